"""Which kernel and which tile for which call, as data; and why a call cannot run on the kernels. Imports no Triton."""

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch

MAX_SHORT = 128  # the longest window and the widest features of the short kernels


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, features: tuple[int, int, int], max_len: int, grouped_tables: bool
) -> str | None:
    """Why the Triton kernels cannot run, and what to do about it; None where they can.

    features: D, D_v and R. max_len: the longest window. grouped_tables: a table per query head under grouped-query attention.
    """
    if max_len > MAX_SHORT or max(features) > MAX_SHORT:
        size = f"L = {max_len}, D, D_v, R = {features}"
        return f"the kernels hold L, D, D_v and R up to {MAX_SHORT}, this call has {size} (use backend='torch')"
    if grouped_tables:
        return "the kernels have no per-head tables under grouped-query attention (use backend='torch')"
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
    needed = shared_memory(max_len, max(features), dtype)
    properties = torch.cuda.get_device_properties(device)
    present = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    if needed is None or needed > present:
        size = f"L = {max_len}, D, D_v, R = {features}, {dtype}"
        return f"the backward of this call ({size}) does not fit the GPU's shared memory (use backend='torch')"
    return None


# Shared memory of the short backward, by (rows of the tile, widest feature, bytes per element), as compiled for sm_90 by Triton
# 3.9 for "value" with dropout and shifted tables, the largest of those tried. Tiles of 128 rows are left out: under grouped-query
# attention they take 262,144, more than sm_90 grants.
_SHORT_BWD_SHARED = {(64, 64, 2): 90112, (64, 64, 4): 163840, (64, 128, 2): 155648}


def shared_memory(max_len: int, width: int, dtype: torch.dtype) -> int | None:
    """Bytes of shared memory that a call needs, None where no GPU has as many."""
    return _SHORT_BWD_SHARED.get((64 if max_len <= 64 else 128, 64 if width <= 64 else 128, dtype.itemsize))


class Tile(NamedTuple):
    """How a kernel is launched: rows and columns of a tile (equal in the short regime), warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def short_tile(direction: str, max_len: int, features: tuple[int, int, int], dtype: torch.dtype) -> Tile:
    """Tile of a short kernel, direction "fwd" or "bwd"."""
    block = next(size for size in (16, 32, 64, 128) if max_len <= size)
    return Tile(block, block, 4 if block <= 64 else 8, 1)
