"""Histories: read, fetched or synthetic, filtered and divided."""

from .histories import Histories
from .ids import DataError, DataWarning
from .readers import read
from .splits import Split, split, time_folds

__all__ = ["DataError", "DataWarning", "Histories", "Split", "read", "split", "time_folds"]
