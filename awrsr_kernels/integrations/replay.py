"""RePlay 0.22: refined attention as the encoder of its SasRec.

model = SasRec.from_params(schema, embedding_dim=64, num_heads=2, max_sequence_length=50)
model.body.encoder = RefinedEncoder(64, 2, num_blocks=2, dropout=0.3, max_len=50)
model.body.attn_mask_builder = NoAttentionMask()
model.reset_parameters()
"""

from typing import Any

import torch
import torch.nn.functional as F
from replay.nn.sequential.sasrec import SasRecTransformerLayer
from torch import Tensor, nn

from .. import checks
from ..torch_state import readable
from .packed import Packed, PackedAttention, pack, unpack

__all__ = ["NoAttentionMask", "RefinedEncoder"]


class NoAttentionMask(nn.Module):
    """For SasRecBody's `attn_mask_builder`: RefinedEncoder needs only the padding mask, so nothing of size L x L is built."""

    def forward(self, feature_tensors: Any, padding_mask: Tensor) -> None:
        return None


class RefinedEncoder(SasRecTransformerLayer):
    """RePlay's SasRecTransformerLayer with refined attention, for SasRecBody's `encoder`.

    Args:
        embedding_dim, num_heads, num_blocks, dropout, activation, hidden_dim: RePlay's own.
        options: arguments of `RefinedMultiheadAttention`. Position tables need max_len, the model's max_sequence_length.

    Raises:
        ValueError, TypeError: an option does not fit; the message names it.
    """

    def __init__(
        self, embedding_dim: int, num_heads: int, num_blocks: int, dropout: float, activation: str = "gelu",
        hidden_dim: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(embedding_dim, num_heads, num_blocks, dropout, activation, hidden_dim)
        self.causal = options.get("causal", True)
        options = {"refinement": "additive"} | options
        plain: Any = self.attention_layers
        self.attention_layers: Any = nn.ModuleList(PackedAttention.from_multihead(own, **options) for own in plain)

    def reset_parameters(self) -> None:
        """Draw all parameters as RePlay does, and tables and gates as `RefinedMultiheadAttention` does."""
        super().reset_parameters()
        for attention in self.attention_layers:
            attention.reset_refinement()

    def forward(
        self, feature_tensors: Any, input_embeddings: Tensor, padding_mask: Tensor, attention_mask: Tensor | None
    ) -> Tensor:
        """input_embeddings (B, L, E), padding_mask (B, L) True at items, on either side -> (B, L, E), 0 at padding.

        padding_mask may be bool or numbers. attention_mask is None from `NoAttentionMask`, or what RePlay's own builder makes of
        causality and padding, (B H, L, L) or (B, H, L, L), 0 where attention goes. Any other mask is refused where reading it is
        free (CPU, not compiled); elsewhere it has no effect.

        Raises:
            ValueError: attention_mask has another shape or hides something else, or a history is longer than `max_len`.
        """
        real = padding_mask.bool()
        if attention_mask is not None:
            self._check_mask(attention_mask, real)
        rows, where = pack(input_embeddings, real)
        count = rows.shape[1]
        if not count:  # RePlay's convolutions refuse no rows: one of zeros passes, so that every parameter has a gradient, 0
            rows, where = F.pad(rows, (0, 0, 0, 1)), Packed(where.cu_seqlens.new_tensor([0, 1]), 1)
        items = rows.new_ones(rows.shape[:2], dtype=torch.bool)
        return unpack(super().forward(feature_tensors, rows, items, where)[:, :count], real)

    def _check_mask(self, attention_mask: Tensor, real: Tensor) -> None:
        entries, size = real.shape
        fits = attention_mask.dim() in (3, 4) and attention_mask.shape[-2:] == (size, size)
        if not fits or attention_mask.shape[0] % max(entries, 1):
            must = f"(B H, L, L) or (B, H, L, L) with B = {entries}, L = {size}"
            checks.refuse("attention_mask", f"of shape {tuple(attention_mask.shape)}", must)
        if not entries or not readable(attention_mask):
            return
        seen = real[:, None].expand(-1, size, -1)
        if self.causal:
            seen = seen.tril()
        allowed = (attention_mask == 0).view(entries, -1, size, size)
        wrong = (allowed != seen[:, None]) & real[:, None, :, None]  # rows of padding attend as they like
        if wrong.any():
            way = "padding and the future" if self.causal else "padding"
            checks.refuse("attention_mask", "another", f"a mask that hides only {way}; or use attn_mask_builder=NoAttentionMask()")
