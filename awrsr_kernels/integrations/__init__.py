"""Refined attention inside other libraries: one module per library. Import it by its name; it needs that library (an extra)."""
