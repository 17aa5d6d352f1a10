"""Small trained runs that tests of the command line share."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from .runs import train, write


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.txt and two runs on it, run/ (additive) and plain/ (no refinement); tests only read it."""
    folder = tmp_path_factory.mktemp("home")
    data = write(folder / "data.txt")
    train(data, folder / "run", epochs=2)
    train(data, folder / "plain", epochs=2, refinement="none")
    return folder


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """A copy of run/ that a test may change."""
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


@pytest.fixture
def listening() -> Iterator[None]:
    """Ctrl-C is heard, though whatever started the tests may have it ignored, as shells do in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
