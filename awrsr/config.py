"""What a model is made of and how it is trained. Loads no torch, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.histories import Split
from .options import check, option

WATCHED = "NDCG@10"  # on validation: what decides which epoch is kept, and when to stop
NEGATIVES = {"sampled_softmax": 1024, "cross_entropy": 0, "bce": 1, "bpr": 1, "gbce": 256}


def usual_negatives() -> str:
    return ", ".join(f"{count} for {loss}" for loss, count in NEGATIVES.items() if count)


@dataclass(frozen=True)
class AWRSRConfig:
    """What the network is made of; each option says what it is for."""

    num_items: int = option(0, "items N of the catalogue; 0 leaves it to fit", least=0)
    backbone: str = option(
        "sasrec",
        "sasrec: dot-product attention; stosa: items and events are Gaussians, in the attention and for scores compared by their "
        "Wasserstein distance; its authors' options stand above",
        choices=("sasrec", "stosa"),
    )
    refinement: str = option(
        "additive",
        "how attention weights are refined; none is plain attention (SASRec, STOSA), stochastic for stosa alone",
        choices=("none", "simple", "value", "additive", "stochastic"),
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
    table_init: str = option(
        "normal",
        "position tables at the start: normal, all drawn; orthogonal, with orthogonal columns; identity, a column per position, or "
        "per few positions where rank is less than max_len, so that events attend to events that attend alike; shifted, w_k is w_q "
        "moved on by one position, so that events attend to what followed the events they would attend to",
        choices=("normal", "orthogonal", "identity", "shifted"),
    )
    refine_scale: float = option(0.0, "factor of the scores of the higher-order weights; 0 takes 1 / sqrt(rank)", least=0)
    learned_scale: bool = option(
        False, "whether that factor is learned for each head, beginning there; not of stochastic, nor with correlation_norm"
    )
    correlation_norm: bool = option(
        False,
        "layer norm in the correlation space, on what the higher-order scores multiply; by calls of plain attention, two or three, "
        "rather than one of the fused operator",
    )
    gate: float = option(1.0, "factor of the higher-order weights in additive", least=0)
    learned_gate: bool = option(False, "whether additive learns that factor for each head, beginning there")
    feedforward: int = option(1, "width of the feed-forward layer as a multiple of hidden", least=1)
    activation: str = option("relu", "of the feed-forward layer", choices=("relu", "gelu", "elu"))
    norm: str = option("pre", "layer norm before or after attention and feed-forward", choices=("pre", "post"))
    init: str = option(
        "copy",
        "weights at the start: normal, all small; match, the last block has Xavier's, and keys equal to queries, so that events "
        "attend to events like them; copy, that, and what they attend to is passed on as it is, so that it ranks first",
        choices=("normal", "match", "copy"),
    )
    mean_branch: str = option(
        "attended",
        "of stosa: attended; or published, as in the code published with STOSA, whose blocks give means back as they came",
        choices=("attended", "published"),
    )
    temperature: float = option(
        0.0, "of scores: 0 takes dot products of state and item; above 0, cosines divided by it (0.05 to 0.1 is usual)", least=0
    )
    hidden_dropout: float = option(0.5, "of embeddings and of what each layer adds", least=0, below=1)
    attention_dropout: float = option(0.3, "of attention weights", least=0, below=1)
    backend: str = option(
        "auto",
        "of awrsr_kernels; nothing that is stored depends on it",
        choices=("auto", "triton", "torch", "reference"),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.hidden % self.heads or self.hidden // self.heads > 256:
            raise ValueError(f"hidden is {self.hidden}, must be a multiple of heads ({self.heads}), at most 256 per head")
        if self.correlation_norm and self.refinement == "none":
            raise ValueError("correlation_norm is True, must be False with refinement 'none', which has no correlation space")
        if self.learned_scale and (self.correlation_norm or self.refinement == "stochastic"):
            other = "correlation_norm, which has such factors" if self.correlation_norm else "refinement 'stochastic', of distances"
            raise ValueError(f"learned_scale is True, must be False with {other}")
        if self.backbone != "stosa":
            for name, value in (("refinement", "stochastic"), ("mean_branch", "published")):
                if getattr(self, name) == value:
                    raise ValueError(f"{name} is {value!r}, must be another with backbone {self.backbone!r}: it is of stosa alone")
        elif self.correlation_norm:
            raise ValueError("correlation_norm is True, must be False with backbone 'stosa': it is of sasrec alone")
        elif self.temperature:
            raise ValueError(f"temperature is {self.temperature}, must be 0 with backbone 'stosa', whose scores are distances")


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is trained; each option says what it is for."""

    loss: str = option(
        "sampled_softmax",
        "sampled_softmax (one uniform pool of negatives per batch, uncorrected; one as large as the "
        "catalogue is all of it), cross_entropy (the whole catalogue), bce, bpr or gbce (negatives: any item but "
        "the target); for stosa not bce and gbce, which want scores above 0 where distances have none",
        choices=tuple(NEGATIVES),
    )
    negatives: int = option(0, "items each target is compared with; 0: the usual, " + usual_negatives(), least=0)
    pvn_weight: float = option(
        0.0,
        "of the penalty that STOSA adds to bpr, where a target is farther from the state than from the negative; theirs is 0.005",
        least=0,
    )
    calibration: float = option(0.75, "gbce's t: 0 is bce, negatives summed, 1 calibrated", least=0, below=1 + 1e-9)
    item_init: str = option(
        "normal",
        "item embeddings begin at random, or as a factorisation of which items share training histories: fewer epochs, and more "
        "for rare items",
        choices=("normal", "cooccurrence"),
    )
    windows: str = option(
        "last", "train on the last max_len events of a history, or on all of them, cut into windows", choices=("last", "all")
    )
    batch_size: int = option(128, "sequences per step, over all processes; steps are made alike, so a few more or less", least=1)
    learning_rate: float = option(1e-3, "of AdamW", least=1e-12)
    schedule: str = option(
        "constant",
        "of the learning rate: constant, or falling to 0 over all epochs by half a cosine",
        choices=("constant", "cosine"),
    )
    table_rate: float = option(
        1.0, "learning rate of the tables of the correlation space, as a multiple of that of the rest", least=0
    )
    weight_decay: float = option(0.0, "of AdamW", least=0)
    average: float = option(
        0.998,
        "a running average of the weights is what is evaluated and saved: the share of it that stays in a step, less in the first "
        "ones; 0 takes the weights themselves",
        least=0,
        below=1,
    )
    clip: float = option(0.0, "largest norm of the gradient; 0 does not clip", least=0)
    epochs: int = option(100, "passes over the data, at most", least=1)
    patience: int = option(10, f"stop after so many epochs without a better validation {WATCHED}; 0 never stops early", least=0)
    filter_seen: str = option(
        "auto",
        "leave items of the history out of the ranking, where a target among them is a miss; auto: unless over 1 % of the events "
        "repeat an item of their history",
        choices=("auto", "yes", "no"),
    )
    seed: int = option(0, "of weights, order, negatives and dropout", least=0, below=1 << 31)
    precision: str = option("32-true", "of the arithmetic", choices=("32-true", "bf16-mixed", "16-mixed", "64-true"))
    accelerator: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "gpu", "mps"))
    devices: int = option(1, "processes on each machine", least=1)
    nodes: int = option(1, "machines", least=1)
    threads: int = option(0, "of torch on the CPU; 0 leaves it to torch", least=0)
    logger: str = option("csv", "where loss and metrics of each epoch go, under logs/", choices=("csv", "tensorboard", "none"))
    progress: bool = option(True, "show a bar on a terminal, otherwise a line per epoch")

    def __post_init__(self) -> None:
        check(self)
        if self.pvn_weight and self.loss != "bpr":
            raise ValueError(f"pvn_weight is {self.pvn_weight}, must be 0 with loss {self.loss!r}: it is of bpr alone")
        if self.accelerator in ("gpu", "mps") and self.device() == "cpu":
            raise ValueError(f"accelerator is {self.accelerator!r}, but torch finds none here; take cpu or auto")
        if self.precision == "16-mixed" and self.device() == "cpu":
            raise ValueError("precision is '16-mixed', which needs a GPU; take bf16-mixed or 32-true")

    def num_negatives(self) -> int:
        return self.negatives or NEGATIVES[self.loss]

    def device(self) -> str:
        """Where a single process computes."""
        import torch

        if self.accelerator in ("auto", "gpu") and torch.cuda.is_available():
            return "cuda"
        return "mps" if self.accelerator in ("auto", "mps") and torch.backends.mps.is_available() else "cpu"

    def filters_seen(self, split: Split) -> bool:
        """Whether items of the history are left out of the ranking."""
        return not split.histories.repeats() if self.filter_seen == "auto" else self.filter_seen == "yes"


def before_averaging() -> TrainingOptions:
    """What runs had whose files lack an option: those that came later are off by default, but for the running average."""
    return TrainingOptions(average=0)


def without_removed_options(stored: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The contents of a config.json without options that no longer exist. Raises ValueError for one that had an effect."""
    return stored
