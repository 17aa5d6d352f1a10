"""Rivals of stochastic attention, made of stock attention calls.

With the points x = [mean | sqrt(covariance)] a score is a dot product of longer features, 2 scale [x_i | 1] . [x_j | -|x_j|^2 / 2],
up to a number per row that softmax ignores. Squared weights are weights of twice the scores, rescaled per row, and products of two
kinds of weights are weights of the sum of their scores, whose features stand side by side:

    P*P = exp(lse(2 S) - 2 lse(S)) softmax(2 S)            P*R = exp(lse(S + T) - lse(S) - lse(T)) softmax(S + T)

So attention calls that return their log-sum-exps, and pass gradients through them, compute every refinement in O(L) memory. Their
roundings add up: in float32 and at lengths of a thousand the gate refuses some of them, by a little.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.stosa import SMALLEST
from .workloads import Batch

AttendLse = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]  # (q, k, v, scale) -> out, log-sum-exps; causal


def tensors_of(batch: Batch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Means and covariances in turn, then the tables that the refinement reads."""
    assert batch.q_cov is not None and batch.k_cov is not None and batch.v_cov is not None
    names = {"none": (), "stochastic": ("w_q", "w_k", "w_q_cov", "w_k_cov")}.get(batch.refinement, ("w_q", "w_k"))
    tensors = batch.q, batch.q_cov, batch.k, batch.k_cov, batch.v, batch.v_cov
    return tensors, tuple(getattr(batch, name) for name in names)


class FlashCpu(torch.autograd.Function):
    """The CPU's flash attention, whose own autograd drops the gradient of the log-sum-exps.

    Its backward forms dS = P * (dO V^T - rowsum(dO * O)). The gradient of a log-sum-exp adds P times it to a row of dS: in a spare
    column, where V is zero, dO = 1 and O less that gradient say so.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.sizes, ctx.scale = (q.shape[-1], v.shape[-1]), scale
        width = -(-max(q.shape[-1], v.shape[-1] + 1) // 8) * 8  # one for all, as the call wants it
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        return out[..., : ctx.sizes[1]], lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        (d, d_v), width = ctx.sizes, q.shape[-1]
        dout, out = F.pad(dout, (0, width - d_v)), out.clone()
        dout[..., d_v], out[..., d_v] = 1, -dlse
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = backward(dout, q, k, v, out, lse, 0.0, True, scale=ctx.scale)
        return dq[..., :d], dk[..., :d], dv[..., :d_v], None


def features(mean_q: Tensor, cov_q: Tensor, mean_k: Tensor, cov_k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose dot products are -|x_i - x_j|^2 / 2 up to a number per row."""
    x_q, x_k = (torch.cat([m, c.clamp(min=SMALLEST).sqrt()], -1) for m, c in ((mean_q, cov_q), (mean_k, cov_k)))
    return F.pad(x_q, (0, 1), value=1.0), torch.cat([x_k, -0.5 * x_k.square().sum(-1, keepdim=True)], -1)


def squares(batch: Batch, attend: AttendLse) -> tuple[Tensor, Tensor]:
    """Every refinement from attention calls alone; half precision in float32, as its gradients miss the definition otherwise."""
    dtype = torch.promote_types(batch.q.dtype, torch.float32)
    tensors, tables = (tuple(x.to(dtype) for x in group) for group in tensors_of(batch))
    group = batch.q.shape[1] // batch.k.shape[1]
    if group > 1:
        tensors = *tensors[:2], *(x.repeat_interleave(group, 1) for x in tensors[2:])
    *items, v_mean, v_cov = tensors
    q, k = features(*items)
    scale, second_scale, rank = 2 * batch.q.shape[-1] ** -0.5, batch.w_q.shape[-1] ** -0.5, batch.w_q.shape[-1]

    def squared(q: Tensor, k: Tensor, values: Tensor, scale: float, lse: Tensor) -> Tensor:
        weighted, twice = attend(q, k, values, 2 * scale)
        return (twice - 2 * lse).exp()[..., None] * weighted

    def results(mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
        return mean.to(batch.q.dtype), cov.to(batch.q.dtype)

    if batch.refinement == "none":
        mean, lse = attend(q, k, v_mean, scale)
        return results(mean, squared(q, k, v_cov, scale, lse))
    values = [w.expand(*k.shape[:-1], rank) for w in tables]
    means = [v_mean] if batch.refinement in ("value", "additive") else []
    joint, lse = attend(q, k, torch.cat([*values, *means], -1), scale)
    q_a, k_a, *rest = joint.split([x.shape[-1] for x in (*values, *means)], -1)
    if batch.refinement == "stochastic":
        q_a, k_a = features(q_a, F.elu(rest[0]) + 1, k_a, F.elu(rest[1]) + 1)
        second_scale *= 2
    if batch.refinement == "value":
        v_mean, v_cov = rest[0], squared(q, k, v_cov, scale, lse)
    mean, second = attend(q_a, k_a, v_mean, second_scale)
    cov = squared(q_a, k_a, v_cov, second_scale, second)
    if batch.refinement != "additive":
        return results(mean, cov)
    gate = batch.gate[:, None, None].to(dtype)
    crossed, third = attend(torch.cat([scale * q, second_scale * q_a], -1), torch.cat([k, k_a], -1), v_cov, 1.0)
    crossed = (third - lse - second).exp()[..., None] * crossed
    return results(rest[0] + gate * mean, squared(q, k, v_cov, scale, lse) + 2 * gate * crossed + gate**2 * cov)
