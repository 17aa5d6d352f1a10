"""Writes files completely or not at all, seals them with checksums, and marks what became stale.

A file is written under a temporary name in its folder, flushed to the disk and then renamed. The temporary name tells which process
on which host writes it, so that what a killed process left can be removed, and what a living one writes stays.
"""

import errno
import glob
import io
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .processes import unforked

if TYPE_CHECKING:
    import numpy as np

UNSEALED = "sha256:" + "0" * 64  # where the checksum of a file will stand in it
SEAL = re.compile(rb"sha256:[0-9a-f]{64}")
TEMPORARY = re.compile(r"\.awrsr-(\d+)@(.+)-[0-9a-f]{8}(\.[^.]*)?$")  # the end of a temporary name: process, host
OLDER_TEMPORARY = re.compile(r"\.[0-9a-f]{8}(\.[^.]*)?$")  # of older versions
CANNOT_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # what file systems without it answer
A_DAY = 86_400.0  # seconds after which a temporary file counts as abandoned if its process cannot be asked for
STALE = "stale.txt"
STALE_NOTE = "# These files are of an earlier model than this folder's. Rerun the command that wrote them, or remove them."

_writing: set[str] = set()  # temporary names of this process


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder and with the same suffix. At the end of the block the file is flushed to the disk and
    renamed to `path`, or removed after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, [glob.escape(path.name[:40])])
    temporary = path.with_name(f".{path.name[:40]}.awrsr-{os.getpid()}@{host()}-{secrets.token_hex(4)}{path.suffix}")
    _writing.add(temporary.name)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
        no_longer_stale(path.parent, [path.name])
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk, which does not say where
            error.filename = str(path)
        raise
    finally:
        _writing.discard(temporary.name)


def flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk, if the file system can."""
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folders
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH | ({errno.EACCES, errno.EPERM} if folder else set()):  # a folder that may not be read
            raise


def host() -> str:
    """The name of this machine, as it may stand in a file's name."""
    return re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname())[:64]


def sweep(folder: Path, names: Iterable[str]) -> None:
    """Remove temporary files of files with these names (patterns) if the process that wrote them is dead."""
    patterns, entries = [f"{name}*" for name in names], []
    with suppress(OSError):  # not there, or not to be listed
        entries = list(folder.iterdir())
    for temporary in entries:
        plain = temporary.name.lstrip(".")  # older versions nested temporary names
        if plain != temporary.name and any(fnmatchcase(plain, pattern) for pattern in patterns) and abandoned(temporary):
            temporary.unlink(missing_ok=True)


def abandoned(temporary: Path) -> bool:
    """Whether this is a temporary file whose process is dead. If it cannot be asked for, it counts as dead after a day."""
    owner = TEMPORARY.search(temporary.name)
    if owner and owner[2] == host() and os.name != "nt":
        pid = int(owner[1])
        return temporary.name not in _writing if pid == os.getpid() else not lives(pid)
    if not owner and not OLDER_TEMPORARY.search(temporary.name):
        return False
    with suppress(FileNotFoundError):
        return time.time() - temporary.stat().st_mtime > A_DAY
    return False


def lives(pid: int) -> bool:
    """Whether a process of this machine lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:  # no process has such a number
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def sealed(data: bytes) -> bytes:
    """The content of a file with the checksum of all the rest where `UNSEALED` stands first."""
    blank = UNSEALED.encode()
    place = data.index(blank)
    return b"".join((data[:place], b"sha256:", sha256(data).hexdigest().encode(), data[place + len(blank) :]))


def is_whole(data: bytes, end: int | None = None) -> bool | None:
    """Whether the checksum in a file's content is that of all the rest. None if there is none.

    end: the checksum stands before this byte.
    """
    view, whole = memoryview(data), None
    for seal in SEAL.finditer(view[:end]):  # one, unless a text happens to look like another
        rest = sha256(view[: seal.start()])
        rest.update(UNSEALED.encode())
        rest.update(view[seal.end() :])
        whole = bool(whole) or b"sha256:" + rest.hexdigest().encode() == seal[0]
    return whole


def checksum(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def first_process() -> bool:
    """Whether this is the first of several processes, or the only one, according to the variables that launchers set."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def write_json(path: str | Path, value: Any, seal: bool = False) -> None:
    """seal: add a checksum, as an entry of the object."""
    value = {"checksum": UNSEALED} | value if seal else value
    data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    with atomic(path) as temporary:
        temporary.write_bytes(sealed(data) if seal else data)


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises FileNotFoundError, or ValueError naming the file if it is not JSON or was damaged after it
    was sealed."""
    data = Path(path).read_bytes()
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(value, dict) and ("checksum" in value or is_whole(data) is False) and not is_whole(data):
        raise ValueError(f"{path} is damaged, its checksum does not fit: restore it from a backup, or write it anew")
    return value


def mark_stale(folder: Path, patterns: Iterable[str]) -> set[str]:
    """Note in stale.txt that files with these names (patterns) are of an earlier model, and return the names that were not there
    yet. Writing a file anew removes its note."""
    before = set(stale(folder))
    new = {path.name for pattern in patterns for path in folder.glob(pattern)} - before
    if new:
        _write_stale(folder, before | new)
    return new


def stale(folder: Path) -> list[str]:
    """Names of files in a folder that are of an earlier model."""
    try:
        note, *names = (folder / STALE).read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    except OSError:
        return []
    return names if note == STALE_NOTE else []  # another file of that name


def no_longer_stale(folder: Path, names: Iterable[str]) -> None:
    before, gone = set(stale(folder)), set(names)
    if before & gone:
        _write_stale(folder, before - gone)


def _write_stale(folder: Path, names: set[str]) -> None:
    if not names:
        (folder / STALE).unlink(missing_ok=True)
        return
    with atomic(folder / STALE) as temporary:
        temporary.write_text("\n".join([STALE_NOTE, *sorted(names)]) + "\n", encoding="utf-8")


@unforked
def write_columns(path: Path, columns: dict[str, Any]) -> None:
    """Write a Parquet file at this very path. Raises OSError, not polars' errors, if the disk is full."""
    import polars as pl

    content = io.BytesIO()
    pl.DataFrame(columns).write_parquet(content)
    path.write_bytes(content.getbuffer())


@unforked
def read_ids(path: str | Path) -> "np.ndarray":
    """The column "item" of a Parquet file: numbers, or strings as objects. Raises polars' errors."""
    import polars as pl

    return pl.read_parquet(path)["item"].to_numpy()
