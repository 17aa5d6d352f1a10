"""The learned tables of one refined layer of a transformers model, and what they give one pass.

B batch, H query heads, L positions, T packed positions, E hidden size, R refinement rank, N table rows.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization

from ... import checks
from ...tables import SHARPNESS, draw_position_tables, start_std
from .masks import Padding


class Tables(NamedTuple):
    """The tables of one pass. No module is in it: accelerate moves what it finds in arguments to the device of a layer."""

    w_q: Tensor  # content: (B, H, L, R), the rows of the pass; position: (H, N, R), or (1, N, R) shared by the heads
    w_k: Tensor
    gate: Tensor | None
    lags: Tensor | None
    refinement: str
    content: bool
    shift: bool
    plain_heads: int

    @property
    def learn(self) -> bool:
        return any(x is not None and x.requires_grad for x in self[:4])

    @property
    def options(self) -> dict[str, Any]:
        """What prompts, steps and whole windows take beside the tables."""
        return {"gate": self.gate, "lags": self.lags, "shift": self.shift, "plain_heads": self.plain_heads}

    def padded(self, q: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
        """W_q and W_k for a window of queries (B, H, L, D): (B, H, L, R); or (H, L, R) or (L, R) from position tables without
        padding on the left, which are for all entries the same."""
        if self.content:
            return self.w_q, self.w_k
        self._enough(padding.longest)
        (w_q, w_k), length = self.whole(), q.shape[2]
        if padding.first is None and length <= w_q.shape[-2]:
            return w_q[..., :length, :], w_k[..., :length, :]
        first = torch.zeros(q.shape[0], dtype=torch.int64, device=q.device) if padding.first is None else padding.first
        return self.at(torch.arange(length, device=q.device) - first[:, None], q.shape[1])

    def at(self, items: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """The rows of position tables for items (B, L) of their sequences, as (B, H, L, R)."""
        items = items.clamp(0, self.w_q.shape[1] - 1)
        w_q, w_k = (w[:, items].transpose(0, 1).expand(-1, heads, -1, -1) for w in (self.w_q, self.w_k))
        return w_q, w_k

    def whole(self) -> tuple[Tensor, Tensor]:
        """Position tables in the form of the operator."""
        return (self.w_q[0], self.w_k[0]) if self.w_q.shape[0] == 1 else (self.w_q, self.w_k)

    def packed(self, longest: int) -> tuple[Tensor, Tensor]:
        """W_q and W_k for packed rows: (T, H, R) with T = B L, or position tables as (1, H, N, R) or (N, R)."""
        if self.content:
            return self.w_q.transpose(1, 2).flatten(0, 1), self.w_k.transpose(1, 2).flatten(0, 1)
        self._enough(longest)
        w_q, w_k = self.whole()
        return (w_q, w_k) if w_q.dim() == 2 else (w_q[None], w_k[None])

    def _enough(self, longest: int) -> None:
        if not self.content and longest > (limit := self.w_q.shape[1]):
            checks.refuse("max_positions", str(limit), f"at least the {longest} positions of the input")


class RefinedTables(nn.Module):
    """The learned part of one refined layer: tables W_q and W_k and, with a gate, one number per head.

    Parameters w_q and w_k: (H, R, E), or (1, R, E) shared by the heads, for "content"; (H, N, R) or (1, N, R) for "position". They
    start as those of `RefinedMultiheadAttention` do: shifted by one position and sharp; content tables with variance 1, for inputs
    that have it. Parameter gate: (H,), zero at first, or None. Parameter lags: (H, A), 1/2, 1/4, ... at first, or None.

    Other code (accelerate, PEFT, FSDP) may replace the parameters while `forward` runs, so nothing else may read them.
    """

    def __init__(self, attention: nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        config: Any = attention.config
        self.heads, self.refinement = config.num_attention_heads, settings["refinement"]
        self.content, self.hidden_size = settings["tables"] == "content", config.hidden_size
        rank, count = settings["rank"], self.heads if settings["per_head"] else 1
        shape = (rank, self.hidden_size) if self.content else (settings["max_positions"], rank)
        factory: Any = {"device": next(attention.parameters()).device, "dtype": dtype}
        self.w_q, self.w_k = (nn.Parameter(torch.empty(count, *shape, **factory)) for _ in range(2))
        self.gate = nn.Parameter(torch.empty(self.heads, **factory)) if settings["gate"] else None
        lags = settings.get("lags", 0)  # models that were saved before there were any do not say
        self.lags = nn.Parameter(torch.empty(self.heads, lags, **factory)) if lags else None
        self.shift, self.plain_heads = settings.get("shift", False), settings.get("plain_heads", 0)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the tables and set the gate to zero; parameters that transformers has loaded keep their values."""
        if self.content:
            for w in (self.w_q, self.w_k):
                initialization.normal_(w, std=self.hidden_size**-0.5)
        else:
            w_q, w_k = torch.empty_like(self.w_q), torch.empty_like(self.w_k)
            draw_position_tables(w_q, w_k, "shifted", start_std(None, SHARPNESS, None, w_q.shape[-1]))
            initialization.copy_(self.w_q, w_q)
            initialization.copy_(self.w_k, w_k)
        if self.gate is not None:
            initialization.zeros_(self.gate)
        if self.lags is not None:
            initialization.copy_(self.lags, (0.5 ** torch.arange(1, self.lags.shape[1] + 1)).expand_as(self.lags))

    def forward(self, hidden: Tensor) -> Tables:
        """hidden: (B, L, E), the attention module's input."""
        w_q, w_k = (self._rows(hidden, w) if self.content else w for w in (self.w_q, self.w_k))
        return Tables(w_q, w_k, self.gate, self.lags, self.refinement, self.content, self.shift, self.plain_heads)

    def _rows(self, hidden: Tensor, w: Tensor) -> Tensor:
        rows = F.linear(hidden, w.flatten(0, 1).to(hidden.dtype)).unflatten(-1, w.shape[:2])  # (B, L, 1 or H, R)
        return rows.transpose(1, 2).expand(-1, self.heads, -1, -1)
