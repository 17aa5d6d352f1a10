"""Histories: read, fetched or synthetic, filtered and divided."""

from .histories import Histories, Split, split
from .readers import DataError, read

__all__ = ["DataError", "Histories", "Split", "read", "split"]
