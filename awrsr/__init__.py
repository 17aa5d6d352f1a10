"""AWRSR: sequential recommendation with refined attention (Liu, Liu and Liu, RecSys 2024)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import AWRSRConfig, TrainingOptions
    from .data import DataError, DataWarning, Histories, Split, read, split, time_folds
    from .recommender import AWRSR

__all__ = [
    "AWRSR",
    "AWRSRConfig",
    "DataError",
    "DataWarning",
    "Histories",
    "Split",
    "TrainingOptions",
    "read",
    "split",
    "time_folds",
]

HOMES = {"AWRSR": "recommender", "AWRSRConfig": "config", "TrainingOptions": "config"}  # of names; the others are in data


def __getattr__(name: str) -> object:
    """Import what is used when it is used. The model imports torch, which reading data does not need; and a command line that is
    interrupted must have got beyond this file to say so."""
    if name in __all__:
        return getattr(import_module(f".{HOMES.get(name, 'data')}", __name__), name)
    if name in ("config", "data"):
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
