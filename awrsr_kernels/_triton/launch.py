"""Launching a kernel, the views of tensors that kernels take, and memory for results."""

import contextlib
import threading
from typing import Any

import torch
from torch import Tensor

from ..launch_config import Config
from ..torch_state import materialised
from .ptxas import sound_ptxas

View = tuple[Tensor | None, int | None, int | None, int | None]  # tensor, strides of entries, heads and rows

PARTS = ("ptr", "entry", "head", "row")
recording = threading.local()  # .recorder: the `Recorder` of this thread, if it has one
NO_VIEW: View = (None, None, None, None)  # of a tensor that a call does not have

# Triton must not specialise kernels for these numbers: other lengths or batch sizes would compile again.
RUNTIME = ["gate_stride", "rows_total", "max_len", "least", "reach", "table_rows", "batch", "heads", "run", "splits"]
RUNTIME += ["drop_threshold", "capacity", "own_entry", "own_head", "own_row", "plain_heads", "lags_head"]


def view_of(x: Tensor, packed: bool = False) -> View:
    """A tensor as kernels take it. Entries or heads of size 1 get stride 0: every entry or head reads the same one."""
    entries, heads, *_ = x.shape
    entry, head, row, _ = x.stride()
    return x, 0 if packed or entries == 1 else entry, 0 if heads == 1 else head, row


def flat(**arguments: Any) -> dict[str, Any]:
    """Arguments as kernels take them: a view NAME as NAME_ptr and the strides NAME_entry, NAME_head and NAME_row."""
    flattened: dict[str, Any] = {}
    for name, x in arguments.items():
        flattened |= {f"{name}_{part}": y for part, y in zip(PARTS, x, strict=True)} if isinstance(x, tuple) else {name: x}
    return flattened


def with_rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension and its values in memory; a copy only if needed."""
    x = materialised(x)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def allocate(like: Tensor, heads: int, features: int, varlen: bool, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised (entries, heads, rows, features) in the memory order of `like`: (heads, rows) or (rows, heads)."""
    entries, rows = like.shape[0], like.shape[2]
    if heads_inside(like, varlen):
        return like.new_empty(entries, rows, heads, features, dtype=dtype).transpose(1, 2)
    return like.new_empty(entries, heads, rows, features, dtype=dtype)


def gradient_of(x: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of a tensor with a contiguous last dimension, which is contiguous there, too: of rows
    that overlap, as of sliding windows, `empty_like` orders the dimensions otherwise."""
    like = torch.empty_like(x)
    return like if like.stride(-1) == 1 or x.shape[-1] == 1 else x.new_empty(x.shape)


def heads_inside(like: Tensor, varlen: bool) -> bool:
    """Whether memory order is (rows, heads) rather than (heads, rows)."""
    return varlen or like.stride(1) < like.stride(2)


def launch(kernel: Any, grid: tuple[int, ...], config: Config, device: torch.device, **arguments: Any) -> None:
    """Run a kernel on `device` under a configuration's warps and stages. Fused multiply-add is pinned, as results depend on it."""
    recorder = getattr(recording, "recorder", None)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
        if recorder is not None:
            recorder.launch(kernel, grid, arguments, options)
        elif 0 not in grid:
            start(kernel, grid, **arguments, **options)


def start(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> Any:
    """`kernel[grid]`, which compiles it where that is new, with the assembler that is right for our kernels."""
    with sound_ptxas():
        return kernel[grid](**arguments)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
