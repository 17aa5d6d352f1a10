"""The tuner's results: a versioned JSON file per machine, which is used by `launch_config.choose`.

    {"version": 1, "entries": [{"gpu": "NVIDIA H200", "triton": "3.6.0", "key": ["short_fwd", 64, 64, 2],
                                "config": [64, 64, 4, 1, 4], "source": "..."}, ...]}

The file lies at $AWRSR_KERNELS_TUNED, or in the user's cache folder. Without it the table of `launch_config.py` decides alone.
A file that changes is read again, a second later at most. `python -m awrsr_kernels.tune` writes it; `forced` tries a
configuration without writing anything.
"""

import contextlib
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .launch_config import LENGTHS, RESIDENT_KERNELS, SHORT_KERNELS, TABLE, Config, Key, Tuned

VERSION = 1
Entry = dict[str, Any]


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "awrsr_kernels"


def tuned_path() -> Path:
    return Path(os.environ.get("AWRSR_KERNELS_TUNED") or cache_folder() / "tuned.json")


def machine(device: torch.device) -> tuple[str, str]:
    """What an entry is valid for: the name of a GPU, and the installed version of Triton, under any package name."""
    import triton

    return torch.cuda.get_device_name(device), triton.__version__


def misfit(key: Key, config: Config) -> str | None:
    """Why a kernel cannot be launched with a configuration on any GPU; None if it can."""
    block_m, block_n, warps, stages, programs = config
    if any(size < 16 or size & (size - 1) for size in (block_m, block_n)):
        return "block_m and block_n must be powers of two and at least 16"
    if warps < 1 or warps & (warps - 1) or stages < 1:
        return "num_warps must be a power of two, and num_stages at least 1"
    resident = key.kernel in RESIDENT_KERNELS
    least = key.length if key.kernel in SHORT_KERNELS else 16  # a tile of the short regime holds whole sequences
    if key.length and not (least <= block_m <= LENGTHS[-1] and block_n in ((16, block_m) if resident else (block_m,))):
        return f"block_m must be from {least} to {LENGTHS[-1]} for this length class, and block_n {'16 or ' * resident}as large"
    if key.length and key.kernel != "resident_fwd" and programs < 1:
        return "programs must be at least 1"
    return None


def read_entries(path: Path) -> list[Entry]:
    """The entries of a file, or an empty list if there is no file.

    Raises:
        ValueError: the file is not what the tuner writes; the message names it and what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); it must be a file that awrsr_kernels.tune writes") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); it must be what awrsr_kernels.tune writes: delete it") from None
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("entries"), list):
        raise ValueError(f"{path} must be an object of version {VERSION} with entries; delete it and tune again")
    for number, entry in enumerate(content["entries"]):
        parts = entry if isinstance(entry, dict) else {}
        key, config = _numbers(parts.get("key"), 1, 3), _numbers(parts.get("config"), 0, 5)
        named = all(isinstance(parts.get(name), str) for name in ("gpu", "triton", "source"))
        if not named or key is None or config is None or Key(*key) not in TABLE:
            raise ValueError(f"{path}: entry {number} is {str(entry)[:120]}; it must name gpu, triton, key, config and source")
        reason = misfit(Key(*key), Config(*config))
        if reason:
            raise ValueError(f"{path}: entry {number} has a config that {key[0]} cannot run: {Config(*config)}; {reason}")
    return content["entries"]


def _numbers(value: Any, names: int, numbers: int) -> list[Any] | None:
    """A list of so many strings and then so many whole numbers, None if it is anything else."""
    if not isinstance(value, list) or [type(x) for x in value] != [str] * names + [int] * numbers:
        return None
    return value if all(x >= 0 for x in value[names:]) else None


def write_entries(path: Path, entries: list[Entry]) -> None:
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    replace_file(path, f'{{"version": {VERSION}, "entries": [\n  {lines}\n]}}\n')
    _renew()


def replace_file(path: Path, text: str) -> None:
    """Replace a file in one step: readers, and a crash, see either the old file or the new one, complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's own mode shuts other users out
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def merged(old: list[Entry], new: list[Entry], gpu: str, triton: str, keys: Collection[Key]) -> list[Entry]:
    """`new` after what `old` has for other GPUs, other versions of Triton and other keys.

    keys: what was measured. A key without a new entry loses its old one: the table's row held its own.
    """
    replaced = [[gpu, triton, *key] for key in keys]
    return [entry for entry in old if [entry["gpu"], entry["triton"], *entry["key"]] not in replaced] + new


def tuned_entries(entries: list[Entry], gpu: str, triton: str) -> Tuned:
    """Configurations by key, of one GPU and one Triton."""
    mine = [entry for entry in entries if (entry["gpu"], entry["triton"]) == (gpu, triton)]
    return {Key(*entry["key"]): Config(*entry["config"]) for entry in mine}


_forced: dict[Key, Config] = {}  # of the process, not of a thread: autograd runs a backward in threads of its own


@contextlib.contextmanager
def forced(configs: Mapping[Key, Config]) -> Iterator[None]:
    """Launch with these configurations, instead of those of file and table, on any device and in every thread.

    For measuring and testing, such as `with forced({key: config}): out = refined_attention(...)`. The backward is launched where
    it is called: keep it inside, too. Contexts nest, the innermost decides.

    Raises:
        ValueError: a kernel cannot be launched with its configuration.
    """
    for key, config in configs.items():
        reason = misfit(key, config) if key in TABLE else "the table has no such key"
        if reason:
            raise ValueError(f"configs is {config} for {key}, which cannot run: {reason}")
    before = dict(_forced)
    _forced.update(configs)
    _renew()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _renew()


@functools.cache
def _of(device: torch.device) -> Tuned:
    return tuned_entries(read_entries(tuned_path()), *machine(device)) if device.type == "cuda" else {}


_generation = 0  # of the results: another one when they may have changed
_looked = -math.inf  # when the file was last looked at
_state: tuple[Any, ...] = ()


def generation() -> int:
    """A number that changes with the results; the file is looked at once a second."""
    global _looked, _state
    now = time.monotonic()
    if now - _looked > 1:
        path = tuned_path()
        try:
            found = os.stat(path)
            state: tuple[Any, ...] = (str(path), found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            state = (str(path),)
        _looked, before, _state = now, _state, state
        if before and state != before:
            _renew()
    return _generation


def _renew() -> None:
    global _generation
    _generation += 1
    _of.cache_clear()


def tuned_for(device: torch.device) -> Tuned:
    """Forced configurations, then those tuned for this GPU and the installed Triton."""
    generation()
    tuned = _of(device)
    return {**tuned, **_forced} if _forced else tuned
