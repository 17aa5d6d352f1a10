"""Refined attention in plain torch with O(L) memory and its own backward: the CPU path.

The batch is cut into chunks of windows (`packing.py`, `plan.py`) and each chunk into blocks of rows, which `forward.py` and
`backward.py` visit and where the formulas are. Saved for the backward are Q_A, K_A and Y = P V of "value"; weights are computed
again, except P where keeping it pays. Plain attention goes to torch's own kernel where that is faster (`stock.py`).

Under torch.compile all this is one operator (`operator.py`): it plans when it runs, as in eager mode, so that lengths are read and
one graph serves any of them. torch.export gets plain aten operations, for the shapes at hand.

Half precision is computed in float32 and rounded once, on the way out (torch's kernel rounds P, too, as the definition does).
"""

import torch
from torch import Tensor

from ..call import Call, Inputs
from ..operators import must_dispatch
from ..torch_state import own_tensor, watched
from .autograd import RefinedAttention, RefinedAttentionOperator
from .forward import forward_pass
from .operator import forward_op
from .plan import Plan
from .stock import has_stock_kernel, stock_attention


def torch_attention(inputs: Inputs, call: Call) -> tuple[Tensor, ...]:
    """The outputs in rows form, (entries, H, rows, D_v). Differentiable once; for torch.export, plain aten operations."""
    if call.stochastic:  # -scale |x_i - x_j|^2 is, in a softmax, 2 scale (x_i.x_j - |x_j|^2 / 2)
        factor = 1 + (call.refinement == "stochastic")
        call = call._replace(softmax_scale=2 * call.softmax_scale, refine_scale=factor * call.refine_scale)
    if has_stock_kernel(inputs, call) and not watched():  # counters of operations know the operator by one formula
        return (stock_attention(inputs, call),)
    learns, exports = inputs.need_gradient(), torch.compiler.is_exporting()
    if must_dispatch(inputs) and not exports:
        return tuple(RefinedAttentionOperator.apply(*inputs, *call) if learns else forward_op(*inputs, *call, False))
    if learns:
        outs: tuple[Tensor, ...] = RefinedAttention.apply(*inputs, call)
        return outs
    if exports:  # what is written in place must have no gradient, wherever the program runs
        inputs = Inputs._make(x if x is None else x.detach() for x in inputs)
    plan = Plan(inputs, call)
    return tuple(map(own_tensor, forward_pass(plan, inputs, plan.load_inputs(inputs), keep=False)[0]))
