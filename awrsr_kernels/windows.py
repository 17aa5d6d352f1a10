"""Positions of sequences: windows of rows, gathered from packed batches and written back.

B sequences, H query heads, L window length, N table rows, T packed rows, F features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call


class Windows(NamedTuple):
    """A window of L = `call.max_len` positions for each sequence, all aligned the same way."""

    first: Tensor  # (B,) int64, position of the first real item in its window
    valid: Tensor  # (B, L) bool, whether a position holds a real item
    rows: Tensor  # (B, L) int64, row of each position; positions without an item point into the batch's rows, too


def sequence_lengths(call: Call, bounds: Tensor) -> Tensor:
    """(B,) int64: number of real items per sequence, clamped to what the call allows."""
    bounds = bounds.long()
    return (bounds.diff() if call.varlen else bounds).clamp(0, call.max_len)


def make_windows(call: Call, bounds: Tensor, num_rows: int) -> Windows:
    lengths = sequence_lengths(call, bounds)
    first = call.max_len - lengths if call.align_right else torch.zeros_like(lengths)
    local = torch.arange(call.max_len, device=bounds.device) - first[:, None]
    valid = (local >= 0) & (local < lengths[:, None])
    start = bounds.long()[:-1] if call.varlen else first  # padded: the row of a position is the position
    return Windows(first, valid, (start[:, None] + local).clamp(0, max(num_rows - 1, 0)))


def gather_windows(x: Tensor, windows: Windows) -> Tensor:
    """(1, heads, T, F) -> (B, heads, L, F); positions without an item read as zero, even over NaN."""
    if not x.shape[2]:
        count, length = windows.valid.shape
        return x.new_zeros(count, x.shape[1], length, x.shape[3]) + x.sum()  # an empty sum, for its gradient
    head = torch.arange(x.shape[1], device=x.device)
    return torch.where(windows.valid[:, None, :, None], x[0][head[:, None], windows.rows[:, None]], 0)


def scatter_windows(value: Tensor, windows: Windows, like: Tensor) -> Tensor:
    """(B, H, L, F), zero where there is no item -> (1, H, T, F), packed like `like` and with its T rows.

    Laid out in memory as the caller will see it, (T, H, F).
    """
    _, heads, _, features = value.shape
    num_rows = like.shape[2]
    out = like.new_zeros(num_rows + 1, heads, features)  # the last row takes what belongs to no item, and is cut off
    rows = torch.where(windows.valid, windows.rows, num_rows)
    out.index_put_((rows[:, None], torch.arange(heads, device=out.device)[:, None]), value.to(out.dtype))
    return out[:num_rows].transpose(0, 1).unsqueeze(0)


def table_window(table: Tensor, call: Call) -> Tensor:
    """The rows of a position table (..., N, R) that a window uses."""
    return table.narrow(-2, table.shape[-2] - call.max_len if call.align_right else 0, call.max_len)


def visibility(valid: Tensor | None, length: int, causal: bool, device: torch.device) -> Tensor | None:
    """(B or 1, 1, length, length) bool: whether row i may attend to column j; None if all positions see each other."""
    visible = None
    if valid is not None:
        visible = (valid[:, :, None] & valid[:, None, :])[:, None]
    if causal:
        past = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        visible = past[None, None] if visible is None else visible & past
    return visible
