"""One process at a time writes into a run folder. The lock is the system's: it is gone when its process ends, however it ends."""

import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from .files import first_process, host

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # there while a process writes; it holds who
_held: dict[tuple[int, Path], int] = {}  # process (a fork holds nothing), folder -> thread


@contextmanager
def locked(folder: str | Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it does not exist. A thread that holds it already may do so again. Of several
    processes that train together, the first one holds it.

    patience: seconds to wait for another process.

    Raises:
        BlockingIOError: another process or thread writes there; the message says which one.
    """
    folder = Path(folder).resolve()
    key = os.getpid(), folder
    if _held.get(key) == threading.get_ident() or not first_process():
        yield
        return
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(folder, time.monotonic() + patience)
    _held[key] = threading.get_ident()
    try:
        yield
    finally:
        del _held[key]
        if descriptor is not None:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: nobody else's is removed
            os.close(descriptor)
        with suppress(OSError):  # something is in it
            for each in new:
                each.rmdir()


def _acquire(folder: Path, until: float) -> int | None:
    """The open lock file; None, after a warning, where the system or the file system has no locks."""
    cannot = f"{folder} cannot be locked here ({{}}): make sure that no other process writes into it"
    if fcntl is None:
        warnings.warn(cannot.format("the system has no flock"), stacklevel=4)
        return None
    while True:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= until:
                holder = _holder(folder)
                raise BlockingIOError(f"{holder} is writing into {folder}: wait until it ends, or choose another folder") from None
            time.sleep(0.02)
            continue
        except OSError as error:
            os.close(descriptor)
            (folder / LOCK).unlink(missing_ok=True)
            warnings.warn(cannot.format(error.strerror), stacklevel=4)
            return None
        if _is_still_there(folder / LOCK, descriptor):  # not removed by a holder who has just finished
            with suppress(OSError):  # a full disk: the lock is held all the same
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n{host()}\n{datetime.now().astimezone().isoformat(' ', 'seconds')}\n".encode())
            return descriptor
        os.close(descriptor)


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(folder: Path) -> str:
    """Who holds the lock of a folder, as it is noted there."""
    if (os.getpid(), folder) in _held:
        return "another thread of this process"
    try:
        pid, name, since = (folder / LOCK).read_text().splitlines()
        return f"process {pid} on {name}, since {since},"
    except (OSError, ValueError):  # it has not noted it yet
        return "another process"
