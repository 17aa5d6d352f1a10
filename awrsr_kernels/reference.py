"""The definition of refined attention, with every L x L matrix written out: specification and yardstick.

B batch, H query heads, H_kv key and value heads, L positions, D head dim, D_v value dim, R refinement rank.

    S   = softmax_scale * Q K^T                P = softmax(S)        first-order weights     (L, L)
    Q_A = P W_q        K_A = P W_k                                   correlation space       (L, R)
    T   = refine_scale * Q_A K_A^T             R = softmax(T)        higher-order weights    (L, L)

    none      M = P             simple    M = R
    value     M = R P           additive  M = P + gate * R           output  M V

Every softmax runs over the positions that i may see: real items j, and j <= i if causal; a row that sees nothing has weights
zero. Dropout multiplies P (none), R (simple, value) or M (additive) by Z, the mask times 1/(1-p); the P inside Q_A and K_A,
and the P V of "value", are never dropped. This is the project's reading of *Pay Attention to Attention for Sequential
Recommendation* (Liu, Liu, Liu; RecSys 2024); it stands here alone, so that it can be compared with the paper's equations.

Plain torch, any dtype, any device, differentiable any number of times, O(L^2) memory.
"""

import torch
from torch import Tensor

from .dropout import scaled_mask
from .layout import Call, Inputs, Windows, gather_windows, make_windows, row_buffer, scatter_windows, table_window, visibility


def masked_softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax over the visible columns of each row; a row that sees nothing is zero, and so is its gradient."""
    if visible is None:
        return scores.softmax(-1)
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(~visible, lowest).softmax(-1).masked_fill(~visible, 0)


def correlation_weights(first: Tensor, w_q: Tensor, w_k: Tensor, visible: Tensor | None, call: Call) -> Tensor:
    """R: attention among rows of P, compared in the correlation space that W_q and W_k span."""
    scores = call.refine_scale * (first @ w_q) @ (first @ w_k).transpose(-1, -2)
    return masked_softmax(scores, visible)


def prepare(
    given: Inputs, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Windows | None, Tensor | None]:
    """q, k, v, W as (n, H, L, F) in q's dtype, zero where there is no item, with the windows and who sees whom."""
    q, heads, group = given.q, given.q.shape[1], given.q.shape[1] // given.k.shape[1]
    windows = None if given.bounds is None else make_windows(call, given.bounds, q.shape[2])

    def windowed(x: Tensor) -> Tensor:
        if windows is None:
            return x
        if call.varlen:
            return gather_windows(x, windows, True)
        return torch.where(windows.valid[:, None, :, None], x, 0)

    def table(w: Tensor | None) -> Tensor | None:
        if w is None:
            return None
        return (windowed(w) if call.per_entry else table_window(w, call, call.max_len)).to(q.dtype)

    q, k, v = windowed(q), windowed(given.k), windowed(given.v)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(heads // v.shape[1], dim=1)
    visible = visibility(None if windows is None else windows.valid, q.shape[2], call.causal, q.device)
    return q, k, v, table(given.w_q), table(given.w_k), windows, visible


def reference_attention(given: Inputs, call: Call) -> Tensor:
    """The output in rows form, (entries, H, rows, D_v)."""
    (_, heads, num_rows, _), seed = given.q.shape, given.seed
    q, k, v, w_q, w_k, windows, visible = prepare(given, call)

    first = masked_softmax(call.softmax_scale * q @ k.transpose(-1, -2), visible)
    drop: Tensor | float = 1.0
    if seed is not None:
        sequence = torch.arange(q.shape[0], device=q.device) if windows is None else windows.sequence
        rows, offset = torch.arange(q.shape[2], device=q.device), None if windows is None else windows.first
        drop = scaled_mask(seed, call.dropout_p, sequence, heads, rows, q.shape[2], offset, q.dtype)

    if call.refinement == "none":
        out = (drop * first) @ v
    else:
        assert w_q is not None and w_k is not None
        higher = correlation_weights(first, w_q, w_k, visible, call)
        if call.refinement == "simple":
            out = (drop * higher) @ v
        elif call.refinement == "value":
            out = (drop * higher) @ (first @ v)
        else:
            out = (drop * (first + _per_head(given.gate, q.dtype) * higher)) @ v

    if windows is None:
        return out
    if not call.varlen:
        return torch.where(windows.valid[:, None, :, None], out, 0)
    buffer = row_buffer(given.q, heads, v.shape[-1], varlen=True)
    return scatter_windows(buffer, out, windows, True)[:, :, :num_rows]


def reference_weights(given: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """(P, M), each (B, H, L, L); the values are not looked at."""
    q, k, _, w_q, w_k, _, visible = prepare(given, call)
    first = masked_softmax(call.softmax_scale * q @ k.transpose(-1, -2), visible)
    if call.refinement == "none":
        return first, first
    assert w_q is not None and w_k is not None
    higher = correlation_weights(first, w_q, w_k, visible, call)
    if call.refinement == "value":
        return first, higher @ first
    if call.refinement == "additive":
        return first, first + _per_head(given.gate, q.dtype) * higher
    return first, higher


def _per_head(gate: Tensor | None, dtype: torch.dtype) -> Tensor | float:
    return 1.0 if gate is None else gate.to(dtype).view(-1, 1, 1)
