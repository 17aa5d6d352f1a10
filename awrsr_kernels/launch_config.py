"""Which kernels and which tiles for which call, as data; and why a call cannot run on the kernels. Imports no Triton."""

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch

MAX_SHORT = 64  # rows of the largest short tile


class Config(NamedTuple):
    """How a kernel is launched: rows and columns of a tile (equal in the short regime), warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 4


def unsupported_reason(device: torch.device, dtype: torch.dtype, features: tuple[int, int, int]) -> str | None:
    """Why the Triton kernels cannot run, and what to do about it; None where they can. features: D, D_v and R."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton, Linux only)"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "the tensors are on the CPU (move them to a GPU, or set TRITON_INTERPRET=1 before Triton is imported)"
        return "Triton's interpreter gets bfloat16 products wrong (use float32)" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"the tensors are on {device.type} (move them to an NVIDIA or AMD GPU)"
    if dtype == torch.float64:
        return "the kernels have no float64 on a GPU (use float32, or backend='torch')"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0 (use backend='torch')"
    needed, present = _tiled_rows(features, dtype.itemsize)[-1][0], shared_memory(device)
    if torch.version.cuda and needed > present:
        return f"{features} features in {dtype} take {needed} bytes of shared memory, the GPU has {present} (use backend='torch')"
    return None


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; for the interpreter, those of an H100."""
    if device.type != "cuda":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


# Shared memory of the short backward, by (rows of the tile, widest feature, bytes per element), as compiled for sm_90 by Triton
# 3.6 and 3.9 (`benchmarks/compile_report.py --refinement value --dim 64 128 --group 2`: "value" under grouped-query attention, with
# dropout and shifted tables, the greediest). Tiles of 128 rows are left out: they take 262,144 there, more than sm_90 grants.
_SHORT_BWD_SHARED = {(64, 64, 2): 98304, (64, 64, 4): 163840, (64, 128, 2): 163840}


def is_short(max_len: int, features: tuple[int, int, int], itemsize: int, shared: int) -> bool:
    """Whether a call runs in the short regime, which holds every matrix of a head on chip; the tiled regime takes all others.

    features: D, D_v and R. shared: bytes a program may have.
    """
    if max_len > MAX_SHORT or max(features) > MAX_SHORT:
        return False
    key = (64 if max_len <= 64 else 128, 64 if max(features) <= 64 else 128, min(itemsize, 4))
    return _SHORT_BWD_SHARED.get(key, shared + 1) <= shared


def short_config(kernel, max_len: int, features, itemsize, shared) -> Config:
    """Tile of the short kernels: the length class of the window."""
    block = next(size for size in (16, 32, 64, 128) if max_len <= size)
    return Config(block, block, 4 if block <= 64 else 8, 1, 2)


# Tiles of the tiled kernels by (widest feature, bytes per element): what a program takes of an NVIDIA GPU's shared memory, as
# compiled for sm_90 by Triton 3.6 and 3.9 (`benchmarks/compile_report.py --length 512 --dim 64 128 256`: the greediest kernel of
# "additive" with dropout), and the tile; larger ones first.
_TILED = {
    (64, 2): [(115200, Config(64, 64, 4, 2)), (65536, Config(64, 64, 4, 1))],
    (128, 2): [(213504, Config(64, 64, 8, 2)), (114688, Config(64, 64, 8, 1)), (51200, Config(32, 32, 4, 1))],
    (256, 2): [(133376, Config(32, 32, 8, 2)), (100352, Config(32, 32, 8, 1))],
    (64, 4): [(81920, Config(32, 32, 4, 1))],
    (128, 4): [(163840, Config(32, 32, 8, 1)), (81920, Config(16, 16, 4, 1))],
    (256, 4): [(163840, Config(16, 16, 4, 1))],
}


def tiled_config(kernel: str, features: tuple[int, int, int], itemsize: int, shared: int) -> Config:
    """Tile of the tiled kernels: the largest that fits, otherwise the smallest (AMD GPUs keep operands in registers)."""
    rows = _tiled_rows(features, itemsize)
    return next((tile for needed, tile in rows if needed <= shared), rows[-1][1])


def _tiled_rows(features: tuple[int, int, int], itemsize: int) -> list[tuple[int, Config]]:
    return _TILED[next(width for width in (64, 128, 256) if max(features) <= width), 2 if itemsize == 2 else 4]
