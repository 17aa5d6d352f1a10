"""Rivals of lagged attention (`--refinement lagged`): additive refinement with two lags and shift, half of the heads plain.

The scores of stage 2 are dot products of three rows side by side, so a stock call computes them at three times the width. What it
cannot do is shift: weights of a row fall on what followed, except for the row's own weight, whose follower is not known yet. A call
that returns its log-sum-exps gives that weight, exp(s_ii - lse_i), and its share is subtracted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.stock import stock
from .wasserstein import AttendLse
from .workloads import Batch


def earlier(x: Tensor, factors: Tensor | None) -> Tensor:
    """Rows (B, H, L, R) beside those of earlier positions, times a factor each if given: (B, H, L, (A + 1) R)."""
    lags = 2 if factors is None else len(factors)
    rows = [F.pad(x, (0, 0, lag, 0))[:, :, : x.shape[2]] for lag in range(1, lags + 1)]
    return torch.cat([x, *(rows if factors is None else (f * row for f, row in zip(factors, rows, strict=True)))], -1)


def shifted(q: Tensor, k: Tensor, values: Tensor, width: int, scale: float, attend: AttendLse) -> Tensor:
    """Attention to values whose first `width` features are what followed each position, without what follows the row's own."""
    out, lse = attend(q, k, values, scale)
    own = (scale * (q * k).sum(-1) - lse).exp()[..., None]
    return torch.cat([out[..., :width] - own * values[..., :width], out[..., width:]], -1)


def lagged_calls(batch: Batch, attend: AttendLse) -> Tensor:
    """Two attention calls for the heads that refine, and one for the plain ones."""
    assert batch.lags is not None
    group, plain = batch.q.shape[1] // batch.k.shape[1], batch.plain_heads
    q, k, v = batch.q, batch.k.repeat_interleave(group, 1), batch.v.repeat_interleave(group, 1)
    first = stock(q[:, :plain], k[:, :plain], v[:, :plain], q.shape[-1] ** -0.5)
    q, k, v = (x[:, plain:] for x in (q, k, v))
    followed, width, rank = F.pad(v, (0, 0, 0, 1))[:, :, 1:], v.shape[-1], batch.w_q.shape[-1]
    values = [w.expand(*k.shape[:-1], rank) for w in (batch.w_q, batch.w_k)]
    joint = shifted(q, k, torch.cat([followed, *values], -1), width, q.shape[-1] ** -0.5, attend)
    out, q_a, k_a = joint.split([width, rank, rank], -1)
    higher = shifted(earlier(q_a, batch.lags), earlier(k_a, None), followed, width, rank**-0.5, attend)
    return torch.cat([first, out + batch.gate[plain:, None, None] * higher], 1)


def textbook_lagged(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, gate: Tensor, lags: Tensor, plain: int, dropout_p: float
) -> Tensor:
    """The equations line by line: L x L matrices."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    first = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
    refined = first[:, plain:]
    scores = earlier(refined @ w_q, lags) @ earlier(refined @ w_k, None).transpose(-1, -2) * w_q.shape[-1] ** -0.5
    higher = scores.masked_fill(future, -torch.inf).softmax(-1)
    weights = F.pad((refined + gate[plain:, None, None] * higher).tril(-1), (1, 0))[..., :length]
    return F.dropout(torch.cat([first[:, :plain], weights], 1), dropout_p) @ v
