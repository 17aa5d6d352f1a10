"""The public call: checks what it is given, brings padded and packed batches to one form, and chooses a backend.

B batch, H query heads, H_kv key and value heads, L positions, T packed positions, D head dim, D_v value dim, R refinement
rank, N table rows.
"""

import torch
from torch import Tensor

from . import checks, jagged
from ._torch.attention import torch_attention
from .call import Call, Inputs
from .launch_config import table_features, unsupported_reason
from .reference import reference_attention, reference_weights
from .torch_state import exports_any_size, without_autocast

BACKENDS = ("auto", "triton", "torch", "reference")


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
            j; or (B, H, L, R) computed from content, a table per entry. q's dtype, or float32 beside half-precision q (read in
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
    if jagged.is_nested(q):
        packed = jagged.packed({"q": q, "k": k, "v": v}, {"w_q": w_q, "w_k": w_k}, lengths, padding_side)
        out = refined_attention_varlen(
            **packed, refinement=refinement, gate=gate, causal=causal, softmax_scale=softmax_scale, refine_scale=refine_scale,
            dropout_p=dropout_p, dropout_seed=dropout_seed, backend=backend,
        )  # fmt: skip
        return jagged.unpacked(out, q).transpose(1, 2)
    checks.refinement(refinement)
    q, k, v = checks.batch(q, k, v)
    w_q, w_k, per_entry = checks.padded_tables(w_q, w_k, q, refinement)
    call = padded_call(q, w_q, refinement, causal, lengths, padding_side, per_entry, softmax_scale, refine_scale, dropout_p)
    gate = checks.gate(gate, refinement, q.shape[1], q)
    return run(Inputs(q, k, v, w_q, w_k, gate, lengths, None), dropout_seed, call, backend)[0]


def refined_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    cu_seqlens: Tensor,
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
) -> Tensor:
    """`refined_attention` on packed sequences, in flash-attention's convention: no padding anywhere.

    Args:
        q, k, v: (T, H, D), (T, H_kv, D), (T, H_kv, D_v): the items of all sequences, one sequence after another.
        w_q, w_k: (T, H, R) computed from content, a row per item; or a table of N >= max_seqlen rows, (N, R) shared or (H, N, R)
            per head. A tensor of shape (T, H, R) is always read as content, one of shape (1, H, N, R) never.
        cu_seqlens: (B + 1,) int32 or int64, rising from 0 to T; sequence b holds items cu_seqlens[b] .. cu_seqlens[b+1] - 1.
            Empty sequences are legal. On a GPU values are not read, the kernels clamp them, and rows that no sequence covers (those
            from the last value to T, or beyond max_seqlen items of a sequence) are uninitialised in the output and in gradients:
            where T is fixed, as in a CUDA graph, let last sequences hold the rest.
        max_seqlen: the longest sequence, or a bound on it. Default: N; T with content tables or without any. Give it on a GPU: the
            kernels launch work for B sequences of that length, and "torch" needs as much memory.
        align: "right": a sequence of n items uses the last n rows of a table, which equals left padding to a window of N;
            "left": the first n.

    The other arguments, and what is raised, are those of `refined_attention`.

    Returns:
        (T, H, D_v) in v's dtype.
    """
    checks.refinement(refinement)
    q, k, v = checks.packed(q, k, v)
    w_q, w_k, per_entry = checks.packed_tables(w_q, w_k, q, refinement)
    call = packed_call(q, w_q, refinement, causal, cu_seqlens, max_seqlen, align, per_entry, softmax_scale, refine_scale, dropout_p)
    gate = checks.gate(gate, refinement, q.shape[1], q)
    given = Inputs(as_rows(q), as_rows(k), as_rows(v), w_q, w_k, gate, cu_seqlens, None)
    return run(given, dropout_seed, call, backend)[0].squeeze(0).transpose(0, 1)


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
) -> tuple[Tensor, Tensor]:
    """The weights themselves, for analysis: O(L^2) memory on purpose.

    Arguments as in `refined_attention`. Returns (P, M), each (B, H, L, L) in q's dtype: the first-order weights and the weights
    that meet the values (for "value" M = R P). Rows of P and R sum to 1, rows of additive M to 1 + gate; rows and columns of
    padding are 0. Differentiable.
    """
    checks.refinement(refinement)
    q, k, _ = checks.batch(q, k, k)
    w_q, w_k, per_entry = checks.padded_tables(w_q, w_k, q, refinement)
    call = padded_call(q, w_q, refinement, causal, lengths, padding_side, per_entry, softmax_scale, refine_scale, 0.0)
    gate = checks.gate(gate, refinement, q.shape[1], q)
    with without_autocast(q.device):
        return reference_weights(Inputs(q, k, k, w_q, w_k, gate, lengths, None), call)


def padded_call(
    q: Tensor,
    w_q: Tensor | None,
    refinement: str,
    causal: bool,
    lengths: Tensor | None,
    padding_side: str,
    per_entry: bool,
    softmax_scale: float | None,
    refine_scale: float | None,
    dropout_p: float,
    gaussian: bool = False,
) -> Call:
    """What a padded call comes to, beside its tensors."""
    checks.choice("padding_side", padding_side, ("left", "right"))
    checks.lengths(lengths, q)
    return Call(
        refinement=refinement,
        causal=checks.flag("causal", causal),
        varlen=False,
        align_right=padding_side == "left",
        max_len=q.shape[2],
        per_entry=per_entry,
        softmax_scale=checks.scale("softmax_scale", softmax_scale, q.shape[-1]),
        refine_scale=checks.scale("refine_scale", refine_scale, _rank(w_q, refinement)),
        dropout_p=checks.probability("dropout_p", dropout_p),
        gaussian=gaussian,
    )


def packed_call(
    q: Tensor,
    w_q: Tensor | None,
    refinement: str,
    causal: bool,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    align: str,
    per_entry: bool,
    softmax_scale: float | None,
    refine_scale: float | None,
    dropout_p: float,
    gaussian: bool = False,
) -> Call:
    """What a packed call comes to, beside its tensors."""
    checks.choice("align", align, ("left", "right"))
    cu_seqlens = checks.cu_seqlens(cu_seqlens, q)
    table_rows = None if w_q is None or per_entry else w_q.shape[2]
    return Call(
        refinement=refinement,
        causal=checks.flag("causal", causal),
        varlen=True,
        align_right=align == "right",
        max_len=checks.max_seqlen(max_seqlen, cu_seqlens, q.shape[0], table_rows),
        per_entry=per_entry,
        softmax_scale=checks.scale("softmax_scale", softmax_scale, q.shape[-1]),
        refine_scale=checks.scale("refine_scale", refine_scale, _rank(w_q, refinement)),
        dropout_p=checks.probability("dropout_p", dropout_p),
        gaussian=gaussian,
    )


def as_rows(x: Tensor) -> Tensor:
    """(T, H, F) as (1, H, T, F)."""
    return x.transpose(0, 1).unsqueeze(0)


def run(given: Inputs, dropout_seed: int | Tensor | None, call: Call, backend: str) -> tuple[Tensor, ...]:
    """Hand a checked call to its backend: the output, between Gaussians also that of the covariances."""
    q, rank = given.q, 1 if given.w_q is None else given.w_q.shape[-1]
    features = table_features(q.shape[-1], given.v.shape[-1], rank, call.gaussian, call.refinement)
    backend = choose_backend(backend, q, features)
    if backend != "reference":
        checks.no_transform(backend, given)
    learns = given.need_gradient() and torch.compiler.is_exporting()
    if backend == "torch" and (learns or exports_any_size(q, given.bounds)):
        backend = "reference"  # chunks and blocks of rows are made for the sizes at hand, and written in place
    if torch.compiler.is_compiling():  # which wants every input of an autograd Function to be another tensor
        given = Inputs._make(x if x is None else x.view_as(x) for x in given)
    if call.dropout_p:
        given = given._replace(seed=checks.seed(dropout_seed, q.device))
    with without_autocast(q.device):
        if backend == "reference":
            return reference_attention(given, call)
        if backend == "torch":
            return torch_attention(given, call)
        from ._triton import triton_attention

        return triton_attention(given, call)


def choose_backend(backend: str, q: Tensor, features: tuple[int, int, int]) -> str:
    """The backend that "auto", or the name of one, comes to; features: those of q, v and the tables."""
    checks.choice("backend", backend, BACKENDS)
    if backend == "auto" and not q.is_cuda:
        return "torch"
    if backend not in ("auto", "triton"):
        return backend
    reason = unsupported_reason(q.device, q.dtype, features)
    if backend == "triton" and reason is not None:
        raise ValueError(f'backend is "triton", which cannot run here: {reason}')
    return "triton" if reason is None else "torch"


def _rank(w_q: Tensor | None, refinement: str) -> int:
    """Columns of a table that the caller gave; those of "stochastic" lie side by side."""
    return 1 if w_q is None else w_q.shape[-1] // (1 + (refinement == "stochastic"))
