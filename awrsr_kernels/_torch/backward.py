"""The backward pass: the formulas, chunk by chunk and block by block.

n windows of a chunk, H query heads, L window length, m rows of a block, c columns, D, D_v, R feature sizes.

It sweeps from the last block to the first: in the causal case, once a block has been visited, nothing below adds to its dK_A (and
dY). The bidirectional case takes one sweep per stage. Weights that were not kept are computed again. With M as in `reference.py`, Z
the dropout mask, and softmax'(g; p) = p * (g - rowsum(g * p)):

    others             dM = Z*(dO V^T)     dV = (M*Z)^T dO               dP, dR = dM of none, simple; additive: dR = gate dM
    value              dR = Z*(dO Y^T)     dY = (R*Z)^T dO               dV = P^T dY
    dT = softmax'(dR; R)                   dQ_A = refine_scale dT K_A    dK_A = refine_scale dT^T Q_A
    dP = dQ_A W_q^T + dK_A W_k^T + (value: dY V^T) + (additive: dM)      dW_q = P^T dQ_A     dW_k = P^T dK_A
    dS = softmax'(dP; P)                   dQ = softmax_scale dS K       dK = softmax_scale dS^T Q

In stochastic attention, with the scores of `forward.py` and C the output that squared weights make of V_cov (the points
of refinement "stochastic" and its T likewise, in place of K and S):

    dK_j -= softmax_scale K_j sum_i dS_ij
    others     dM += 2 Z*(M*Z)*(dC V_cov^T)                              dV_cov = ((M*Z)^2)^T dC
    value      dR += 2 Z*(R*Z)*(dC Y_cov^T)    dY_cov = ((R*Z)^2)^T dC   dP += 2 P*(dY_cov V_cov^T)    dV_cov = (P^2)^T dY_cov
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Inputs
from .chunks import Chunk, Operands, Products, load_operands
from .forward import first_weights, higher_weights, key_term, met_values, mixed, multiply, one_sweep, projections, without_own
from .lags import Lags
from .packing import Block
from .plan import Plan


class Gradients(NamedTuple):
    """The gradients of a chunk's operands. A shared table sums those of all chunks."""

    q: Tensor  # (n * H, L, D)
    k: Tensor
    values: list[Tensor]
    tables: list[Tensor]


def _softmax_backward(grad: Tensor, weights: Tensor, into: Tensor | None = None) -> Tensor:
    """softmax'(grad; weights), in the memory of grad unless `into` says where."""
    into = grad if into is None else into
    return torch.ops.aten._softmax_backward_data.out(grad, weights, -1, weights.dtype, grad_input=into)


def _slopes(points: Tensor) -> Tensor:
    """Derivatives of the deviations r in correlation points, where they came from: 1 / (2 r) for r >= 1, r / 2 below."""
    r = points.chunk(2, -1)[1].contiguous()
    return r.reciprocal().minimum(r).mul_(0.5)


class _ChunkBackward:
    """Adds gradients to `grads` block by block."""

    def __init__(self, chunk: Chunk, operands: Operands, products: Products, douts: list[Tensor], grads: Gradients) -> None:
        self.chunk, self.operands, self.products, self.douts, self.grads = chunk, operands, products, douts, grads
        self.dproducts = Products(*(x if x is None else torch.empty_like(x) for x in products))
        self.dq_a: dict[Block, Tensor] = {}  # what only its own block reads is contiguous
        self.lags = None if operands.lags is None else Lags(chunk, operands.lags, operands.tables[0].shape[-1])
        self.projections = projections(operands.tables, operands.values, products)
        self.dprojections = projections(grads.tables, grads.values, self.dproducts)
        self.values = met_values(operands.values, products)
        self.dvalues = met_values(grads.values, self.dproducts)
        self.term = self.dterm = self.higher_term = self.dhigher_term = None
        if chunk.call.stochastic:
            self.term = key_term(operands.k)
            self.dterm = torch.empty_like(self.term)
        if chunk.call.refinement == "stochastic" and products.k_a is not None:
            self.higher_term = key_term(products.k_a)
            self.dhigher_term = torch.empty_like(self.higher_term)
        self.dgate = None if operands.gate is None else torch.zeros_like(operands.gate)

    def run(self) -> None:
        """Visits all blocks."""
        blocks = self.chunk.blocks[::-1]
        if one_sweep(self.chunk):
            for block in blocks:
                first = self._first(block)
                self._first_stage(block, first, self._second_stage(block, first))
        else:
            for block in blocks:
                self._second_stage(block, self._first(block))
            for block in blocks:
                first = self._first(block)
                self._first_stage(block, first, self._direct_gradient(block, first))
        if self.chunk.call.shift:
            self._to_own_rows()
        if self.dterm is not None:
            self.grads.k.addcmul_(self.operands.k, self.dterm.transpose(1, 2), value=-self.chunk.call.softmax_scale)

    def _to_own_rows(self) -> None:
        """Gradients of the rows after each, which shifted weights multiply, become those of the rows themselves."""
        for grad in self.dvalues:
            grad[:, 1:] = grad[:, :-1].clone()
            grad[:, 0] = 0

    def _first(self, block: Block) -> Tensor:
        return first_weights(self.chunk, block, self.operands, self.term)

    def _higher(self, block: Block) -> Tensor:
        return higher_weights(self.chunk, block, self.products, self.higher_term)

    def _is_last(self, block: Block) -> bool:
        """Whether this is the first block, which has nothing to add to."""
        return block.end == self.chunk.length

    def _gather(self, block: Block, total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """total[:, :c] += left^T right."""
        multiply(total[:, : block.columns], left.transpose(1, 2), right, add=not self._is_last(block), scale=scale)

    def _gather_term(self, block: Block, total: Tensor, dscores: Tensor) -> None:
        """total[..., :c] += sums over rows."""
        if self._is_last(block):
            torch.sum(dscores, 1, keepdim=True, out=total)
        else:
            total[..., : block.columns] += dscores.sum(1, keepdim=True)

    def _dropped(self, block: Block, first: Tensor, higher: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weights that multiply the values, Z*M, and Z."""
        seed = self.operands.seed
        mask = None if seed is None else self.chunk.mask(seed, block)
        mix = first if higher is None else higher
        if self.chunk.call.refinement == "additive":
            mix = mixed(first, mix, self.operands.gate)
        own = mask is None and self.chunk.call.refinement != "additive"
        mix = mix if mask is None else mix * mask
        if self.chunk.call.shift:
            mix = without_own(self.chunk, block, mix.clone() if own else mix)
        return mix, mask

    def _mixed_gradient(self, block: Block, dropped: Tensor, mask: Tensor | None) -> Tensor:
        """dM."""
        rows = slice(block.first, block.end)
        pairs = [(d[:, rows], x[:, : block.columns].transpose(1, 2)) for d, x in zip(self.douts, self.values, strict=True)]
        if len(pairs) == 1:
            grad = torch.bmm(*pairs[0])
        else:
            grad = torch.empty_like(dropped)
            grad.baddbmm_(*pairs[1], beta=0, alpha=2).mul_(dropped).baddbmm_(*pairs[0])
        return without_own(self.chunk, block, grad if mask is None else grad.mul_(mask))

    def _direct_gradient(self, block: Block, first: Tensor) -> Tensor | None:
        """What reaches P of a block directly, where the second stage was another sweep: dM of "additive"."""
        if self.chunk.call.refinement != "additive":
            return None
        return self._mixed_gradient(block, *self._dropped(block, first, self._higher(block)))

    def _second_stage(self, block: Block, first: Tensor) -> Tensor | None:
        """Everything below M of a block except P; returns what reaches P directly (dM of "none" and "additive")."""
        call, rows = self.chunk.call, slice(block.first, block.end)
        higher = None if call.refinement == "none" else self._higher(block)
        dropped, mask = self._dropped(block, first, higher)
        for power, (dvalue, dout) in enumerate(zip(self.dvalues, self.douts, strict=True)):
            self._gather(block, dvalue, dropped.square() if power else dropped, dout[:, rows])
        grad = self._mixed_gradient(block, dropped, mask)
        del dropped
        if higher is None:
            return grad
        if self.dgate is not None:
            self.dgate += torch.linalg.vecdot(higher.flatten(1), grad.flatten(1)).view_as(self.dgate)
        keep = call.refinement == "additive"
        dscores = _softmax_backward(grad, higher, torch.empty_like(grad) if keep else None)
        if self.operands.gate is not None:
            dscores *= self.operands.gate
        q_a, k_a, dk_a = self.products.q_a, self.products.k_a, self.dproducts.k_a
        assert q_a is not None and k_a is not None and dk_a is not None
        if self.lags is None:
            self.dq_a[block] = dq_a = torch.empty_like(q_a[:, rows], memory_format=torch.contiguous_format)
        else:  # rows before will gather what their copies get
            assert self.dproducts.q_a is not None
            dq_a = self.dproducts.q_a[:, rows]
        multiply(dq_a, dscores, k_a[:, : block.columns], scale=call.refine_scale)
        self._gather(block, dk_a, dscores, q_a[:, rows], call.refine_scale)
        if self.dhigher_term is not None:
            self._gather_term(block, self.dhigher_term, dscores)
        return grad if keep else None

    def _through_points(self, block: Block, dterm: Tensor) -> None:
        """From gradients of correlation points to those of what they were made from, in a block where they are complete."""
        rows = slice(block.first, block.end)
        q_a, k_a, dk_a = (x[:, rows] for x in (*self.products[:2], self.dproducts.k_a) if x is not None)
        dk_a.addcmul_(k_a, dterm[..., rows].transpose(1, 2), value=-self.chunk.call.refine_scale)
        for points, dpoints in ((q_a, self.dq_a[block]), (k_a, dk_a)):
            dpoints.chunk(2, -1)[1].mul_(_slopes(points))

    def _first_stage(self, block: Block, first: Tensor, grad: Tensor | None) -> None:
        """Everything below P of a block; grad is what reached P directly."""
        scale, rows, columns = self.chunk.call.softmax_scale, slice(block.first, block.end), block.columns
        if self.dhigher_term is not None:
            self._through_points(block, self.dhigher_term)
        if self.lags is None:
            dproducts = [self.dq_a.pop(block)] if self.projections else []
        else:
            q_a, dq_a, dk_a = self.products.q_a, self.dproducts.q_a, self.dproducts.k_a
            assert q_a is not None and dq_a is not None and dk_a is not None
            dproducts = self.lags.gather(block, q_a, dq_a, dk_a)
        dproducts += [each.product[:, rows] for each in self.dprojections[len(dproducts) :]]
        for forward, backward, dproduct in zip(  # P*P first: its share of dP is then multiplied with P
            self.projections[::-1], self.dprojections[::-1], dproducts[::-1], strict=True
        ):
            if backward.factor.dim() == 2:  # one product over windows, heads and rows together
                dproduct = dproduct.contiguous()
                backward.factor[:columns].addmm_(first.flatten(0, 1).T, dproduct.flatten(0, 1))
            else:
                self._gather(block, backward.factor, first.square() if forward.squared else first, dproduct)
            add = grad is not None
            grad = torch.empty_like(first) if grad is None else grad
            right = forward.factor[..., :columns, :].transpose(-1, -2)
            multiply(grad, dproduct, right, add=add, scale=2 if forward.squared else 1)
            if forward.squared:
                grad *= first
        assert grad is not None
        dscores = _softmax_backward(grad, first)
        multiply(self.grads.q[:, rows], dscores, self.operands.k[:, :columns], scale=scale)
        self._gather(block, self.grads.k, dscores, self.operands.q[:, rows], scale)
        if self.dterm is not None:
            self._gather_term(block, self.dterm, dscores)


def backward_pass(plan: Plan, like: Inputs, loaded: Inputs, douts: Iterable[Tensor], buffers: Products) -> Inputs:
    """The gradients.

    like: shapes and dtypes of the caller's tensors. loaded: by `Plan.load_inputs`. buffers: what the forward pass kept.
    """
    loaded_douts = [plan.load(dout, clear=True) for dout in douts]
    values = [x for x in (like.v, like.v_cov) if x is not None]
    tables = [x for x in (like.w_q, like.w_k) if x is not None]
    dq, dk, *dvalues = (plan.buffer(x.shape[-1]) for x in (like.q, like.k, *values))
    dtables = [plan.table_gradient(x) for x in tables]
    dgate = torch.zeros(plan.heads, dtype=plan.dtype, device=plan.device)
    dlags = None if like.lags is None else torch.zeros(plan.heads, like.lags.shape[1], dtype=plan.dtype, device=plan.device)
    for chunk in plan.chunks:
        part = chunk.rows_of
        products = Products(*(x if x is None else part(x) for x in buffers))
        into = [x if plan.is_shared(w) else part(x) for x, w in zip(dtables, tables, strict=True)]
        grads = Gradients(part(dq), part(dk), [part(x) for x in dvalues], into)
        visit = _ChunkBackward(chunk, load_operands(chunk, loaded), products, [chunk.load(x) for x in loaded_douts], grads)
        visit.run()
        if visit.dgate is not None:
            dgate += visit.dgate.view(-1, plan.heads).sum(0)
        if visit.lags is not None and dlags is not None:
            dlags += visit.lags.dfactors.unflatten(0, (-1, plan.heads)).sum(0)
    dk, dv, *dv_cov = (plan.collect(x, w.dtype, w.shape[1]) for x, w in zip((dk, *dvalues), (like.k, *values), strict=True))
    dw_q, dw_k = [plan.collect_table(x, w) for x, w in zip(dtables, tables, strict=True)] or (None, None)
    if like.gate is not None:
        dgate = (dgate if like.gate.shape[0] == plan.heads else dgate.sum(0, keepdim=True)).to(like.gate.dtype)
    gate = None if like.gate is None else dgate
    if dlags is not None and like.lags is not None:
        dlags = (dlags if like.lags.shape[0] == plan.heads else dlags.sum(0, keepdim=True)).to(like.lags.dtype)
    cov = dv_cov[0] if dv_cov else None
    return Inputs(plan.collect(dq, like.q.dtype), dk, dv, dw_q, dw_k, gate, None, None, cov, dlags)
