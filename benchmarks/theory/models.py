"""Small causal transformers that differ in their attention alone: ours by presets of the recommender, others in plain torch.

B sequences, H heads, L positions, E hidden size, D head dim.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awrsr.config import AWRSRConfig
from awrsr.models.attention import Padded
from awrsr.models.network import AWRSRNetwork
from awrsr.presets import preset_options

from .tasks import Task


class Contestant(NamedTuple):
    """A model. preset: of the recommender; attention: instead of it, a class below; width: a multiple of the usual hidden size
    and number of heads.
    chosen: the layers, from 0, that have this attention, all by default; the others have plain attention."""

    name: str
    preset: str = "plain"
    layers: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    attention: type["Weighted"] | None = None
    width: int = 1
    chosen: tuple[int, ...] | None = None

    def build(self, task: Task, hidden: int, heads: int) -> AWRSRNetwork:
        """A new model for a task. All start alike but for the attention: events attend to events like them, and pass on what
        they are (`init copy`)."""
        options = preset_options(self.preset) | {"layers": self.layers} | dict(self.options)
        sizes: dict[str, Any] = {
            "num_items": task.vocabulary,
            "max_len": task.length,
            "hidden": hidden * self.width,
            "heads": heads * self.width,
        }
        if options["refinement"] == "additive":
            options["rank"] = min(task.length, 256 // (options["lags"] + 1))
        own: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "feedforward": 2, "activation": "gelu"}
        network = AWRSRNetwork(AWRSRConfig(**options | sizes | own))
        if self.attention is not None:
            for block in network.blocks:
                block._modules["attention"] = self.attention(block.attention, heads)
        if self.chosen is not None:
            plain = AWRSRNetwork(AWRSRConfig(**preset_options("plain") | {"layers": self.layers} | sizes | own))
            for nth in self.chosen:
                plain.blocks[nth]._modules["attention"] = network.blocks[nth].attention
            return plain
        return network


class Weighted(nn.Module):
    """Attention by L x L weights, with the linear maps of the layer in whose place it stands."""

    def __init__(self, plain: Any, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = plain.qkv, plain.out, heads

    def forward(self, x: Tensor, where: Padded, rows: None = None) -> Tensor:
        """x (B, L, E) -> (B, L, E)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attended(q, k, v).transpose(1, 2).flatten(-2))

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, L, D) each -> (B, H, L, D)."""
        raise NotImplementedError


def causal(scores: Tensor) -> Tensor:
    """Softmax of (..., L, L) scores over what came before."""
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


class TalkingHeads(Weighted):
    """Heads mix their scores before the softmax and their weights after it, by learned matrices (Shazeer and others,
    arXiv 2003.02436)."""

    def __init__(self, plain: Any, heads: int) -> None:
        super().__init__(plain, heads)
        self.before, self.after = nn.Parameter(torch.eye(heads)), nn.Parameter(torch.eye(heads))

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhij,hg->bgij", q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, self.before)
        return torch.einsum("bhij,hg->bgij", causal(scores), self.after) @ v


class Differential(Weighted):
    """Each head subtracts a second softmax, of the other half of its features, times a learned number, and normalises
    (Ye and others, arXiv 2410.05258, with one number per head and the paper's start for a first layer)."""

    START = 0.2

    def __init__(self, plain: Any, heads: int) -> None:
        super().__init__(plain, heads)
        self.share = nn.Parameter(torch.full((heads, 1, 1), self.START))
        self.norm = nn.RMSNorm(self.out.in_features // heads)

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first, second = (
            causal(a @ b.transpose(-1, -2) * a.shape[-1] ** -0.5) for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
        )
        return self.norm((first - self.share * second) @ v) * (1 - self.START)


class Nexus(Weighted):
    """Queries and keys are themselves results of attention, by the same weights (after arXiv 2512.03377: one inner attention, its
    maps shared with the outer one)."""

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inner = causal(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
        return F.scaled_dot_product_attention(inner @ q, inner @ k, v, is_causal=True)


CONTESTANTS = (
    Contestant("plain"),
    Contestant("plain, ten times as wide", width=10),
    Contestant("two plain layers", layers=2),
    Contestant("refined", "refined"),
    Contestant("lagged", "lagged"),
    Contestant("shifted values", "shifted"),
    Contestant("smeared keys", "smeared"),
    Contestant("suffix-3", "suffix", options=(("unigram", False), ("shift_gate", 3.0))),
    Contestant("talking heads", attention=TalkingHeads),
    Contestant("differential", attention=Differential),
    Contestant("Nexus", attention=Nexus),
)

LAYERS = 3  # of the language models; SECOND: refined there, after a layer that has seen the text around
SECOND = (1,)
LANGUAGE = (
    Contestant("three plain layers", layers=LAYERS),
    Contestant("four plain layers", layers=LAYERS + 1),
    Contestant("second layer refined", "refined", LAYERS, chosen=SECOND),
    Contestant("second layer lagged", "lagged", LAYERS, chosen=SECOND),
    Contestant("all layers lagged", "lagged", LAYERS),
    Contestant("second layer smeared", "smeared", LAYERS, chosen=SECOND),
    Contestant("second layer suffix-3", "suffix", LAYERS, (("unigram", False), ("shift_gate", 3.0)), chosen=SECOND),
)
