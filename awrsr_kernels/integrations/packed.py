"""Shared code of the adapters for recommender libraries: padding is dropped before the library's blocks and restored after them.

B batch, L window, T items of all histories, E width. Blocks of recommenders are made of attention and of maps of single rows, so
that they run on (1, T, E) as on (B, L, E), and padding costs them nothing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..module import RefinedMultiheadAttention


class Packed(NamedTuple):
    """The positions of histories in packed rows; passed through a library's blocks in place of its attention mask."""

    cu_seqlens: Tensor  # (B + 1,)
    max_seqlen: int


@torch.compiler.disable  # how many items there are is data: a compiled graph breaks here rather than inside
def pack(x: Tensor, real: Tensor) -> tuple[Tensor, Packed]:
    """The items of x (B, L, E) without padding, (1, T, E), and their positions; B and T may be 0.

    real (B, L), bool or numbers, is True or not 0 at items; padding on either side.
    """
    real = real.bool()
    lengths = real.sum(1)
    return x[real][None], Packed(F.pad(lengths.cumsum(0), (1, 0)).int(), int(lengths.max()) if len(lengths) else 0)


@torch.compiler.disable
def unpack(rows: Tensor, real: Tensor) -> Tensor:
    """(1, T, E) -> (B, L, E), 0 at padding, real as for `pack`."""
    x = rows.new_zeros(*real.shape, rows.shape[-1])
    x[real.bool()] = rows[0]
    return x


class PackedAttention(RefinedMultiheadAttention):
    """RefinedMultiheadAttention with the call of torch.nn.MultiheadAttention, for a library's block; same parameters.

    `from_multihead` makes one of the attention that a block has. Queries may come from rows of their own: SASRec normalises these
    alone. Content tables are computed from the rows of the queries.
    """

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Packed, key_padding_mask: None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """query, key (1, T, E), value the same as key, attn_mask what `pack` gave -> (1, T, E) and no weights.

        Raises:
            ValueError: a history is longer than max_len.
        """
        assert value is key and not need_weights
        if self.max_len is not None and attn_mask.max_seqlen > self.max_len:
            checks.refuse("max_len", str(self.max_len), f"at least the longest history, {attn_mask.max_seqlen} items")
        projected, width, qkv = None, self.embed_dim, self.qkv
        if query is not key and (type(qkv) is not nn.Linear or qkv._forward_hooks or qkv._forward_pre_hooks):
            # Of a map that was replaced (LoRA, quantized) or has hooks: it alone knows what it does
            projected = torch.cat([qkv(query[0])[:, :width], qkv(key[0])[:, width:]], -1)
        elif query is not key:
            biases = [None, None] if qkv.bias is None else [qkv.bias[:width], qkv.bias[width:]]
            parts = zip((query, key), (qkv.weight[:width], qkv.weight[width:]), biases, strict=True)
            projected = torch.cat([F.linear(rows[0], weight, bias) for rows, weight, bias in parts], -1)
        return self._packed(query[0], *attn_mask, projected)[None], None
