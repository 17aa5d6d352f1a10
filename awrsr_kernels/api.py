"""The public calls on vectors: they check their arguments and pass them to a backend in the form that all backends accept.

B batch, H query heads, H_kv key and value heads, L positions, T packed positions, D head dim, D_v value dim, R refinement
rank, N table rows.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import checks, habits, jagged, plans
from .backends import run
from .call import Call, Inputs
from .reference import reference_weights
from .torch_state import own_tensor, without_autocast


@habits.own_signature
def refined_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    *,
    refinement: str = "simple",
    gate: Tensor | float | None = None,
    lags: Tensor | Sequence[float] | None = None,
    shift: bool = False,
    plain_heads: int = 0,
    causal: bool = True,
    lengths: Tensor | None = None,
    padding_side: str | None = None,
    align: str | None = None,
    softmax_scale: float | None = None,
    refine_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """Self-attention with refined weights, as defined in `awrsr_kernels/reference.py` (AWRSR, RecSys 2024).

    Args:
        q: (B, H, L, D); float32, bfloat16, float16 or float64; D in 1..256. Strides are arbitrary: "triton" copies a tensor only
            if its last dimension is not contiguous; with lengths, "torch" also copies a slice of a larger tensor. q may also be
            jagged (torch.nested, layout torch.jagged), (B, H, j, D). Then k, v and content tables must be jagged as well, position
            tables need at least as many rows as the longest sequence, lengths must be None, and padding_side says which rows of a
            table a sequence uses: the last ones ("left") or the first ones ("right").
        k: (B, H_kv, L, D) in q's dtype. H is a multiple of H_kv (grouped-query attention); query head h reads head
            h // (H / H_kv).
        v: (B, H_kv, L, D_v) in q's dtype, D_v in 1..256.
        w_q, w_k: the tables of the correlation space, R in 1..256. Position tables are (L, R), shared by the heads, or (H, L, R);
            row j belongs to position j. Content tables are (B, H, L, R), computed for each entry. Their dtype is that of q, or
            float32 if q is in half precision (they are then rounded to q's dtype). Ignored, and may be None, if refinement is
            "none".
        refinement: "none" (plain attention), "simple", "value" or "additive".
        gate: factor of the higher-order weights in "additive": a number, a scalar tensor or an (H,) tensor. Default 1.
        lags: if given, correlations compare not only where two positions attend, but also where those before them do: T_ij =
            refine_scale * (Q_A[i].K_A[j] + sum over a of lags[a-1] Q_A[i-a].K_A[j-a]), where rows before a sequence's first item
            are 0. Numbers, or a tensor (A,) or (H, A), with gradient; 1 <= A <= 7 and (A + 1) R <= 256. Not with "none". A tensor
            costs less host time than numbers.
        shift: whether weights fall on what followed: position i gives the weight M_ij to item j+1 instead of j, for j < i, and
            M_ii to nothing. Needs causal; for "none", "simple" and "additive".
        plain_heads: number of heads, the first ones, that attend by P alone, neither refined nor shifted; 0 .. H-1, for "none"
            and "additive".
        causal: whether position i sees only positions j <= i.
        lengths: (B,) integer tensor in 0..L: number of real items per entry. The rest is padding: output and gradients are 0
            there, and stored values, even NaN, have no effect. On a GPU and under torch.compile, values out of range are clamped.
        padding_side: "left" (the default: the last item is at position L-1) or "right".
        align: an alias of padding_side by its opposite: align="right" is padding_side="left".
        softmax_scale: factor of q.k, default 1/sqrt(D).
        refine_scale: factor of the correlations, default 1/sqrt(R).
        dropout_p: dropout rate in [0, 1) of the weights that multiply the values (`dropout.py`). It is rounded to a multiple of
            1/65536, at most 65534/65536.
        dropout_seed: int, or int64 tensor of one element. If None, it is drawn with torch.randint on q's device. All backends and
            layouts draw the same mask from the same seed.
        backend: "triton" (the kernels), "torch" (plain torch, O(L) memory), "reference" (the definition with L x L matrices, any
            number of derivatives, torch.func), or "auto": triton where it can run on a GPU, otherwise torch. torch.export with
            dynamic sizes, or in its strict mode, exports the definition for "torch" as well. For "triton" it exports an operator
            that AOTInductor cannot package; import awrsr_kernels._triton before you load such a program.

    Returns:
        (B, H, L, D_v) in v's dtype; jagged if q is. "triton" and "torch" are differentiable once. Entries do not depend on each
        other, nor, with `causal`, earlier items on later ones, whatever finite numbers these hold. Since 0 * NaN is NaN, a NaN or
        Inf can reach earlier items of its entry: from v and the tables on every backend, as in torch's own attention; from q and k
        with refinement "value", on "torch", and with lags in the short regime of "triton". Where short entries share a tile (on
        "triton" and, with lengths, on "torch"), it can also reach the others in the tile. What stands in padding never has an
        effect.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. ValueError: the named backend cannot run, or
            torch.func (vmap, grad, jvp ...) is used with a backend other than "reference". RuntimeError: a second derivative is
            taken with "triton" or "torch". NotImplementedError: forward-mode AD is used with one of these.
    """
    if unknown:
        habits.refuse(refined_attention, unknown)
    decisive = (
        "padded", refinement, causal.__class__, causal, padding_side, align, softmax_scale.__class__, softmax_scale,
        refine_scale.__class__, refine_scale, dropout_p.__class__, dropout_p, shift.__class__, shift,
        plain_heads.__class__, plain_heads,
    )  # fmt: skip
    sight = plans.look([q, k, v, w_q, w_k, gate, lengths, dropout_seed, None, lags], backend, decisive)
    if sight is not None and sight.plan is not None:
        out: Tensor = sight.plan(sight)[0]
        return out
    padding_side = checks.side("padding_side", padding_side, "align", align, "left")
    scales = {"softmax_scale": softmax_scale, "refine_scale": refine_scale}
    options: dict[str, Any] = {"refinement": refinement, "causal": causal, "dropout_p": dropout_p} | scales
    options |= {"shift": shift, "plain_heads": plain_heads}
    if jagged.is_nested(q):
        packed = jagged.packed({"q": q, "k": k, "v": v}, {"w_q": w_q, "w_k": w_k}, lengths, padding_side)
        out = refined_attention_varlen(**packed, **options, gate=gate, lags=lags, dropout_seed=dropout_seed, backend=backend)
        return jagged.unpacked(out, q).transpose(1, 2)
    checks.refinement(refinement)
    q, k, v = checks.batch(q, k, v)
    w_q, w_k, per_entry = checks.padded_tables(w_q, w_k, q, refinement)
    call = Call.padded(q, w_q, lengths, padding_side, per_entry=per_entry, **options)
    gate, lags = checks.gate(gate, refinement, q.shape[1], q), checks.lags(lags, refinement, w_q, q)
    return run(Inputs(q, k, v, w_q, w_k, gate, lengths, lags=lags), call, dropout_seed, backend, sight)[0]


@habits.own_signature
def refined_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    align: str | None = None,
    padding_side: str | None = None,
    refinement: str = "simple",
    gate: Tensor | float | None = None,
    lags: Tensor | Sequence[float] | None = None,
    shift: bool = False,
    plain_heads: int = 0,
    causal: bool = True,
    softmax_scale: float | None = None,
    refine_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """`refined_attention` on packed sequences, in flash-attention's convention, without any padding.

    Args:
        q, k, v: (T, H, D), (T, H_kv, D), (T, H_kv, D_v): the items of all sequences, one sequence after another.
        w_q, w_k: content tables (T, H, R), with a row per item; or position tables of N >= max_seqlen rows, (N, R), shared by the
            heads, or (H, N, R). A tensor of shape (T, H, R) is always read as a content table; pass a position table of that shape
            as (1, H, N, R).
        cu_seqlens: (B + 1,) int32 or int64, increasing from 0 to T, and required; sequence b holds items cu_seqlens[b] ..
            cu_seqlens[b+1] - 1. Sequences may be empty. On a GPU the values are not checked, and the kernels clamp them. Rows that
            no sequence covers (from the last value to T, or beyond max_seqlen items of a sequence) are uninitialised in the output
            and in gradients. If T is fixed, as in a CUDA graph, let additional sequences cover the rest.
        max_seqlen: length of the longest sequence, or an upper bound on it. Default: N; T with content tables or without tables.
            Pass it on a GPU: the kernels launch work for B sequences of this length, and "torch" needs memory for as many.
        align: "right" (the default): a sequence of n items uses the last n rows of a table, as with left padding to a window of N.
            "left": it uses the first n rows.
        padding_side: an alias of align by its opposite: padding_side="left" is align="right".

    The other arguments, and the exceptions, are those of `refined_attention`.

    Returns:
        (T, H, D_v) in v's dtype.
    """
    if unknown:
        habits.refuse(refined_attention_varlen, unknown)
    decisive = (
        "packed", refinement, causal.__class__, causal, align, padding_side, softmax_scale.__class__, softmax_scale,
        refine_scale.__class__, refine_scale, dropout_p.__class__, dropout_p, max_seqlen.__class__, max_seqlen,
        shift.__class__, shift, plain_heads.__class__, plain_heads,
    )  # fmt: skip
    sight = plans.look([q, k, v, w_q, w_k, gate, cu_seqlens, dropout_seed, None, lags], backend, decisive)
    if sight is not None and sight.plan is not None:
        out: Tensor = sight.plan(sight)[0]
        return out
    align = checks.side("align", align, "padding_side", padding_side, "right")
    checks.refinement(refinement)
    q, k, v = checks.packed(q, k, v)
    w_q, w_k, per_entry = checks.packed_tables(w_q, w_k, q, refinement)
    call = Call.packed(
        q, w_q, cu_seqlens, max_seqlen, align, per_entry=per_entry, refinement=refinement, causal=causal,
        softmax_scale=softmax_scale, refine_scale=refine_scale, dropout_p=dropout_p, shift=shift, plain_heads=plain_heads,
    )  # fmt: skip
    gate, lags = checks.gate(gate, refinement, q.shape[1], q), checks.lags(lags, refinement, w_q, q)
    inputs = Inputs(as_rows(q), as_rows(k), as_rows(v), w_q, w_k, gate, cu_seqlens, lags=lags)
    return as_packed(run(inputs, call, dropout_seed, backend, sight)[0])


@habits.own_signature
def attention_weights(
    q: Tensor,
    k: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    *,
    refinement: str = "simple",
    gate: Tensor | float | None = None,
    lags: Tensor | Sequence[float] | None = None,
    shift: bool = False,
    plain_heads: int = 0,
    causal: bool = True,
    lengths: Tensor | None = None,
    padding_side: str | None = None,
    align: str | None = None,
    softmax_scale: float | None = None,
    refine_scale: float | None = None,
    **unknown: NoReturn,
) -> tuple[Tensor, Tensor]:
    """The attention weights, for analysis. They take O(L^2) memory.

    Arguments are those of `refined_attention`. Returns (P, M), each (B, H, L, L) in q's dtype: the first-order weights, and the
    weights that multiply the values (for "value", M = R P). Rows of P and R sum to 1, rows of M with "additive" to 1 + gate. Rows
    and columns of padding are 0. With `shift` M is M+, as the values meet it: moved by a column, so that its rows sum to less. The
    result is differentiable.
    """
    if unknown:
        habits.refuse(attention_weights, unknown)
    padding_side = checks.side("padding_side", padding_side, "align", align, "left")
    checks.refinement(refinement)
    q, k, _ = checks.batch(q, k, k)
    w_q, w_k, per_entry = checks.padded_tables(w_q, w_k, q, refinement)
    call = Call.padded(
        q, w_q, lengths, padding_side, per_entry=per_entry, refinement=refinement, causal=causal,
        softmax_scale=softmax_scale, refine_scale=refine_scale, shift=shift, plain_heads=plain_heads,
    )  # fmt: skip
    gate, lags = checks.gate(gate, refinement, q.shape[1], q), checks.lags(lags, refinement, w_q, q)
    with without_autocast(q.device):
        return reference_weights(Inputs(q, k, k, w_q, w_k, gate, lengths, lags=lags), call)


def as_rows(x: Tensor) -> Tensor:
    """(T, H, F) as (1, H, T, F)."""
    return x.transpose(0, 1).unsqueeze(0)


def as_packed(out: Tensor) -> Tensor:
    """(1, H, T, F) as (T, H, F)."""
    out = out.squeeze(0).transpose(0, 1)
    return out if torch.is_grad_enabled() else own_tensor(out)
