"""Refined attention in plain torch with O(L) memory and its own backward: the CPU path.

The batch is cut into chunks of windows of similar length (`_fallback_selection.py`; so padding costs little) and each chunk into
blocks of rows, which `_fallback_sweeps.py` visits and where the formulas are. Saved for the backward are Q_A, K_A and Y = P V of
"value"; weights are recomputed, except where all of them weigh no more than q, k and v, and computing them again would be a good
part of the work. Plain attention goes to torch's own kernel where that is faster (`_fallback_stock.py`).

Under torch.compile all this is one operator (`_fallback_operator.py`): it plans when it runs, as in eager mode, so that lengths
are read and one graph serves any of them. torch.export gets plain aten operations, for the shapes at hand.

Half precision is computed in float32 and rounded once, on the way out (torch's kernel rounds P, too, as the definition does).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..call import Call, Inputs
from ..checks import one_gradient
from ..torch_state import without_autocast
from .chunks import Plan
from .operator import operator_attention
from .passes import backward_pass, forward_pass, kinds_of
from .stock import stock_attention, takes
from .sweeps import Named


class _RefinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args):  # type: ignore[no-untyped-def]
        *tensors, call = args
        saved: list[Named] = []
        given = Inputs(*tensors)
        plan = Plan(given, call)
        loaded = plan.load_inputs(given)
        outs = forward_pass(plan, loaded, given.v.dtype, saved)
        ctx.plan, ctx.kinds, ctx.names = plan, kinds_of(given, call), [list(named) for named in saved]  # no tensor of the caller
        # Rows once picked are not picked again
        ctx.save_for_backward(*(loaded if plan.ragged else given), *(x for named in saved for x in named.values()))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts):  # type: ignore[no-untyped-def]
        one_gradient("torch", douts)
        size, plan, tensors = len(Inputs._fields), ctx.plan, ctx.saved_tensors  # read once: a checkpoint gives them once
        given, saved = Inputs(*tensors[:size]), iter(tensors[size:])
        loaded = given if plan.ragged else plan.load_inputs(given)
        named = ({name: next(saved) for name in names} for names in ctx.names)
        with without_autocast(given.q.device):
            found = backward_pass(plan, ctx.kinds, loaded, douts, named)
        return *(found.get(name) for name in Inputs._fields), None


def fallback_attention(given: Inputs, call: Call) -> tuple[Tensor, ...]:
    """The outputs in rows form, (entries, H, rows, D_v). Differentiable once; for torch.export, plain aten operations."""
    if call.gaussian:  # -scale |x_i - x_j|^2 is, in a softmax, 2 scale (x_i.x_j - |x_j|^2 / 2)
        factor = 1 + (call.refinement == "stochastic")
        call = call._replace(softmax_scale=2 * call.softmax_scale, refine_scale=factor * call.refine_scale)
    if takes(given, call):
        return (stock_attention(given, call),)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return operator_attention(given, call)
    if given.need_gradient():
        found: tuple[Tensor, ...] = _RefinedAttention.apply(*given, call)
        return found
    if torch.compiler.is_exporting():  # what is written in place must have no gradient, wherever the program runs
        given = Inputs._make(x if x is None else x.detach() for x in given)
    plan = Plan(given, call)
    return forward_pass(plan, plan.load_inputs(given), given.v.dtype)
