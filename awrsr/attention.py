"""Refined self-attention as a layer: the package's only door to `awrsr_kernels`.

T packed events of B histories, L window, E hidden size, H heads, D head dim, R refinement rank.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awrsr_kernels import attention_weights, refined_attention, refined_attention_varlen


class Packed(NamedTuple):
    """Histories one after another, x is (T, E); history b holds rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1."""

    cu_seqlens: Tensor  # (B + 1,)
    max_seqlen: int


class Padded(NamedTuple):
    """Histories in a window each, x is (B, L, E), padding on the left."""

    lengths: Tensor  # (B,)


class RefinedAttention(nn.Module):
    """Causal self-attention with refined weights (AWRSR), between two linear maps.

    Tables "position" are parameters (H, max_len, R), or (max_len, R) shared by the heads; a history of n events uses the last n
    rows, so that a row means "so many events before the prediction". Tables "content" are computed from each event by a linear map.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        *,
        refinement: str,
        max_len: int,
        rank: int,
        tables: str = "position",
        per_head: bool = True,
        table_std: float = 1.0,
        refine_scale: float = 0.0,
        gate: float = 1.0,
        learned_gate: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.heads, self.refinement, self.dropout, self.backend = heads, refinement, dropout, backend
        self.refine_scale = refine_scale or None  # None is the operator's 1 / sqrt(rank)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        self.w_q = self.w_k = self.to_tables = None
        self.gate: Tensor | float | None = gate if refinement == "additive" else None
        if refinement == "none":
            return
        if learned_gate and refinement == "additive":
            self.gate = nn.Parameter(torch.full((heads,), gate))
        if tables == "content":
            self.to_tables = nn.Parameter(torch.randn(hidden, 2 * heads * rank) * table_std / hidden**0.5)
        else:
            shape = (heads, max_len, rank) if per_head else (max_len, rank)
            self.w_q, self.w_k = (nn.Parameter(torch.randn(shape) * table_std) for _ in range(2))

    def forward(self, x: Tensor, where: Packed | Padded) -> Tensor:
        """x (..., E) -> (..., E)."""
        q, k, v = self.split(self.qkv(x))
        w_q, w_k = self.tables(x, where)
        dropout_p = self.dropout if self.training else 0.0
        options: dict[str, Any] = {
            "gate": self.gate,
            "refine_scale": self.refine_scale,
            "dropout_p": dropout_p,
            "refinement": self.refinement,
            "backend": self.backend,
        }
        if isinstance(where, Packed):
            out = refined_attention_varlen(q, k, v, w_q, w_k, where.cu_seqlens, where.max_seqlen, **options)
        else:
            q, k, v = (a.transpose(1, 2) for a in (q, k, v))
            out = refined_attention(q, k, v, w_q, w_k, lengths=where.lengths, **options).transpose(1, 2)
        return self.out(out.flatten(-2))

    def weights(self, x: Tensor, where: Padded) -> tuple[Tensor, Tensor]:
        """First-order weights P and the refined weights M that meet the values, each (B, H, L, L)."""
        q, k, _ = (a.transpose(1, 2) for a in self.split(self.qkv(x)))
        options: dict[str, Any] = {"refinement": self.refinement, "gate": self.gate, "refine_scale": self.refine_scale}
        return attention_weights(q, k, *self.tables(x, where), lengths=where.lengths, **options)

    @torch.no_grad()
    def match_keys(self) -> None:
        """Draw queries of unit scale and make the keys equal to them: events attend to events like them."""
        hidden = self.out.in_features
        nn.init.normal_(self.qkv.weight[:hidden], std=hidden**-0.5)
        self.qkv.weight[hidden : 2 * hidden] = self.qkv.weight[:hidden]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(..., 3 E) -> three of (..., H, D)."""
        return x.unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def tables(self, x: Tensor, where: Packed | Padded) -> tuple[Tensor | None, Tensor | None]:
        """W_q and W_k as the operator wants them."""
        if self.to_tables is not None:  # (T, H, R), or (B, H, L, R)
            w_q, w_k = (x @ self.to_tables).unflatten(-1, (2, self.heads, -1)).unbind(-3)
            return (w_q, w_k) if isinstance(where, Packed) else (w_q.transpose(1, 2), w_k.transpose(1, 2))
        if self.w_q is None or self.w_k is None:
            return None, None
        if isinstance(where, Packed):
            if tuple(self.w_q.shape[:-1]) != (len(x), self.heads):
                return self.w_q, self.w_k
            return F.pad(self.w_q, (0, 0, 1, 0)), F.pad(self.w_k, (0, 0, 1, 0))  # a row nobody uses, or it would pass for content
        size, rows = self.w_q.shape[-2], x.shape[1]
        last = torch.arange(size - rows, size, device=x.device)  # a slice would tie an exported program to one window
        return self.w_q.index_select(-2, last), self.w_k.index_select(-2, last)
