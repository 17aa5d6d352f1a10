"""Two processes never mix their results in one folder: the second one is told who writes there, and leaves everything alone."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from awrsr import AWRSR
from awrsr.cli import main, parser
from awrsr.cli.shared import options_of
from awrsr.cli.train import OPTIONS, default_folder
from awrsr.config import AWRSRConfig, TrainingOptions
from awrsr.data.prepare import DEMO, DataOptions
from awrsr.files import host
from awrsr.lock import LOCK, locked

from .runs import QUICK, command, everything, histories, results, timeless, train, write
from .small import make_model

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys
from awrsr.lock import locked

with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Holds the lock of a folder."""
    line = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "held\n"
        yield process
        process.communicate()


def test_what_writes_into_a_run_is_refused_while_another_process_does(
    home: Path, run: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with another_process(run) as process:
        before = everything(run)
        who = f"process {process.pid} on {host()}, since 20"
        error = refused(*command(home / "data.txt", run, epochs=3))
        assert who in error and f"is writing into {run.resolve()}: wait until it ends, or choose another folder" in error
        monkeypatch.setattr("awrsr.lock.time.monotonic", iter([0.0, 11.0]).__next__)
        with pytest.raises(BlockingIOError, match=f"process {process.pid} "):
            make_model().save(run)
        monkeypatch.undo()
        with pytest.raises(BlockingIOError, match=f"process {process.pid} "):
            AWRSR(layers=1).fit(histories(), out=run, epochs=1, **QUICK)
        assert everything(run) == before
        assert main(["evaluate", "--run", str(run)]) == 0  # reads
    assert train(home / "data.txt", run, epochs=3)["epochs"] == 3
    assert not (run / LOCK).exists()


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    with another_process(tmp_path / "run") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "run" / LOCK).exists()
        with locked(tmp_path / "run"):
            pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_save_waits_for_another_one(tmp_path: Path) -> None:
    with another_process(tmp_path) as process:
        later = threading.Timer(0.3, process.communicate)
        later.start()
        make_model().save(tmp_path)
        later.join()


def test_threads_of_a_process_exclude_each_other_and_one_thread_does_not_exclude_itself(tmp_path: Path) -> None:
    said: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path / "a" / "run"):
                said.append("both hold it")
        except BlockingIOError as error:
            said.append(str(error))

    with locked(tmp_path / "a" / "run"), locked(str(tmp_path / "a" / "run")), locked(tmp_path / "a" / "b" / ".." / "run"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert said and said[0].startswith("another thread of this process is writing into")
    assert os.listdir(tmp_path) == []  # folders that nothing was written into


def test_many_processes_hold_a_lock_one_after_the_other(tmp_path: Path) -> None:
    """Also in the moment in which one removes the file that others have opened."""
    count = """
import sys
from pathlib import Path
from awrsr.lock import locked

for _ in range(100):
    with locked(sys.argv[1], patience=60):
        file = Path(sys.argv[1]) / "count"
        file.write_text(str(int(file.read_text()) + 1))
"""
    (tmp_path / "count").write_text("0")
    line = [sys.executable, "-c", count, str(tmp_path)]
    for process in [subprocess.Popen(line, cwd=ROOT) for _ in range(4)]:
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "count").read_text() == "400" and os.listdir(tmp_path) == ["count"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked here .*: make sure that no other process writes into it"):
        with locked(tmp_path):
            pass
    assert os.listdir(tmp_path) == []


def test_a_full_disk_does_not_keep_a_lock_from_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with locked(tmp_path), pytest.raises(BlockingIOError, match="^another process is writing into "), another_user(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


@contextmanager
def another_user(folder: Path) -> Iterator[None]:
    """As if this process did not hold what it holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("awrsr.lock._held", {})
        with locked(folder):
            yield


def test_two_commands_with_one_folder_never_mix(tmp_path: Path) -> None:
    """One of them trains; the other one is refused, or finds a run of other options. The results are those of one alone."""
    data, out = write(tmp_path / "data.txt"), tmp_path / "run"
    options: list[dict[str, Any]] = [{"seed": seed, "epochs": 2} for seed in (1, 2)]
    started = [[sys.executable, "-m", "awrsr", *command(data, out, **each)] for each in options]
    both = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in started]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 1], errors
    error = errors[codes.index(1)]
    assert error.count("\n") == 1 and ("is writing into" in error or "holds another run" in error)
    alone = train(data, tmp_path / "alone", **options[codes.index(0)])
    assert timeless(results(out)) == timeless(alone)


def test_the_default_folder_tells_apart_runs_whose_options_differ() -> None:
    def folder(data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **training: Any) -> str:
        of_data = DataOptions(**({"data": "a/beauty.txt"} | (data or {})))
        usual = {} if of_data.data else DEMO
        of_model, of_training = (
            kind(**({k: v for k, v in usual.items() if k in kind.__dataclass_fields__} | its))
            for kind, its in ((AWRSRConfig, model or {}), (TrainingOptions, training))
        )
        return str(default_folder(of_data, of_model, of_training))

    usual = "runs/beauty-sasrec-additive-sampled_softmax-0"
    same = [{}, {"epochs": 3}, {"patience": 1}, {"model": {"backend": "torch"}}, {"threads": 1}, {"model": {"num_items": 9}}]
    assert {folder(**each) for each in same} == {usual}
    assert folder({"data": ""}) == "runs/synthetic-sasrec-additive-sampled_softmax-0"
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"loss": "bce"},
        {"learning_rate": 0.01},
        {"average": 0.01},
        {"schedule": "cosine"},
        {"schedule": "cosine", "epochs": 9},
        {"model": {"hidden": 32}},
        {"model": {"rank": 8}},
        {"data": {"split": "none"}},
        {"data": {"min_user_events": 2}},
    ]
    names = [folder(**each) for each in [{}, *others]]
    assert len(set(names)) == len(names) and all(name == usual or name.startswith("runs/beauty-sasrec-add") for name in names)


@pytest.mark.parametrize("words, name", [([], "synthetic"), (["--data", "a/beauty.txt"], "beauty")])
def test_a_command_without_options_has_the_plain_default_folder(words: list[str], name: str) -> None:
    options = parser(not words).parse_args(["train", *words, "--epochs", "3", "--backend", "torch"]).train
    chosen = [kind(**options_of(kind, options)) for kind in OPTIONS.values()]
    assert str(default_folder(*chosen)) == f"runs/{name}-sasrec-additive-sampled_softmax-0"
