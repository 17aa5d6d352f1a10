"""The public calls of stochastic attention (STOSA) and its refinements.

B batch, H query heads, H_kv key and value heads, L positions, T packed positions, D head dim, D_v value dim, R refinement rank,
N table rows.
"""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

from . import checks, habits, jagged, plans
from .api import as_packed, as_rows
from .backends import run
from .call import Call, Inputs
from .reference import reference_weights
from .torch_state import without_autocast
from .wasserstein import points, side_by_side

_MEANS = ("q_mean", "k_mean", "v_mean")
_COVARIANCES = ("q_cov", "k_cov", "v_cov")


@habits.own_signature
def stochastic_refined_attention(
    q_mean: Tensor,
    q_cov: Tensor,
    k_mean: Tensor,
    k_cov: Tensor,
    v_mean: Tensor,
    v_cov: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    w_q_cov: Tensor | None = None,
    w_k_cov: Tensor | None = None,
    *,
    refinement: str = "simple",
    gate: Tensor | float | None = None,
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
) -> tuple[Tensor, Tensor]:
    """Stochastic self-attention (STOSA, WWW 2022): Gaussians with diagonal covariances, scored by Wasserstein
    distance, with refined weights.

    Scores are -softmax_scale (|m_i - m_j|^2 + |sqrt c_i - sqrt c_j|^2). Means are averaged with the weights, covariances with the
    squares of the weights. The definition is in `awrsr_kernels/reference.py`.

    Args:
        q_mean, q_cov: (B, H, L, D), D in 1..256; float32, bfloat16, float16 or float64. Covariances are variances and should be
            positive: values below 2^-20, including 0 and negative numbers, are read as 2^-20 and get no gradient.
        k_mean, k_cov: (B, H_kv, L, D) in q_mean's dtype, H a multiple of H_kv; covariances as above.
        v_mean, v_cov: (B, H_kv, L, D_v) in q_mean's dtype, D_v in 1..256; v_cov is used unchanged.
        w_q, w_k: the tables, as in `refined_attention`; with "stochastic", those of the means of the correlation space.
        w_q_cov, w_k_cov: only for "stochastic": tables of the same form; ELU + 1 of their products gives the covariances of the
            correlation space.
        refinement: "none" (Wasserstein attention), "simple", "value" or "additive" (dot products in the correlation space), or
            "stochastic" (Gaussians in the correlation space, compared by Wasserstein distance).
        softmax_scale: factor of the squared distances, default 1/sqrt(D).
        refine_scale: factor of the correlations, or of the squared distances of "stochastic"; default 1/sqrt(R).

    The other arguments, and the exceptions, are those of `refined_attention`. Dropout is applied to weights before they are
    squared. The kernels support D and D_v up to 128, with "stochastic" R up to 128, and with "additive" 2 D + R up to 256; "auto"
    uses the torch backend beyond that. Distances are computed as differences of products, so means that are far from 0, compared
    with the distances between them, lose digits.

    Returns:
        (B, H, L, D_v) means and (B, H, L, D_v) covariances, in q_mean's dtype; 0 at padding. Jagged if the inputs are, as in
        `refined_attention`.
    """
    if unknown:
        habits.refuse(stochastic_refined_attention, unknown)
    decisive = (
        "stochastic, padded", refinement, causal.__class__, causal, padding_side, align, softmax_scale.__class__, softmax_scale,
        refine_scale.__class__, refine_scale, dropout_p.__class__, dropout_p,
    )  # fmt: skip
    seen = [q_mean, k_mean, v_mean, w_q, w_k, gate, lengths, dropout_seed, v_cov, None, q_cov, k_cov, w_q_cov, w_k_cov]
    sight = _look(seen, backend, decisive)
    if sight is not None and sight.plan is not None:
        return _planned(sight)
    padding_side = checks.side("padding_side", padding_side, "align", align, "left")
    scales = {"softmax_scale": softmax_scale, "refine_scale": refine_scale}
    options: dict[str, Any] = {"refinement": refinement, "causal": causal, "dropout_p": dropout_p} | scales
    if jagged.is_nested(q_mean):
        items = {"q_mean": q_mean, "q_cov": q_cov, "k_mean": k_mean, "k_cov": k_cov, "v_mean": v_mean, "v_cov": v_cov}
        tables = {"w_q": w_q, "w_k": w_k, "w_q_cov": w_q_cov, "w_k_cov": w_k_cov}
        packed = jagged.packed(items, tables, lengths, padding_side)
        mean, cov = stochastic_refined_attention_varlen(**packed, **options, gate=gate, dropout_seed=dropout_seed, backend=backend)
        return jagged.unpacked(mean, q_mean).transpose(1, 2), jagged.unpacked(cov, q_mean).transpose(1, 2)
    checks.refinement(refinement, stochastic=True)
    q, k, v = checks.batch(q_mean, k_mean, v_mean, _MEANS)
    q_cov, k_cov, v_cov = map(checks.covariance, _COVARIANCES, (q_cov, k_cov, v_cov), (q, k, v))
    w_q, w_k, per_entry = _tables(checks.padded_tables, (w_q, w_k), (w_q_cov, w_k_cov), q, refinement)
    call = Call.padded(q, w_q, lengths, padding_side, per_entry=per_entry, stochastic=True, **options)
    gate = checks.gate(gate, refinement, q.shape[1], q)
    with without_autocast(q.device):
        inputs = Inputs(points(q, q_cov), points(k, k_cov), v, w_q, w_k, gate, lengths, v_cov=v_cov)
    mean, cov = run(inputs, call, dropout_seed, backend, sight)
    return mean, cov


@habits.own_signature
def stochastic_refined_attention_varlen(
    q_mean: Tensor,
    q_cov: Tensor,
    k_mean: Tensor,
    k_cov: Tensor,
    v_mean: Tensor,
    v_cov: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    w_q_cov: Tensor | None = None,
    w_k_cov: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    align: str | None = None,
    padding_side: str | None = None,
    refinement: str = "simple",
    gate: Tensor | float | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    refine_scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> tuple[Tensor, Tensor]:
    """`stochastic_refined_attention` on packed sequences, in the layout of `refined_attention_varlen`.

    Args:
        q_mean, q_cov: (T, H, D). k_mean, k_cov: (T, H_kv, D). v_mean, v_cov: (T, H_kv, D_v).
        w_q, w_k, w_q_cov, w_k_cov, cu_seqlens, max_seqlen, align, padding_side: as in `refined_attention_varlen`; cu_seqlens must
            be given.

    Returns:
        (T, H, D_v) means and (T, H, D_v) covariances, in q_mean's dtype.
    """
    if unknown:
        habits.refuse(stochastic_refined_attention_varlen, unknown)
    decisive = (
        "stochastic, packed", refinement, causal.__class__, causal, align, padding_side, softmax_scale.__class__, softmax_scale,
        refine_scale.__class__, refine_scale, dropout_p.__class__, dropout_p, max_seqlen.__class__, max_seqlen,
    )  # fmt: skip
    seen = [q_mean, k_mean, v_mean, w_q, w_k, gate, cu_seqlens, dropout_seed, v_cov, None, q_cov, k_cov, w_q_cov, w_k_cov]
    sight = _look(seen, backend, decisive)
    if sight is not None and sight.plan is not None:
        return _planned(sight)
    align = checks.side("align", align, "padding_side", padding_side, "right")
    checks.refinement(refinement, stochastic=True)
    q, k, v = checks.packed(q_mean, k_mean, v_mean, _MEANS)
    q_cov, k_cov, v_cov = map(checks.covariance, _COVARIANCES, (q_cov, k_cov, v_cov), (q, k, v))
    w_q, w_k, per_entry = _tables(checks.packed_tables, (w_q, w_k), (w_q_cov, w_k_cov), q, refinement)
    call = Call.packed(
        q, w_q, cu_seqlens, max_seqlen, align, per_entry=per_entry, refinement=refinement, causal=causal,
        softmax_scale=softmax_scale, refine_scale=refine_scale, dropout_p=dropout_p, stochastic=True,
    )  # fmt: skip
    gate = checks.gate(gate, refinement, q.shape[1], q)
    with without_autocast(q.device):
        x_q, x_k = as_rows(points(q, q_cov)), as_rows(points(k, k_cov))
    inputs = Inputs(x_q, x_k, as_rows(v), w_q, w_k, gate, cu_seqlens, v_cov=as_rows(v_cov))
    mean, cov = map(as_packed, run(inputs, call, dropout_seed, backend, sight))
    return mean, cov


@habits.own_signature
def stochastic_attention_weights(
    q_mean: Tensor,
    q_cov: Tensor,
    k_mean: Tensor,
    k_cov: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    w_q_cov: Tensor | None = None,
    w_k_cov: Tensor | None = None,
    *,
    refinement: str = "simple",
    gate: Tensor | float | None = None,
    causal: bool = True,
    lengths: Tensor | None = None,
    padding_side: str | None = None,
    align: str | None = None,
    softmax_scale: float | None = None,
    refine_scale: float | None = None,
    **unknown: NoReturn,
) -> tuple[Tensor, Tensor]:
    """The attention weights of `stochastic_refined_attention`, for analysis. They take O(L^2) memory.

    Returns (P, M), each (B, H, L, L) in q_mean's dtype, as `attention_weights` does: the weights that multiply the means (for
    "value", M = R P). Covariances are multiplied by their squares (for "value", by those of P and then those of R). The result is
    differentiable.
    """
    if unknown:
        habits.refuse(stochastic_attention_weights, unknown)
    padding_side = checks.side("padding_side", padding_side, "align", align, "left")
    checks.refinement(refinement, stochastic=True)
    q, k, _ = checks.batch(q_mean, k_mean, k_mean, _MEANS)
    q_cov, k_cov = map(checks.covariance, _COVARIANCES[:2], (q_cov, k_cov), (q, k))
    w_q, w_k, per_entry = _tables(checks.padded_tables, (w_q, w_k), (w_q_cov, w_k_cov), q, refinement)
    call = Call.padded(
        q, w_q, lengths, padding_side, per_entry=per_entry, refinement=refinement, causal=causal,
        softmax_scale=softmax_scale, refine_scale=refine_scale, stochastic=True,
    )  # fmt: skip
    gate = checks.gate(gate, refinement, q.shape[1], q)
    with without_autocast(q.device):
        return reference_weights(Inputs(points(q, q_cov), points(k, k_cov), k, w_q, w_k, gate, lengths), call)


def _look(seen: list[Any], backend: str, decisive: tuple[Any, ...]) -> plans.Sight | None:
    """`plans.look`; None too if tables of covariances have another form than those of means: (L, R) and, of one head, (1, L, R)."""
    sight = plans.look(seen, backend, decisive)
    w_q, w_q_cov = seen[3], seen[-2]
    if sight is None or w_q_cov is None or getattr(w_q, "shape", None) == getattr(w_q_cov, "shape", None):
        return sight
    return None


def _planned(sight: plans.Sight) -> tuple[Tensor, Tensor]:
    """The outputs by a plan, which takes points in place of means and covariances, and tables side by side."""
    tensors, pointers = sight.tensors, sight.pointers
    q, k, _, w_q, w_k, *_, q_cov, k_cov, w_q_cov, w_k_cov = tensors
    tensors[:2] = points(q, q_cov), points(k, k_cov)
    if w_q_cov is not None:
        tensors[3:5] = side_by_side(w_q, w_q_cov), side_by_side(w_k, w_k_cov)
        pointers[3:5] = [x.data_ptr() for x in tensors[3:5]]
    pointers[:2] = [x.data_ptr() for x in tensors[:2]]
    mean, cov = sight.plan(sight)
    return mean, cov


def _tables(
    check: Callable[..., checks.Tables], w: tuple[Tensor | None, Tensor | None], w_cov: tuple[Tensor | None, Tensor | None],
    q: Tensor, refinement: str,
) -> checks.Tables:  # fmt: skip
    """W_q and W_k as `check` has them; for "stochastic" the columns of the covariances come after those of the means."""
    w_q, w_k, per_entry = check(*w, q, refinement)
    names = ("w_q_cov", "w_k_cov")
    if refinement != "stochastic":
        must = f'None unless refinement is "stochastic"; refinement is "{refinement}"'
        checks.absent(must, **dict(zip(names, w_cov, strict=True)))
        return w_q, w_k, per_entry
    w_q_cov, w_k_cov, _ = check(*w_cov, q, refinement, names)
    assert w_q is not None and w_k is not None and w_q_cov is not None and w_k_cov is not None
    if w_q_cov.shape != w_q.shape or w_q_cov.dtype != w_q.dtype:
        shapes = [tuple(x.shape) for x in (w_cov[0], w[0]) if x is not None]
        checks.refuse(names[0], f"of shape {shapes[0]}, {w_q_cov.dtype}", f"like w_q of shape {shapes[1]}, {w_q.dtype}")
    pairs = (w_q, w_q_cov), (w_k, w_k_cov)
    if per_entry and q.dim() == 3:  # in the memory order of the caller's (T, H, R)
        joint = [side_by_side(*(x.transpose(1, 2) for x in pair)).transpose(1, 2) for pair in pairs]
    else:
        joint = [side_by_side(*pair) for pair in pairs]
    return joint[0], joint[1], per_entry
