"""The public calls on vectors: their arguments, checked, in the one form that every backend takes.

B batch, H query heads, H_kv key and value heads, L positions, T packed positions, D head dim, D_v value dim, R refinement
rank, N table rows.
"""

from typing import Any, NoReturn

from torch import Tensor

from . import checks, habits, jagged
from .backends import run
from .call import Call, Inputs
from .reference import reference_weights
from .torch_state import without_autocast


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
    causal: bool = True,
    lengths: Tensor | None = None,
    padding_side: str = "left",
    softmax_scale: float | None = None,
    refine_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """Self-attention with refined weights, as defined in `awrsr_kernels/reference.py` (AWRSR, RecSys 2024).

    Args:
        q: (B, H, L, D); float32, bfloat16, float16 or float64; D in 1..256. Any strides: "triton" copies only a tensor whose last
            dimension is not contiguous, "torch" also what is cut out of a larger one, where there are lengths. Or jagged
            (torch.nested, layout torch.jagged), (B, H, j, D): then k, v and content tables are, too, position tables have as many
            rows as the longest sequence or more, lengths must be None, and padding_side says which rows of a table a sequence
            uses: "left" the last ones, "right" the first.
        k: (B, H_kv, L, D) in q's dtype; H a multiple of H_kv (grouped-query attention), query head h reads head h // (H / H_kv).
        v: (B, H_kv, L, D_v) in q's dtype, D_v in 1..256.
        w_q, w_k: the tables that span the correlation space, R in 1..256: (L, R) shared, (H, L, R) per head, row j for position
            j; or (B, H, L, R) computed from content, a table per entry. q's dtype, or float32 with half-precision q (read in
            q's dtype). Ignored, and may be None, when refinement is "none".
        refinement: "none" (plain attention), "simple", "value" or "additive".
        gate: factor of the higher-order weights in "additive": a number, a scalar tensor or an (H,) tensor. Default 1.
        causal: whether position i sees only positions j <= i.
        lengths: (B,) integer tensor in 0..L: real items per entry. The rest is padding: output and gradients there are 0, and
            whatever is stored there (NaN too) has no effect. On a GPU and under torch.compile values out of range are clamped.
        padding_side: "left" (items end at position L-1) or "right".
        softmax_scale: factor of q.k, default 1/sqrt(D).
        refine_scale: factor of the correlations, default 1/sqrt(R).
        dropout_p: in [0, 1), rounded to a multiple of 1/65536, at most 65534 of them; falls on the weights that meet the values
            (`dropout.py`).
        dropout_seed: int, or int64 tensor of one element; drawn with torch.randint on q's device when None. Every backend and
            layout draws the same mask from the same seed.
        backend: "triton" (the kernels), "torch" (plain torch, O(L) memory), "reference" (the definition, L x L matrices, any
            number of derivatives, torch.func), or "auto": triton where it can run on a GPU, otherwise torch. torch.export with
            dynamic sizes, or in its strict mode, gets the definition from "torch", too; from "triton" it gets an operator that
            AOTInductor's packages cannot hold, and whose programs need `import awrsr_kernels._triton` before they are loaded.

    Returns:
        (B, H, L, D_v) in v's dtype; jagged as q is. "triton" and "torch" are differentiable once. Entries are independent, and
        under `causal` earlier items of later ones; but "triton" and, where there are lengths, "torch" let short ones share a
        tile, where a NaN or Inf in a real item of one reaches the others, and "torch" lets it reach earlier items of its own.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. ValueError: the named backend cannot run, or
            torch.func (vmap, grad, jvp ...) meets another one than "reference". RuntimeError: a second derivative of "triton" or
            "torch". NotImplementedError: their forward mode.
    """
    if unknown:
        habits.refuse(refined_attention, unknown)
    scales = {"softmax_scale": softmax_scale, "refine_scale": refine_scale}
    options: dict[str, Any] = {"refinement": refinement, "causal": causal, "dropout_p": dropout_p} | scales
    if jagged.is_nested(q):
        packed = jagged.packed({"q": q, "k": k, "v": v}, {"w_q": w_q, "w_k": w_k}, lengths, padding_side)
        out = refined_attention_varlen(**packed, **options, gate=gate, dropout_seed=dropout_seed, backend=backend)
        return jagged.unpacked(out, q).transpose(1, 2)
    checks.refinement(refinement)
    q, k, v = checks.batch(q, k, v)
    w_q, w_k, per_entry = checks.padded_tables(w_q, w_k, q, refinement)
    call = Call.padded(q, w_q, lengths, padding_side, per_entry=per_entry, **options)
    gate = checks.gate(gate, refinement, q.shape[1], q)
    return run(Inputs(q, k, v, w_q, w_k, gate, lengths), call, dropout_seed, backend)[0]


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
    align: str = "right",
    refinement: str = "simple",
    gate: Tensor | float | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    refine_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """`refined_attention` on packed sequences, in flash-attention's convention: no padding anywhere.

    Args:
        q, k, v: (T, H, D), (T, H_kv, D), (T, H_kv, D_v): the items of all sequences, one sequence after another.
        w_q, w_k: (T, H, R) computed from content, a row per item; or a table of N >= max_seqlen rows, (N, R) shared or (H, N, R)
            per head. A tensor of shape (T, H, R) is always read as content, one of shape (1, H, N, R) never.
        cu_seqlens: (B + 1,) int32 or int64, rising from 0 to T, and must be given; sequence b holds items
            cu_seqlens[b] .. cu_seqlens[b+1] - 1. Empty sequences are legal. On a GPU values are not read, the kernels clamp them,
            and rows that no sequence covers (those from the last value to T, or beyond max_seqlen items of a sequence) are
            uninitialised in the output and in gradients: where T is fixed, as in a CUDA graph, let last sequences hold the rest.
        max_seqlen: the longest sequence, or a bound on it. Default: N; T with content tables or without any. Give it on a GPU: the
            kernels launch work for B sequences of that length, and "torch" needs as much memory.
        align: "right": a sequence of n items uses the last n rows of a table, which equals left padding to a window of N;
            "left": the first n.

    The other arguments, and what is raised, are those of `refined_attention`.

    Returns:
        (T, H, D_v) in v's dtype.
    """
    if unknown:
        habits.refuse(refined_attention_varlen, unknown)
    checks.refinement(refinement)
    q, k, v = checks.packed(q, k, v)
    w_q, w_k, per_entry = checks.packed_tables(w_q, w_k, q, refinement)
    call = Call.packed(
        q, w_q, cu_seqlens, max_seqlen, align, per_entry=per_entry, refinement=refinement, causal=causal,
        softmax_scale=softmax_scale, refine_scale=refine_scale, dropout_p=dropout_p,
    )  # fmt: skip
    gate = checks.gate(gate, refinement, q.shape[1], q)
    inputs = Inputs(as_rows(q), as_rows(k), as_rows(v), w_q, w_k, gate, cu_seqlens)
    return run(inputs, call, dropout_seed, backend)[0].squeeze(0).transpose(0, 1)


@habits.own_signature
def attention_weights(
    q: Tensor,
    k: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    *,
    refinement: str = "simple",
    gate: Tensor | float | None = None,
    causal: bool = True,
    lengths: Tensor | None = None,
    padding_side: str = "left",
    softmax_scale: float | None = None,
    refine_scale: float | None = None,
    **unknown: NoReturn,
) -> tuple[Tensor, Tensor]:
    """The weights themselves, for analysis: O(L^2) memory on purpose.

    Arguments as in `refined_attention`. Returns (P, M), each (B, H, L, L) in q's dtype: the first-order weights and the weights
    that meet the values (for "value" M = R P). Rows of P and R sum to 1, rows of additive M to 1 + gate; rows and columns of
    padding are 0. Differentiable.
    """
    if unknown:
        habits.refuse(attention_weights, unknown)
    checks.refinement(refinement)
    q, k, _ = checks.batch(q, k, k)
    w_q, w_k, per_entry = checks.padded_tables(w_q, w_k, q, refinement)
    call = Call.padded(
        q, w_q, lengths, padding_side, per_entry=per_entry, refinement=refinement, causal=causal,
        softmax_scale=softmax_scale, refine_scale=refine_scale,
    )  # fmt: skip
    gate = checks.gate(gate, refinement, q.shape[1], q)
    with without_autocast(q.device):
        return reference_weights(Inputs(q, k, k, w_q, w_k, gate, lengths), call)


def as_rows(x: Tensor) -> Tensor:
    """(T, H, F) as (1, H, T, F)."""
    return x.transpose(0, 1).unsqueeze(0)
