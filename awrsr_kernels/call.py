"""A checked call, in one form for padded and packed calls: its tensors, and everything about it that is not a tensor.

B sequences, H query heads, L positions, N table rows, T packed rows, R refinement rank.

Inside the package every tensor is four-dimensional: (entries, heads, rows, features). A padded batch has one entry per
sequence; a packed batch is a single entry whose rows hold all sequences one after another. `bounds` is the one tensor that says
where sequences lie (lengths, cumulative lengths, or nothing).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks


class Call(NamedTuple):
    """Everything about one call that is not a tensor, checked and with its defaults filled in."""

    refinement: str
    causal: bool
    varlen: bool  # packed rows; bounds are cumulative lengths
    align_right: bool  # the last item of a sequence meets the last row of the window and of the tables
    max_len: int  # no sequence is longer
    per_entry: bool  # the tables come with the items, a row per item, rather than a row per position
    softmax_scale: float
    refine_scale: float
    dropout_p: float
    stochastic: bool = False  # stochastic attention: q and k hold [mean | deviation], and squared weights multiply v_cov
    shift: bool = False  # M+ in place of M: weights fall on what followed
    plain_heads: int = 0  # the first heads, whose M is P, without refinement or shift
    first_head: int = 0  # of those that the tensors hold, where a backend has split the heads: dropout counts from it

    @classmethod
    def padded(cls, q: Tensor, w_q: Tensor | None, lengths: Tensor | None, padding_side: str, **options: Any) -> "Call":
        """The call of a padded batch, from checked queries (B, H, L, D) and tables. options: those of `settled`, checked here."""
        checks.choice("padding_side", padding_side, ("left", "right"))
        checks.lengths(lengths, q)
        return cls.settled(q, w_q, varlen=False, align_right=padding_side == "left", max_len=q.shape[2], **options)

    @classmethod
    def packed(
        cls, q: Tensor, w_q: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None, align: str, *, per_entry: bool,
        **options: Any,
    ) -> "Call":  # fmt: skip
        """The call of a packed batch, from checked queries (T, H, D) and tables. options: those of `settled`, checked here."""
        checks.choice("align", align, ("left", "right"))
        cu_seqlens = checks.cu_seqlens(cu_seqlens, q)
        table_rows = None if w_q is None or per_entry else w_q.shape[2]
        max_len = checks.max_seqlen(max_seqlen, cu_seqlens, q.shape[0], table_rows)
        return cls.settled(q, w_q, varlen=True, align_right=align == "right", max_len=max_len, per_entry=per_entry, **options)

    @classmethod
    def settled(
        cls, q: Tensor, w_q: Tensor | None, *, refinement: str, causal: bool, softmax_scale: float | None,
        refine_scale: float | None, dropout_p: float = 0.0, shift: bool = False, plain_heads: int = 0, **rest: Any,
    ) -> "Call":  # fmt: skip
        """The call with its numbers checked and their defaults filled in. rest: the other fields."""
        rank = 1 if w_q is None else w_q.shape[-1] // (1 + (refinement == "stochastic"))  # tables of "stochastic" lie side by side
        return cls(
            refinement=refinement,
            causal=checks.flag("causal", causal),
            softmax_scale=checks.scale("softmax_scale", softmax_scale, q.shape[-1]),
            refine_scale=checks.scale("refine_scale", refine_scale, rank),
            dropout_p=checks.probability("dropout_p", dropout_p),
            shift=checks.shift(shift, refinement, causal),
            plain_heads=checks.plain_heads(plain_heads, refinement, q.shape[1]),
            **rest,
        )


class Inputs(NamedTuple):
    """The tensors of one call, (entries, heads, rows, features) each unless a comment says otherwise."""

    q: Tensor
    k: Tensor
    v: Tensor
    w_q: Tensor | None  # (1, 1 or H, N, R) by position, or (entries, H, rows, R) per item
    w_k: Tensor | None
    gate: Tensor | None  # (1 or H,)
    bounds: Tensor | None  # lengths (B,), or cumulative lengths (B + 1,) if packed
    seed: Tensor | None = None  # () int64, only under dropout
    v_cov: Tensor | None = None  # like v, only in stochastic attention
    lags: Tensor | None = None  # (1 or H, A): factors of the correlations 1 .. A rows before

    def compared(self) -> int:
        """How many rows the correlation of two positions compares: their own and, with lags, those before."""
        return 1 if self.lags is None else 1 + self.lags.shape[-1]

    def need_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self)
