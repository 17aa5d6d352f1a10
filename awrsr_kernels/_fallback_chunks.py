"""Chunks of a batch: which sequences the torch backend works on at a time, and how rows travel to and from them.

n sequences of a chunk, H query heads, L window length, F features.

A chunk holds each of its tensors as (n * H, L, F), contiguous, in the dtype of the arithmetic. Where a tensor of the caller
already looks like that, nothing is copied: products read it and write into it in place.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Call, Inputs, Windows, gather_windows, make_windows, row_buffer, scatter_windows, sequence_lengths, table_window

BLOCK_ROWS = 128  # rows whose weights exist at a time
_BLOCK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 24}  # weights that exist at a time: a share of the cache, or enough to fill a GPU
_SHORT = 8  # windows up to twice this are not worth a chunk for each length


def block_rows(length: int) -> int:
    """Rows per block: blocks of equal height, as few as `BLOCK_ROWS` allows."""
    blocks = -(-length // BLOCK_ROWS)
    return -(-length // blocks)


def _selections(given: Inputs, call: Call) -> Iterator[tuple[slice | Tensor, int]]:
    """(sequences, window length) of each chunk, of at most `_BLOCK_WEIGHTS` weights at a time."""
    q, bounds = given.q, given.bounds
    budget = _BLOCK_WEIGHTS.get(q.device.type, _BLOCK_WEIGHTS["cpu"])

    def fitting(length: int) -> int:
        """Sequences of this length that a chunk may hold."""
        return max(1, budget // (q.shape[1] * block_rows(length) * length))

    count = q.shape[0] if bounds is None else bounds.shape[0] - call.varlen
    if bounds is None or bounds.device.type != "cpu" or torch.compiler.is_compiling():
        if not count or not call.max_len:
            return
        chunks = -(-count // fitting(call.max_len))
        step = -(-count // chunks)
        for lo in range(0, count, step):
            chosen = slice(lo, min(lo + step, count))
            yield (chosen if bounds is None else torch.arange(chosen.start, chosen.stop, device=q.device)), call.max_len
        return
    lengths, order = sequence_lengths(call, bounds).sort()
    ordered: list[int] = lengths.tolist()
    lo = sum(length == 0 for length in ordered)
    for hi in range(lo + 1, count + 1):
        if hi == count or ordered[hi] > 2 * max(_SHORT, ordered[lo]) or hi + 1 - lo > fitting(ordered[hi]):
            yield order[lo:hi], ordered[hi - 1]
            lo = hi


class Place(NamedTuple):
    """Where the rows of a chunk lie in the caller's tensors."""

    chosen: slice | Tensor
    length: int
    sequence: Tensor  # (n,) int64, index in the batch
    windows: Windows | None  # None: the sequences are `chosen`, a slice, and every row is a real item
    heads: int
    dtype: torch.dtype
    call: Call

    def empty(self, features: int) -> Tensor:
        return self.sequence.new_empty(self.sequence.shape[0] * self.heads, self.length, features, dtype=self.dtype)

    def load(self, x: Tensor) -> Tensor:
        """The chunk's rows of x, each head repeated for the query heads that share it; zero where there is no item."""
        group = self.heads // x.shape[1]
        if self.windows is not None:
            found = gather_windows(x, self.windows, self.call.varlen, group)
        else:
            found = x[self.chosen] if group == 1 else x[self.chosen].repeat_interleave(group, dim=1)
        return found.to(self.dtype).flatten(0, 1).contiguous()

    def _is_direct(self, total: Tensor) -> bool:
        return self.windows is None and total.dtype == self.dtype and total.shape[1] == self.heads

    def result(self, total: Tensor) -> Tensor:
        """Where the chunk shall write its rows of `total`: into `total` itself if they lie there as the chunk has them."""
        return total[self.chosen].flatten(0, 1) if self._is_direct(total) else self.empty(total.shape[-1])

    def store(self, total: Tensor, value: Tensor) -> None:
        """Put a `result` into its row buffer; query heads that share a key head are summed."""
        if self._is_direct(total):
            return
        value = value.unflatten(0, (-1, self.heads))
        if total.shape[1] != self.heads:
            value = value.unflatten(1, (total.shape[1], -1)).sum(2)
        if self.windows is None:
            total[self.chosen] = value.to(total.dtype)
        else:
            scatter_windows(total, value, self.windows, self.call.varlen)

    def load_table(self, w: Tensor) -> Tensor:
        """(L, R) if the whole chunk shares it, otherwise (n * H, L, R)."""
        if self.call.per_entry:
            return self.load(w)
        found = table_window(w, self.call, self.length).to(self.dtype)[0]
        return found[0] if found.shape[0] == 1 else found.repeat(self.sequence.shape[0], 1, 1)

    def table_result(self, total: Tensor) -> Tensor:
        """Where the gradient of a `load_table` is written, or, if the whole chunk shares it, added to."""
        if self.call.per_entry:
            return self.result(total)
        return table_window(total, self.call, self.length)[0, 0] if total.shape[1] == 1 else self.empty(total.shape[-1])

    def store_table(self, total: Tensor, value: Tensor) -> None:
        if self.call.per_entry:
            self.store(total, value)
        elif value.dim() == 3:
            table_window(total, self.call, self.length).add_(value.unflatten(0, (-1, self.heads)).sum(0))


def places(given: Inputs, call: Call) -> Iterator[Place]:
    q, bounds = given.q, given.bounds
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    for chosen, length in _selections(given, call):
        if isinstance(chosen, slice):
            sequence = torch.arange(chosen.start, chosen.stop, device=q.device)
            yield Place(chosen, length, sequence, None, q.shape[1], dtype, call)
        else:
            assert bounds is not None
            windows = make_windows(call, bounds, q.shape[2], length, chosen)
            yield Place(chosen, length, chosen, windows, q.shape[1], dtype, call)


def rows_like(x: Tensor, heads: int, features: int, bounds: Tensor | None, call: Call) -> Tensor:
    """A row buffer for all chunks; without bounds they write every row of it."""
    if bounds is None:
        return x.new_empty(x.shape[0], heads, x.shape[2], features)
    return row_buffer(x, heads, features, call.varlen)
