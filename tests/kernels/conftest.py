"""Fixtures of the kernels' tests: compiled graphs forgotten, a tuner's file of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from awrsr_kernels import tuned


@pytest.fixture
def forget() -> None:
    """Graphs of other tests are not found again."""
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("AWRSR_KERNELS_TUNED", str(tmp_path / "cache" / "tuned.json"))
    tuned._of.cache_clear()
    yield tuned.tuned_path()
    tuned._of.cache_clear()
