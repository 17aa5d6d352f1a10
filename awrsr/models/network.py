"""The model, top to bottom: AWRSR (Liu, Liu and Liu, RecSys 2024) on a backbone like SASRec (Kang and McAuley 2018) or like STOSA
(Fan et al., WWW 2022).

T packed events of B histories, L window (max_len), N items, E hidden size. A state has F features: F = E for SASRec; for STOSA
F = 2 E, those of means and those of covariances before ELU + 1. Rows that are multiplied for scores have S features.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import OF_SASREC, AWRSRConfig
from .attention import DotProductAttention, Packed, Padded, StochasticAttention, positive
from .distance import distance_columns, distance_rows, gaussian_points


class AWRSRNetwork(nn.Module):
    """Item and position embeddings, blocks of refined attention, and scores by the item embeddings. `AWRSR` holds one."""

    def __init__(self, config: AWRSRConfig) -> None:
        super().__init__()
        self.config = c = config
        self.by_distance = c.backbone == "stosa"  # whether scores are negative squared distances
        self.computes_table = self.by_distance or c.temperature > 0  # whether `item_table` is more than the embeddings
        features = (2 if self.by_distance else 1) * c.hidden  # F
        block = StochasticBlock if self.by_distance else Block
        self.items = nn.Embedding(c.num_items, features)  # read by events and, tied, by scores
        self.positions = nn.Embedding(c.max_len, features)  # the last row is the event before the prediction
        self.blocks: Sequence[Block] = nn.ModuleList(block(c) for _ in range(c.layers))  # type: ignore[assignment]
        norm = NormOfHalves if self.by_distance else nn.LayerNorm
        self.norm = norm(c.hidden)  # of the embeddings ("post"), or of the last block's output ("pre")
        self.dropout = nn.Dropout(c.hidden_dropout)
        self.apply(initialise)
        if c.init != "normal":
            self.blocks[-1].apply(xavier)
            self.blocks[-1].attention.match_keys()
        if c.init == "copy":
            self.blocks[-1].attention.pass_values()

    def forward(self, items: Tensor, cu_seqlens: Tensor, max_seqlen: int, last: bool = False) -> Tensor:
        """Packed histories -> (T, S): the product of row t and `item_table` scores what follows event t.

        items: (T,) in 0..N-1. cu_seqlens: (B + 1,), rising from 0 to T. max_seqlen: the longest history, at most max_len.
        last: only the rows of the last event of each history, (B, S); no history may be empty. What the last block computes after
        attention is then left out for all other rows.
        """
        if max_seqlen > self.config.max_len:
            raise ValueError(
                f"max_seqlen is {max_seqlen}, must be at most max_len={self.config.max_len}: keep the last events of each history"
            )
        return self.encode(items, Packed(cu_seqlens, max_seqlen), cu_seqlens[1:] - 1 if last else None)

    def forward_padded(self, items: Tensor, lengths: Tensor) -> Tensor:
        """The same for padded histories, (B, L), padded on the left with any id below N -> (B, L, S). lengths: (B,) in 0..L."""
        return self.encode(items, Padded(lengths))

    def encode(self, items: Tensor, where: Packed | Padded, rows: Tensor | None = None) -> Tensor:
        """rows: those that are wanted, all by default."""
        x = self.embed(items, where)
        for block in self.blocks[:-1]:
            x = block(x, where)
        x = self.blocks[-1](x, where, rows)
        x = self.norm(x) if self.config.norm == "pre" else x
        if self.by_distance:
            return distance_rows(gaussian_points(x))
        return F.normalize(x, dim=-1) / self.config.temperature if self.config.temperature else x

    def embed(self, items: Tensor, where: Packed | Padded) -> Tensor:
        """(...) -> (..., F)."""
        x = (self.items(items) + self.positions(where.places(items, self.config.max_len))) * self.config.hidden**0.5
        return self.dropout(x if self.config.norm == "pre" else self.norm(x))

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """The table that a hidden state is multiplied by for scores: (N, S), or only the rows of some items."""
        table = self.items.weight if items is None else self.items(items)
        if self.by_distance:
            return distance_columns(gaussian_points(table))
        return F.normalize(table, dim=-1) if self.config.temperature else table

    def scores_padded(self, items: Tensor, lengths: Tensor) -> Tensor:
        """Scores of all items as the next one, (B, L), (B,) -> (B, N). This is the path that is exported."""
        return self.forward_padded(items, lengths)[:, -1] @ self.item_table().T

    def weights_padded(self, items: Tensor, lengths: Tensor) -> list[tuple[Tensor, Tensor]]:
        """First-order and refined weights (P, M) of every block, each (B, H, L, L)."""
        where, weights = Padded(lengths), []
        x = self.embed(items, where)
        for block in self.blocks:
            weights.append(block.attention.weights(block.before_attention(x), where))
            x = block(x, where)
        return weights


Module = TypeVar("Module", bound=nn.Module)


def in_evaluation(module: Module) -> Module:
    """A twin in evaluation mode, which shares the module's tensors. The module's own mode stays as it is, for other threads may be
    using it, or training it. A compiled module is its own twin in evaluation mode; in training mode its twin is not compiled."""
    compiled = [each for each in module.modules() if hasattr(each, "_orig_mod") or each._compiled_call_impl is not None]
    if compiled and not any(each.training for each in module.modules()):
        return module
    return _twin(module)


def _twin(module: Any) -> Any:
    twin = copy(getattr(module, "_orig_mod", module))
    twin._modules = {name: child if child is None else _twin(child) for name, child in twin._modules.items()}
    twin.training, twin._compiled_call_impl = False, None
    return twin


class Branch(nn.Module):
    """The parts of a block other than attention: norms, residuals and a feed-forward layer."""

    def __init__(self, c: AWRSRConfig, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.pre = c.norm == "pre"
        if attention is not None:
            self.attention = attention  # before the rest: in this order weights are drawn
        self.attention_norm = nn.LayerNorm(c.hidden)
        self.feedforward_norm = nn.LayerNorm(c.hidden)
        width = c.feedforward * c.hidden
        self.widen, self.narrow = nn.Linear(c.hidden, width), nn.Linear(width, c.hidden)
        self.activation: Callable[[Tensor], Tensor] = ACTIVATIONS[c.activation]
        self.dropout = nn.Dropout(c.hidden_dropout)

    def before_attention(self, x: Tensor) -> Tensor:
        return self.attention_norm(x) if self.pre else x

    def after_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        if self.pre:
            x = x + self.dropout(attended)
            return x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        x = self.attention_norm(x + self.dropout(attended))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))

    def feedforward(self, x: Tensor) -> Tensor:
        return self.narrow(self.dropout(self.activation(self.widen(x))))


class Block(Branch):
    """Refined attention, then a feed-forward layer, both with a residual connection."""

    attention: DotProductAttention

    def __init__(self, c: AWRSRConfig) -> None:
        own: dict[str, Any] = {name: getattr(c, name) for name in OF_SASREC}
        super().__init__(c, DotProductAttention(c.hidden, c.heads, **own, **attention_options(c)))

    def forward(self, x: Tensor, where: Packed | Padded, rows: Tensor | None = None) -> Tensor:
        """rows: those of the output that are wanted, all by default."""
        attended = self.attention(self.before_attention(x), where, rows)
        return self.after_attention(x if rows is None else x[rows], attended)


class StochasticBlock(nn.Module):
    """The same for means and for covariances, which attention combines (STOSA).

    mean_branch "published" gives the means back as they came: the code published with STOSA does so, by a misspelt name.
    """

    def __init__(self, c: AWRSRConfig) -> None:
        super().__init__()
        self.pre = c.norm == "pre"
        self.attention = StochasticAttention(c.hidden, c.heads, mean_branch=c.mean_branch, **attention_options(c))
        self.mean = Branch(c) if c.mean_branch == "attended" else None
        self.cov = Branch(c)

    def before_attention(self, x: Tensor) -> Tensor:
        mean, cov = self.halves(x)
        return torch.cat([mean if self.mean is None else self.mean.before_attention(mean), self.cov.before_attention(cov)], -1)

    def forward(self, x: Tensor, where: Packed | Padded, rows: Tensor | None = None) -> Tensor:
        attended = self.attention(self.before_attention(x), where, rows).chunk(2, -1)
        mean, cov = self.halves(x if rows is None else x[rows])
        mean = mean if self.mean is None else self.mean.after_attention(mean, attended[0])
        return torch.cat([mean, self.cov.after_attention(cov, attended[1])], -1)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and covariances. With norm "post", the covariances that a layer reads are positive."""
        mean, cov = x.chunk(2, -1)
        return mean, cov if self.pre else positive(cov)


class NormOfHalves(nn.Module):
    """A layer norm for means and one for covariances."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mean, self.cov = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        mean, cov = x.chunk(2, -1)
        return torch.cat([self.mean(mean), self.cov(cov)], -1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "elu": F.elu}


def attention_options(c: AWRSRConfig) -> dict[str, Any]:
    """The configuration as arguments of `RefinedMultiheadAttention`."""
    names = ("refinement", "max_len", "rank", "tables", "table_std", "table_init", "backend")
    gated = c.refinement == "additive"
    return {name: getattr(c, name) for name in names} | {
        "per_head": c.per_head or c.tables == "content",
        "refine_scale": refine_scale(c),
        "sharpness": None,
        "learned_scale": c.learned_scale and c.refinement != "stochastic",  # whose scores are distances
        "gate": True if c.learned_gate or not gated else c.gate,
        "gate_init": c.gate if c.learned_gate and gated else 0.0,
        "dropout": c.attention_dropout,
    }


def refine_scale(c: AWRSRConfig) -> float | None:
    """The factor of the scores that become higher-order weights; None: 1 / sqrt(rank)."""
    square = c.table_std**2 * c.rank * (c.backbone != "stosa")  # whose scores are distances; sharpness was not tried there
    return c.refine_scale or (c.sharpness / square if square else 0) or None


def initialise(module: nn.Module) -> None:
    """Draw weights with standard deviation 0.02 and set biases to 0. Position tables are drawn by their layer."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def xavier(module: nn.Module) -> None:
    """Draw the weights of linear maps as Glorot and Bengio (2010) do."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
