"""Runs commands in forked processes that have imported what is slow to import, and kills them at a chosen operation on files."""

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

TRAINING = {"hidden": 8, "layers": 1, "rank": 4, "max_len": 6, "batch_size": 8, "threads": 1, "accelerator": "cpu"}
OF_TIME = {"train_seconds", "train_cpu_seconds", "train_sequences_per_cpu_second", "eval_users_per_cpu_second", "peak_mib"}
ON_FILES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}  # audit events
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Outcome(NamedTuple):
    """What a forked process left. status: its exit status, or the negative number of the signal that ended it."""

    status: int
    out: str
    error: str
    value: Any

    def __str__(self) -> str:
        return f"status {self.status}, {' | '.join(self.error.splitlines()[-2:])[:600]}"


def preload() -> None:
    """Import what takes seconds. This process must not use it: a fork lacks the threads of what was used."""
    import scipy.stats  # noqa: F401

    import awrsr.cli  # noqa: F401
    import awrsr.evaluation.compare  # noqa: F401
    import awrsr.training.run  # noqa: F401


def start(function: Callable[..., Any], *arguments: Any, seconds: int = 60) -> Callable[[], Outcome]:
    """Begin a function in a forked process, which the system ends after so many seconds. Returns what waits for its outcome."""
    files = [tempfile.TemporaryFile("w+b") for _ in range(3)]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _in_the_fork(files, function, arguments, seconds)
    return lambda: _outcome(pid, files)


def run(function: Callable[..., Any], *arguments: Any, seconds: int = 60) -> Outcome:
    return start(function, *arguments, seconds=seconds)()


def _in_the_fork(files: list[Any], function: Callable[..., Any], arguments: tuple[Any, ...], seconds: int) -> None:
    status = 70
    try:
        out, error, value = files
        if "awrsr.processes" in sys.modules:
            sys.modules["awrsr.processes"]._forked = False  # type: ignore[attr-defined]  # nothing has used a thread before
        os.dup2(out.fileno(), 1)
        os.dup2(error.fileno(), 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        returned = function(*arguments)
        pickle.dump(returned, value)
        value.flush()
        status = returned if isinstance(returned, int) and not isinstance(returned, bool) else 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _outcome(pid: int, files: list[Any]) -> Outcome:
    _, status = os.waitpid(pid, 0)
    for file in files:
        file.seek(0)
    out, error, value = (file.read() for file in files)
    for file in files:
        file.close()
    code = os.waitstatus_to_exitcode(status)
    return Outcome(code, out.decode(errors="replace"), error.decode(errors="replace"), pickle.loads(value) if value else None)


def awrsr(*arguments: Any) -> int:
    """The command line."""
    from awrsr.cli import main

    return main([str(each) for each in arguments])


def training(data: Path, out: Path, **options: Any) -> list[str]:
    flags = TRAINING | {"data": data, "out": out} | options
    pairs = [("--" + name.replace("_", "-"), str(value)) for name, value in flags.items()]
    return ["train", "--no-progress", *(word for pair in pairs for word in pair)]


def write_histories(path: Path, seed: int = 0) -> Path:
    """24 users and 12 items."""
    state, lines = seed * 7 + 3, []
    for user in range(24):
        items = []
        for _ in range(6 + user % 4):
            state = (state * 1_103_515_245 + 12_345) % (1 << 31)
            items.append(f"i{(state >> 16) % 12}")
        lines.append(" ".join([f"u{user}", *items]))
    path.write_text("\n".join(lines) + "\n")
    return path


def loaded(folder: Path) -> str | None:
    """What a saved model is, as one text; None if there is none."""
    from hashlib import sha256

    from awrsr import AWRSR

    try:
        model = AWRSR.load(folder)
    except FileNotFoundError:
        return None
    found = sha256(repr(model.ids().tolist()).encode())
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode() + weight.detach().numpy().tobytes())
    return found.hexdigest()


def results(out: Path) -> dict[str, Any] | None:
    """metrics.json without times; None if it is not there."""
    import json

    try:
        found = json.loads((out / "metrics.json").read_text())
    except FileNotFoundError:
        return None
    kept = {name: value for name, value in found.items() if name not in OF_TIME | {"checksum"}}
    return kept | {"config": {name: value for name, value in found["config"].items() if name != "out"}}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


class Killer:
    """Ends this process right before its nth operation on files below a folder. After a power cut, of what was not flushed to the
    disk only half is there."""

    def __init__(self, folder: Path, nth: int, power: bool = False) -> None:
        self.folder, self.nth, self.power = str(folder.resolve()), nth, power
        self.count, self.log = 0, []  # type: ignore[var-annotated]
        self.unflushed: set[str] = set()
        self.real_fsync = os.fsync
        os.fsync = self.fsync
        sys.addaudithook(self.heard)

    def below(self, path: Any) -> str:
        """The absolute path, or nothing if it is elsewhere."""
        if isinstance(path, bytes | str | os.PathLike):
            text = os.path.abspath(os.fsdecode(path))
            return text if text.startswith(self.folder) else ""
        return ""

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or isinstance(flags, int) and flags & TO_WRITE
            if writes and (name := self.below(path)):
                self.step(f"open {os.path.basename(name)}")
                self.unflushed.add(name)
        elif event in ON_FILES and (name := self.below(arguments[0])):
            self.step(f"{event} {os.path.basename(name)}")
            if event == "os.rename" and name in self.unflushed:
                self.unflushed.discard(name)
                self.unflushed.add(self.below(arguments[1]))

    def fsync(self, descriptor: int) -> None:
        name = self.below(f"/proc/self/fd/{descriptor}") or os.path.realpath(f"/proc/self/fd/{descriptor}")
        self.step(f"fsync {os.path.basename(name)}")
        self.real_fsync(descriptor)
        self.unflushed.discard(name)

    def step(self, what: str) -> None:
        self.count += 1
        self.log.append(what)
        if self.count != self.nth:
            return
        for name in self.unflushed if self.power else ():
            with suppress(OSError):
                size = os.stat(name).st_size
                descriptor = os.open(name, os.O_WRONLY)
                os.ftruncate(descriptor, size // 2)
                os.close(descriptor)
        os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path, nth: int, power: bool, function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Call a function under a `Killer`; the operations, if it comes to its end."""
    killer = Killer(folder, nth, power)
    status = function(*arguments)
    assert status in (None, 0), status
    return killer.log


def until(seconds: float) -> Callable[[], bool]:
    """Whether time is left."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() < end
