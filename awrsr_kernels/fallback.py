"""Refined attention in plain torch with O(L) memory and its own backward: the CPU path.

n windows of a chunk, H query heads, L window length, m rows of a block, c columns they can see, D, D_v, R feature sizes.

The batch is cut into chunks of windows of similar length (`_fallback_selection.py`; so padding costs little) and each chunk into
blocks of rows, small enough to stay in cache. In the causal case a block needs columns up to its own last row only, and one
sweep serves both stages: K_A (and P V) are complete for the rows above. The backward sweeps from the last block to the first,
where the same holds for the gradients: once a block has been visited, nothing below adds to its dK_A (and dY). The bidirectional
case takes one sweep per stage. Saved for the backward are Q_A, K_A and Y = P V of "value"; weights are recomputed, except where
all of them weigh no more than q, k and v, and computing them again would be a good part of the work. Plain attention goes to
torch's own kernel where that is faster (`_fallback_stock.py`). With M as in `reference.py`, Z the dropout mask, and
softmax'(g; p) = p * (g - rowsum(g * p)):

    simple, additive   dM = Z*(dO V^T)     dR = gate dM               dV = (M*Z)^T dO
    value              dR = Z*(dO Y^T)     dY = (R*Z)^T dO            dV = P^T dY
    dT = softmax'(dR; R)                   dQ_A = refine_scale dT K_A            dK_A = refine_scale dT^T Q_A
    dP = dQ_A W_q^T + dK_A W_k^T + (value: dY V^T) + (additive: dM)              dW_q = P^T dQ_A     dW_k = P^T dK_A
    dS = softmax'(dP; P)                   dQ = softmax_scale dS K               dK = softmax_scale dS^T Q

What torch does on a CPU shapes the rest. Batched products are quick only into contiguous memory, where they also scale and
add for free: so chunks are three-dimensional (n * H, rows, features), what only its own block reads (Q_A) is a tensor per block,
and results go straight to where they are wanted. Passes over a block of weights that are not products are few.

Rows without an item have weights that are finite but mean nothing. Nothing comes of them: no row with an item gives weight to
them, their output is not stored and their output gradient is read as zero.

Half precision is computed in float32 and rounded once, on the way out (torch's kernel rounds P, too, as the definition does).
"""

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._fallback_chunks import Place, Plan
from ._fallback_selection import LANES
from ._fallback_stock import stock_attention, takes
from .layout import Call, Inputs

_Named = dict[tuple[str, int], Tensor]  # by name and first row of the block
_WEIGHTS = ("first", "higher")


@dataclass
class _Chunk:
    """Some sequences in windows of one length, in the accumulation dtype: what a sweep works on."""

    place: Place
    q: Tensor  # (n * H, L, D)
    k: Tensor  # (n * H, L, D), one per query head
    v: Tensor  # (n * H, L, D_v)
    tables: list[Tensor]  # W_q and W_k, none for "none"; (L, R) shared, otherwise (n * H, L, R)
    gate: Tensor | None  # (n * H, 1, 1)
    future: Tensor | None  # (block rows, block rows): added to the scores of a block's rows and the same columns
    padding: Tensor | None  # (n * H, 1, L): added to scores, hides columns without an item
    owner: Tensor | None  # (n, L): which sequence of its window a row belongs to, if several share one
    seed: Tensor | None
    keep: bool  # whether weights stay for the backward
    kept: _Named
    _strangers: dict[int, Tensor] = field(default_factory=dict)  # of the block where they were asked for last

    @property
    def call(self) -> Call:
        return self.place.call

    @property
    def blocks(self) -> list[tuple[int, int]]:
        return self.place.blocks

    @property
    def factors(self) -> list[Tensor]:
        """What P is multiplied with; the last in "value" alone."""
        return [*self.tables, self.v]

    @property
    def length(self) -> int:
        return self.q.shape[1]

    def one_sweep(self) -> bool:
        return not self.tables or self.call.causal or len(self.blocks) == 1

    def columns(self, hi: int) -> int:
        return hi if self.call.causal else self.length

    def _weights(self, name: str, queries: Tensor, keys: Tensor, scale: float, lo: int, hi: int) -> Tensor:
        """Softmax of the queries of rows lo..hi against every key they can see, (n * H, m, c)."""
        if (name, lo) in self.kept:
            return self.kept[name, lo]
        right = keys[:, : self.columns(hi)].transpose(1, 2)
        columns = right.shape[-1]
        scale = scale if columns >= LANES else scale / math.log(2)
        scores = queries.new_empty(queries.shape[0], hi - lo, columns)
        scores.baddbmm_(queries, right, beta=0, alpha=scale)
        if self.future is not None:
            scores[..., lo:].add_(self.future[: hi - lo, : hi - lo])
        if self.padding is not None:
            scores += self.padding[..., :columns]
        if self.owner is not None:
            scores.unflatten(0, (-1, self.place.heads)).add_(self.strangers(lo, hi, columns))
        if columns >= LANES:
            scores = torch.softmax(scores, -1)  # in place it is slower
        else:  # torch's softmax goes number by number here, and its exp is slow where the result is zero
            scores.sub_(scores.amax(-1, keepdim=True)).exp2_()
            scores.div_(scores.sum(-1, keepdim=True))
        return self._found(name, lo, scores)

    def _found(self, name: str, lo: int, weights: Tensor) -> Tensor:
        if self.keep:
            self.kept[name, lo] = weights
        return weights

    def strangers(self, lo: int, hi: int, columns: int) -> Tensor:
        """(n, 1, m, c): added to scores, hides columns of other sequences; P and R of a block need it one after the other."""
        if lo not in self._strangers:
            assert self.owner is not None
            differ = self.owner[:, lo:hi, None] != self.owner[:, None, :columns]
            hidden = differ.to(self.q.dtype).mul_(torch.finfo(self.q.dtype).min / 2)
            self._strangers = {lo: hidden[:, None]}
        return self._strangers[lo]

    def first(self, lo: int, hi: int) -> Tensor:
        return self._weights("first", self.q[:, lo:hi], self.k, self.call.softmax_scale, lo, hi)

    def higher(self, products: _Named, lo: int, hi: int) -> Tensor:
        return self._weights("higher", products["q_a", lo], products["k_a", 0], self.call.refine_scale, lo, hi)

    def mask(self, lo: int, hi: int) -> Tensor | None:
        return None if self.seed is None else self.place.mask(self.seed, lo, hi, self.columns(hi))

    def softmax_backward(self, grad: Tensor, weights: Tensor, *, into: Tensor | None = None) -> Tensor:
        """softmax'(grad; weights), in the memory of grad unless `into` says where."""
        into = grad if into is None else into
        if weights.shape[-1] < LANES:
            shares = grad * weights
            return torch.addcmul(shares, weights, shares.sum(-1, keepdim=True), value=-1, out=into)
        return torch.ops.aten._softmax_backward_data.out(grad, weights, -1, weights.dtype, grad_input=into)

    def mixed(self, first: Tensor, higher: Tensor) -> Tensor:
        """M of "additive"."""
        return first + higher if self.gate is None else torch.addcmul(first, self.gate, higher)


def _tables(given: Inputs, call: Call) -> list[Tensor]:
    return [] if call.refinement == "none" else [w for w in (given.w_q, given.w_k) if w is not None]


def _kept(plan: Plan, loaded: Inputs) -> list[bool]:
    """Whether each chunk keeps its weights: its own, or those of all, weigh no more than q, k and v. The order of memory stays."""
    kinds, features = 1 + (plan.call.refinement != "none"), sum(x.shape[-1] for x in (loaded.q, loaded.k, loaded.v))
    areas = [kinds * sum((hi - lo) * (hi if plan.call.causal else p.length) for lo, hi in p.blocks) for p in plan.places]
    rooms = [p.length * features for p in plan.places]
    counts = [p.count for p in plan.places]
    fit = sum(map(operator.mul, counts, areas)) <= sum(map(operator.mul, counts, rooms))
    return [fit or area <= room for area, room in zip(areas, rooms, strict=True)]


def _load_chunk(place: Place, loaded: Inputs, keep: bool, kept: _Named) -> _Chunk:
    q, k, v, _, _, gate, _, seed, _ = loaded
    tables = [place.load_table(w) for w in _tables(loaded, place.call)]
    if gate is not None:
        gate = gate.to(place.dtype).expand(place.heads).repeat(place.count).view(-1, 1, 1)
    hidden = (None, None, None) if kept else (place.future(), place.padding(), place.owner())
    return _Chunk(place, place.load(q), place.load(k), place.load(v), tables, gate, *hidden, seed, keep, kept)


def _times(weights: Tensor, mask: Tensor | None) -> Tensor:
    return weights if mask is None else weights * mask


def _multiply(total: Tensor, left: Tensor, right: Tensor, *, add: bool = False, scale: float = 1.0) -> None:
    """total = scale * left @ right (add: +=), for (n * H, rows, features) and right without n * H if all share it."""
    if not total.is_contiguous():
        part = torch.empty_like(total, memory_format=torch.contiguous_format)
        _multiply(part, left, right, scale=scale)
        total.add_(part) if add else total.copy_(part)
    elif right.dim() == 2:
        total.view(-1, total.shape[-1]).addmm_(left.flatten(0, 1), right, beta=int(add), alpha=scale)
    else:
        total.baddbmm_(left, right, beta=int(add), alpha=scale)


def _products(chunk: _Chunk) -> _Named:
    """Room for P times W_q, by first row of the block; P times W_k; for "value", P times the values. Or for their gradients."""
    if not chunk.tables:
        return {}
    rank, empty = chunk.tables[0].shape[-1], chunk.place.empty
    found = {("q_a", lo): empty(rank, hi - lo) for lo, hi in chunk.blocks}
    found["k_a", 0] = empty(rank)
    if chunk.call.refinement == "value":
        found["y", 0] = empty(chunk.v.shape[-1])
    return found


def _of_block(products: _Named, lo: int, hi: int) -> list[Tensor]:
    """The rows of a block of [Q_A, K_A, Y]: what its P gives with [W_q, W_k, V]."""
    return [x if name == "q_a" else x[:, lo:hi] for (name, row), x in products.items() if name != "q_a" or row == lo]


def _forward_chunk(chunk: _Chunk, out: Tensor) -> _Named:
    """Writes the output (n * H, L, D_v); returns `_products`."""
    found = _products(chunk)
    values = found.get(("y", 0), chunk.v)
    direct = chunk.call.refinement in ("none", "additive")

    def correlate(lo: int, hi: int) -> Tensor | None:
        """First stage of a block; returns P if that meets the values."""
        first = chunk.first(lo, hi)
        for total, right in zip(_of_block(found, lo, hi), chunk.factors, strict=False):
            _multiply(total, first, right[..., : first.shape[-1], :])
        return first if direct else None

    def attend(lo: int, hi: int, first: Tensor | None) -> None:
        weights = chunk.higher(found, lo, hi) if found else None
        if first is not None:
            weights = first if weights is None else chunk.mixed(first, weights)
        assert weights is not None
        _multiply(out[:, lo:hi], _times(weights, chunk.mask(lo, hi)), values[:, : weights.shape[-1]])

    if chunk.one_sweep():
        for lo, hi in chunk.blocks:
            attend(lo, hi, correlate(lo, hi))
    else:
        for lo, hi in chunk.blocks:
            correlate(lo, hi)
        for lo, hi in chunk.blocks:
            attend(lo, hi, chunk.first(lo, hi) if direct else None)
    return found


class _ChunkGradients:
    """The backward of a chunk: gradients build up in the given tensors while blocks are visited."""

    def __init__(self, chunk: _Chunk, products: _Named, dout: Tensor, results: list[Tensor]) -> None:
        self.chunk, self.products, self.dout = chunk, products, dout
        self.dq, self.dk, self.dv, *self.dtables = results
        self.dproducts = {name: torch.empty_like(x) for name, x in products.items()}
        self.values, self.dvalues = products.get(("y", 0), chunk.v), self.dproducts.get(("y", 0), self.dv)
        self.dgate = None if chunk.gate is None else torch.zeros_like(chunk.gate)

        blocks = chunk.blocks[::-1]
        if chunk.one_sweep():
            for lo, hi in blocks:
                first = chunk.first(lo, hi)
                self._first_stage(lo, hi, first, self._second_stage(lo, hi, first))
        else:
            for lo, hi in blocks:
                self._second_stage(lo, hi, chunk.first(lo, hi))
            for lo, hi in blocks:
                direct = self._mixed_gradient(lo, hi, chunk.mask(lo, hi)) if chunk.call.refinement == "additive" else None
                self._first_stage(lo, hi, chunk.first(lo, hi), direct)

    def _collect(self, total: Tensor, left: Tensor, right: Tensor, hi: int, scale: float = 1.0) -> None:
        """total[:, :c] += left^T right; the first block visited, which ends at L, finds nothing in total yet."""
        _multiply(total[:, : left.shape[-1]], left.transpose(1, 2), right, add=hi < self.chunk.length, scale=scale)

    def _mixed_gradient(self, lo: int, hi: int, mask: Tensor | None) -> Tensor:
        """dM."""
        grad = self.dout[:, lo:hi] @ self.values[:, : self.chunk.columns(hi)].transpose(1, 2)
        return grad if mask is None else grad.mul_(mask)

    def _second_stage(self, lo: int, hi: int, first: Tensor) -> Tensor | None:
        """Everything below M of a block but P; returns what reaches P directly (dM of "none" and "additive")."""
        chunk, refinement, scale = self.chunk, self.chunk.call.refinement, self.chunk.call.refine_scale
        mask = chunk.mask(lo, hi)
        higher = first if refinement == "none" else chunk.higher(self.products, lo, hi)
        weights = chunk.mixed(first, higher) if refinement == "additive" else higher
        self._collect(self.dvalues, _times(weights, mask), self.dout[:, lo:hi], hi)
        del weights
        grad = self._mixed_gradient(lo, hi, mask)
        if refinement == "none":
            return grad
        if self.dgate is not None:
            self.dgate += torch.linalg.vecdot(higher.flatten(1), grad.flatten(1)).view_as(self.dgate)
        keep_grad = refinement == "additive"
        into = None if not keep_grad else torch.empty_like(grad) if chunk.keep else higher
        dscores = chunk.softmax_backward(grad, higher, into=into)
        if chunk.gate is not None:
            dscores *= chunk.gate
        _multiply(self.dproducts["q_a", lo], dscores, self.products["k_a", 0][:, : dscores.shape[-1]], scale=scale)
        self._collect(self.dproducts["k_a", 0], dscores, self.products["q_a", lo], hi, scale)
        return grad if keep_grad else None

    def _first_stage(self, lo: int, hi: int, first: Tensor, grad: Tensor | None) -> None:
        """Everything below P of a block; grad is what reached P directly."""
        chunk, columns, scale = self.chunk, first.shape[-1], self.chunk.call.softmax_scale
        dfactors = [*self.dtables, self.dv]
        for factor, dfactor, drows in zip(chunk.factors, dfactors, _of_block(self.dproducts, lo, hi), strict=False):
            if dfactor.dim() == 2:  # one product over sequences, heads and rows together
                drows = drows.contiguous()
                dfactor[:columns].addmm_(first.flatten(0, 1).T, drows.flatten(0, 1))
            else:
                self._collect(dfactor, first, drows, hi)
            add = grad is not None
            grad = torch.empty_like(first) if grad is None else grad
            _multiply(grad, drows, factor[..., :columns, :].transpose(-1, -2), add=add)
        assert grad is not None
        dscores = chunk.softmax_backward(grad, first)
        _multiply(self.dq[:, lo:hi], dscores, chunk.k[:, :columns], scale=scale)
        self._collect(self.dk, dscores, chunk.q[:, lo:hi], hi, scale)


def _forward(plan: Plan, loaded: Inputs, dtype: torch.dtype, saved: list[_Named] | None) -> Tensor:
    """The output in rows form and `dtype`; what the backward needs of each chunk is appended to `saved`."""
    out = plan.buffer(plan.heads, loaded.v.shape[-1], dtype)
    for place, keep in zip(plan.places, _kept(plan, loaded), strict=True):
        chunk = _load_chunk(place, loaded, saved is not None and keep, {})
        value = place.result(out)
        products = _forward_chunk(chunk, value)
        if saved is not None:
            saved.append(products | chunk.kept)
        place.store(out, value)
    return plan.collect(out, dtype)


class _RefinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args):  # type: ignore[no-untyped-def]
        *tensors, call = args
        saved: list[_Named] = []
        given = Inputs(*tensors)
        plan = Plan(given, call)
        loaded = plan.load_inputs(given)
        out = _forward(plan, loaded, given.v.dtype, saved)
        eager = not torch.compiler.is_compiling()
        ctx.call, ctx.names = call, [list(named) for named in saved]
        ctx.plan = plan if eager else None  # it has no tensors of the caller
        ctx.loaded = eager and plan.ragged  # rows once picked are not picked again
        ctx.kinds = [(x.shape, x.dtype) for x in (given.q, given.k, given.v, *_tables(given, call))]
        ctx.save_for_backward(*(loaded if ctx.loaded else given), *(x for named in saved for x in named.values()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        size, call = len(Inputs._fields), ctx.call
        given, saved = Inputs(*ctx.saved_tensors[:size]), iter(ctx.saved_tensors[size:])
        plan = ctx.plan or Plan(given, call)
        loaded = given if ctx.loaded else plan.load_inputs(given)
        dout = plan.load_items(dout)
        count = len(ctx.kinds) if call.per_entry else 3  # of gradients that have rows like the output
        inputs, tables = ctx.kinds[:count], ctx.kinds[count:]
        buffers = [plan.buffer(shape[1], shape[-1], dtype) for shape, dtype in inputs]
        dtables = [dout.new_zeros(shape[2:] if shape[1] == 1 else shape[1:], dtype=plan.dtype) for shape, _ in tables]
        dgate = dout.new_zeros(plan.heads, dtype=plan.dtype)
        for place, names in zip(plan.places, ctx.names, strict=True):
            named = {name: next(saved) for name in names}
            kept = {name: x for name, x in named.items() if name[0] in _WEIGHTS}
            products = {name: x for name, x in named.items() if name not in kept}
            chunk = _load_chunk(place, loaded, bool(kept), kept)
            results = [place.result(x) for x in buffers] + [place.table_result(x) for x in dtables]
            found = _ChunkGradients(chunk, products, place.load(dout), results)
            for buffer, value in zip(buffers, results, strict=False):
                place.store(buffer, value)
            for total, value in zip(dtables, results[3:], strict=False):
                place.store_table(total, value)
            if found.dgate is not None:
                dgate += found.dgate.view(-1, place.heads).sum(0)
        grads = [plan.collect(buffer, dtype) for buffer, (_, dtype) in zip(buffers, inputs, strict=True)]
        grads += [total.to(dtype).view(shape) for total, (shape, dtype) in zip(dtables, tables, strict=True)]
        if (gate := given.gate) is not None:
            dgate = (dgate if gate.shape[0] == plan.heads else dgate.sum(0, keepdim=True)).to(gate.dtype)
        return *grads, *[None] * (5 - len(grads)), None if gate is None else dgate, None, None, None, None


def fallback_attention(given: Inputs, call: Call) -> tuple[Tensor, ...]:
    """The outputs in rows form, (entries, H, rows, D_v). Differentiable once; plain aten operations without gradients."""
    if call.gaussian:
        raise NotImplementedError
    if takes(given, call):
        return (stock_attention(given, call),)
    if given.need_gradient():
        return (_RefinedAttention.apply(*given, call),)
    plan = Plan(given, call)
    return (_forward(plan, plan.load_inputs(given), given.v.dtype, None),)
