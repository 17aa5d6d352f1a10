"""The model, top to bottom: AWRSR on a SASRec-like backbone (Kang and McAuley 2018; Liu, Liu and Liu, RecSys 2024).

T packed events of B histories, L window (max_len), N items, E hidden size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Packed, Padded, RefinedAttention
from .config import AWRSRConfig
from .recommender import Recommender

__all__ = ["AWRSR", "AWRSRConfig"]


class AWRSR(Recommender):
    """Sequential recommender whose attention weights attend to one another."""

    config: AWRSRConfig

    def __init__(self, config: AWRSRConfig | None = None) -> None:
        super().__init__()
        self.config = config or AWRSRConfig()
        c = self.config
        self.items = nn.Embedding(c.num_items, c.hidden)  # read by events and, tied, by scores
        self.positions = nn.Embedding(c.max_len, c.hidden)  # the last row is the event before the prediction
        self.blocks: Sequence[Block] = nn.ModuleList(Block(c) for _ in range(c.layers))  # type: ignore[assignment]
        self.norm = nn.LayerNorm(c.hidden)  # of the embeddings ("post"), or of the last block's output ("pre")
        self.dropout = nn.Dropout(c.hidden_dropout)
        self.apply(initialise)
        if c.init == "match":
            self.apply(xavier)
            self.blocks[-1].attention.match_keys()

    def forward(self, items: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Packed histories -> (T, E): row t, times the items' embeddings, scores what follows event t.

        items: (T,) in 0..N-1. cu_seqlens: (B + 1,), rising from 0 to T. max_seqlen: the longest history, at most max_len.
        """
        if max_seqlen > self.config.max_len:
            raise ValueError(
                f"max_seqlen is {max_seqlen}, must be at most max_len={self.config.max_len}: cut histories to their ends"
            )
        ends = cu_seqlens[1:].repeat_interleave(cu_seqlens.diff(), output_size=len(items))
        position = torch.arange(len(items), device=items.device) - ends + self.config.max_len
        return self.encode(items, position, Packed(cu_seqlens, max_seqlen))

    def forward_padded(self, items: Tensor, lengths: Tensor) -> Tensor:
        """The same for histories in windows, (B, L) padded on the left with any id below N -> (B, L, E). lengths: (B,) in 0..L."""
        return self.encode(items, self.window(items), Padded(lengths))

    def window(self, items: Tensor) -> Tensor:
        """(L,) positions of the columns of a padded batch."""
        size, most = items.shape[1], self.config.max_len
        if size > most:
            raise ValueError(f"items are {size} events wide, must be at most max_len={most}: cut histories to their ends")
        return torch.arange(size, device=items.device) + most - size

    def encode(self, items: Tensor, position: Tensor, where: Packed | Padded) -> Tensor:
        x = self.embed(items, position)
        for block in self.blocks:
            x = block(x, where)
        return self.norm(x) if self.config.norm == "pre" else x

    def embed(self, items: Tensor, position: Tensor) -> Tensor:
        x = (self.items(items) + self.positions(position)) * self.config.hidden**0.5
        return self.dropout(x if self.config.norm == "pre" else self.norm(x))

    def scores_padded(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Scores of all items as the next one, (B, L), (B,) -> (B, N): the path that is exported."""
        return self.forward_padded(items, lengths)[:, -1] @ self.items.weight.T

    def weights_padded(self, items: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
        """First-order and refined weights (P, M) of every block, each (B, H, L, L)."""
        x, where, weights = self.embed(items, self.window(items)), Padded(lengths), []
        for block in self.blocks:
            weights.append(block.attention.weights(block.before_attention(x), where))
            x = block(x, where)
        return weights


class Block(nn.Module):
    """Refined attention, then a feed-forward layer; both add to what they read."""

    def __init__(self, c: AWRSRConfig) -> None:
        super().__init__()
        self.pre = c.norm == "pre"
        self.attention = RefinedAttention(
            c.hidden,
            c.heads,
            refinement=c.refinement,
            max_len=c.max_len,
            rank=c.rank,
            tables=c.tables,
            per_head=c.per_head,
            table_std=c.table_std,
            refine_scale=c.refine_scale,
            gate=c.gate,
            learned_gate=c.learned_gate,
            dropout=c.attention_dropout,
            backend=c.backend,
        )
        self.attention_norm = nn.LayerNorm(c.hidden)
        self.feedforward_norm = nn.LayerNorm(c.hidden)
        width = c.feedforward * c.hidden
        self.widen, self.narrow = nn.Linear(c.hidden, width), nn.Linear(width, c.hidden)
        self.activation = F.relu if c.activation == "relu" else F.gelu
        self.dropout = nn.Dropout(c.hidden_dropout)

    def before_attention(self, x: Tensor) -> Tensor:
        return self.attention_norm(x) if self.pre else x

    def forward(self, x: Tensor, where: Packed | Padded) -> Tensor:
        if self.pre:
            x = x + self.dropout(self.attention(self.attention_norm(x), where))
            return x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, where)))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))

    def feedforward(self, x: Tensor) -> Tensor:
        return self.narrow(self.dropout(self.activation(self.widen(x))))


def initialise(module: nn.Module) -> None:
    """Weights of standard deviation 0.02, biases 0; position tables are drawn where they are made."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def xavier(module: nn.Module) -> None:
    """Weights of linear maps by Glorot and Bengio (2010)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
