"""The definition of refined attention, with every L x L matrix written out: the specification that backends are tested against.

B batch, H query heads, L positions, D head dim, D_v value dim, R refinement rank; * is elementwise between matrices of weights.

    S   = softmax_scale * Q K^T                P = softmax(S)        first-order weights     (L, L)
    Q_A = P W_q        K_A = P W_k                                   correlation space       (L, R)
    T   = refine_scale * Q_A K_A^T             R = softmax(T)        higher-order weights    (L, L)

    none      M = P             simple    M = R
    value     M = R P           additive  M = P + gate * R           output  M V

Three options of these, which stochastic attention does not have: with `lags` l, (A,) per head, and Q_A, K_A zero before the first
item,

    T_ij = refine_scale * (Q_A[i] . K_A[j] + sum over a of l_a Q_A[i-a] . K_A[j-a])

so that R attends to positions whose last A + 1 items attended alike. With `shift`, weights fall on what followed: the output is
M+ V with M+_ij = M_i,j-1 for j <= i, and 0 in the first column; M_ii, which would fall on the future, falls on nothing. The first
`plain_heads` heads have M = P, neither refined nor shifted.

In stochastic attention, with the points x = [mean | sqrt(covariance)] of `wasserstein.py`:

    S   = -softmax_scale * |x_i - x_j|^2       output  M V_mean and (M*M) V_cov; value  R (P V_mean) and (R*R) ((P*P) V_cov)

    stochastic M = R   T = -refine_scale * |a_i - b_j|^2, points of the Gaussians N(P W_q, ELU(P W_q_cov) + 1) and the same of W_k

Every softmax runs over the positions that i may see: real items j, and j <= i if causal; a row that sees nothing has weights
zero. Dropout multiplies P (none), R (simple, value, stochastic) or M (additive) by Z, the mask times 1/(1-p), before squares are
taken; the P inside Q_A and K_A, and the P V of "value", are never dropped. This is the project's reading of *Pay Attention to
Attention for Sequential Recommendation* (Liu, Liu, Liu; RecSys 2024). It is stated only here, so that it can be compared with the
paper's equations.

Plain torch, any dtype, any device, differentiable any number of times, O(L^2) memory; in stochastic attention in float64 O(L^2 D).
Half precision is computed in float32 and rounded once, on the way out, as by the other backends; `rounded_at_every_step` is the
yardstick of `tolerance.py`.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, Inputs
from .dropout import scaled_mask
from .wasserstein import correlation_points, squared_distances
from .windows import Windows, gather_windows, make_windows, scatter_windows, table_window, visibility

_every_step = False


@contextlib.contextmanager
def rounded_at_every_step() -> Iterator[None]:
    """Inside, in the whole process, the reference computes in the dtype of its inputs, and rounds the result of every operation."""
    global _every_step
    before, _every_step = _every_step, True
    try:
        yield
    finally:
        _every_step = before


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which the reference computes for inputs of `dtype`."""
    return dtype if _every_step else torch.promote_types(dtype, torch.float32)


def masked_softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the visible columns of each row. A row that sees nothing is zero, and so is its gradient."""
    if visible is None:
        return scores.softmax(-1)
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~visible, lowest).softmax(-1).masked_fill(~visible, 0)


def first_weights(q: Tensor, k: Tensor, visible: Tensor | None, call: Call) -> Tensor:
    """P."""
    scores = -squared_distances(q, k) if call.stochastic else q @ k.transpose(-1, -2)
    return masked_softmax(call.softmax_scale * scores, visible)


def rows_before(x: Tensor, lag: int) -> Tensor:
    """Row i is row i - lag; the first rows are zero."""
    return F.pad(x, (0, 0, lag, 0))[..., : x.shape[-2], :]


def correlation_weights(
    first: Tensor, w_q: Tensor, w_k: Tensor, lags: Tensor | None, visible: Tensor | None, call: Call
) -> Tensor:
    """R: attention among rows of P, compared in the correlation space that W_q and W_k span."""
    q_a, k_a = first @ w_q, first @ w_k
    if call.refinement == "stochastic":
        return masked_softmax(-call.refine_scale * squared_distances(correlation_points(q_a), correlation_points(k_a)), visible)
    scores = call.refine_scale * q_a @ k_a.transpose(-1, -2)
    for lag, factor in enumerate(() if lags is None else lags.to(first.dtype).unbind(-1), start=1):
        q_before, k_before = rows_before(q_a, lag), rows_before(k_a, lag)  # P, and so Q_A, is zero before the first item
        scores = scores + call.refine_scale * factor.view(-1, 1, 1) * q_before @ k_before.transpose(-1, -2)
    return masked_softmax(scores, visible)


def on_what_followed(weights: Tensor, call: Call) -> Tensor:
    """M+ of the heads that are not plain if the call shifts, M of the others."""
    if not call.shift:
        return weights
    shifted = F.pad(weights.tril(-1), (1, 0))[..., : weights.shape[-1]]  # so, because torch.export allows any length
    return torch.cat([weights[:, : call.plain_heads], shifted[:, call.plain_heads :]], 1) if call.plain_heads else shifted


def weights_and_values(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor, list[Tensor], Windows | None]:
    """P and, without dropout, the weights that multiply the values (R; "additive" M), each (B, H, L, L); what they multiply, V and,
    in stochastic attention, V_cov, (B, H, L, D_v) each, zero where there is no item; and the windows."""
    q, group = inputs.q, inputs.q.shape[1] // inputs.k.shape[1]
    dtype = arithmetic_dtype(q.dtype)
    windows = None if inputs.bounds is None else make_windows(call, inputs.bounds, q.shape[2])

    def windowed(x: Tensor) -> Tensor:
        if windows is None:
            return x
        if call.varlen:
            return gather_windows(x, windows)
        return torch.where(windows.valid[:, None, :, None], x, 0)

    def table(w: Tensor) -> Tensor:
        return (windowed(w) if call.per_entry else table_window(w, call)).to(inputs.q.dtype).to(dtype)

    values = [inputs.v] if inputs.v_cov is None else [inputs.v, inputs.v_cov]
    q, k, *values = (windowed(x).to(dtype) for x in (q, inputs.k, *values))
    k, *values = (x.repeat_interleave(group, dim=1) for x in (k, *values))
    visible = visibility(None if windows is None else windows.valid, q.shape[2], call.causal, q.device)
    first = weights = first_weights(q, k, visible, call)
    if inputs.w_q is not None and inputs.w_k is not None:
        weights = correlation_weights(first, table(inputs.w_q), table(inputs.w_k), inputs.lags, visible, call)
    if call.refinement == "additive":
        weights = first + (1.0 if inputs.gate is None else inputs.gate.to(dtype).view(-1, 1, 1)) * weights
        if call.plain_heads:
            weights = torch.cat([first[:, : call.plain_heads], weights[:, call.plain_heads :]], 1)
    return first, weights, values, windows


def reference_attention(inputs: Inputs, call: Call) -> tuple[Tensor, ...]:
    """The outputs in rows form, (entries, H, rows, D_v): of the values and, in stochastic attention, of their covariances."""
    first, weights, values, windows = weights_and_values(inputs, call)
    if inputs.seed is not None:
        count, heads, length, _ = first.shape
        sequence, rows = (torch.arange(size, device=first.device) for size in (count, length))
        offset = None if windows is None else windows.first
        weights = scaled_mask(inputs.seed, call.dropout_p, sequence, heads, rows, length, offset, first.dtype) * weights
    weights = on_what_followed(weights, call)
    powers = [weights, weights.square()] if call.stochastic else [weights]
    if call.refinement == "value":
        values = [x @ v for x, v in zip((first, first.square()), values, strict=False)]
    outs = [(x @ v).to(inputs.q.dtype) for x, v in zip(powers, values, strict=True)]

    if windows is None:
        return tuple(outs)
    if not call.varlen:
        return tuple(torch.where(windows.valid[:, None, :, None], out, 0) for out in outs)
    return tuple(scatter_windows(out, windows, inputs.q) for out in outs)


def reference_weights(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """(P, M), each (B, H, L, L), in q's dtype. The values are not used."""
    first, weights, *_ = weights_and_values(inputs, call)
    weights = on_what_followed(weights @ first if call.refinement == "value" else weights, call)
    return first.to(inputs.q.dtype), weights.to(inputs.q.dtype)
