"""Where sequences lie: windows of rows, gathered from padded or packed batches and written back.

B sequences, H query heads, L window length, N table rows, T packed rows, F features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call


class Windows(NamedTuple):
    """A window of `valid.shape[1]` positions for each of n sequences, all aligned the same way."""

    sequence: Tensor  # (n,) int64, index of the sequence in the batch
    first: Tensor  # (n,) int64, position of the first real item in its window
    valid: Tensor  # (n, window) bool, whether a position holds a real item
    rows: Tensor  # (n, window) int64, row of each position; positions without an item point into the entry's rows, too


def sequence_lengths(call: Call, bounds: Tensor) -> Tensor:
    """(B,) int64: real items per sequence, clamped to what the call allows."""
    bounds = bounds.long()
    return (bounds.diff() if call.varlen else bounds).clamp(0, call.max_len)


def make_windows(
    call: Call, bounds: Tensor, num_rows: int, length: int | None = None, select: Tensor | None = None
) -> Windows:
    """Windows of `length` positions (default: `call.max_len`) for the sequences named by `select` (default: all)."""
    lengths = sequence_lengths(call, bounds)
    sequence = torch.arange(lengths.shape[0], device=bounds.device) if select is None else select
    length = call.max_len if length is None else length
    lengths = lengths[sequence]
    first = length - lengths if call.align_right else torch.zeros_like(lengths)
    local = torch.arange(length, device=bounds.device) - first[:, None]
    valid = (local >= 0) & (local < lengths[:, None])
    if call.varlen:
        start = bounds.long()[sequence]
    else:
        start = num_rows - lengths if call.align_right else torch.zeros_like(lengths)
    rows = (start[:, None] + local).clamp(0, max(num_rows - 1, 0))
    return Windows(sequence, first, valid, rows)


def gather_windows(x: Tensor, windows: Windows, varlen: bool, group: int = 1) -> Tensor:
    """(entries, heads, rows, F) -> (n, heads * group, window, F); positions without an item read as zero, even over NaN."""
    if not x.shape[2]:
        count, length = windows.valid.shape
        return x.new_zeros(count, x.shape[1] * group, length, x.shape[3]) + x.sum()  # an empty sum, for its gradient
    entry = torch.zeros_like(windows.sequence) if varlen else windows.sequence
    head = torch.arange(x.shape[1] * group, device=x.device) // group
    picked = x[entry[:, None, None], head[:, None], windows.rows[:, None]]
    return torch.where(windows.valid[:, None, :, None], picked, 0)


def row_buffer(like: Tensor, heads: int, features: int, varlen: bool) -> Tensor:
    """Zeros (entries, heads, rows, features) for `scatter_windows`, laid out in memory as the caller will see them.

    When packed that is (T + 1, heads, features): the last row takes what belongs to no item and is cut off afterwards.
    """
    entries, rows = like.shape[0], like.shape[2]
    if varlen:
        return like.new_zeros(rows + 1, heads, features).transpose(0, 1).unsqueeze(0)
    return like.new_zeros(entries, heads, rows, features)


def scatter_windows(out: Tensor, value: Tensor, windows: Windows, varlen: bool) -> Tensor:
    """Write (n, heads, window, F), zero where there is no item, into a `row_buffer`."""
    head = torch.arange(out.shape[1], device=out.device)
    if varlen:
        entry = torch.zeros_like(windows.sequence)
        rows = torch.where(windows.valid, windows.rows, out.shape[2] - 1)
    else:
        entry, rows = windows.sequence, windows.rows
    return out.index_put_((entry[:, None, None], head[:, None], rows[:, None]), value.to(out.dtype))


def table_window(table: Tensor, call: Call, length: int) -> Tensor:
    """The rows of a position table (..., N, R) that a window of `length` positions uses."""
    return table.narrow(-2, table.shape[-2] - length if call.align_right else 0, length)


def visibility(valid: Tensor | None, length: int, causal: bool, device: torch.device) -> Tensor | None:
    """(n or 1, 1, length, length) bool: whether row i may attend to column j; None if every position sees every other."""
    visible = None
    if valid is not None:
        visible = (valid[:, :, None] & valid[:, None, :])[:, None]
    if causal:
        past = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        visible = past[None, None] if visible is None else visible & past
    return visible
