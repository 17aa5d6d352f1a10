"""The chunks of a batch, and the copies of rows between the caller's tensors and those of the chunks.

B sequences, H query heads, L window length, N rows of all chunks and heads, F features.

Without lengths a window is an entry of the batch, and chunks take what they need. With lengths every tensor is brought into windows
once for all chunks, and results back: a tensor is a matrix of rows, and a permutation of its rows an index.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..call import Call, Inputs
from ..windows import sequence_lengths
from .chunks import Chunk
from .packing import Windows, find_windows, row_blocks

# Weights that exist at a time: a share of the cache per thread, for four at most, or enough to fill a GPU. On one thread of a
# Xeon with 2 MiB of L2, "simple" at (128, 4, 100, 16), forward and backward, takes 64 ms with this share, 80 ms with four of them.
_CPU_BLOCK_WEIGHTS, _CUDA_BLOCK_WEIGHTS = 1 << 18, 1 << 24

Strides = tuple[int, int, int]  # of entries, heads and rows in a matrix of rows


def _block_weights(device: torch.device) -> int:
    if device.type == "cuda":
        return _CUDA_BLOCK_WEIGHTS
    return _CPU_BLOCK_WEIGHTS * (4 if torch.compiler.is_compiling() else min(torch.get_num_threads(), 4))


def _as_matrix(x: Tensor) -> tuple[Tensor, Strides]:
    """(entries, heads, rows, F) as a matrix of rows."""
    _, heads, rows, features = x.shape
    packed = x.transpose(1, 2)
    if packed.is_contiguous():
        return packed.reshape(-1, features), (rows * heads, 1, heads)
    return x.reshape(-1, features), (heads * rows, rows, 1)


class Plan:
    """The division of a batch into chunks. It holds no tensor of the caller."""

    def __init__(self, inputs: Inputs, call: Call) -> None:
        q, bounds = inputs.q, inputs.bounds
        self.call, self.device = call, q.device
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.entries, self.heads, self.num_rows, _ = q.shape
        self.windows: list[Windows] | None = None
        if bounds is not None:
            lengths = sequence_lengths(call, bounds)
            if call.varlen:
                start = bounds.long()[:-1]
            else:
                start = self.num_rows - lengths if call.align_right else torch.zeros_like(lengths)
            self.start = start.clamp(0, max(self.num_rows - 1, 0))  # on a GPU nobody has checked the bounds
            lengths = lengths.minimum(self.num_rows - self.start)
            self.windows = find_windows(lengths, call.max_len) if self.num_rows else []
        self._indices: dict[tuple[Strides, int], Tensor] = {}
        self._inverse: Tensor | None = None
        self.chunks = list(self._make_chunks(inputs))
        self._num_rows = sum(chunk.count * chunk.length for chunk in self.chunks) * self.heads

    def _make_chunks(self, inputs: Inputs) -> Iterator[Chunk]:
        """Chunks with as many windows as `_block_weights` allows; windows of a chunk have equal length."""
        budget, first_row = _block_weights(self.device), 0
        kept_columns = sum(x.shape[-1] for x in (inputs.q, inputs.k, inputs.v))
        for windows in [None] if self.windows is None else self.windows:
            count, length = (self.entries, self.num_rows) if windows is None else windows.sequence.shape
            if not count or not length:
                continue
            rows = max(block.end - block.first for block in row_blocks(length, self.call.causal))
            steps = -(-count // max(1, budget // (self.heads * rows * length)))
            step = -(-count // steps)
            for first in range(0, count, step):
                entries = slice(first, min(first + step, count))
                part = None if windows is None else windows.part(entries)
                yield Chunk(self.call, self.heads, self.dtype, first_row, entries, length, part, self.device, kept_columns)
                first_row += (entries.stop - first) * self.heads * length

    def _in_buffer(self, rows: list[Tensor], heads: Tensor | None = None) -> Tensor:
        """(N,) numbers in the order of a buffer, from (n, L) for each kind of windows; heads: (H,) what each head adds."""
        heads = torch.zeros(self.heads, dtype=torch.int64, device=self.device) if heads is None else heads
        parts = [(x[:, None] + heads[:, None]).flatten() for x in rows]
        return torch.cat(parts) if parts else heads[:0]

    def _valid(self, windows: list[Windows]) -> Tensor:
        """(N,) whether a row of a buffer is an item."""
        return self._in_buffer([w.valid for w in windows]) > 0

    def _index(self, windows: list[Windows], strides: Strides, group: int) -> Tensor:
        """(N,) row of a matrix of rows; query heads of a group read the same head, padding the last item before it."""
        if (strides, group) not in self._indices:
            entry, head, row = strides
            rows = [(self.start[w.sequence] + w.item) * row for w in windows]
            if not self.call.varlen:
                rows = [x + w.sequence * entry for x, w in zip(rows, windows, strict=True)]
            heads = torch.arange(self.heads, device=self.device) // group * head
            self._indices[strides, group] = self._in_buffer(rows, heads)
        return self._indices[strides, group]

    def load(self, x: Tensor, *, clear: bool = False) -> Tensor:
        """What chunks load x from: itself without lengths; otherwise (N, F), with zeros at padding if `clear`."""
        if self.windows is None:
            return x
        rows, strides = _as_matrix(x)
        loaded = rows.index_select(0, self._index(self.windows, strides, self.heads // x.shape[1]))
        if clear or not all(w.read for w in self.windows):
            loaded = torch.where(self._valid(self.windows)[:, None], loaded, 0)
        return loaded

    def load_inputs(self, inputs: Inputs) -> Inputs:
        """Loaded, the tables in the dtype of q."""
        q, k, v, w_q, w_k, _, _, _, v_cov, _ = inputs
        q, k, v = (self.load(x) for x in (q, k, v))
        w_q, w_k = (None if w is None else self._load_table(w.to(q.dtype)) for w in (w_q, w_k))
        return inputs._replace(q=q, k=k, v=v, w_q=w_q, w_k=w_k, v_cov=None if v_cov is None else self.load(v_cov))

    def _load_table(self, w: Tensor) -> Tensor:
        if self.windows is None or self.call.per_entry:
            return self.load(w)
        return w.reshape(-1, w.shape[-1]).index_select(0, self._table_index(self.windows, w))

    def _table_index(self, windows: list[Windows], w: Tensor) -> Tensor:
        """(N,) row of a table by position, (1, 1 or H, rows, R), whose rows are numbered through."""
        _, heads, size, _ = w.shape
        rows = [x.item + (size - x.items) if self.call.align_right else x.item for x in windows]
        by_head = torch.arange(self.heads, device=self.device) * size * (heads > 1)
        return self._in_buffer([x.clamp_(0, max(size - 1, 0)) for x in rows], by_head)

    def buffer(self, features: int) -> Tensor:
        """For what chunks compute, in the dtype of the arithmetic: rows form, or with lengths (N + 1, F), the last row zero."""
        if self.windows is None:
            return torch.empty(self.entries, self.heads, self.num_rows, features, dtype=self.dtype, device=self.device)
        buffer = torch.empty(self._num_rows + 1, features, dtype=self.dtype, device=self.device)
        buffer[-1] = 0
        return buffer

    def collect(self, buffer: Tensor, dtype: torch.dtype, heads: int | None = None) -> Tensor:
        """A buffer in rows form, (entries, heads, rows, F), laid out as the caller will see it; heads of a group are summed."""
        heads, features = self.heads if heads is None else heads, buffer.shape[-1]
        shared = (heads, self.heads // heads)
        if self.windows is None:
            return (buffer if heads == self.heads else buffer.unflatten(1, shared).sum(2)).to(dtype)
        rows = buffer.index_select(0, self._to_rows(self.windows))
        if self.call.varlen:
            grouped = rows.view(1, self.num_rows, *shared, features)
            return (grouped.squeeze(3) if heads == self.heads else grouped.sum(3)).to(dtype).transpose(1, 2)
        grouped = rows.view(self.entries, *shared, self.num_rows, features)
        return (grouped.squeeze(2) if heads == self.heads else grouped.sum(2)).to(dtype)

    def _to_rows(self, windows: list[Windows]) -> Tensor:
        """(rows of all entries and heads,) the buffer's row of each; N where no item is."""
        if self._inverse is None:
            size = self.entries * self.num_rows * self.heads
            strides = (0, 1, self.heads) if self.call.varlen else (self.heads * self.num_rows, self.num_rows, 1)
            inverse = torch.full((size + 1,), self._num_rows, device=self.device)
            target = torch.where(self._valid(windows), self._index(windows, strides, 1), size)
            self._inverse = inverse.scatter_(0, target, torch.arange(self._num_rows, device=self.device))[:size]
        return self._inverse

    def is_shared(self, table: Tensor) -> bool:
        """Whether all windows read the same rows of the caller's table, without a copy."""
        return self.windows is None and not self.call.per_entry and table.shape[1] == 1

    def table_gradient(self, like: Tensor) -> Tensor:
        """Where chunks put the gradient of a table: a buffer, or (L, R) to add to where all share the table."""
        if self.is_shared(like):
            return torch.zeros(like.shape[2:], dtype=self.dtype, device=self.device)
        return self.buffer(like.shape[-1])

    def collect_table(self, total: Tensor, like: Tensor) -> Tensor:
        """The gradient of a table, shaped `like` it."""
        _, heads, size, _ = like.shape
        if self.call.per_entry:
            return self.collect(total, like.dtype)
        if self.windows is not None:
            index = self._table_index(self.windows, like)
            total = torch.ops.aten.embedding_dense_backward(total[:-1], index, heads * size, -1, False)  # repeatable on a GPU, too
        elif heads > 1:
            total = total.sum(0)
        return total.to(like.dtype).view(like.shape)
