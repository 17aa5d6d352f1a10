"""AWRSR: sequential recommendation with refined attention (Liu, Liu and Liu, RecSys 2024)."""

from .histories import Histories, Split, split
from .model import AWRSR, AWRSRConfig

__all__ = ["AWRSR", "AWRSRConfig", "Histories", "Split", "TrainingOptions", "read", "split"]


def __getattr__(name: str) -> object:
    """Training and reading load libraries that using a model does without."""
    if name == "TrainingOptions":
        from .train import TrainingOptions

        return TrainingOptions
    if name == "read":
        from .readers import read

        return read
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
