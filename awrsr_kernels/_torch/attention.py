"""Refined attention in plain torch with O(L) memory and its own backward: the CPU path.

The batch is cut into chunks of windows (`packing.py`, `plan.py`) and each chunk into blocks of rows, which `forward.py` and
`backward.py` visit and where the formulas are. Saved for the backward are Q_A, K_A and Y = P V of "value"; weights are computed
again, except P where keeping it pays. Plain attention goes to torch's own kernel where that is faster (`stock.py`).

Under torch.compile all this is one operator (`operator.py`): it plans when it runs, as in eager mode, so that lengths are read and
one graph serves any of them. torch.export gets plain aten operations, for the shapes at hand.

Half precision is computed in float32 and rounded once, on the way out (torch's kernel rounds P, too, as the definition does).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..call import Call, Inputs
from ..operators import joined, must_dispatch
from ..torch_state import own_tensor, watched
from .autograd import RefinedAttention, RefinedAttentionOperator
from .forward import forward_pass
from .operator import forward_op
from .plan import Plan
from .stock import has_stock_kernel, stock_attention


def split_heads(inputs: Inputs, call: Call) -> list[tuple[Inputs, Call]]:
    """The call as one of the plain heads and one of the others: the plain ones then cost no refinement."""
    plain, heads = call.plain_heads, inputs.q.shape[1]
    sizes = [plain, heads - plain]

    def halves(x: Tensor | None) -> Sequence[Tensor | None]:
        return (x, x) if x is None or x.shape[1] == 1 < heads else x.split(sizes, 1)

    group = heads // inputs.k.shape[1]
    k, v = inputs.k, inputs.v
    if plain % group or (heads - plain) % group:
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        group = 1
    of_keys = [plain // group, (heads - plain) // group]
    q, w_q, w_k = map(halves, (inputs.q, inputs.w_q, inputs.w_k))
    k, v = k.split(of_keys, 1), v.split(of_keys, 1)
    gate, lags = (x if x is None or x.shape[0] == 1 < heads else x[plain:] for x in (inputs.gate, inputs.lags))
    call = call._replace(plain_heads=0)
    first = Inputs(q[0], k[0], v[0], None, None, None, inputs.bounds, inputs.seed)  # type: ignore[arg-type]  # q is there
    rest = Inputs(q[1], k[1], v[1], w_q[1], w_k[1], gate, inputs.bounds, inputs.seed, lags=lags)  # type: ignore[arg-type]
    plain_call = call._replace(refinement="none", shift=False, per_entry=False)
    return [(first, plain_call), (rest, call._replace(first_head=plain))]


def torch_attention(inputs: Inputs, call: Call) -> tuple[Tensor, ...]:
    """The outputs in rows form, (entries, H, rows, D_v). Differentiable once; for torch.export, plain aten operations."""
    if call.plain_heads:
        parts = [torch_attention(*part)[0] for part in split_heads(inputs, call)]
        if call.varlen:  # in the memory order that the caller sees, (rows, heads)
            return (torch.cat([x.transpose(1, 2) for x in parts], 2).transpose(1, 2),)
        return (torch.cat(parts, 1),)
    if call.stochastic:  # -scale |x_i - x_j|^2 is, in a softmax, 2 scale (x_i.x_j - |x_j|^2 / 2)
        factor = 1 + (call.refinement == "stochastic")
        call = call._replace(softmax_scale=2 * call.softmax_scale, refine_scale=factor * call.refine_scale)
    if has_stock_kernel(inputs, call) and not watched():  # counters of operations know the operator by one formula
        return (stock_attention(inputs, call),)
    learns, exports = inputs.need_gradient(), torch.compiler.is_exporting()
    if must_dispatch(inputs) and not exports:
        return tuple(RefinedAttentionOperator.apply(*inputs, *call) if learns else forward_op(*joined(inputs, call, False)))
    if learns:
        outs: tuple[Tensor, ...] = RefinedAttention.apply(*inputs, call)
        return outs
    if exports:  # what is written in place must have no gradient, wherever the program runs
        inputs = Inputs._make(x if x is None else x.detach() for x in inputs)
    plan = Plan(inputs, call)
    return tuple(map(own_tensor, forward_pass(plan, inputs, plan.load_inputs(inputs), keep=False)[0]))
