"""Refined attention inside other libraries: a module each, imported by its name alone, for it needs that library (an extra)."""
