"""The forward pass, chunk by chunk and block by block.

n windows of a chunk, H query heads, L window length, m rows of a block, c columns, D, D_v, R feature sizes.

A chunk is cut into blocks of rows, small enough to stay in cache. In the causal case a block needs columns up to its own last row
only, and one sweep over the blocks serves both stages: K_A (and P V) are complete for the rows above. The bidirectional case takes
one sweep per stage. P and R are as in `reference.py`, those of stochastic attention (the points x in Q and K) in another form: a
softmax sees no difference where a row adds the same number to all its scores, so

    S_ij = softmax_scale (x_i.x_j - |x_j|^2 / 2)          where `attention.py` has doubled the scale

and T of "stochastic" likewise. What torch does on a CPU shapes the rest. Batched products are quick only into contiguous memory,
where they also scale and add for free: so chunks are three-dimensional, (n * H, rows, features), and results go straight to where
they are wanted. Passes over a block of weights that are not products are few.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Inputs
from .chunks import Chunk, Operands, Products, load_operands, make_products
from .lags import Lags
from .packing import Block
from .plan import Plan


@dataclass
class Projection:
    """product = P factor, or if `squared` (P*P) factor; in the backward the gradients of both."""

    factor: Tensor  # (n * H, L, F), or (L, F) shared
    product: Tensor  # (n * H, L, F)
    squared: bool = False


def projections(tables: list[Tensor], values: list[Tensor], products: Products) -> list[Projection]:
    """The factors that P is multiplied by; with lags the products go to slot 0."""
    if products.q_a is None or products.k_a is None:
        return []
    factors = [Projection(w, x[..., : w.shape[-1]]) for w, x in zip(tables, (products.q_a, products.k_a), strict=True)]
    if products.y is not None:
        factors.append(Projection(values[0], products.y))
    if products.y_cov is not None:
        factors.append(Projection(values[1], products.y_cov, squared=True))
    return factors


def met_values(values: list[Tensor], products: Products) -> list[Tensor]:
    """What M multiplies and, in stochastic attention, what its square multiplies."""
    return values if products.y is None else [x for x in (products.y, products.y_cov) if x is not None]


def multiply(total: Tensor, left: Tensor, right: Tensor, *, add: bool = False, scale: float = 1.0) -> None:
    """total = scale * left @ right (add: +=), for (n * H, rows, features) and right without n * H if all share it."""
    if not total.is_contiguous():
        part = torch.empty_like(total, memory_format=torch.contiguous_format)
        multiply(part, left, right, scale=scale)
        total.add_(part) if add else total.copy_(part)
    elif right.dim() == 2:
        total.view(-1, total.shape[-1]).addmm_(left.flatten(0, 1), right, beta=int(add), alpha=scale)
    else:
        total.baddbmm_(left, right, beta=int(add), alpha=scale)


def key_term(points: Tensor) -> Tensor:
    """(n * H, L, F) -> (n * H, 1, L): what a key adds to the dot products with it, -|x_j|^2 / 2."""
    return points.square().sum(-1).mul_(-0.5).unsqueeze(1)


def _to_points(x: Tensor) -> None:
    """`correlation_points` in place; passes over half of each row are slow, so that half is moved out and back."""
    half = x.chunk(2, -1)[1]
    r = half.contiguous()
    low = r.clamp(max=0).mul_(0.5).exp_()
    half.copy_(r.clamp_(min=0).add_(1).sqrt_().mul_(low))


def _softmax(chunk: Chunk, block: Block, queries: Tensor, keys: Tensor, term: Tensor | None, scale: float) -> Tensor:
    """Weights of a block's queries for the keys that they may see, (n * H, m, c); term: `key_term`, where scores are distances."""
    first, end, columns = block
    scores = queries.new_empty(queries.shape[0], end - first, columns)
    if term is not None:
        scores.copy_(term[..., :columns] * scale)  # the product adds to it
    right = keys[:, :columns].transpose(1, 2)
    scores.baddbmm_(queries[:, first:end], right, beta=int(term is not None), alpha=scale)
    hidden = chunk.hidden(block)
    if hidden is not None:
        # masked_fill_, which would hide a NaN, too, takes ten times as long, as long as the softmax
        scores.unflatten(0, (-1, chunk.heads))[..., columns - hidden.shape[-1] :].add_(hidden)
    return torch.softmax(scores, -1)  # in place it is slower


def first_weights(chunk: Chunk, block: Block, operands: Operands, term: Tensor | None, keep: bool = False) -> Tensor:
    """P of a block."""
    call, (q, k) = chunk.call, (operands.q, operands.k)
    return chunk.weights("P", block, lambda: _softmax(chunk, block, q, k, term, call.softmax_scale), keep)


def higher_weights(chunk: Chunk, block: Block, products: Products, term: Tensor | None, keep: bool = False) -> Tensor:
    """R of a block."""
    call, (q_a, k_a, *_) = chunk.call, products
    assert q_a is not None and k_a is not None
    return chunk.weights("R", block, lambda: _softmax(chunk, block, q_a, k_a, term, call.refine_scale), keep)


def mixed(first: Tensor, higher: Tensor, gate: Tensor | None) -> Tensor:
    """M of "additive"."""
    return first + higher if gate is None else torch.addcmul(first, gate, higher)


def without_own(chunk: Chunk, block: Block, weights: Tensor) -> Tensor:
    """Weights of a block, in place, without each row's weight for itself if the call shifts: it would fall on the future."""
    if chunk.call.shift:
        weights[..., block.first : block.end].diagonal(dim1=-2, dim2=-1).zero_()
    return weights


def one_sweep(chunk: Chunk) -> bool:
    return chunk.call.refinement == "none" or chunk.call.causal or len(chunk.blocks) == 1


class _ChunkForward:
    """Writes the products and the outputs (n * H, L, D_v), of the values and, in stochastic attention, of their covariances."""

    def __init__(self, chunk: Chunk, operands: Operands, products: Products, outs: list[Tensor], keep_weights: bool) -> None:
        self.chunk, self.operands, self.products, self.outs, self.keep_weights = chunk, operands, products, outs, keep_weights
        self.projections = projections(operands.tables, operands.values, products)
        self.values = met_values(operands.values, products)
        self.lags = None if operands.lags is None else Lags(chunk, operands.lags, operands.tables[0].shape[-1])
        self.term = key_term(operands.k) if chunk.call.stochastic else None
        self.higher_term: Tensor | None = None
        if chunk.call.refinement == "stochastic":
            self.higher_term = operands.k.new_empty(operands.k.shape[0], 1, chunk.length)

    def run(self) -> None:
        blocks = self.chunk.blocks
        if one_sweep(self.chunk):
            for block in blocks:
                first = self._first(block)
                self._project(block, first)
                self._attend(block, first)
            return
        for block in blocks:
            self._project(block, self._first(block))
        for block in blocks:
            self._attend(block, self._first(block) if self.chunk.call.refinement == "additive" else None)

    def _first(self, block: Block) -> Tensor:
        return first_weights(self.chunk, block, self.operands, self.term, self.keep_weights)

    def _project(self, block: Block, first: Tensor) -> None:
        rows = slice(block.first, block.end)
        for each in self.projections:
            multiply(each.product[:, rows], first.square() if each.squared else first, each.factor[..., : block.columns, :])
            if self.higher_term is not None:
                _to_points(each.product[:, rows])
        if self.lags is not None and self.products.q_a is not None and self.products.k_a is not None:
            self.lags.widen(block, self.products.q_a, self.products.k_a)
        if self.higher_term is not None and self.products.k_a is not None:
            self.higher_term[..., rows] = key_term(self.products.k_a[:, rows])

    def _attend(self, block: Block, first: Tensor | None) -> None:
        """first: P, if it multiplies the values."""
        chunk, products, seed = self.chunk, self.products, self.operands.seed
        mix = first
        if chunk.call.refinement != "none":
            mix = higher_weights(chunk, block, products, self.higher_term, self.keep_weights)
            if chunk.call.refinement == "additive" and first is not None:
                mix = mixed(first, mix, self.operands.gate)
        assert mix is not None
        own = seed is None and chunk.call.refinement != "additive"  # P or R itself, which may be kept
        mix = mix if seed is None else mix * chunk.mask(seed, block)
        if chunk.call.shift:
            mix = without_own(chunk, block, mix.clone() if own else mix)
        for power, (out, value) in enumerate(zip(self.outs, self.values, strict=True)):
            multiply(out[:, block.first : block.end], mix.square() if power else mix, value[:, : block.columns])


def forward_pass(
    plan: Plan, inputs: Inputs, loaded: Inputs, *, keep: bool, keep_weights: bool = False
) -> tuple[tuple[Tensor, ...], Products]:
    """The outputs in rows form and, if `keep`, the products of all chunks, which the backward needs.

    keep_weights: whether chunks, which the same plan's backward visits again, may keep P and R.
    """
    values = [x for x in (inputs.v, inputs.v_cov) if x is not None]
    outs = [plan.buffer(x.shape[-1]) for x in values]
    buffers = make_products(inputs, plan.call, plan.buffer) if keep else Products()
    for chunk in plan.chunks:
        products = Products(*(x if x is None else chunk.rows_of(x) for x in buffers))
        if not keep:
            products = make_products(inputs, plan.call, chunk.empty)
        _ChunkForward(chunk, load_operands(chunk, loaded), products, [chunk.rows_of(out) for out in outs], keep_weights).run()
    return tuple(plan.collect(out, x.dtype) for out, x in zip(outs, values, strict=True)), buffers
