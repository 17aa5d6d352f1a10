"""Refined attention in plain torch with O(L) memory and its own backward: the CPU path.

n sequences of a chunk, H query heads, L window length, m rows of a block, c columns they can see, D, D_v, R feature sizes.

The batch is cut into chunks of sequences of similar length (so padding costs little) and each chunk into blocks of rows, small
enough to stay in cache. In the causal case a block needs columns up to its own last row only, and one sweep serves both
stages: K_A (and P V) are complete for the rows above. The backward sweeps from the last block to the first, where the same
holds for the gradients: once a block has been visited, nothing below adds to its dK_A (and dY). The bidirectional case takes
one sweep per stage. Saved for the backward are Q_A, K_A and Y = P V of "value"; weights are recomputed. With M as in
`reference.py`, Z the dropout mask, and softmax'(g; p) = p * (g - rowsum(g * p)):

    simple, additive   dM = Z*(dO V^T)     dR = gate dM               dV = (M*Z)^T dO
    value              dR = Z*(dO Y^T)     dY = (R*Z)^T dO            dV = P^T dY
    dT = refine_scale softmax'(dR; R)      dQ_A = dT K_A              dK_A = dT^T Q_A
    dP = dQ_A W_q^T + dK_A W_k^T + (value: dY V^T) + (additive: dM)   dW_q = P^T dQ_A     dW_k = P^T dK_A
    dS = softmax_scale softmax'(dP; P)     dQ = dS K                  dK = dS^T Q

Half precision is computed in float32 and rounded once, on the way out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import scaled_mask
from .layout import Call, Windows, gather_windows, make_windows, row_buffer, scatter_windows, sequence_lengths, table_window

_BLOCK_ROWS = 128  # rows whose weights exist at a time
_BLOCK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights that exist at a time: a share of the cache, or enough to fill a GPU


@dataclass
class _Chunk:
    """Some sequences in windows of one length, in the accumulation dtype: what a sweep works on."""

    q: Tensor  # (n, H, L, D), scaled by softmax_scale
    k: Tensor  # (n, H, L, D), one per query head
    v: Tensor  # (n, H, L, D_v)
    tables: Tensor | None  # (L, 2R) shared, (H, L, 2R) per head or (n, H, L, 2R) per entry: [W_q | W_k]
    gate: Tensor | None  # (H or 1, 1, 1)
    seed: Tensor | None
    sequence: Tensor  # (n,)
    windows: Windows | None
    call: Call

    @property
    def length(self) -> int:
        return self.q.shape[2]

    def blocks(self) -> list[tuple[int, int]]:
        return [(lo, min(lo + _BLOCK_ROWS, self.length)) for lo in range(0, self.length, _BLOCK_ROWS)]

    def columns(self, hi: int) -> int:
        return hi if self.call.causal else self.length

    def weights(self, queries: Tensor, keys: Tensor, lo: int, hi: int) -> Tensor:
        """Softmax of queries of rows lo..hi against every key they can see, (n, H, m, c)."""
        columns = self.columns(hi)
        scores = queries @ keys[:, :, :columns].transpose(-1, -2)
        lowest = torch.finfo(scores.dtype).min
        if self.windows is not None:
            scores.masked_fill_(~self.windows.valid[:, None, None, :columns], lowest)
        if self.call.causal:
            rows = torch.arange(hi - lo, device=scores.device)
            scores[..., lo:].masked_fill_(rows > rows[:, None], lowest)
        weights = scores.softmax(-1)
        if self.windows is not None:  # a row without an item came out uniform
            weights.masked_fill_(~self.windows.valid[:, None, lo:hi, None], 0)
        return weights

    def first(self, lo: int, hi: int) -> Tensor:
        return self.weights(self.q[:, :, lo:hi], self.k, lo, hi)

    def higher(self, space: Tensor, lo: int, hi: int) -> Tensor:
        q_a, k_a = space.chunk(2, dim=-1)
        return self.weights(q_a[:, :, lo:hi] * self.call.refine_scale, k_a, lo, hi)

    def mask(self, lo: int, hi: int) -> Tensor | None:
        if self.seed is None:
            return None
        rows = torch.arange(lo, hi, device=self.q.device)
        first = None if self.windows is None else self.windows.first
        return scaled_mask(
            self.seed, self.call.dropout_p, self.sequence, self.q.shape[1], rows, self.columns(hi), first, self.q.dtype
        )

    def one_sweep(self) -> bool:
        return self.call.causal or self.length <= _BLOCK_ROWS


def _times(weights: Tensor, mask: Tensor | None) -> Tensor:
    return weights if mask is None else weights * mask


def _mixed(first: Tensor, higher: Tensor, gate: Tensor | None) -> Tensor:
    """M of "additive"."""
    return first + (higher if gate is None else gate * higher)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total[:, :, :c] += left^T right, for left (n, H, m, c) and right (n, H, m, F)."""
    rows = total.view(-1, *total.shape[2:])[:, : left.shape[-1]]
    rows.baddbmm_(left.flatten(0, 1).transpose(-1, -2), right.flatten(0, 1))


def _forward_chunk(chunk: _Chunk) -> tuple[Tensor, list[Tensor]]:
    """The output (n, H, L, D_v) and what the backward needs: [Q_A | K_A] and, for "value", Y."""
    refinement, v, tables = chunk.call.refinement, chunk.v, chunk.tables
    out = torch.empty_like(v)
    if tables is None:
        for lo, hi in chunk.blocks():
            out[:, :, lo:hi] = _times(chunk.first(lo, hi), chunk.mask(lo, hi)) @ v[:, :, : chunk.columns(hi)]
        return out, []

    space = v.new_empty(*v.shape[:3], tables.shape[-1])
    values = torch.empty_like(v) if refinement == "value" else v

    def correlate(lo: int, hi: int) -> Tensor:
        first = chunk.first(lo, hi)
        space[:, :, lo:hi] = first @ tables[..., : first.shape[-1], :]
        if refinement == "value":
            values[:, :, lo:hi] = first @ v[:, :, : first.shape[-1]]
        return first

    def attend(lo: int, hi: int, first: Tensor | None) -> None:
        weights = chunk.higher(space, lo, hi)
        if refinement == "additive":
            weights = _mixed(chunk.first(lo, hi) if first is None else first, weights, chunk.gate)
        out[:, :, lo:hi] = _times(weights, chunk.mask(lo, hi)) @ values[:, :, : weights.shape[-1]]

    if chunk.one_sweep():
        for lo, hi in chunk.blocks():
            attend(lo, hi, correlate(lo, hi))
    else:
        for lo, hi in chunk.blocks():
            correlate(lo, hi)
        for lo, hi in chunk.blocks():
            attend(lo, hi, None)
    return out, [space, values] if refinement == "value" else [space]


class _ChunkGradients:
    """The backward of a chunk: gradients build up in its tensors while blocks are visited."""

    def __init__(self, chunk: _Chunk, saved: list[Tensor], dout: Tensor) -> None:
        self.chunk, self.dout = chunk, dout
        # Contiguous whatever the chunk's strides are: products are added to views of them.
        self.dq, self.dk, self.dv = (x.new_zeros(x.shape) for x in (chunk.q, chunk.k, chunk.v))
        self.dtables = None if chunk.tables is None else torch.zeros_like(chunk.tables)
        self.dgate = None if chunk.gate is None else dout.new_zeros(dout.shape[1])
        if chunk.tables is not None:
            self.space, self.dspace = saved[0], torch.zeros_like(saved[0])
        self.is_value = chunk.call.refinement == "value"
        self.values = saved[1] if self.is_value else chunk.v
        self.dvalues = chunk.v.new_zeros(chunk.v.shape) if self.is_value else self.dv

        blocks = chunk.blocks()[::-1]
        if chunk.tables is None or chunk.one_sweep():
            for lo, hi in blocks:
                first = chunk.first(lo, hi)
                self._first_stage(lo, hi, first, self._weights_gradient(lo, hi, first))
        else:
            for lo, hi in blocks:
                self._weights_gradient(lo, hi, chunk.first(lo, hi))
            for lo, hi in blocks:
                mixed = self._mixed_gradient(lo, hi)[0] if chunk.call.refinement == "additive" else None
                self._first_stage(lo, hi, chunk.first(lo, hi), mixed)

    def _mixed_gradient(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        """dM, and the dropout mask it went through."""
        mask = self.chunk.mask(lo, hi)
        grad = self.dout[:, :, lo:hi] @ self.values[:, :, : self.chunk.columns(hi)].transpose(-1, -2)
        return (grad if mask is None else grad.mul_(mask)), mask

    def _weights_gradient(self, lo: int, hi: int, first: Tensor) -> Tensor | None:
        """Second stage of a block; returns what reaches P directly (dM of "none" and "additive")."""
        chunk, refinement = self.chunk, self.chunk.call.refinement
        grad, mask = self._mixed_gradient(lo, hi)
        if refinement == "none":
            _add_product(self.dv, _times(first, mask), self.dout[:, :, lo:hi])
            return grad
        higher = chunk.higher(self.space, lo, hi)
        weights, higher_grad = higher, grad
        if refinement == "additive":
            weights = _mixed(first, higher, chunk.gate)
            if chunk.gate is not None and self.dgate is not None:
                self.dgate += (higher * grad).sum((0, 2, 3))
                higher_grad = chunk.gate * grad
        _add_product(self.dvalues, _times(weights, mask), self.dout[:, :, lo:hi])
        dscores = _softmax_backward(higher_grad, higher).mul_(chunk.call.refine_scale)
        (q_a, k_a), rank = self.space.chunk(2, dim=-1), self.space.shape[-1] // 2
        self.dspace[:, :, lo:hi, :rank] = dscores @ k_a[:, :, : dscores.shape[-1]]
        _add_product(self.dspace[..., rank:], dscores, q_a[:, :, lo:hi])
        return grad if refinement == "additive" else None

    def _first_stage(self, lo: int, hi: int, first: Tensor, grad: Tensor | None) -> None:
        """Everything below P of a block; grad is what reached P directly."""
        chunk, columns = self.chunk, first.shape[-1]
        if chunk.tables is not None:
            assert self.dtables is not None
            dspace = self.dspace[:, :, lo:hi]
            through_space = dspace @ chunk.tables[..., :columns, :].transpose(-1, -2)
            grad = through_space if grad is None else through_space.add_(grad)
            self._add_tables(first, dspace)
        assert grad is not None
        if self.is_value:
            dvalues = self.dvalues[:, :, lo:hi]
            grad = grad + dvalues @ chunk.v[:, :, :columns].transpose(-1, -2)
            _add_product(self.dv, first, dvalues)
        dscores = _softmax_backward(grad, first)
        self.dq[:, :, lo:hi] = (dscores @ chunk.k[:, :, :columns]).mul_(chunk.call.softmax_scale)
        _add_product(self.dk, dscores, chunk.q[:, :, lo:hi])

    def _add_tables(self, first: Tensor, dspace: Tensor) -> None:
        assert self.dtables is not None
        rows = self.dtables[..., : first.shape[-1], :]
        if self.dtables.dim() == 2:  # one product over sequences, heads and rows together
            rows += first.flatten(0, 2).T @ dspace.flatten(0, 2)
        else:
            product = first.transpose(-1, -2) @ dspace
            rows += product if self.dtables.dim() == 4 else product.sum(0)


def _softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    return torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)


def _selections(call: Call, q: Tensor, bounds: Tensor | None) -> Iterator[tuple[slice | Tensor, int]]:
    """(sequences, window length) of each chunk, of at most `_BLOCK_WEIGHTS` weights at a time."""
    budget = _BLOCK_WEIGHTS.get(q.device.type, _BLOCK_WEIGHTS["cpu"])

    def weights(length: int) -> int:
        return q.shape[1] * min(length, _BLOCK_ROWS) * length

    count = q.shape[0] if bounds is None else bounds.shape[0] - call.varlen
    if bounds is None or bounds.device.type != "cpu" or torch.compiler.is_compiling():
        step = max(1, budget // weights(call.max_len))
        for lo in range(0, count, step):
            chosen = slice(lo, min(lo + step, count))
            yield (chosen if bounds is None else torch.arange(chosen.start, chosen.stop, device=q.device)), call.max_len
        return
    lengths, order = sequence_lengths(call, bounds).sort()
    lo, ordered = 0, lengths.tolist()
    for hi in range(1, count + 1):
        if hi < count and (hi + 1 - lo) * weights(ordered[hi]) <= budget:
            continue
        if ordered[hi - 1]:
            yield order[lo:hi], ordered[hi - 1]
        lo = hi


def _load_chunk(
    chosen: slice | Tensor,
    length: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    gate: Tensor | None,
    bounds: Tensor | None,
    seed: Tensor | None,
    call: Call,
) -> _Chunk:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    if isinstance(chosen, slice):
        windows = None
        sequence = torch.arange(chosen.start, chosen.stop, device=q.device)
    else:
        assert bounds is not None
        windows = make_windows(call, bounds, q.shape[2], length, chosen)
        sequence = windows.sequence

    def load(x: Tensor, group: int = 1) -> Tensor:
        if windows is not None:
            return gather_windows(x, windows, call.varlen, group).to(dtype)
        assert isinstance(chosen, slice)
        found = x[chosen].to(dtype)
        return found if group == 1 else found.repeat_interleave(group, dim=1)

    tables = None
    if w_q is not None and w_k is not None:
        pair = torch.cat([w_q, w_k], dim=-1)
        if call.per_entry:
            tables = load(pair)
        else:
            tables = table_window(pair, call, length).to(q.dtype).to(dtype)[0]
            tables = tables[0] if tables.shape[0] == 1 else tables
    return _Chunk(
        load(q) * call.softmax_scale,
        load(k, group),
        load(v, group),
        tables,
        None if gate is None else gate.to(dtype).view(-1, 1, 1),
        seed,
        sequence,
        windows,
        call,
    )


def _store(out: Tensor, value: Tensor, chosen: slice | Tensor, chunk: _Chunk) -> None:
    """Put a chunk's (n, H, L, F) into a row buffer; query heads that share a key head are summed."""
    if out.shape[1] != value.shape[1]:
        value = value.unflatten(1, (out.shape[1], -1)).sum(2)
    if chunk.windows is None:
        out[chosen] = value.to(out.dtype)
    else:
        scatter_windows(out, value, chunk.windows, chunk.call.varlen)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    gate: Tensor | None,
    bounds: Tensor | None,
    seed: Tensor | None,
    call: Call,
) -> tuple[Tensor, list[Tensor]]:
    if call.refinement == "none":
        w_q = w_k = None
    out = row_buffer(q, q.shape[1], v.shape[-1], call.varlen)
    saved: list[Tensor] = []
    for chosen, length in _selections(call, q, bounds):
        chunk = _load_chunk(chosen, length, q, k, v, w_q, w_k, gate, bounds, seed, call)
        value, kept = _forward_chunk(chunk)
        _store(out, value, chosen, chunk)
        saved += kept
    return out[:, :, : q.shape[2]], saved


class _RefinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, w_q, w_k, gate, bounds, seed, call):  # type: ignore[no-untyped-def]
        out, saved = _forward(q, k, v, w_q, w_k, gate, bounds, seed, call)
        ctx.call = call
        ctx.save_for_backward(q, k, v, w_q, w_k, gate, bounds, seed, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        q, k, v, w_q, w_k, gate, bounds, seed, *saved = ctx.saved_tensors
        call, num_rows = ctx.call, q.shape[2]
        tables = call.refinement != "none"
        dq, dk, dv = (row_buffer(x, x.shape[1], x.shape[-1], call.varlen) for x in (q, k, v))
        pair = dgate = None
        if tables:
            rank, wide = w_q.shape[-1], torch.promote_types(q.dtype, torch.float32)
            if call.per_entry:
                pair = row_buffer(w_q, w_q.shape[1], 2 * rank, call.varlen)
            else:
                pair = w_q.new_zeros(*w_q.shape[:3], 2 * rank, dtype=wide)
            dgate = None if gate is None else gate.new_zeros(q.shape[1], dtype=wide)
        kept = iter(saved)
        for chosen, length in _selections(call, q, bounds):
            chunk = _load_chunk(
                chosen, length, q, k, v, w_q if tables else None, w_k if tables else None, gate, bounds, seed, call
            )
            dchunk = (
                dout[chosen] if chunk.windows is None else gather_windows(dout, chunk.windows, call.varlen)
            ).to(chunk.q.dtype)
            mine = [next(kept) for _ in range(tables + (call.refinement == "value"))]
            found = _ChunkGradients(chunk, mine, dchunk)
            for out, value in ((dq, found.dq), (dk, found.dk), (dv, found.dv)):
                _store(out, value, chosen, chunk)
            if pair is not None and found.dtables is not None:
                if call.per_entry:
                    _store(pair, found.dtables, chosen, chunk)
                else:
                    table_window(pair, call, length).add_(found.dtables)
            if dgate is not None:
                dgate += found.dgate
        dq, dk, dv = dq[:, :, :num_rows], dk[:, :, :num_rows], dv[:, :, :num_rows]
        if pair is None:
            return dq, dk, dv, None, None, None, None, None, None
        dw_q, dw_k = pair[:, :, : w_q.shape[2]].to(w_q.dtype).chunk(2, dim=-1)
        if dgate is not None:
            dgate = (dgate if gate.shape[0] == q.shape[1] else dgate.sum(0, keepdim=True)).to(gate.dtype)
        return dq, dk, dv, dw_q, dw_k, dgate, None, None, None


def fallback_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    gate: Tensor | None,
    bounds: Tensor | None,
    seed: Tensor | None,
    call: Call,
) -> Tensor:
    """The output in rows form, (entries, H, rows, D_v). Differentiable once; plain aten operations without gradients."""
    tensors = (q, k, v, w_q, w_k, gate, bounds, seed)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _RefinedAttention.apply(*tensors, call)
    return _forward(*tensors, call)[0]
