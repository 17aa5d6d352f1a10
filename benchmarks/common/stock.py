"""Refined attention made of torch's own attention calls: a rival of the operator and, in a model, of the recommender.

B batch, H query heads, H_kv key and value heads, L positions, T packed rows, D head dim, D_v value dim, R refinement rank.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[..., Tensor]  # (q, k, v, scale, dropout_p) -> out, causal
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | float]  # q, k, v, w_q, w_k, gate


class Form(NamedTuple):
    """How `two_calls` is called: with one call per block of values or not, and by which kernel alone (None: torch chooses)."""

    split: bool
    kernel: str | None = None
    on_cpu: bool = True


FORMS = {  # flash kernels want one width for queries, keys and values, which only the split form has
    "sdpa2": Form(split=False),
    "sdpa2-split": Form(split=True),
    "sdpa2-flash": Form(split=True, kernel="FLASH_ATTENTION"),
    "sdpa2-efficient": Form(split=False, kernel="EFFICIENT_ATTENTION", on_cpu=False),
    "sdpa2-cudnn": Form(split=False, kernel="CUDNN_ATTENTION", on_cpu=False),
    "sdpa2-split-cudnn": Form(split=True, kernel="CUDNN_ATTENTION", on_cpu=False),
    "sdpa2-math": Form(split=False, kernel="MATH"),
}


def stock(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, dropout_p=dropout_p, enable_gqa=q.shape[1] != k.shape[1]
    )


def two_calls(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    gate: Tensor | float,
    refinement: str,
    dropout_p: float = 0.0,
    *,
    attend: Attend = stock,
    split: bool = False,
) -> Tensor:
    """P [W_q | W_k | V] in one attention, R V or R (P V) in the next.

    Tables are expanded over batch and heads, not copied: (L, R) each, or whatever else expands to (B, H_kv, L, R), packed
    (T, H_kv, R). With refinement "none" they are not read. With "additive", dropout is that of the second call alone, which is not
    the dropout of P + gate R.
    """
    scale, group = q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    if split:
        attend = functools.partial(_equal_widths, attend)
    if refinement == "none":
        return attend(q, k, v, scale, dropout_p)
    rank = w_q.shape[-1]
    tables = [w_q, w_k] if split else [torch.cat([w_q, w_k], -1)]
    values = [w.expand(*k.shape[:-1], w.shape[-1]) for w in tables] + ([] if refinement == "simple" else [v])
    if split:
        parts = [attend(q, k, x, scale) for x in values]
    else:
        joint = attend(q, k, values[0] if len(values) == 1 else torch.cat(values, -1), scale)
        parts = list(joint.split([rank, rank, *(x.shape[-1] for x in values[1:])], -1))
    second = parts[2] if refinement == "value" else v if group == 1 else v.repeat_interleave(group, 1)
    out = attend(parts[0], parts[1], second, rank**-0.5, dropout_p)
    if refinement != "additive":
        return out
    return parts[2] + (gate.view(-1, *[1] * (q.dim() - 2)) if isinstance(gate, Tensor) else gate) * out


def _equal_widths(attend: Attend, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    """Attention with queries, keys and values padded with zeros to one width, if they are not of one width already."""
    missing = v.shape[-1] - q.shape[-1]
    if missing > 0:
        q, k = F.pad(q, (0, missing)), F.pad(k, (0, missing))
    return attend(q, k, F.pad(v, (0, -missing)) if missing < 0 else v, scale, dropout_p)[..., : v.shape[-1]]


def by_stock(form: Form, tensors: Tensors, refinement: str, dropout_p: float = 0.0) -> Tensor:
    """`two_calls` in one of FORMS. tensors: its first six arguments.

    Raises RuntimeError, with torch's reasons, if the form's kernel cannot run.
    """
    call = functools.partial(two_calls, *tensors, refinement, dropout_p, split=form.split)
    if form.kernel is None:
        return call()
    with sdpa_kernel(getattr(SDPBackend, form.kernel)):
        try:
            return call()
        except RuntimeError as error:
            reasons = _reasons(call) if "No available kernel" in str(error) else []
            if reasons:
                raise RuntimeError("; ".join(reasons)) from error
            raise


def _reasons(call: Callable[[], object]) -> list[str]:
    """Why torch refuses the only kernel that it may use, from its warnings."""
    with warnings.catch_warnings(record=True) as warned, suppress(RuntimeError):
        warnings.simplefilter("always")
        call()
    texts = [str(w.message).split(" (Triggered internally")[0] for w in warned]
    return [text for text in dict.fromkeys(texts) if not text.endswith("because:") and "runtime disabled" not in text]
