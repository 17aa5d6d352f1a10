"""The kernels as torch operators, with the autograd Function around them. Imported only where Triton is wanted."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..layout import Call, Inputs
from .launch import Problem, with_rows
from .short import short_backward, short_buffers, short_forward
from .tiled import tiled_buffers, tiled_forward
from .tiled_bwd import tiled_backward


@torch.library.custom_op("awrsr_kernels::refined_attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    gate: Tensor | None,
    bounds: Tensor | None,
    seed: Tensor | None,
    refinement: str,
    causal: bool,
    varlen: bool,
    align_right: bool,
    max_len: int,
    per_entry: bool,
    softmax_scale: float,
    refine_scale: float,
    dropout_p: float,
) -> list[Tensor]:
    """The output, (entries, H, rows, D_v), and what the backward needs besides the inputs: in the short regime, nothing."""
    call = Call(refinement, causal, varlen, align_right, max_len, per_entry, softmax_scale, refine_scale, dropout_p)
    problem = Problem(Inputs(q, k, v, w_q, w_k, gate, bounds, seed), call)
    if problem.is_short():
        return short_forward(problem)
    found = tiled_forward(problem)
    if problem.short_reach():
        short_forward(problem, found[0])
    return found


@_forward_op.register_fake
def _(q, k, v, w_q, w_k, gate, bounds, seed, *call):  # type: ignore[no-untyped-def]
    problem = Problem(Inputs(q, k, v, w_q, w_k, gate, bounds, seed), Call(*call))
    buffers = short_buffers(problem) if problem.is_short() else tiled_buffers(problem)
    return list(buffers.values())


@torch.library.custom_op("awrsr_kernels::refined_attention_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    gate: Tensor | None,
    bounds: Tensor | None,
    seed: Tensor | None,
    refinement: str,
    causal: bool,
    varlen: bool,
    align_right: bool,
    max_len: int,
    per_entry: bool,
    softmax_scale: float,
    refine_scale: float,
    dropout_p: float,
) -> list[Tensor]:
    """Gradients of q, k, v and, where given, of w_q, w_k, gate."""
    call = Call(refinement, causal, varlen, align_right, max_len, per_entry, softmax_scale, refine_scale, dropout_p)
    problem = Problem(Inputs(q, k, v, w_q, w_k, gate, bounds, seed), call)
    dout = with_rows(dout)
    if problem.is_short():
        return short_backward(problem, dout, saved)
    found = tiled_backward(problem, dout, saved)
    return short_backward(problem, dout, [], found) if problem.short_reach() else found


@_backward_op.register_fake
def _(dout, saved, q, k, v, w_q, w_k, gate, bounds, seed, *call):  # type: ignore[no-untyped-def]
    problem = Problem(Inputs(q, k, v, w_q, w_k, gate, bounds, seed), Call(*call))
    found = list(problem.gradients())
    if w_q is not None:
        found += problem.table_gradients() if problem.call.per_entry else (w.new_empty(w.shape) for w in (w_q, w_k))
    return found if gate is None else [*found, gate.new_empty(gate.shape)]


class _RefinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, ctx.call = args
        found = _forward_op(*tensors, *ctx.call)
        ctx.save_for_backward(*tensors, *(found if len(found) > 1 else ()))
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        given, saved = Inputs(*ctx.saved_tensors[:8]), list(ctx.saved_tensors[8:])
        found = _backward_op(dout, saved, *given, *ctx.call)
        tables = found[3:5] if given.w_q is not None else [None, None]
        return *found[:3], *tables, found[-1] if given.gate is not None else None, None, None, None


def triton_attention(given: Inputs, call: Call) -> Tensor:
    """The output in rows form, (entries, H, rows, D_v). Differentiable once."""
    if given.need_gradient():
        return _RefinedAttention.apply(*given, call)
    return _forward_op(*given, *call)[0]
