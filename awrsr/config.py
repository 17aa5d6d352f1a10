"""The options of a model and of its training. This module does not import torch, so that `--help` is quick."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

from .data.splits import Split
from .habits import refuse_unknown
from .options import check, option
from .processes import MOST_THREADS

WATCHED = "NDCG@10"  # on validation: decides which epoch is kept, and when training stops
NEGATIVES = {"sampled_softmax": 1024, "cross_entropy": 0, "bce": 1, "bpr": 1, "gbce": 256}
USUAL_NEGATIVES = ", ".join(f"{count} for {loss}" for loss, count in NEGATIVES.items() if count)
MAY_CHANGE = {"epochs", "patience", "progress", "logger", "threads", "backend", "data", "path"}  # in a run that is resumed
# Options that need backbone sasrec
OF_SASREC = ("lags", "suffix", "smeared_keys", "shift", "shift_gate", "plain_heads", "unigram")
REMOVED: dict[str, dict[str, Any]] = {  # options of older runs, with the value that had no effect
    "model": {"correlation_norm": False},
    "training": {"table_rate": 1.0},
}
# What an option was in runs that do not store it, where that is not its default now
BEFORE = {"layers": 2, "rank": 32, "table_init": "normal", "sharpness": 0.0, "learned_scale": False}
EARLIER: dict[str, dict[str, Any]] = {
    "model": BEFORE | {"gate": 1.0, "learned_gate": False},
    "training": {"average": 0},
}


@dataclass(frozen=True)
class AWRSRConfig:
    """Options of the network; the help text of each field says what it does."""

    num_items: int = option(0, "Number of items N in the catalogue; 0 means that `fit` counts them.", least=0, below=1 << 31)
    backbone: str = option(
        "sasrec",
        "Kind of model. sasrec: dot-product attention. stosa: stochastic attention, in which items and events are Gaussians; "
        "attention and scores compare them by Wasserstein distance. The help of the train command lists the options of STOSA's "
        "authors.",
        choices=("sasrec", "stosa"),
    )
    refinement: str = option(
        "additive",
        "How attention weights are refined; the README has the formulas. none: plain attention, as in SASRec and STOSA. "
        "stochastic: only with backbone stosa.",
        choices=("none", "simple", "value", "additive", "stochastic"),
    )
    max_len: int = option(50, "Number of events that the model reads: the last ones of each history.", least=1, most=65536)
    hidden: int = option(64, "Width of the network: the number of features of each event.", least=1, most=16384)
    layers: int = option(1, "Number of blocks, each of attention and a feed-forward layer.", least=1, most=1000)
    heads: int = option(2, "Number of attention heads in each block.", least=1, most=1024)
    rank: int = option(64, "Number of columns of the tables W_q and W_k that refinement learns; at most 256.", least=1, below=257)
    tables: str = option(
        "position",
        "Where the rows of the tables come from. position: a learned row for each position, counted from the end of the history. "
        "content: a learned linear map of each event.",
        choices=("position", "content"),
    )
    per_head: bool = option(True, "Give each head its own position tables instead of sharing one pair.")
    table_std: float = option(1.0, "Root mean square of the entries of the tables before training.", least=0)
    table_init: str = option(
        "shifted",
        "How position tables are initialised. normal: at random. orthogonal: with orthogonal columns. identity: with one column "
        "per position, or one shared by several positions if rank is less than max_len; events then attend to events with similar "
        "first-order weights. shifted: W_k is W_q shifted by one position; events then attend to whatever followed the events that "
        "first-order weights point to, exactly so if rank is max_len or more.",
        choices=("normal", "orthogonal", "identity", "shifted"),
    )
    sharpness: float = option(
        25.0,
        "How sharp higher-order weights begin: the score refine_scale * table_std^2 * rank that they give, before training, to two "
        "events whose first-order weights all lie on rows of the tables that match. It sets refine_scale, unless that is given or "
        "table_std is 0. 0, or backbone stosa: refine_scale is 1 / sqrt(rank).",
        least=0,
    )
    refine_scale: float = option(
        0.0, "Factor of the scores that become higher-order weights; 0 means that sharpness decides.", least=0
    )
    learned_scale: bool = option(
        True, "Multiply refine_scale by a learned number per head, which starts at 1; without effect with refinement stochastic."
    )
    gate: float = option(2.0, "Factor of the higher-order weights; only used with refinement additive.", least=0)
    learned_gate: bool = option(
        True, "Learn the gate of each head, starting from the value of gate; only with refinement additive."
    )
    lags: int = option(
        0,
        "Number of earlier events whose first-order weights are compared as well: with 2, higher-order weights fall on events "
        "where the last three events attended alike, by learned factors per head that start at 1/2 and 1/4. Only with backbone "
        "sasrec; (lags + 1) times rank is at most 256.",
        least=0,
        most=7,
    )
    suffix: int = option(
        1,
        "Number of events that first-order weights compare: with 3, an event attends to events that it resembles and whose two "
        "events before resemble its own, by a learned factor per head and event. 1: only the events themselves. Only with backbone "
        "sasrec; suffix times hidden / heads is at most 256.",
        least=1,
        most=256,
    )
    smeared_keys: bool = option(
        False,
        "Mix the key of each event with the key of the event before (token shift), by a learned share per head: in half of the "
        "heads, events at first attend to what followed the events that they resemble. Only with backbone sasrec.",
    )
    shift: str = option(
        "off",
        "Whether weights fall on what followed the events that they were given to. off: no. heads: in all heads but the first "
        "plain_heads. added: each head attends to the events and to what followed them; only with refinement none, at the cost of "
        "twice as many heads. Only with backbone sasrec, not with refinement value.",
        choices=("off", "heads", "added"),
    )
    shift_gate: float = option(
        1.0, "Factor of what followed in shifted heads, learned per head from this value on; only used with shift.", least=0
    )
    plain_heads: int = option(
        0,
        "Number of heads, the first ones, with plain attention, neither refined nor shifted; with refinement none or additive and "
        "backbone sasrec.",
        least=0,
    )
    unigram: bool = option(
        False,
        "Shifted heads also attend without suffix, by a second softmax with a learned factor per head that starts at shift_gate; "
        "needs shift heads, suffix 2 or more and refinement none.",
    )
    feedforward: int = option(1, "Width of the feed-forward layer, as a multiple of hidden.", least=1, most=1000)
    activation: str = option("relu", "Activation of the feed-forward layer.", choices=("relu", "gelu", "elu"))
    norm: str = option("pre", "Apply layer norm before or after attention and feed-forward.", choices=("pre", "post"))
    init: str = option(
        "copy",
        "How weights are initialised. normal: small random values. match: the last block has Xavier weights, and keys equal "
        "queries, so that events attend to similar events. copy: like match, but the last block also passes on unchanged what it "
        "attends to, so that the items of those events rank first.",
        choices=("normal", "match", "copy"),
    )
    mean_branch: str = option(
        "attended",
        "How stosa treats means. attended: attention is applied to them, as in STOSA's paper. published: blocks return them "
        "unchanged, as in the code published with STOSA.",
        choices=("attended", "published"),
    )
    temperature: float = option(
        0.0,
        "Temperature of scores. 0: a score is the dot product of state and item. Above 0: it is their cosine divided by the "
        "temperature (0.05 to 0.1 is usual).",
        least=0,
    )
    hidden_dropout: float = option(0.5, "Dropout rate of embeddings and of the output that each layer adds.", least=0, below=1)
    attention_dropout: float = option(0.3, "Dropout rate of attention weights.", least=0, below=1)
    backend: str = option(
        "auto",
        "Backend of awrsr_kernels that computes attention; a saved model does not depend on it.",
        choices=("auto", "triton", "torch", "reference"),
    )

    def __post_init__(self) -> None:
        check(self)
        if self.hidden % self.heads or self.hidden // self.heads > 256:
            raise ValueError(f"hidden is {self.hidden}, must be a multiple of heads ({self.heads}), at most 256 per head")
        self._check_heads()
        if self.backbone != "stosa":
            for name, value in (("refinement", "stochastic"), ("mean_branch", "published")):
                if getattr(self, name) == value:
                    raise ValueError(f"{name} is {value!r}, which needs backbone 'stosa'; backbone is {self.backbone!r}")
            return
        for name in OF_SASREC:
            if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name} is {value!r}, which needs backbone 'sasrec'; backbone is {self.backbone!r}")
        if self.temperature:
            raise ValueError(f"temperature is {self.temperature}, must be 0 with backbone 'stosa', whose scores are distances")

    def _check_heads(self) -> None:
        """What heads compare, and what their weights fall on."""
        if self.suffix * (self.hidden // self.heads) > 256:
            width = f"hidden / heads = {self.hidden // self.heads}"
            raise ValueError(f"suffix is {self.suffix}, must be at most 256 / {width}: what is compared is at most 256 wide")
        if (self.lags + 1) * self.rank > 256 and self.refinement != "none":
            raise ValueError(f"lags is {self.lags}, must be so small that (lags + 1) * rank is at most 256; rank is {self.rank}")
        if self.plain_heads >= self.heads:
            raise ValueError(f"plain_heads is {self.plain_heads}, must be below heads, {self.heads}")
        needs = (
            ("plain_heads", self.plain_heads, self.refinement in ("none", "additive"), "refinement none or additive"),
            ("plain_heads", self.plain_heads, self.shift != "added", "shift off or heads"),
            ("shift", self.shift != "off", self.refinement != "value", "another refinement than value"),
            ("shift", self.shift == "added", self.refinement == "none", "refinement none"),
            ("unigram", self.unigram, self.shift == "heads", "shift heads"),
            ("unigram", self.unigram, self.suffix > 1, "suffix 2 or more"),
            ("unigram", self.unigram, self.refinement == "none", "refinement none"),
        )
        for name, used, fits, needed in needs:
            if used and not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}, which needs {needed}")


@dataclass(frozen=True)
class TrainingOptions:
    """Options of training; the help text of each field says what it does."""

    loss: str = option(
        "sampled_softmax",
        "Training loss. sampled_softmax: softmax over the target and a pool of negatives, which the batch shares; they are drawn "
        "uniformly, and scores are not corrected for sampling. If the pool is as large as the catalogue, it is the whole "
        "catalogue. cross_entropy: softmax over the whole catalogue. bce, bpr and gbce: negatives are drawn from all items except "
        "the target. bce and gbce do not suit stosa, whose scores are never above 0.",
        choices=tuple(NEGATIVES),
    )
    negatives: int = option(
        0, f"Number of negatives that each target is compared with; 0 means the default of the loss: {USUAL_NEGATIVES}.", least=0
    )
    pvn_weight: float = option(
        0.0,
        "Weight of the penalty that STOSA adds to bpr when a target is farther from the state than from the negative; its authors "
        "use 0.005.",
        least=0,
    )
    calibration: float = option(
        0.75, "Calibration t of gbce: 0 is bce summed over the negatives, 1 is fully calibrated.", least=0, below=1 + 1e-9
    )
    item_init: str = option(
        "normal",
        "How item embeddings are initialised. normal: at random. cooccurrence: from a factorisation of which items share training "
        "histories, which needs fewer epochs and helps rare items.",
        choices=("normal", "cooccurrence"),
    )
    windows: str = option(
        "last",
        "Which events of a long history are trained on. last: the last max_len events. all: all events, cut into windows.",
        choices=("last", "all"),
    )
    batch_size: int = option(
        128,
        "Number of sequences per step, over all processes. All steps of an epoch are made equally large, so the number used may "
        "differ a little from the one given.",
        least=1,
    )
    learning_rate: float = option(1e-3, "Learning rate of AdamW.", least=1e-12)
    schedule: str = option(
        "constant",
        "Schedule of the learning rate. constant: it does not change. cosine: it falls to 0 over all epochs along half a cosine.",
        choices=("constant", "cosine"),
    )
    weight_decay: float = option(0.0, "Weight decay of AdamW.", least=0)
    average: float = option(
        0.998,
        "Decay per step of the running average of the weights, lower during the first steps. The average is evaluated and saved; "
        "0 switches averaging off.",
        least=0,
        below=1,
    )
    clip: float = option(0.0, "Clip the norm of the gradient to this value; 0 does not clip.", least=0)
    epochs: int = option(100, "Maximum number of passes over the data.", least=1)
    patience: int = option(
        10, f"Stop after this many epochs without a better {WATCHED} on validation; 0 never stops early.", least=0
    )
    filter_seen: str = option(
        "auto",
        "Leave the items of a history out of the ranking; a target among them then counts as a miss. auto: yes, unless more than "
        "1 % of the events repeat an item of their history.",
        choices=("auto", "yes", "no"),
    )
    seed: int = option(0, "Random seed of initial weights, data order, negatives and dropout.", least=0, below=1 << 31)
    precision: str = option(
        "32-true",
        "Numerical precision, in Lightning's names.",
        choices=("32-true", "bf16-mixed", "16-mixed", "64-true"),
    )
    accelerator: str = option("auto", "Device to train on; auto uses a GPU if there is one.", choices=("auto", "cpu", "gpu", "mps"))
    devices: int = option(1, "Number of processes on each machine.", least=1, most=1024)
    nodes: int = option(1, "Number of machines.", least=1, most=65536)
    threads: int = option(0, "Number of CPU threads that torch uses; 0 leaves the number to torch.", least=0, most=MOST_THREADS)
    logger: str = option(
        "csv",
        "Format of the log of losses and metrics per epoch, which is in the folder logs/ of the run.",
        choices=("csv", "tensorboard", "none"),
    )
    progress: bool = option(True, "Show a progress bar on a terminal, or a line per epoch elsewhere.")

    def __post_init__(self) -> None:
        check(self)
        if self.pvn_weight and self.loss != "bpr":
            raise ValueError(f"pvn_weight is {self.pvn_weight}, must be 0 with loss {self.loss!r}: only bpr has the penalty")
        if self.accelerator in ("gpu", "mps") and self.device() == "cpu":
            raise ValueError(f"accelerator is {self.accelerator!r}, but torch finds no such device; use cpu or auto")
        if self.precision == "16-mixed" and self.device() == "cpu":
            raise ValueError("precision is '16-mixed', which needs a GPU; use bf16-mixed or 32-true")

    def num_negatives(self) -> int:
        return self.negatives or NEGATIVES[self.loss]

    def device(self) -> str:
        """The device that a single process computes on."""
        import torch

        if self.accelerator in ("auto", "gpu") and torch.cuda.is_available():
            return "cuda"
        return "mps" if self.accelerator in ("auto", "mps") and torch.backends.mps.is_available() else "cpu"

    def filters_seen(self, split: Split) -> bool:
        """Whether items of the history are left out of the ranking."""
        return not split.histories.repeats() if self.filter_seen == "auto" else self.filter_seen == "yes"


def check_names(call: str, kind: type, given: Iterable[str], *more: str) -> None:
    """Raise TypeError, saying what to write, for an option that a class of options does not have. more: options of the call."""
    of_model = {each.name: f"the model: AWRSR({each.name}=...)" for each in fields(AWRSRConfig)}
    of_training = {each.name: f"training: fit(histories, {each.name}=...)" for each in fields(TrainingOptions)}
    own, elsewhere = (of_model, of_training) if kind is AWRSRConfig else (of_training, of_model)
    refuse_unknown(call, given, (*own, *more), elsewhere)


def _check_names_of(kind: type) -> None:
    """Have a class of options name what it does not know, as Python's own message does not say what to write."""
    init: Any = kind.__init__  # type: ignore[misc]

    @wraps(init)
    def __init__(self: Any, *args: Any, **given: Any) -> None:
        check_names(kind.__name__, kind, given)
        init(self, *args, **given)

    kind.__init__ = __init__  # type: ignore[misc]


_check_names_of(AWRSRConfig)
_check_names_of(TrainingOptions)


def _short(value: Any) -> str:
    return text if len(text := repr(value)) <= 40 else text[:40] + "..."


def earlier_values() -> dict[str, dict[str, Any]]:
    """By section, what the options of a run are that its configuration does not store, as it was written before they existed."""
    return {name: asdict(kind()) | EARLIER[name] for name, kind in (("model", AWRSRConfig), ("training", TrainingOptions))}


def without_removed_options(stored: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The sections of a run's config.json, read from `source`, without options that no longer exist, and with the values of model
    options that did not exist when it was written.

    Raises:
        ValueError: this is no configuration, or the run used such an option.
    """
    for name, value in {"": stored, **(stored if isinstance(stored, dict) else {})}.items():
        if name in ("", "data", "model", "training") and not isinstance(value, dict):
            what = f"{name or 'the whole'} is {_short(value)}, must be options with their values in braces"
            raise ValueError(f"{source} is not a configuration of this model: {what}")
    kept = dict(stored)
    for section, removed in REMOVED.items():
        options = kept.get(section)
        if not isinstance(options, dict):
            continue
        for name, unused in removed.items():
            if options.get(name, unused) != unused:
                used = f"{source} uses {name} (it is {options[name]!r}), an option that was removed"
                raise ValueError(f"{used}: load this run at the tag study-1 of this project, or train again without the option")
        earlier = EARLIER["model"] if section == "model" and options else {}
        kept[section] = earlier | {name: value for name, value in options.items() if name not in removed}
    return kept
