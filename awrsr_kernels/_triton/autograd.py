"""The kernels as an autograd Function and as torch operators, and the choice between their regimes.

H query heads, D_v value dim.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..call import Call, Inputs
from ..checks import one_gradient
from ..operators import define_operators, joined, must_dispatch
from ..torch_state import own_tensor, without_autocast
from .launch import with_rows
from .problem import Problem
from .resident import launch_resident_forward, resident_widths
from .resident_bwd import launch_resident_backward
from .short import launch_short_backward, launch_short_forward, short_buffers
from .tiled import launch_tiled_forward, tiled_widths
from .tiled_bwd import launch_tiled_backward


def launch_forward(inputs: Inputs, call: Call, keep: bool, together: bool = False) -> list[Tensor]:
    """The outputs, (entries, H, rows, D_v), then, with `keep`, what a tiled or resident backward needs besides the inputs.

    With `together` all that is kept lies in one piece of memory, which an operator's results may not.
    A call whose lengths vary may run in both regimes: first long sequences in the tiled one, then short ones in the other.
    """
    problem = Problem(inputs, call, together)
    if problem.is_short():
        return launch_short_forward(problem)
    results = (launch_resident_forward if problem.is_resident() else launch_tiled_forward)(problem, keep)
    if problem.short_reach():
        launch_short_forward(problem, results[: 1 + call.stochastic])
    return results


def launch_backward(douts: list[Tensor], saved: list[Tensor], inputs: Inputs, call: Call) -> list[Tensor]:
    """Gradients of q, k, v and, where given, of w_q, w_k, gate, v_cov, lags."""
    problem = Problem(inputs, call)
    douts = [with_rows(dout) for dout in douts]
    if problem.is_short():
        return launch_short_backward(problem, douts).summed()
    gradients = (launch_resident_backward if problem.is_resident() else launch_tiled_backward)(problem, douts, saved)
    if problem.short_reach():
        launch_short_backward(problem, douts, gradients)
    return gradients.summed()


def _fake_forward(inputs: Inputs, call: Call, keep: bool) -> list[Tensor]:
    problem = Problem(inputs, call)
    if problem.is_short() or not keep:
        return list(short_buffers(problem).values())
    return list(problem.buffers((resident_widths if problem.is_resident() else tiled_widths)(problem)).values())


def _fake_backward(douts: list[Tensor], saved: list[Tensor], inputs: Inputs, call: Call) -> list[Tensor]:
    problem, (w_q, w_k) = Problem(inputs, call), (inputs.w_q, inputs.w_k)
    gradients = list(problem.gradients())
    if w_q is not None and w_k is not None:
        gradients += problem.table_gradients() if call.per_entry else (w.new_empty(w.shape) for w in (w_q, w_k))
    return gradients + [x.new_empty(x.shape) for x in (inputs.gate, inputs.v_cov, inputs.lags) if x is not None]


forward_op, backward_op = define_operators("refined_attention", launch_forward, _fake_forward, launch_backward, _fake_backward)


class TritonAttention(torch.autograd.Function):
    """(tensors of `Inputs` one by one, call) -> outputs; differentiable once."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.call = arguments
        inputs, outputs = Inputs(*tensors), 1 + ctx.call.stochastic
        dispatched = must_dispatch(inputs)
        results = forward_op(*joined(inputs, ctx.call, True)) if dispatched else launch_forward(inputs, ctx.call, True)
        ctx.save_for_backward(*tensors, *(results if len(results) > outputs else ()))
        return tuple(map(own_tensor, results[:outputs]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        tensors, size = ctx.saved_tensors, len(Inputs._fields)  # read once: under activation checkpointing a second read fails
        inputs, saved = Inputs(*tensors[:size]), list(tensors[size:])
        gradients = iter(gradients_of(list(douts), saved, inputs, ctx.call))
        differentiable = inputs._replace(bounds=None, seed=None)
        return *(None if x is None else next(gradients) for x in differentiable), None


def gradients_of(douts: list[Tensor], saved: list[Tensor], inputs: Inputs, call: Call) -> list[Tensor]:
    """`launch_backward`, through the operator where that must be seen."""
    one_gradient("triton", douts)
    with without_autocast(inputs.q.device):
        if must_dispatch(inputs) or must_dispatch(douts) or must_dispatch(saved):
            gradients: list[Tensor] = backward_op(douts, saved, *joined(inputs, call))
            return gradients
        return launch_backward(douts, saved, inputs, call)


def triton_attention(inputs: Inputs, call: Call) -> tuple[Tensor, ...]:
    """The outputs, (entries, H, rows, D_v): of the values and, in stochastic attention, of their covariances."""
    if inputs.need_gradient():
        outputs: tuple[Tensor, ...] = TritonAttention.apply(*inputs, call)
        return outputs
    if must_dispatch(inputs):
        return tuple(forward_op(*joined(inputs, call, False)))
    return tuple(map(own_tensor, launch_forward(inputs, call, False)))
