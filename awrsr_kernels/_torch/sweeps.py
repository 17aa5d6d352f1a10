"""Sweeps of the torch backend over the blocks of one chunk, forward and backward: the formulas.

n windows of a chunk, H query heads, L window length, m rows of a block, c columns they can see, D, D_v, R feature sizes.

A chunk is cut into blocks of rows, small enough to stay in cache. In the causal case a block needs columns up to its own last row
only, and one sweep serves both stages: K_A (and P V) are complete for the rows above. The backward sweeps from the last block to
the first, where the same holds for the gradients: once a block has been visited, nothing below adds to its dK_A (and dY). The
bidirectional case takes one sweep per stage. With M as in `reference.py`, Z the dropout mask, and
softmax'(g; p) = p * (g - rowsum(g * p)):

    simple, additive   dM = Z*(dO V^T)     dR = gate dM               dV = (M*Z)^T dO
    value              dR = Z*(dO Y^T)     dY = (R*Z)^T dO            dV = P^T dY
    dT = softmax'(dR; R)                   dQ_A = refine_scale dT K_A            dK_A = refine_scale dT^T Q_A
    dP = dQ_A W_q^T + dK_A W_k^T + (value: dY V^T) + (additive: dM)              dW_q = P^T dQ_A     dW_k = P^T dK_A
    dS = softmax'(dP; P)                   dQ = softmax_scale dS K               dK = softmax_scale dS^T Q

Between Gaussians scores are dot products of the points x in Q and K less a number per key, and squared weights meet V_cov, with C
their output (the points of "stochastic" and its T likewise, in place of Q, K and S):

    S_ij = softmax_scale (x_i.x_j - |x_j|^2 / 2)                                 dK_j -= softmax_scale K_j sum_i dS_ij
    others     dM += 2 Z*(M*Z)*(dC V_cov^T)                                      dV_cov = ((M*Z)^2)^T dC
    value      dR += 2 Z*(R*Z)*(dC Y_cov^T)    dY_cov = ((R*Z)^2)^T dC    dP += 2 P*(dY_cov V_cov^T)    dV_cov = (P^2)^T dY_cov

What torch does on a CPU shapes the rest. Batched products are quick only into contiguous memory, where they also scale and
add for free: so chunks are three-dimensional (n * H, rows, features), what only its own block reads (Q_A) is a tensor per block,
and results go straight to where they are wanted. Passes over a block of weights that are not products are few.

Rows without an item have weights that are finite but mean nothing. Nothing comes of them: no row with an item gives weight to
them, their output is not stored and their output gradient is read as zero.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..call import Call
from .chunks import Place
from .selection import LANES

WEIGHTS = ("first", "higher")  # P and R
Named = dict[tuple[str, int], Tensor]  # by name and first row of the block
Shapes = dict[tuple[str, int], tuple[int, int]]  # rows and columns, for each window and head


@dataclass
class Chunk:
    """Some sequences in windows of one length, in the accumulation dtype: what a sweep works on."""

    place: Place
    q: Tensor  # (n * H, L, D)
    k: Tensor  # (n * H, L, D), one per query head
    values: list[Tensor]  # (n * H, L, D_v): V and, between Gaussians, V_cov
    tables: list[Tensor]  # W_q and W_k, none for "none"; (L, R) shared, otherwise (n * H, L, R)
    gate: Tensor | None  # (n * H, 1, 1)
    future: Tensor | None  # (block rows, block rows): added to the scores of a block's rows and the same columns
    padding: Tensor | None  # (n * H, 1, L): added to scores, hides columns without an item
    owner: Tensor | None  # (n, L): which sequence of its window a row belongs to, if several share one
    seed: Tensor | None
    keep: bool  # whether weights stay for the backward
    kept: Named
    room: Named = field(default_factory=dict)  # where products and kept weights go; if it is empty, anywhere
    term: Tensor | None = None  # (n * H, 1, L): `key_term` of k, where P of Gaussians is computed
    _strangers: dict[int, Tensor] = field(default_factory=dict)  # of the block where they were asked for last

    @property
    def call(self) -> Call:
        return self.place.call

    @property
    def blocks(self) -> list[tuple[int, int]]:
        return self.place.blocks

    @property
    def factors(self) -> dict[str, Tensor]:
        """What P is multiplied with (for "y_cov" P^2), by the name of the product."""
        found = dict(zip(("q_a", "k_a"), self.tables, strict=False))
        if self.call.refinement == "value":
            found |= zip(("y", "y_cov"), self.values, strict=False)
        return found

    @property
    def length(self) -> int:
        return self.q.shape[1]

    def one_sweep(self) -> bool:
        return not self.tables or self.call.causal or len(self.blocks) == 1

    def columns(self, hi: int) -> int:
        return hi if self.call.causal else self.length

    def _weights(self, name: str, queries: Tensor, keys: Tensor, term: Tensor | None, scale: float, lo: int, hi: int) -> Tensor:
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
        if term is not None:
            row = term[..., :columns] * scale
            scores += row if self.padding is None else row.add_(self.padding[..., :columns])
        elif self.padding is not None:
            scores += self.padding[..., :columns]
        if self.owner is not None:
            scores.unflatten(0, (-1, self.place.heads)).add_(self.strangers(lo, hi, columns))
        room = self.room.get((name, lo))
        if columns >= LANES:
            return self._found(name, lo, torch.softmax(scores, -1, out=room))  # in place it is slower
        # torch's softmax goes number by number here, and its exp is slow where the result is zero
        scores.sub_(scores.amax(-1, keepdim=True)).exp2_()
        return self._found(name, lo, torch.div(scores, scores.sum(-1, keepdim=True), out=scores if room is None else room))

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
        return self._weights("first", self.q[:, lo:hi], self.k, self.term, self.call.softmax_scale, lo, hi)

    def higher(self, products: Named, lo: int, hi: int) -> Tensor:
        term = products.get(("term", 0))
        return self._weights("higher", products["q_a", lo], products["k_a", 0], term, self.call.refine_scale, lo, hi)

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


def key_term(keys: Tensor) -> Tensor:
    """(n * H, L, F) points -> (n * H, 1, L): what a key adds to the dot products with it, -|x_j|^2 / 2."""
    return keys.square().sum(-1).mul_(-0.5).unsqueeze(1)


def _to_points(x: Tensor) -> None:
    """`correlation_points` in place; passes over half of each row are slow, so that half is moved out and back."""
    half = x.chunk(2, -1)[1]
    r = half.contiguous()
    low = r.clamp(max=0).mul_(0.5).exp_()
    half.copy_(r.clamp_(min=0).add_(1).sqrt_().mul_(low))


def _slopes(points: Tensor) -> Tensor:
    """Derivatives of the deviations r in correlation points, where they came from: 1 / (2 r) for r >= 1, r / 2 below."""
    r = points.chunk(2, -1)[1].contiguous()
    return r.reciprocal().minimum(r).mul_(0.5)


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


def product_shapes(place: Place, widths: dict[str, int]) -> Shapes:
    """Of P times W_q, by first row of the block; P times W_k; for "value", P times V and P^2 times V_cov; widths: features of each.

    For "stochastic" the first two are correlation points instead, beside the `key_term` of the second.
    """
    found: Shapes = {}
    for name, width in widths.items():
        rows = place.blocks if name == "q_a" else [(0, place.length)]
        found |= {(name, lo): (hi - lo, width) for lo, hi in rows}
    if place.call.refinement == "stochastic":
        found["term", 0] = (1, place.length)
    return found


def weight_shapes(place: Place) -> Shapes:
    """Of P and R, block by block."""
    names = WEIGHTS[:1] if place.call.refinement == "none" else WEIGHTS
    return {(name, lo): (hi - lo, hi if place.call.causal else place.length) for lo, hi in place.blocks for name in names}


def _products(chunk: Chunk) -> Named:
    """Room for what `product_shapes` says."""
    if chunk.room:
        return {name: x for name, x in chunk.room.items() if name[0] not in WEIGHTS}
    shapes = product_shapes(chunk.place, {name: factor.shape[-1] for name, factor in chunk.factors.items()})
    return {name: chunk.place.empty(width, rows) for name, (rows, width) in shapes.items()}


def _rows(products: Named, name: str, lo: int, hi: int) -> Tensor:
    """The rows of a block of a product."""
    return products[name, lo] if name == "q_a" else products[name, 0][:, lo:hi]


def _meeting(products: Named, chunk: Chunk) -> list[Tensor]:
    """What M meets and, between Gaussians, what its square meets."""
    found = zip(("y", "y_cov"), chunk.values, strict=False)
    return [products.get((name, 0), value) for name, value in found]


def forward_chunk(chunk: Chunk, outs: list[Tensor]) -> Named:
    """Writes the outputs (n * H, L, D_v) of the values and, between Gaussians, of their covariances; returns `_products`."""
    found = _products(chunk)
    values = _meeting(found, chunk)
    direct = chunk.call.refinement in ("none", "additive")

    def correlate(lo: int, hi: int) -> Tensor | None:
        """First stage of a block; returns P if that meets the values."""
        first = chunk.first(lo, hi)
        for name, right in chunk.factors.items():
            total = _rows(found, name, lo, hi)
            _multiply(total, first.square() if name == "y_cov" else first, right[..., : first.shape[-1], :])
            if ("term", 0) in found:
                _to_points(total)
        if ("term", 0) in found:
            found["term", 0][..., lo:hi] = key_term(_rows(found, "k_a", lo, hi))
        return first if direct else None

    def attend(lo: int, hi: int, first: Tensor | None) -> None:
        weights = chunk.higher(found, lo, hi) if chunk.tables else None
        if first is not None:
            weights = first if weights is None else chunk.mixed(first, weights)
        assert weights is not None
        weights = _times(weights, chunk.mask(lo, hi))
        for power, (out, value) in enumerate(zip(outs, values, strict=True)):
            _multiply(out[:, lo:hi], weights.square() if power else weights, value[:, : weights.shape[-1]])

    if chunk.one_sweep():
        for lo, hi in chunk.blocks:
            attend(lo, hi, correlate(lo, hi))
    else:
        for lo, hi in chunk.blocks:
            correlate(lo, hi)
        for lo, hi in chunk.blocks:
            attend(lo, hi, chunk.first(lo, hi) if direct else None)
    return found


class ChunkGradients:
    """The backward of a chunk: gradients build up in the given tensors while blocks are visited."""

    def __init__(self, chunk: Chunk, products: Named, douts: list[Tensor], results: list[Tensor]) -> None:
        """results: of q, k, the values and the tables."""
        self.chunk, self.products, self.douts = chunk, products, douts
        count = 2 + len(chunk.values)
        self.dq, self.dk, self.dtables = results[0], results[1], results[count:]
        self.dproducts = {name: torch.empty_like(x) for name, x in products.items()}
        self.dfactors = dict(zip(chunk.factors, [*self.dtables, *results[2:count]], strict=False))
        self.values = _meeting(products, chunk)
        self.dvalues = [self.dproducts.get((name, 0), x) for name, x in zip(("y", "y_cov"), results[2:count], strict=False)]
        self.dterm = chunk.place.empty(chunk.length, 1) if chunk.call.gaussian else None
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
                first = chunk.first(lo, hi)
                self._first_stage(lo, hi, first, self._direct(lo, hi, first))
        if self.dterm is not None:
            self.dk.addcmul_(chunk.k, self.dterm.transpose(1, 2), value=-chunk.call.softmax_scale)

    def _collect(self, total: Tensor, left: Tensor, right: Tensor, hi: int, scale: float = 1.0) -> None:
        """total[:, :c] += left^T right; the first block visited, which ends at L, finds nothing in total yet."""
        _multiply(total[:, : left.shape[-1]], left.transpose(1, 2), right, add=hi < self.chunk.length, scale=scale)

    def _collect_term(self, total: Tensor, dscores: Tensor, hi: int) -> None:
        """total[..., :c] += sums over rows, likewise."""
        if hi == self.chunk.length:
            torch.sum(dscores, 1, keepdim=True, out=total)
        else:
            total[..., : dscores.shape[-1]] += dscores.sum(1, keepdim=True)

    def _mixed(self, lo: int, hi: int, first: Tensor, higher: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What falls on the values, Z*M, and Z."""
        mask = self.chunk.mask(lo, hi)
        weights = first if higher is None else higher
        if self.chunk.call.refinement == "additive":
            weights = self.chunk.mixed(first, weights)
        return _times(weights, mask), mask

    def _mixed_gradient(self, lo: int, hi: int, weights: Tensor | None, mask: Tensor | None) -> Tensor:
        """dM; weights is Z*M between Gaussians, otherwise None."""
        columns = self.chunk.columns(hi)
        pairs = [(dout[:, lo:hi], value[:, :columns].transpose(1, 2)) for dout, value in zip(self.douts, self.values, strict=True)]
        if weights is None:
            grad = torch.bmm(*pairs[0])
        else:
            grad = torch.empty_like(weights)
            grad.baddbmm_(*pairs[1], beta=0, alpha=2).mul_(weights).baddbmm_(*pairs[0])
        return grad if mask is None else grad.mul_(mask)

    def _direct(self, lo: int, hi: int, first: Tensor) -> Tensor | None:
        """What reaches P of a block directly, where the second stage was another sweep: dM of "additive"."""
        if self.chunk.call.refinement != "additive":
            return None
        if not self.chunk.call.gaussian:
            return self._mixed_gradient(lo, hi, None, self.chunk.mask(lo, hi))
        return self._mixed_gradient(lo, hi, *self._mixed(lo, hi, first, self.chunk.higher(self.products, lo, hi)))

    def _second_stage(self, lo: int, hi: int, first: Tensor) -> Tensor | None:
        """Everything below M of a block but P; returns what reaches P directly (dM of "none" and "additive")."""
        chunk, refinement, scale = self.chunk, self.chunk.call.refinement, self.chunk.call.refine_scale
        higher = None if refinement == "none" else chunk.higher(self.products, lo, hi)
        weights, mask = self._mixed(lo, hi, first, higher)
        self._collect(self.dvalues[0], weights, self.douts[0][:, lo:hi], hi)
        if chunk.call.gaussian:
            grad = self._mixed_gradient(lo, hi, weights, mask)
            self._collect(self.dvalues[1], weights.square(), self.douts[1][:, lo:hi], hi)
            del weights
        else:
            del weights
            grad = self._mixed_gradient(lo, hi, None, mask)
        if higher is None:
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
        if ("term", 0) in self.products:
            self._collect_term(self.dproducts["term", 0], dscores, hi)
        return grad if keep_grad else None

    def _through_points(self, lo: int, hi: int) -> None:
        """From gradients of correlation points to those of what they were made from, in a block where they are complete."""
        k_a, dk_a = _rows(self.products, "k_a", lo, hi), _rows(self.dproducts, "k_a", lo, hi)
        dterm = self.dproducts["term", 0][..., lo:hi].transpose(1, 2)
        dk_a.addcmul_(k_a, dterm, value=-self.chunk.call.refine_scale)
        for name in ("q_a", "k_a"):
            _rows(self.dproducts, name, lo, hi).chunk(2, -1)[1].mul_(_slopes(_rows(self.products, name, lo, hi)))

    def _first_stage(self, lo: int, hi: int, first: Tensor, grad: Tensor | None) -> None:
        """Everything below P of a block; grad is what reached P directly."""
        chunk, columns, scale = self.chunk, first.shape[-1], self.chunk.call.softmax_scale
        if ("term", 0) in self.products:
            self._through_points(lo, hi)
        for name, factor in reversed(chunk.factors.items()):  # P^2 first: its share of dP is then multiplied with P
            dfactor, drows = self.dfactors[name], _rows(self.dproducts, name, lo, hi)
            if dfactor.dim() == 2:  # one product over sequences, heads and rows together
                drows = drows.contiguous()
                dfactor[:columns].addmm_(first.flatten(0, 1).T, drows.flatten(0, 1))
            else:
                self._collect(dfactor, first.square() if name == "y_cov" else first, drows, hi)
            add = grad is not None
            grad = torch.empty_like(first) if grad is None else grad
            _multiply(grad, drows, factor[..., :columns, :].transpose(-1, -2), add=add, scale=1 + (name == "y_cov"))
            if name == "y_cov":
                grad *= first
        assert grad is not None
        dscores = chunk.softmax_backward(grad, first)
        _multiply(self.dq[:, lo:hi], dscores, chunk.k[:, :columns], scale=scale)
        self._collect(self.dk, dscores, chunk.q[:, lo:hi], hi, scale)
        if self.dterm is not None:
            self._collect_term(self.dterm, dscores, hi)
