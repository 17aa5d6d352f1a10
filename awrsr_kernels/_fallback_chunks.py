"""Chunks of a batch: which sequences the torch backend works on at a time, and how rows travel to and from them.

n sequences of a chunk, H query heads, L window length, m rows of a block, c columns, F features.

A chunk holds each of its tensors as (n * H, L, F), contiguous, in the dtype of the arithmetic. Where a tensor of the caller
already looks like that, nothing is copied: products read it and write into it in place. Otherwise rows are picked one by one,
on the way in and on the way out: a tensor is a matrix of rows, and a permutation of its rows an index.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import WEIGHTS_PER_CALL, draw, scaled_mask
from .layout import Call, Inputs, Windows, make_windows, sequence_lengths, table_window

LANES = 16  # floats of a vector: torch is slow over rows that do not fill whole ones
_BLOCK_ROWS = (2 * LANES, 8 * LANES)  # fewest and most rows whose weights exist at a time
_BLOCK_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 24}  # weights that exist at a time: a share of the cache, or enough to fill a GPU
_CHUNK_WEIGHTS = 1 << 16  # as many weights take about the time that a chunk takes beyond its weights


def row_blocks(length: int, causal: bool) -> list[tuple[int, int]]:
    """(first, end) of each block of rows of a window.

    Causal blocks leave out the columns of later ones. The more blocks, the nearer that comes to half of all weights, but small
    products are slow: three blocks is the compromise, as far as the bounds allow it.
    """
    fewest, most = _BLOCK_ROWS
    if causal:
        step = min(max(length // 3 // LANES * LANES, fewest), most)
        count = max(1, (length + step - LANES) // step)  # what would be a block of a few rows goes with the one before
    else:
        count = -(-length // most)
        step = -(-length // count)
    return [(i * step, (i + 1) * step if i + 1 < count else length) for i in range(count)]


def _classes(lengths: Tensor, heads: int, max_len: int) -> list[tuple[int, int]]:
    """(sequences, window length) of the classes into which ascending lengths fall, shortest first.

    A class of its own must be worth its overhead: the weights that padding its sequences to the next class would add.
    """
    vectors = (lengths + LANES - 1) // LANES
    half = int((lengths <= LANES // 2).sum())
    classes: list[tuple[int, int]] = []
    for i, count in enumerate([half, *vectors[half:].bincount().tolist()]):
        span = min(max(i * LANES, LANES // 2), max_len)
        if count and classes:
            added = heads * classes[-1][0] * (span**2 - classes[-1][1] ** 2)
            count += classes.pop()[0] if added < _CHUNK_WEIGHTS else 0
        if count:
            classes.append((count, span))
    return classes


def _selections(given: Inputs, call: Call) -> Iterator[tuple[slice | Tensor, int, bool]]:
    """(sequences, window length, whether each is known to have an item) of each chunk, of at most `_BLOCK_WEIGHTS` at a time."""
    q, bounds = given.q, given.bounds
    budget = _BLOCK_WEIGHTS.get(q.device.type, _BLOCK_WEIGHTS["cpu"])

    def steps(count: int, length: int) -> Iterator[slice]:
        """Equal parts of `count` sequences of one length that fit the budget."""
        rows = max(hi - lo for lo, hi in row_blocks(length, call.causal))
        chunks = -(-count // max(1, budget // (q.shape[1] * rows * length)))
        step = -(-count // chunks)
        return (slice(lo, min(lo + step, count)) for lo in range(0, count, step))

    count = q.shape[0] if bounds is None else bounds.shape[0] - call.varlen
    if not count or not call.max_len or not q.shape[2]:
        return
    if bounds is None:
        yield from ((chosen, call.max_len, True) for chosen in steps(count, call.max_len))
    elif bounds.device.type != "cpu" or torch.compiler.is_compiling():
        for chosen in steps(count, call.max_len):
            yield torch.arange(chosen.start, chosen.stop, device=q.device), call.max_len, False
    else:
        lengths, order = sequence_lengths(call, bounds).sort()
        begin = int((lengths == 0).sum())
        for members, span in _classes(lengths[begin:], q.shape[1], call.max_len):
            for chosen in steps(members, span):
                part = order[begin + chosen.start : begin + chosen.stop]
                yield part.sort().values, span, True  # in the order of memory
            begin += members


def _as_rows(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """(entries, heads, rows, F) as a matrix of rows, with the strides therein of entries, heads and rows."""
    _, heads, rows, features = x.shape
    packed = x.transpose(1, 2)
    if packed.is_contiguous():
        return packed.reshape(-1, features), (rows * heads, 1, heads)
    return x.reshape(-1, features), (heads * rows, rows, 1)


class Buffer(NamedTuple):
    """Where chunks put one of their results."""

    rows: Tensor  # (entries, heads, rows, F); if there are windows, (rows of all chunks + 1, F), the last of them zero
    heads: int


class Place:
    """Where the rows of a chunk lie in the caller's tensors, and in the buffers for results."""

    def __init__(self, chosen: slice | Tensor, length: int, real: bool, start: int, given: Inputs, call: Call) -> None:
        q = given.q
        self.chosen, self.length, self.call, self.heads = chosen, length, call, q.shape[1]
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.start = start  # rows of the chunks before it
        self.windows: Windows | None = None  # None: the sequences are `chosen`, a slice, and every row is a real item
        if isinstance(chosen, slice):
            self.sequence = torch.arange(chosen.start, chosen.stop, device=q.device)
        else:
            assert given.bounds is not None
            self.sequence = chosen
            self.windows = windows = make_windows(call, given.bounds, q.shape[2], length, chosen)
            nearest = windows.rows.gather(1, windows.first.clamp(max=length - 1)[:, None])
            self.real = real  # every sequence has an item
            self._source = torch.where(windows.valid, windows.rows, nearest)  # padding is not read: NaN may stand there
            self._indices: dict[tuple[int, ...], Tensor] = {}
            self._items = q.shape[0] * q.shape[2], q.shape[2]
        self.count = self.sequence.shape[0]

    def empty(self, features: int) -> Tensor:
        return self.sequence.new_empty(self.count * self.heads, self.length, features, dtype=self.dtype)

    def _index(self, strides: tuple[int, int, int], group: int) -> Tensor:
        """(n * H * L,) numbers of rows in a matrix of rows; query heads of a group read the same head."""
        if (group, *strides) not in self._indices:
            entry, head, row = strides
            of_head = torch.arange(self.heads, device=self.sequence.device)[:, None] // group * head
            of_row = self._source * row if self.call.varlen else self._source * row + self.sequence[:, None] * entry
            self._indices[group, *strides] = (of_row[:, None] + of_head).flatten()
        return self._indices[group, *strides]

    def load(self, x: Tensor) -> Tensor:
        """The chunk's rows of x, each head repeated for the query heads that share it; padding repeats an item."""
        group = self.heads // x.shape[1]
        if self.windows is None:
            found = x[self.chosen] if group == 1 else x[self.chosen].repeat_interleave(group, dim=1)
            return found.to(self.dtype).flatten(0, 1).contiguous()
        rows, strides = _as_rows(x)
        found = rows.index_select(0, self._index(strides, group)).to(self.dtype).view(-1, self.length, x.shape[-1])
        if self.real:
            return found
        return torch.where(self.windows.valid.repeat_interleave(self.heads, 0)[..., None], found, 0)

    def load_items(self, x: Tensor) -> Tensor:
        """The same with zeros at padding."""
        found = self.load(x)
        if self.windows is None or not self.real:
            return found
        return found.mul_(self.windows.valid.to(self.dtype).repeat_interleave(self.heads, 0)[..., None])

    def _share(self, buffer: Buffer) -> Tensor:
        """(n, heads, L, F): the chunk's part of a buffer."""
        rows, heads = buffer
        if self.windows is None:
            return rows[self.chosen]
        begin, size = self.start * heads, self.count * self.length * heads
        return rows[begin : begin + size].view(self.count, heads, self.length, -1)

    def _is_direct(self, buffer: Buffer) -> bool:
        return buffer.rows.dtype == self.dtype and buffer.heads == self.heads

    def result(self, buffer: Buffer) -> Tensor:
        """Where the chunk shall write its rows: into the buffer itself if they lie there as the chunk has them."""
        return self._share(buffer).flatten(0, 1) if self._is_direct(buffer) else self.empty(buffer.rows.shape[-1])

    def store(self, buffer: Buffer, value: Tensor) -> None:
        """Put a `result` into its buffer; query heads that share a key head are summed."""
        if not self._is_direct(buffer):
            value = value.unflatten(0, (-1, buffer.heads, self.heads // buffer.heads))
            self._share(buffer).copy_(value.sum(2) if value.shape[2] > 1 else value.squeeze(2))

    def item_rows(self) -> tuple[Tensor, Tensor]:
        """(n, L) number of each item among the items of all entries, one beyond them for padding; (n, L, 3) its row in a buffer."""
        assert self.windows is not None
        device, (items, per_entry) = self.sequence.device, self._items
        item = self.windows.rows + (0 if self.call.varlen else self.sequence[:, None] * per_entry)
        block = self.start + self.length * torch.arange(self.count, device=device)[:, None]
        row = torch.arange(self.length, device=device)
        parts = torch.broadcast_tensors(block, row.new_full((), self.length), row)
        return torch.where(self.windows.valid, item, items), torch.stack(parts, -1)

    def load_table(self, w: Tensor) -> Tensor:
        """(L, R) if the whole chunk shares it, otherwise (n * H, L, R)."""
        if self.call.per_entry:
            return self.load(w)
        found = table_window(w, self.call, self.length).to(self.dtype)[0]
        return found[0] if found.shape[0] == 1 else found.repeat(self.count, 1, 1)

    def table_result(self, total: Tensor) -> Tensor:
        """Where the gradient of a table by position is written, or, if the whole chunk shares it, added to."""
        return table_window(total, self.call, self.length)[0, 0] if total.shape[1] == 1 else self.empty(total.shape[-1])

    def store_table(self, total: Tensor, value: Tensor) -> None:
        if value.dim() == 3:
            table_window(total, self.call, self.length).add_(value.unflatten(0, (-1, self.heads)).sum(0))

    def mask(self, seed: Tensor, lo: int, hi: int, columns: int) -> Tensor:
        """Z of rows lo..hi, (n * H, m, c); whatever, but finite, where there is no item or nothing visible."""
        rows, dropout_p = torch.arange(lo, hi, device=seed.device), self.call.dropout_p
        if self.windows is None or not self.real:
            first = None if self.windows is None else self.windows.first
            return scaled_mask(seed, dropout_p, self.sequence, self.heads, rows, columns, first, self.dtype).flatten(0, 1)
        # Most of a window may be padding: only groups of columns that an item sees are drawn, and rows cut out of them.
        first, valid = self.windows.first, self.windows.valid
        of, row = valid[:, lo:hi].nonzero(as_tuple=True)
        local = rows[row] - first[of]
        last = local if self.call.causal else valid.sum(1)[of] - 1
        groups = last // WEIGHTS_PER_CALL + 1
        end = groups.cumsum(0)
        item = torch.arange(of.shape[0]).repeat_interleave(groups)
        group = torch.arange(item.shape[0]) - (end - groups)[item]
        head = torch.arange(self.heads)[:, None]
        drawn = draw(seed, dropout_p, (group, head, local[item], self.sequence[of][item]), self.dtype)  # (H, groups of all rows, 8)
        flat = torch.nn.functional.pad(drawn.flatten(), (columns, columns))
        start = torch.zeros_like(valid[:, lo:hi], dtype=torch.int64)
        start[of, row] = WEIGHTS_PER_CALL * (end - groups) - first[of] + columns
        start = start[:, None] + WEIGHTS_PER_CALL * item.shape[0] * head
        return flat.unfold(0, columns, 1).index_select(0, start.flatten()).view(-1, hi - lo, columns)


class Plan:
    """The chunks of a batch, and how what they compute comes together in the caller's order."""

    def __init__(self, given: Inputs, call: Call) -> None:
        self.call = call
        self.places: list[Place] = []
        self._entries, _, self._rows, _ = given.q.shape
        self._windows, self._total, self._device = given.bounds is not None, 0, given.q.device
        for chosen, length, real in _selections(given, call):
            place = Place(chosen, length, real, self._total, given, call)
            self._total += place.count * length
            self.places.append(place)
        self._where: Tensor | None = None

    def buffer(self, heads: int, features: int, dtype: torch.dtype) -> Buffer:
        """For results of `features` columns that the caller wants in `dtype`; every chunk writes all its rows."""
        if not self._windows:
            return Buffer(torch.empty(self._entries, heads, self._rows, features, dtype=dtype, device=self._device), heads)
        wide = torch.promote_types(dtype, torch.float32)
        rows = torch.empty(heads * self._total + 1, features, dtype=wide, device=self._device)
        rows[-1] = 0
        return Buffer(rows, heads)

    def collect(self, buffer: Buffer, dtype: torch.dtype) -> Tensor:
        """A buffer in rows form, (entries, heads, rows, F), laid out in memory as the caller will see it."""
        rows, heads = buffer
        if not self._windows:
            return rows
        block, length, row = self._item_rows().unbind(-1)
        head = torch.arange(heads, device=self._device)
        if self.call.varlen:
            index = (heads * block + row)[:, None] + length[:, None] * head
            return rows.index_select(0, index.flatten()).to(dtype).view(1, -1, heads, rows.shape[-1]).transpose(1, 2)
        block, length, row = (x.view(self._entries, 1, self._rows) for x in (block, length, row))
        index = heads * block + row + length * head[:, None]
        return rows.index_select(0, index.flatten()).to(dtype).view(self._entries, heads, self._rows, -1)

    def _item_rows(self) -> Tensor:
        """(items, 3): row a * heads + b * head + c of a buffer belongs to the item, the last row where no chunk has it."""
        if self._where is None:
            count = self._entries * self._rows
            nowhere = torch.tensor([self._total, 0, 0], device=self._device)
            found = nowhere.repeat(count + 1, 1)
            if self.places:
                item, row = (torch.cat([x.flatten(0, 1) for x in parts]) for parts in zip(*(p.item_rows() for p in self.places)))
                found.index_copy_(0, item, row)
            self._where = found[:count]
        return self._where
