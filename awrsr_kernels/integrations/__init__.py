"""Adapters for other libraries, each imported by name: none is needed by, or imported with, the package itself."""
