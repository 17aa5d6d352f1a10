"""One chunk of a batch: its windows, its tensors in the dtype of the arithmetic, the visibility in a block of rows, and Z.

n windows of the chunk, H query heads, L window length, m rows of a block, c columns, N rows of all chunks and heads, F features.

A chunk holds each of its tensors as (n * H, L, F), contiguous. Rows without an item have weights that are finite but mean nothing.
Nothing comes of them: no row with an item gives weight to them, their output is not read and their output gradient is zero.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call, Inputs
from ..dropout import WEIGHTS_PER_CALL, draw, scaled_mask
from .packing import Block, Windows, row_blocks


@dataclass
class Chunk:
    call: Call
    heads: int
    dtype: torch.dtype
    first_row: int  # of buffers, where the chunk has n * H * L rows
    entries: slice  # of the batch, or of its windows
    length: int
    windows: Windows | None  # if there are lengths
    device: torch.device
    kept_columns: int  # Z, P and R of blocks with no more columns may be kept for the backward: each weighs no more than q, k and v
    _weights: dict[tuple[str, Block], Tensor] = field(default_factory=dict)  # "P" and "R", where they are kept
    _masks: dict[Block, Tensor] = field(default_factory=dict)
    _hidden: tuple[Block, Tensor | None] | None = None  # of the block asked for last: P and R need it one after the other

    def __post_init__(self) -> None:
        self.count = self.entries.stop - self.entries.start
        self.blocks = row_blocks(self.length, self.call.causal)

    def weights(self, name: str, block: Block, compute: Callable[[], Tensor], keep: bool) -> Tensor:
        """P or R of a block, not to be written to: what was kept of it, or computed, and kept if `keep` says so and it is small.

        Computed again in the backward, both would make a training step take 1.1 to 1.3 times as long.
        """
        weights = self._weights.get((name, block))
        if weights is None:
            weights = compute()
            if keep and block.columns <= self.kept_columns:
                self._weights[name, block] = weights
        return weights

    def empty(self, features: int) -> Tensor:
        return torch.empty(self.count * self.heads, self.length, features, dtype=self.dtype, device=self.device)

    def rows_of(self, buffer: Tensor) -> Tensor:
        """(n * H, L, F): the chunk's part of a buffer."""
        count = self.count * self.heads
        return buffer.flatten(0, -2).narrow(0, self.first_row, count * self.length).view(count, self.length, buffer.shape[-1])

    def load(self, x: Tensor) -> Tensor:
        """The chunk's rows of what `Plan.load` returned."""
        if self.windows is not None:
            return self.rows_of(x).to(self.dtype)
        group, x = self.heads // x.shape[1], x[self.entries]
        x = x if group == 1 else x.repeat_interleave(group, dim=1)
        return x.to(self.dtype).flatten(0, 1).contiguous()

    def load_table(self, w: Tensor) -> Tensor:
        """(L, R) if the whole chunk shares it, otherwise (n * H, L, R)."""
        if self.windows is not None or self.call.per_entry:
            return self.load(w)
        return (w[0, 0] if w.shape[1] == 1 else w[0].repeat(self.count, 1, 1)).to(self.dtype)

    def hidden(self, block: Block) -> Tensor | None:
        """(1 or n, 1, m, last columns of the block): added to scores, it hides the future, other sequences and padding."""
        if self._hidden is None or self._hidden[0] != block:
            mask = self._hidden_mask(block)
            lowest = torch.finfo(self.dtype).min / 2  # the sum of two is finite
            self._hidden = block, None if mask is None else mask.to(self.dtype).mul_(lowest).unsqueeze(-3)
        return self._hidden[1]

    def _hidden_mask(self, block: Block) -> Tensor | None:
        first, end, columns = block
        future = None
        if self.call.causal:
            future = torch.ones(end - first, end - first, dtype=torch.bool, device=self.device).triu_(1)[None]
        if self.windows is None or (self.call.causal and not self.windows.shared):
            return future  # padding comes after all items
        owner = self.windows.sequence.int()
        if not self.call.causal:
            owner = torch.where(self.windows.valid, owner, -1)
        others = owner[:, first:end, None] != owner[:, None, :columns]
        if future is not None:
            others[..., first:] |= future
        return others

    def mask(self, seed: Tensor, block: Block) -> Tensor:
        """Z, (n * H, m, c); arbitrary but finite where there is no item or nothing visible."""
        mask = self._masks.get(block)
        if mask is None:
            mask = self._draw_mask(seed, block)
            if block.columns <= self.kept_columns:
                self._masks[block] = mask
        return mask

    def _draw_mask(self, seed: Tensor, block: Block) -> Tensor:
        first, end, columns = block
        if self.windows is not None and self.windows.read:
            return self._draw_visible(seed, block, self.windows)
        sequence = torch.arange(self.entries.start, self.entries.stop, device=self.device)
        rows = torch.arange(first, end, device=self.device)
        heads = range(self.call.first_head, self.call.first_head + self.heads)
        return scaled_mask(seed, self.call.dropout_p, sequence, heads, rows, columns, None, self.dtype).flatten(0, 1)

    def _draw_visible(self, seed: Tensor, block: Block, windows: Windows) -> Tensor:
        """Draws for weights that items see, which are few where sequences share a window: row after row, with room for L more
        before the first and after the last, and each row of the mask reads on from where its window's first column would be."""
        first, end, columns = block
        rows = (x[:, None, first:end] for x in (windows.sequence, windows.position, windows.items))
        sequence, position, items = (x.expand(-1, self.heads, -1).flatten() for x in rows)
        last = position if self.call.causal else items - 1
        groups = torch.where(position < items, last // WEIGHTS_PER_CALL + 1, 0)
        ends = groups.cumsum(0)
        begins, count = ends - groups, int(ends[-1])
        row = torch.repeat_interleave(groups, output_size=count)
        head = row // (end - first) % self.heads + self.call.first_head
        counter = torch.arange(count) - begins[row], head, position[row], sequence[row]
        numbers = torch.zeros(count * WEIGHTS_PER_CALL + 2 * self.length, dtype=self.dtype)
        drawn = draw(seed, self.call.dropout_p, counter, self.dtype)
        numbers[self.length : -self.length].view(count, WEIGHTS_PER_CALL).copy_(drawn)
        offset = torch.arange(first, end).repeat(self.count * self.heads) - position  # of the sequence in its window
        starts = begins * WEIGHTS_PER_CALL - offset + self.length
        return numbers.unfold(0, columns, 1).index_select(0, starts).view(-1, end - first, columns)


class Products(NamedTuple):
    """What P, or for the last its square, is multiplied with; (n * H, L, F) each, or, of all chunks, (N, F)."""

    q_a: Tensor | None = None  # P W_q, of "stochastic" the `correlation_points` of that; likewise k_a; with lags see `lags.py`
    k_a: Tensor | None = None
    y: Tensor | None = None  # P V of "value"
    y_cov: Tensor | None = None  # (P*P) V_cov


def make_products(inputs: Inputs, call: Call, new: Callable[[int], Tensor]) -> Products:
    """The products that the call needs, each created by new(features)."""
    if inputs.w_q is None or inputs.w_k is None:
        return Products()
    q_a, k_a = (new(inputs.compared() * w.shape[-1]) for w in (inputs.w_q, inputs.w_k))
    if call.refinement != "value":
        return Products(q_a, k_a)
    return Products(q_a, k_a, new(inputs.v.shape[-1]), None if inputs.v_cov is None else new(inputs.v_cov.shape[-1]))


@dataclass
class Operands:
    """The inputs of a chunk."""

    q: Tensor  # (n * H, L, D)
    k: Tensor  # (n * H, L, D), one per query head
    values: list[Tensor]  # (n * H, L, D_v): V, if weights are shifted the row after each, and in stochastic attention V_cov
    tables: list[Tensor]  # W_q and W_k, none for "none"; (L, R) shared, otherwise (n * H, L, R)
    gate: Tensor | None  # (n * H, 1, 1)
    seed: Tensor | None
    lags: Tensor | None  # (n * H, A)


def next_rows(x: Tensor) -> Tensor:
    """Row i is row i + 1; the last one, which no weight reaches, is zero."""
    moved = torch.zeros_like(x)
    moved[:, :-1] = x[:, 1:]
    return moved


def load_operands(chunk: Chunk, loaded: Inputs) -> Operands:
    q, k, v, w_q, w_k, gate, _, seed, v_cov, lags = loaded
    if gate is not None:
        gate = gate.to(chunk.dtype).expand(chunk.heads).repeat(chunk.count).view(-1, 1, 1)
    if lags is not None:
        lags = lags.to(chunk.dtype).expand(chunk.heads, -1).repeat(chunk.count, 1)
    values = [chunk.load(x) for x in (v, v_cov) if x is not None]
    if chunk.call.shift:
        values = [next_rows(v) for v in values]
    tables = [chunk.load_table(w) for w in (w_q, w_k) if w is not None]
    return Operands(chunk.load(q), chunk.load(k), values, tables, gate, seed, lags)
