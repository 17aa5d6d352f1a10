"""AWRSR: sequential recommendation with refined attention (Liu, Liu and Liu, RecSys 2024)."""

from .data import DataError, Histories, Split, read, split
from .model import AWRSR, AWRSRConfig

__all__ = ["AWRSR", "AWRSRConfig", "DataError", "Histories", "Split", "TrainingOptions", "read", "split"]


def __getattr__(name: str) -> object:
    """Training loads Lightning, which using a model does without."""
    if name == "TrainingOptions":
        from .train import TrainingOptions

        return TrainingOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
