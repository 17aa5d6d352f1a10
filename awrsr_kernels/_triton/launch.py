"""The launch of a kernel, and what it takes: tensors as views, memory for results."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..launch_config import Config

View = tuple[Tensor, int, int, int]  # and strides of entries, heads and rows

PARTS = ("ptr", "entry", "head", "row")

# Numbers that kernels are not specialised for: a launch with other lengths or another batch compiles nothing anew.
RUNTIME = ["gate_stride", "rows_total", "max_len", "least", "reach", "table_rows", "batch", "heads", "run", "splits"]
RUNTIME += ["drop_threshold", "capacity"]


def view_of(x: Tensor, packed: bool = False) -> View:
    """A tensor as kernels take it; a dimension of size one has stride 0, so that it stands for any entry or head."""
    entries, heads, *_ = x.shape
    entry, head, row, _ = x.stride()
    return x, 0 if packed or entries == 1 else entry, 0 if heads == 1 else head, row


def flat(**views: View) -> dict[str, Any]:
    """Views as kernels take them: NAME_ptr, and the strides NAME_entry, NAME_head and NAME_row."""
    return {f"{name}_{part}": x for name, view in views.items() for part, x in zip(PARTS, view, strict=True)}


def with_rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension; copied only if it has none."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def allocate(like: Tensor, heads: int, features: int, varlen: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (entries, heads, rows, features) in the memory order of `like`: heads outside rows, or rows outside."""
    entries, rows = like.shape[0], like.shape[2]
    if varlen or like.stride(1) < like.stride(2):
        return like.new_empty(entries, rows, heads, features, dtype=dtype).transpose(1, 2)
    return like.new_empty(entries, heads, rows, features, dtype=dtype)


def launch(kernel: Any, grid: tuple[int, ...], config: Config, device: torch.device, **arguments: Any) -> None:
    """Run a kernel on `device` under a configuration's warps and stages. Fused multiply-add is pinned: numerics depend on it."""
    if 0 in grid:
        return
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
