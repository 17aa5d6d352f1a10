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
    v_cov: Tensor | None,
    refinement: str,
    causal: bool,
    varlen: bool,
    align_right: bool,
    max_len: int,
    per_entry: bool,
    softmax_scale: float,
    refine_scale: float,
    dropout_p: float,
    gaussian: bool,
) -> list[Tensor]:
    """The outputs, (entries, H, rows, D_v), and what the backward needs besides the inputs: in the short regime, nothing.

    Outputs are one, between Gaussians two: means and covariances.
    """
    call = Call(refinement, causal, varlen, align_right, max_len, per_entry, softmax_scale, refine_scale, dropout_p, gaussian)
    problem = Problem(Inputs(q, k, v, w_q, w_k, gate, bounds, seed, v_cov), call)
    if problem.is_short():
        return short_forward(problem)
    found = tiled_forward(problem)
    if problem.short_reach():
        short_forward(problem, found[: 1 + gaussian])
    return found


@_forward_op.register_fake
def _(q, k, v, w_q, w_k, gate, bounds, seed, v_cov, *call):  # type: ignore[no-untyped-def]
    problem = Problem(Inputs(q, k, v, w_q, w_k, gate, bounds, seed, v_cov), Call(*call))
    buffers = short_buffers(problem) if problem.is_short() else tiled_buffers(problem)
    return list(buffers.values())


@torch.library.custom_op("awrsr_kernels::refined_attention_backward", mutates_args=())
def _backward_op(
    douts: list[Tensor],
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    gate: Tensor | None,
    bounds: Tensor | None,
    seed: Tensor | None,
    v_cov: Tensor | None,
    refinement: str,
    causal: bool,
    varlen: bool,
    align_right: bool,
    max_len: int,
    per_entry: bool,
    softmax_scale: float,
    refine_scale: float,
    dropout_p: float,
    gaussian: bool,
) -> list[Tensor]:
    """Gradients of q, k, v and, where given, of w_q, w_k, gate, v_cov."""
    call = Call(refinement, causal, varlen, align_right, max_len, per_entry, softmax_scale, refine_scale, dropout_p, gaussian)
    problem = Problem(Inputs(q, k, v, w_q, w_k, gate, bounds, seed, v_cov), call)
    douts = [with_rows(dout) for dout in douts]
    if problem.is_short():
        return short_backward(problem, douts, saved)
    found = tiled_backward(problem, douts, saved)
    return short_backward(problem, douts, [], found) if problem.short_reach() else found


@_backward_op.register_fake
def _(douts, saved, q, k, v, w_q, w_k, gate, bounds, seed, v_cov, *call):  # type: ignore[no-untyped-def]
    problem = Problem(Inputs(q, k, v, w_q, w_k, gate, bounds, seed, v_cov), Call(*call))
    found = list(problem.gradients())
    if w_q is not None:
        found += problem.table_gradients() if problem.call.per_entry else (w.new_empty(w.shape) for w in (w_q, w_k))
    return found + [x.new_empty(x.shape) for x in (gate, v_cov) if x is not None]


class _RefinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.call = args
        found, outputs = _forward_op(*tensors, *ctx.call), 1 + ctx.call.gaussian
        ctx.save_for_backward(*tensors, *(found if len(found) > outputs else ()))
        return tuple(found[:outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        size, stored = len(Inputs._fields), ctx.saved_tensors  # read once, or checkpointing refuses
        given, saved = Inputs(*stored[:size]), list(stored[size:])
        found = iter(_backward_op(list(douts), saved, *given, *ctx.call))
        has_gradient = given._replace(bounds=None, seed=None)
        return *(None if x is None else next(found) for x in has_gradient), None


def triton_attention(given: Inputs, call: Call) -> tuple[Tensor, ...]:
    """The outputs in rows form, (entries, H, rows, D_v). Differentiable once."""
    if given.need_gradient():
        found: tuple[Tensor, ...] = _RefinedAttention.apply(*given, call)
        return found
    return tuple(_forward_op(*given, *call)[: 1 + call.gaussian])
