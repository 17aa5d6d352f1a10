"""Histories: read, fetched or synthetic, filtered and divided."""

from .histories import Histories, Split, split
from .ids import DataError, DataWarning
from .readers import read

__all__ = ["DataError", "DataWarning", "Histories", "Split", "read", "split"]
