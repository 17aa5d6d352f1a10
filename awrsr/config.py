"""What a model is made of and how it is trained. Loads no torch, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data.histories import Split
from .options import check, option

WATCHED = "NDCG@10"  # on validation: what decides which epoch is kept, and when to stop
NEGATIVES = {"sampled_softmax": 1024, "cross_entropy": 0, "bce": 1, "bpr": 1, "gbce": 256}
USUAL_NEGATIVES = ", ".join(f"{count} for {loss}" for loss, count in NEGATIVES.items() if count)
REMOVED: dict[str, dict[str, Any]] = {  # options of older runs, with the value that had no effect
    "model": {"correlation_norm": False},
    "training": {"table_rate": 1.0},
}


@dataclass(frozen=True)
class AWRSRConfig:
    """What the network is made of; each option says what it is for."""

    num_items: int = option(0, "Number of items N in the catalogue; 0 leaves it to fit.", least=0)
    backbone: str = option(
        "sasrec",
        "sasrec: dot-product attention. stosa: items and events are Gaussians, which attention and scores compare by their "
        "Wasserstein distance; awrsr train --help lists the options of STOSA's authors.",
        choices=("sasrec", "stosa"),
    )
    refinement: str = option(
        "additive",
        "How attention weights are refined. none is plain attention (SASRec, STOSA); stochastic needs backbone stosa.",
        choices=("none", "simple", "value", "additive", "stochastic"),
    )
    max_len: int = option(50, "Number of events that the model reads, the last ones of a history.", least=1)
    hidden: int = option(64, "Width of the network.", least=1)
    layers: int = option(2, "Number of blocks of attention and feed-forward.", least=1)
    heads: int = option(2, "Number of attention heads in a block.", least=1)
    rank: int = option(32, "Rank of the correlation space, the number of columns of its tables; at most 256.", least=1, below=257)
    tables: str = option(
        "position",
        "What the tables of the correlation space are. position: a learned row per position, counted from the end. content: a "
        "linear map of each event.",
        choices=("position", "content"),
    )
    per_head: bool = option(True, "Give each head its own position tables instead of sharing them.")
    table_std: float = option(1.0, "Root mean square of the tables' entries at the start.", least=0)
    table_init: str = option(
        "normal",
        "How position tables start. normal: at random. orthogonal: with orthogonal columns. identity: with a column per position, "
        "or per few positions where rank is less than max_len, so that events attend to events that attend alike. shifted: w_k is "
        "w_q moved on by one position, so that events attend to what followed the events that first-order weights find.",
        choices=("normal", "orthogonal", "identity", "shifted"),
    )
    refine_scale: float = option(0.0, "Factor of the scores of higher-order weights; 0 takes 1 / sqrt(rank).", least=0)
    learned_scale: bool = option(
        False, "Learn a factor of refine_scale for each head, which starts at 1; not with refinement stochastic."
    )
    gate: float = option(1.0, "Factor of the higher-order weights with refinement additive.", least=0)
    learned_gate: bool = option(False, "Learn the factor of each head, which starts at gate; only with refinement additive.")
    feedforward: int = option(1, "Width of the feed-forward layer as a multiple of hidden.", least=1)
    activation: str = option("relu", "Activation of the feed-forward layer.", choices=("relu", "gelu", "elu"))
    norm: str = option("pre", "Apply layer norm before or after attention and feed-forward.", choices=("pre", "post"))
    init: str = option(
        "copy",
        "How weights start. normal: all small. match: the last block has Xavier's weights and keys equal to queries, so that "
        "events attend to events like them. copy: like match, and the last block passes on the events it attends to unchanged, so "
        "that their items rank first.",
        choices=("normal", "match", "copy"),
    )
    mean_branch: str = option(
        "attended",
        "What stosa does with means. attended: they are attended to, as STOSA's paper says. published: blocks return them "
        "unchanged, as in the code published with STOSA.",
        choices=("attended", "published"),
    )
    temperature: float = option(
        0.0,
        "Temperature of scores. 0 takes dot products of state and item; above 0, cosines divided by it (0.05 to 0.1 is usual).",
        least=0,
    )
    hidden_dropout: float = option(0.5, "Dropout of embeddings and of what each layer adds.", least=0, below=1)
    attention_dropout: float = option(0.3, "Dropout of attention weights.", least=0, below=1)
    backend: str = option(
        "auto",
        "Backend of awrsr_kernels; a stored model does not depend on it.",
        choices=("auto", "triton", "torch", "reference"),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.hidden % self.heads or self.hidden // self.heads > 256:
            raise ValueError(f"hidden is {self.hidden}, must be a multiple of heads ({self.heads}), at most 256 per head")
        if self.learned_scale and self.refinement == "stochastic":
            raise ValueError("learned_scale is True, must be False with refinement 'stochastic', whose scores are distances")
        if self.backbone != "stosa":
            for name, value in (("refinement", "stochastic"), ("mean_branch", "published")):
                if getattr(self, name) == value:
                    raise ValueError(f"{name} is {value!r}, must be another with backbone {self.backbone!r}: it needs stosa")
        elif self.temperature:
            raise ValueError(f"temperature is {self.temperature}, must be 0 with backbone 'stosa', whose scores are distances")


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is trained; each option says what it is for."""

    loss: str = option(
        "sampled_softmax",
        "Training loss. sampled_softmax: one uniform pool of negatives per batch, uncorrected; a pool as large as the catalogue is "
        "all of it. cross_entropy: the whole catalogue. bce, bpr and gbce: negatives are any items except the target. bce and gbce "
        "do not fit stosa, whose scores are never above 0.",
        choices=tuple(NEGATIVES),
    )
    negatives: int = option(
        0, f"Number of items that each target is compared with; 0 takes the usual number: {USUAL_NEGATIVES}.", least=0
    )
    pvn_weight: float = option(
        0.0,
        "Weight of the penalty that STOSA adds to bpr where a target is farther from the state than from the negative; its authors "
        "take 0.005.",
        least=0,
    )
    calibration: float = option(
        0.75, "Calibration t of gbce: 0 is bce with negatives summed, 1 is fully calibrated.", least=0, below=1 + 1e-9
    )
    item_init: str = option(
        "normal",
        "How item embeddings start. normal: at random. cooccurrence: from a factorisation of which items share training histories, "
        "which takes fewer epochs and helps rare items.",
        choices=("normal", "cooccurrence"),
    )
    windows: str = option(
        "last",
        "Train on the last max_len events of a history, or on all of its events, cut into windows.",
        choices=("last", "all"),
    )
    batch_size: int = option(
        128, "Sequences per step over all processes; steps are made equally large, so it may be a few more or less.", least=1
    )
    learning_rate: float = option(1e-3, "Learning rate of AdamW.", least=1e-12)
    schedule: str = option(
        "constant",
        "Schedule of the learning rate: constant, or falling to 0 over all epochs by half a cosine.",
        choices=("constant", "cosine"),
    )
    weight_decay: float = option(0.0, "Weight decay of AdamW.", least=0)
    average: float = option(
        0.998,
        "Share of a running average of the weights that each step keeps, less in the first steps. The average is evaluated and "
        "saved; 0 takes the weights themselves.",
        least=0,
        below=1,
    )
    clip: float = option(0.0, "Largest norm of the gradient; 0 does not clip.", least=0)
    epochs: int = option(100, "Largest number of passes over the data.", least=1)
    patience: int = option(10, f"Stop after this many epochs without a better validation {WATCHED}; 0 never stops early.", least=0)
    filter_seen: str = option(
        "auto",
        "Leave the items of a history out of its ranking, where a target among them counts as a miss. auto: unless more than 1 % "
        "of the events repeat an item of their history.",
        choices=("auto", "yes", "no"),
    )
    seed: int = option(0, "Random seed of weights, order, negatives and dropout.", least=0, below=1 << 31)
    precision: str = option("32-true", "Precision of the arithmetic.", choices=("32-true", "bf16-mixed", "16-mixed", "64-true"))
    accelerator: str = option("auto", "Where to train; auto takes a GPU if there is one.", choices=("auto", "cpu", "gpu", "mps"))
    devices: int = option(1, "Number of processes on each machine.", least=1)
    nodes: int = option(1, "Number of machines.", least=1)
    threads: int = option(0, "Number of torch's CPU threads; 0 leaves it to torch.", least=0)
    logger: str = option(
        "csv", "Format of each epoch's loss and metrics, written below logs/.", choices=("csv", "tensorboard", "none")
    )
    progress: bool = option(True, "Show a progress bar on a terminal, or a line per epoch elsewhere.")

    def __post_init__(self) -> None:
        check(self)
        if self.pvn_weight and self.loss != "bpr":
            raise ValueError(f"pvn_weight is {self.pvn_weight}, must be 0 with loss {self.loss!r}: only bpr has the penalty")
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
    """The options of runs whose files lack some: later options are off by default, except for the running average."""
    return TrainingOptions(average=0)


def without_removed_options(stored: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The sections of an older run's config.json, read from `source`, without options that no longer exist.

    Raises:
        ValueError: the run used such an option.
    """
    if not isinstance(stored, dict):
        return stored  # its reader says what is wrong
    kept = dict(stored)
    for section, removed in REMOVED.items():
        options = kept.get(section)
        if not isinstance(options, dict):
            continue
        for name, unused in removed.items():
            if options.get(name, unused) != unused:
                used = f"{source} uses {name} (it is {options[name]!r}), an option that was removed"
                raise ValueError(f"{used}: the tag study-1 of this project still reads this run; or train again without the option")
        kept[section] = {name: value for name, value in options.items() if name not in removed}
    return kept
