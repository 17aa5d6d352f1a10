"""The model, top to bottom: AWRSR on a SASRec-like backbone (Kang and McAuley 2018; Liu, Liu and Liu, RecSys 2024).

T packed events of B histories, L window (max_len), N items, E hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Packed, Padded, RefinedAttention
from .options import check, option
from .recommender import Recommender


@dataclass(frozen=True)
class AWRSRConfig:
    """What the network is made of; each option says what it is for."""

    num_items: int = option(0, "items N of the catalogue; 0 leaves it to fit", least=0)
    backbone: str = option("sasrec", "sasrec: dot-product attention", choices=("sasrec",))
    refinement: str = option(
        "additive",
        "how attention weights are refined; none is plain attention (SASRec)",
        choices=("none", "simple", "value", "additive"),
    )
    max_len: int = option(50, "events of a history that the model looks at, the last ones", least=1)
    hidden: int = option(64, "width of the network", least=1)
    layers: int = option(2, "blocks of attention and feed-forward", least=1)
    heads: int = option(2, "attention heads of a block", least=1)
    rank: int = option(32, "columns of the tables that span the correlation space, at most 256", least=1, below=257)
    tables: str = option(
        "position",
        "tables that span the correlation space: a learned row per position from the end, or a linear map of each event",
        choices=("position", "content"),
    )
    per_head: bool = option(True, "position tables for each head rather than one for all")
    table_std: float = option(1.0, "standard deviation of the tables at the start", least=0)
    refine_scale: float = option(0.0, "factor of the scores of the higher-order weights; 0 takes 1 / sqrt(rank)", least=0)
    learned_gate: bool = option(False, "whether additive learns a factor per head for the higher-order weights, 1 at the start")
    feedforward: int = option(1, "width of the feed-forward layer as a multiple of hidden", least=1)
    activation: str = option("relu", "of the feed-forward layer", choices=("relu", "gelu"))
    norm: str = option("pre", "layer norm before or after attention and feed-forward", choices=("pre", "post"))
    init: str = option(
        "normal",
        "weights at the start: normal, all small; match, Xavier's, and in the last block keys equal to queries, so that events "
        "attend to events like them",
        choices=("normal", "match"),
    )
    hidden_dropout: float = option(0.5, "of embeddings and of what each layer adds", least=0, below=1)
    attention_dropout: float = option(0.0, "of attention weights", least=0, below=1)
    backend: str = option(
        "auto",
        "of awrsr_kernels.refined_attention; nothing that is stored depends on it",
        choices=("auto", "triton", "torch", "reference"),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.hidden % self.heads or self.hidden // self.heads > 256:
            raise ValueError(f"hidden is {self.hidden}, must be a multiple of heads ({self.heads}), at most 256 per head")


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
        position = torch.arange(items.shape[1], device=items.device) + self.config.max_len - items.shape[1]
        return self.encode(items, position, Padded(lengths))

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
        position = torch.arange(items.shape[1], device=items.device) + self.config.max_len - items.shape[1]
        x, where, weights = self.embed(items, position), Padded(lengths), []
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
