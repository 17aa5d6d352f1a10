"""What the tuner found: a versioned JSON file per machine, read once, consulted by `launch_config.choose`.

    {"version": 1, "entries": [{"gpu": "NVIDIA H200", "triton": "3.6.0", "key": ["short_fwd", 64, 64, 2],
                                "config": [64, 64, 4, 1, 4], "source": "..."}, ...]}

The file lies at $AWRSR_KERNELS_TUNED, or in the user's cache folder. Without it the table of `launch_config.py` decides alone.
"""

import functools
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .launch_config import TABLE, Config, Key, Tuned

VERSION = 1


def tuned_path() -> Path:
    given = os.environ.get("AWRSR_KERNELS_TUNED")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "awrsr_kernels" / "tuned.json"


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Entries of a file, empty if there is none.

    Raises:
        ValueError: the file is not what the tuner writes; the message names it and what is wrong.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON ({error}); it must be what awrsr_kernels.tune writes: delete it") from None
    if not isinstance(found, dict) or found.get("version") != VERSION or not isinstance(found.get("entries"), list):
        raise ValueError(f"{path} must be an object of version {VERSION} with entries; delete it and tune again")
    for number, entry in enumerate(found["entries"]):
        fine = isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in ("gpu", "triton", "source"))
        fine = fine and isinstance(entry.get("key"), list) and len(entry["key"]) == 4 and Key(*entry["key"]) in TABLE
        config: Any = entry.get("config") if fine else None
        if not (isinstance(config, list) and len(config) == 5 and all(type(x) is int and x >= 0 for x in config)):
            raise ValueError(f"{path}: entry {number} is {str(entry)[:120]}; it must name gpu, triton, key, config and source")
        key, tile = Key(*entry["key"]), Config(*config)
        if min(tile[:4]) < 1 or (key.length and (tile.block_m, tile.block_n) != (key.length,) * 2):
            raise ValueError(f"{path}: entry {number} has a config that {key.kernel} cannot run: {tile}")
    return found["entries"]


def tuned_entries(entries: list[dict[str, Any]], gpu: str, triton: str) -> Tuned:
    """Configurations by key, of one GPU and one Triton."""
    mine = [entry for entry in entries if (entry["gpu"], entry["triton"]) == (gpu, triton)]
    return {Key(*entry["key"]): Config(*entry["config"]) for entry in mine}


@functools.cache
def _read(path: Path, gpu: str, triton: str) -> Tuned:
    return tuned_entries(read_entries(path), gpu, triton)


def tuned_for(device: torch.device) -> Tuned:
    """What was tuned for this GPU and the Triton that is installed; the file is read once per process."""
    if device.type != "cuda":
        return {}
    return _read(tuned_path(), torch.cuda.get_device_name(device), version("triton"))
