"""Chunks of a batch, which `_fallback_selection.py` selects: how rows travel to and from them.

n windows of a chunk, H query heads, L window length, m rows of a block, c columns, F features.

A chunk holds each of its tensors as (n * H, L, F), contiguous, in the dtype of the arithmetic. Where a tensor of the caller
already looks like that, nothing is copied: products read it and write into it in place. Otherwise rows are picked one by one,
once for all chunks, on the way in and on the way out: a tensor is a matrix of rows, and a permutation of its rows an index.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import Call, Inputs
from ..dropout import WEIGHTS_PER_CALL, draw, scaled_mask
from ..windows import sequence_lengths, table_window
from .selection import Selection, drawn_at_most, row_blocks, selections

_DRAWN_AT_ONCE = 1 << 15  # calls of the generator


def _as_rows(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """(entries, heads, rows, F) as a matrix of rows, with the strides therein of entries, heads and rows."""
    _, heads, rows, features = x.shape
    packed = x.transpose(1, 2)
    if packed.is_contiguous():
        return packed.reshape(-1, features), (rows * heads, 1, heads)
    return x.reshape(-1, features), (heads * rows, rows, 1)


class Rows(NamedTuple):
    """The rows of all chunks, N of them, for a number of heads: a window's heads one after another, each with all its rows."""

    pair: Tensor  # (N,) number of the sequence times heads plus the head; sequences are counted as chunks have them
    local: Tensor  # (N,) position, counted from the sequence's first item
    valid: Tensor  # (N,) bool, whether it is an item
    item: Tensor  # (N,) the nearest position of an item; 0 if there is none
    length: Tensor  # (N,) of the sequence


class Buffer(NamedTuple):
    """Where chunks put one of their results."""

    rows: Tensor  # (entries, heads, rows, F); if there are windows, (rows of all chunks + 1, F), the last of them zero
    heads: int


class Plan:
    """The chunks of a batch, and where each of their rows lies in the caller's tensors; it holds none of these."""

    def __init__(self, given: Inputs, call: Call) -> None:
        q, bounds = given.q, given.bounds
        self.call, self.device, self.ragged = call, q.device, bounds is not None
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.entries, self.heads, self.num_rows, _ = q.shape
        self.places: list[Place] = []
        self.total = sequences = 0  # rows of all chunks, for one head
        for selection in selections(given, call):
            self.places.append(Place(self, selection, sequences))
            sequences += self.places[-1].sequence.shape[0]
            self.total += self.places[-1].count * selection.length
        self.drawn: Tensor | None = None  # Z of the columns that items see, if they are few; `first_drawn` says where a row's begin
        self._found: dict[tuple[str | int, ...], Any] = {}
        if self.places and (self.ragged or call.dropout_p):
            self._find_sequences(bounds)
        if self.places and call.dropout_p and q.device.type == "cpu" and not torch.compiler.is_compiling():
            self._draw(given)

    def _find_sequences(self, bounds: Tensor | None) -> None:
        """(S,) numbers for each sequence in the order of chunks, S of all."""
        call, places = self.call, self.places
        self.sequence = torch.cat([p.sequence for p in places])
        length = torch.cat([p.sequence.new_full(p.sequence.shape, p.length) for p in places])
        self.lengths = length if bounds is None else sequence_lengths(call, bounds).long()[self.sequence]
        if bounds is not None and call.varlen:
            start = bounds.long()[self.sequence]
        else:
            start = self.num_rows - self.lengths if call.align_right else torch.zeros_like(self.lengths)
        self.start = start.clamp(0, self.num_rows - 1)
        if not all(p.real for p in places):  # nobody has checked the bounds
            self.lengths = self.lengths.minimum(self.num_rows - self.start)
        self.shared = any(p.window is not None for p in places)
        if self.shared:
            self._find_shares(length)
        else:
            self.span = length  # rows from its first one to that of the next sequence
            self.lead = length - self.lengths if call.align_right else torch.zeros_like(length)  # rows before its first item
            self.first = self.lead  # the row of that in the window

    def _find_shares(self, length: Tensor) -> None:
        """The same where several sequences may share a window: there a sequence's rows end where the next one's begin."""
        alone = torch.cat([torch.full(p.sequence.shape, p.window is None, device=self.device) for p in self.places])
        counts = [torch.ones_like(p.sequence) if p.window is None else p.window.bincount() for p in self.places]
        self.count = torch.cat(counts)  # sequences of each window
        end = self.count.cumsum(0)
        numbers = torch.arange(1, length.shape[0] + 1, device=self.device)
        window = (numbers[: end.shape[0]] - 1).repeat_interleave(self.count, output_size=length.shape[0])
        self.number = numbers - (end - self.count)[window]  # of the sequence in its window, from 1
        used = self.lengths.cumsum(0) - self.lengths  # items before it
        offset = used - used[(end - self.count)[window]]
        self.first = torch.where(alone & self.call.align_right, length - self.lengths, offset)
        self.lead = self.first - offset
        last = torch.zeros_like(alone)
        last[end - 1] = True
        self.span = torch.where(last, length - offset, self.lengths)

    def _pairs(self, heads: int) -> Tensor:
        """(S * heads,) number of the sequence times heads plus the head, in the order of rows."""
        count = self.sequence.shape[0] * heads
        if not self.shared:
            return torch.arange(count, device=self.device)
        begin = (self.count.cumsum(0) - self.count) * heads  # of each window
        sizes, begins = torch.stack((self.count, begin)).repeat_interleave(self.count * heads, 1, output_size=count)
        within = torch.arange(count, device=self.device) - begins
        return begins + within % sizes * heads + within // sizes

    def rows(self, heads: int) -> Rows:
        if ("rows", heads) not in self._found:
            count, pairs = self.total * heads, self._pairs(heads)
            spans, lead = (x.repeat_interleave(heads)[pairs] for x in (self.span, self.lead))
            place = torch.arange(pairs.shape[0], device=self.device).repeat_interleave(spans, output_size=count)
            local = torch.arange(count, device=self.device) - (spans.cumsum(0) - spans + lead)[place]
            pair = pairs[place]
            length = self.lengths.repeat_interleave(heads)[pair]
            item = local.clamp(min=0).minimum((length - 1).clamp_(min=0))
            self._found["rows", heads] = Rows(pair, local, (local == item) & (length > 0), item, length)
        return self._found["rows", heads]

    def index(self, strides: tuple[int, int, int], heads: int, group: int) -> Tensor:
        """(N,) row of a matrix of rows; query heads of a group read the same head, padding the nearest item."""
        if ("index", heads, group, *strides) not in self._found:
            rows, (entry, head, row) = self.rows(heads), strides
            base = (self.start * row if self.call.varlen else self.start * row + self.sequence * entry)[:, None]
            base = (base + torch.arange(heads, device=self.device) // group * head).flatten()[rows.pair]
            self._found["index", heads, group, *strides] = base + rows.item * row
        return self._found["index", heads, group, *strides]

    def owner(self) -> Tensor:
        """(N,), for one head: which sequence of its window a row belongs to, from 1; 0 at padding, unless causality hides that."""
        if ("owner",) not in self._found:
            owner = self.number.int().repeat_interleave(self.span, output_size=self.total)
            self._found["owner",] = owner if self.call.causal else owner.mul_(self.rows(1).valid)
        return self._found["owner",]

    def table_rows(self, size: int) -> Tensor:
        """(N,) which of `size` rows of a table by position belongs to a row; some other one at padding."""
        if ("table", size) not in self._found:
            rows = self.rows(self.heads)
            self._found["table", size] = rows.item + (size - rows.length) if self.call.align_right else rows.item
        return self._found["table", size]

    def future(self, rows: int) -> Tensor:
        """(rows, rows): hides columns after the row when added to scores."""
        if ("future", rows) not in self._found:
            never = torch.full((rows, rows), torch.finfo(self.dtype).min / 2, dtype=self.dtype, device=self.device)
            self._found["future", rows] = never.triu(1)
        return self._found["future", rows]

    def padding(self) -> tuple[Tensor, Tensor]:
        """(N,) 1 for an item and 0 for padding; what hides padding when added to scores: two of them are finite."""
        if ("padding",) not in self._found:
            items = self.rows(self.heads).valid.to(self.dtype)
            self._found["padding",] = items, (1 - items).mul_(torch.finfo(self.dtype).min / 2)
        return self._found["padding",]

    def load(self, x: Tensor) -> Tensor:
        """What chunks load x from: itself; if there are windows, (N, F), each head repeated for the query heads that share it."""
        if not self.ragged or not self.places:
            return x
        rows, strides = _as_rows(x)
        found = rows.index_select(0, self.index(strides, self.heads, self.heads // x.shape[1]))
        if all(place.real for place in self.places):
            return found
        return torch.where(self.rows(self.heads).valid[:, None], found, 0)

    def load_inputs(self, given: Inputs) -> Inputs:
        """Loaded q, k and values, and in the dtype of q the tables: loaded, or, if by position, (N, R) shared or (H, N, R)."""
        q, k, v, *tables = given[:5]
        tables = [w if w is None else w.to(q.dtype) for w in tables]
        tables = [w if w is None else self.load(w) if self.call.per_entry else self.by_head(w) for w in tables]
        v_cov = None if given.v_cov is None else self.load(given.v_cov)
        return given._replace(q=self.load(q), k=self.load(k), v=self.load(v), w_q=tables[0], w_k=tables[1], v_cov=v_cov)

    def by_head(self, w: Tensor) -> Tensor:
        """A table by position, (1, 1 or H, N, R), in the dtype of the arithmetic: (N, R) if heads share it, else (H, N, R)."""
        return (w[0, 0] if w.shape[1] == 1 else w[0]).to(self.dtype)

    def load_items(self, x: Tensor) -> Tensor:
        """Loaded, with zeros, not just any item, at padding."""
        found = self.load(x)
        return found.mul_(self.padding()[0][:, None].to(found.dtype)) if self.ragged and self.places else found

    def buffer(self, heads: int, features: int, dtype: torch.dtype) -> Buffer:
        """For results of `features` columns that the caller wants in `dtype`; every chunk writes all its rows."""
        if not self.ragged:
            return Buffer(torch.empty(self.entries, heads, self.num_rows, features, dtype=dtype, device=self.device), heads)
        rows = torch.empty(heads * self.total + 1, features, dtype=self.dtype, device=self.device)
        rows[-1] = 0
        return Buffer(rows, heads)

    def collect(self, buffer: Buffer, dtype: torch.dtype) -> Tensor:
        """A buffer in rows form, (entries, heads, rows, F), laid out in memory as the caller will see it."""
        rows, heads = buffer
        if not self.ragged:
            return rows
        found, features = rows.index_select(0, self._inverse(heads)).to(dtype), rows.shape[-1]
        if self.call.varlen:
            return found.view(1, self.num_rows, heads, features).transpose(1, 2)
        return found.view(self.entries, heads, self.num_rows, features)

    def _inverse(self, heads: int) -> Tensor:
        """(rows of all entries and heads,) where a buffer has each; its last row where no chunk has it."""
        if ("inverse", heads) not in self._found:
            size, count = self.entries * self.num_rows * heads, self.total * heads
            found = torch.full((size + 1,), count, device=self.device)
            if self.places:
                within = (1, heads) if self.call.varlen else (self.num_rows, 1)
                target = torch.where(self.rows(heads).valid, self.index((heads * self.num_rows, *within), heads, 1), size)
                found.scatter_(0, target, torch.arange(count, device=self.device))
            self._found["inverse", heads] = found[:size]
        return self._found["inverse", heads]

    def _draw(self, given: Inputs) -> None:
        """Z of all weights at once, unless it would be larger than q, k and v."""
        assert given.seed is not None
        pair, local, valid, _, length = self.rows(self.heads)
        if self.call.causal:
            groups = local // WEIGHTS_PER_CALL + 1
        else:
            groups = (length - 1) // WEIGHTS_PER_CALL + 1
        groups = groups * valid
        end = groups.cumsum(0)
        count, before, widest = int(end[-1]), end - groups, max(p.length for p in self.places)
        if count * WEIGHTS_PER_CALL > drawn_at_most(given):
            return
        row = torch.arange(groups.shape[0], device=self.device).repeat_interleave(groups, output_size=count)
        group = torch.arange(count, device=self.device) - before[row]
        pair, local = pair[row], local[row]
        head, sequence = pair % self.heads, self.sequence[pair // self.heads]
        self.drawn = torch.zeros(count * WEIGHTS_PER_CALL + 2 * widest, dtype=self.dtype, device=self.device)
        drawn = self.drawn[widest : -widest].view(count, WEIGHTS_PER_CALL)
        for lo in range(0, count, _DRAWN_AT_ONCE):
            part = slice(lo, lo + _DRAWN_AT_ONCE)
            counter = group[part], head[part], local[part], sequence[part]
            drawn[part] = draw(given.seed, self.call.dropout_p, counter, self.dtype)
        first = self.first.repeat_interleave(self.heads)[self.rows(self.heads).pair]
        self.first_drawn = (before * WEIGHTS_PER_CALL - first).clamp_(min=-widest) + widest


class Place:
    """One chunk, and how it reads and writes tensors of the caller."""

    def __init__(self, plan: Plan, selection: Selection, sequences: int) -> None:
        self.plan = plan if torch.compiler.is_compiling() else weakref.proxy(plan)  # no cycle, so that memory is freed at once
        self.call, self.heads, self.dtype = plan.call, plan.heads, plan.dtype
        self.chosen, self.length, self.real, self.window = selection
        self.blocks = row_blocks(self.length, plan.call.causal)
        chosen = self.chosen
        self.sequence = torch.arange(chosen.start, chosen.stop, device=plan.device) if isinstance(chosen, slice) else chosen
        self.count = self.sequence.shape[0] if self.window is None else int(self.window[-1]) + 1  # of windows
        self._start, self._sequences = plan.total, sequences  # rows and sequences of the chunks before it

    def empty(self, features: int, rows: int | None = None) -> Tensor:
        return self.sequence.new_empty(self.count * self.heads, self.length if rows is None else rows, features, dtype=self.dtype)

    def _part(self, rows: Tensor, heads: int) -> Tensor:
        """(n * heads, L, ...): this chunk's of the rows of all."""
        found = rows.narrow(0, self._start * heads, self.count * self.length * heads)
        return found.view(self.count * heads, self.length, *rows.shape[1:])

    def load(self, x: Tensor) -> Tensor:
        """The chunk's rows of what the plan loaded; at padding there is an item, or zeros if there is none."""
        if self.plan.ragged:
            return self._part(x, self.heads).to(self.dtype)
        group = self.heads // x.shape[1]
        found = x[self.chosen] if group == 1 else x[self.chosen].repeat_interleave(group, dim=1)
        return found.to(self.dtype).flatten(0, 1).contiguous()

    def future(self) -> Tensor | None:
        """(m, m) of the largest block: added to scores of a block's rows and the same columns, hides columns after the row."""
        return self.plan.future(max(hi - lo for lo, hi in self.blocks)) if self.call.causal else None

    def padding(self) -> Tensor | None:
        """(n * H, 1, L): added to scores, hides columns without an item; None if causality or `owner` does."""
        if not self.plan.ragged or self.window is not None or (self.call.causal and not self.call.align_right):
            return None
        return self._part(self.plan.padding()[1], self.heads)[:, None]

    def owner(self) -> Tensor | None:
        """(n, L): which sequence of its window a row belongs to; None if each has a window of its own."""
        return None if self.window is None else self._part(self.plan.owner(), 1)

    def _share(self, buffer: Buffer) -> Tensor:
        """(n * heads, L, F): the chunk's part of a buffer."""
        return self._part(*buffer) if self.plan.ragged else buffer.rows[self.chosen].flatten(0, 1)

    def _is_direct(self, buffer: Buffer) -> bool:
        return buffer.rows.dtype == self.dtype and buffer.heads == self.heads

    def result(self, buffer: Buffer) -> Tensor:
        """Where the chunk shall write its rows: into the buffer itself if they lie there as the chunk has them."""
        return self._share(buffer) if self._is_direct(buffer) else self.empty(buffer.rows.shape[-1])

    def store(self, buffer: Buffer, value: Tensor) -> None:
        """Put a `result` into its buffer; query heads that share a key head are summed."""
        if not self._is_direct(buffer):
            group = self.heads // buffer.heads
            self._share(buffer).copy_(value if group == 1 else value.unflatten(0, (-1, group)).sum(1))

    def load_table(self, w: Tensor) -> Tensor:
        """(L, R) if the whole chunk shares it, otherwise (n * H, L, R)."""
        if self.call.per_entry:
            return self.load(w)
        if self.window is not None:
            return w.flatten(0, -2).index_select(0, self._table_rows(w)).view(-1, self.length, w.shape[-1])
        found = table_window(w, self.call, self.length)
        return found if found.dim() == 2 else found.repeat(self.count, 1, 1)

    def table_result(self, total: Tensor) -> Tensor:
        """Where the gradient of a table by position is written, or, if the whole chunk shares it, added to."""
        is_shared = total.dim() == 2 and self.window is None
        return table_window(total, self.call, self.length) if is_shared else self.empty(total.shape[-1])

    def _table_rows(self, w: Tensor) -> Tensor:
        """(n * H * L,) row of a table by position, (N, R) or (H, N, R), whose rows are numbered through."""
        found = self._part(self.plan.table_rows(w.shape[-2]), self.heads)
        if w.dim() == 3:
            found = found.unflatten(0, (-1, self.heads)) + torch.arange(self.heads, device=w.device)[:, None] * w.shape[-2]
        return found.flatten()

    def store_table(self, total: Tensor, value: Tensor) -> None:
        if self.window is not None:
            total.view(-1, total.shape[-1]).index_add_(0, self._table_rows(total), value.view(-1, total.shape[-1]))
        elif value.dim() == 3:
            table_window(total, self.call, self.length).add_(value.unflatten(0, (-1, self.heads)).sum(0))

    def mask(self, seed: Tensor, lo: int, hi: int, columns: int) -> Tensor:
        """Z of rows lo..hi, (n * H, m, c); whatever, but finite, where there is no item or nothing visible."""
        plan = self.plan
        if plan.drawn is not None:
            start = self._part(plan.first_drawn, self.heads)[:, lo:hi]
            return plan.drawn.unfold(0, columns, 1).index_select(0, start.flatten()).view(-1, hi - lo, columns)
        rows, first = torch.arange(lo, hi, device=seed.device), None
        if plan.ragged:
            first = plan.first[self._sequences : self._sequences + self.count]
        return scaled_mask(seed, self.call.dropout_p, self.sequence, self.heads, rows, columns, first, self.dtype).flatten(0, 1)
