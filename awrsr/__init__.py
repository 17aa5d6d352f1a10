"""AWRSR: sequential recommendation with refined attention (Liu, Liu and Liu, RecSys 2024)."""

from typing import TYPE_CHECKING

from .config import AWRSRConfig, TrainingOptions
from .data import DataError, Histories, Split, read, split

if TYPE_CHECKING:
    from .recommender import AWRSR

__all__ = ["AWRSR", "AWRSRConfig", "DataError", "Histories", "Split", "TrainingOptions", "read", "split"]


def __getattr__(name: str) -> object:
    """Import the model only when it is used: it imports torch, which reading data does not need."""
    if name == "AWRSR":
        from .recommender import AWRSR

        return AWRSR
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
