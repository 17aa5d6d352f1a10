"""What the study runs: cells of data, model and loss, in groups by the question they answer."""

import shlex
from typing import Any, NamedTuple

GROUPS = ("core", "depth", "recipe", "why", "searched", "ablation", "stosa", "losses")
SEEDS = 5  # of a cell that a claim rests on
LOOK = 3  # of one that only shows where to look
EQUAL = "higher-order weights all equal"  # a control
AS_REFINED = "with the settings of the refined"  # plain attention with what a search chose for refined attention
KEY = ("dataset", "backbone", "variant", "refinement", "tables", "layers", "loss")  # what tells cells apart
REMOVED = ("correlation_norm", "table_rate")  # options that training no longer has: their runs stay, and TAG can repeat them
TAG = "study-1"

# How a data set is read, and what suits it whatever the attention: found for plain attention, see docs/study.md; of those with a
# holdout, as docs/study-plan.md says
HOLDOUT = {"jazz": 2, "nottingham": 8, "python": 2, "oneill": 8, "essen": 4, "redis": 3, "loans": 4, "sepsis": 4}
HOLDOUT |= {"wikispeedia": 1, "assistments": 3}
DATA: dict[str, dict[str, Any]] = {name: {"split": "last-n", "holdout": count} for name, count in HOLDOUT.items()}
DATA["wikipedia"] = {"collapse": True, "min_user_events": 5}
EPOCHS = {"jazz": 14, "nottingham": 14, "python": 10, "oneill": 10, "essen": 5, "redis": 10, "loans": 4, "sepsis": 20}
EPOCHS |= {"wikispeedia": 6, "assistments": 6}
BASE = {
    "beauty": "--epochs 25 --patience 5",
    "lastfm": "--batch-size 32 --epochs 60",
    "wikipedia": "--batch-size 32 --epochs 60 --hidden-dropout 0.2 --attention-dropout 0 --init copy",
    "synthetic": "--no-baseline",
} | {
    name: f"--schedule cosine --batch-size 32 --attention-dropout 0.1 --filter-seen no --epochs {count}"
    for name, count in EPOCHS.items()
}

# Defaults of `awrsr train` when the groups below were run, which entries of that time do not name; synthetic histories have others
EARLIER = "--rank 32 --table-init normal --sharpness 0 --no-learned-scale --gate 1 --no-learned-gate"

# As STOSA's authors have it, except for the loss, the window and more dropout
STOSA = "--heads 4 --norm post --activation elu --feedforward 4 --attention-dropout 0 --hidden-dropout 0.5 --init normal"
# Without these, one negative overfits
BCE = "--norm post --attention-dropout 0.5 --hidden-dropout 0.5 --schedule cosine --epochs 120 --patience 30"
# The best found by hand for additive on Beauty, by validation with seed 0; not the width alone
WIDE = ("128 wide", "--hidden 128 --negatives 2048 --schedule cosine --patience 8")
# With twice that width, more dropout, and items that begin by which of them share histories: fewer epochs; chosen likewise
BEGUN = (
    "256 wide from cooccurrence",
    "--hidden 256 --hidden-dropout 0.65 --negatives 2048 --schedule cosine --epochs 20 --patience 8 --item-init cooccurrence",
)
# What the searches chose
SEARCHED_PLAIN = "--heads 4 --init match --hidden-dropout 0.15 --learning-rate 0.00328 --batch-size 128 --temperature 0.1"
SHARED = "--hidden-dropout 0.1 --attention-dropout 0.1 --learning-rate 0.00249 --batch-size 64 --temperature 0.1"
SEARCHED = f"{SHARED} --rank 8 --table-std 0.292 --correlation-norm"


class Cell(NamedTuple):
    """A row of the table: everything but the seed."""

    group: str
    dataset: str  # beauty, lastfm, wikipedia or synthetic
    refinement: str
    layers: int
    variant: str = "default"  # what the table calls it
    options: str = ""  # of awrsr train: what the variant is
    backbone: str = "sasrec"
    tables: str = "position"
    loss: str = "sampled_softmax"
    seeds: int = SEEDS

    @property
    def name(self) -> str:
        parts = (self.dataset, self.backbone, self.refinement, f"{self.layers}", self.tables, self.loss, self.variant)
        usual = ("sasrec", "position", "sampled_softmax", "default")
        return "_".join(part.replace(" ", "-") for part in parts if part not in usual)

    @property
    def removed(self) -> bool:
        """Whether it names an option that training no longer has."""
        return any(name.replace("_", "-") in self.options for name in REMOVED)

    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)

    def described(self, seed: int) -> dict[str, Any]:
        """The part of an entry that the plan decides."""
        return dict(zip(KEY, self.key(), strict=True)) | {"seed": seed, "group": self.group, "options": self.options}

    def arguments(self, seed: int) -> list[str]:
        """The options of `awrsr train`, except for the file of the data and the folder of the run."""
        shared = f"{BASE[self.dataset]} --backbone {self.backbone} --refinement {self.refinement} --layers {self.layers}"
        own = f"--tables {self.tables} --loss {self.loss} {self.options} --seed {seed}"
        earlier = EARLIER if self.group in GROUPS and self.dataset != "synthetic" else ""
        return [*reading(self.dataset), *shlex.split(f"{earlier} {shared} {own}")]

    def command(self, seed: int) -> str:
        """What makes the run, for whoever has the data in a folder of that name."""
        data = [] if self.dataset == "synthetic" else ["--data", f"data/{self.dataset}.txt"]
        return shlex.join(["awrsr", "train", *data, *self.arguments(seed)])

    def commands(self, seed: int) -> tuple[str, str]:
        """The command, and what it was when EARLIER were the defaults."""
        return (command := self.command(seed)), command.replace(f"{EARLIER} ", "")


def reading(dataset: str) -> list[str]:
    """How a data set is read, as options of `awrsr train`."""
    flags: list[str] = []
    for name, value in DATA.get(dataset, {}).items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


def plan() -> list[Cell]:
    return [*core(), *depth(), *recipe(), *why(), *searched(), *ablation(), *stosa(), *losses()]


def core() -> list[Cell]:
    """Each refinement and plain attention, with one layer and two."""
    datasets = ("wikipedia", "lastfm", "synthetic", "beauty")
    kinds = ("none", "simple", "value", "additive")
    return [Cell("core", dataset, kind, layers) for dataset in datasets for layers in (1, 2) for kind in kinds]


def depth() -> list[Cell]:
    """More layers of plain attention, to compare refined ones with."""
    return [Cell("depth", dataset, "none", layers) for dataset in ("wikipedia", "lastfm") for layers in (3, 4)]


def recipe() -> list[Cell]:
    """What any model gains from, whatever its attention, one option changed at a time."""
    averaged, normal = ("weights not averaged", "--average 0"), ("normal start", "--init normal")
    tried = (averaged, ("4096 negatives", "--negatives 4096"))
    cells = [Cell("recipe", "beauty", "none", 2, variant, options, seeds=LOOK) for variant, options in tried]
    cells += [Cell("recipe", "wikipedia", "none", 1, variant, options) for variant, options in (averaged, normal)]
    cells += [Cell("recipe", "beauty", kind, 1, *options) for options in (WIDE, BEGUN) for kind in ("none", "additive")]
    starts = (normal, ("copying start", "--init copy"))  # synthetic histories have that of the demonstration, Xavier's
    cells += [Cell("recipe", "synthetic", "none", 2, variant, options) for variant, options in starts]
    for dataset, kinds in (("beauty", ("none", "additive")), ("lastfm", ("none", "simple", "value", "additive"))):
        cells += [Cell("recipe", dataset, kind, layers, *normal, seeds=LOOK) for layers in (1, 2) for kind in kinds]
    return cells


def why() -> list[Cell]:
    """One thing changed at a time, where training is quick and users repeat themselves.

    Tables of zero get no gradient and stay: every visible event then has the same higher-order weight, so nothing is refined, but
    the mean of the history joins what is attended to. What that gains is not of the second order.
    """
    changes = {
        "gate learned from 0": "--gate 0 --learned-gate",
        "gate learned from 1": "--gate 1 --learned-gate",
        "tables of deviation 0.02": "--table-std 0.02",
        "tables of deviation 0.3": "--table-std 0.3",
        "rank 8": "--rank 8",
        "one table for all heads": "--no-per-head",
        "tables learn 3 times as fast": "--table-rate 3",
        "orthogonal tables": "--table-init orthogonal",
        "identity tables": "--table-init identity",
        "shifted tables": "--table-init shifted --table-std 0.5 --refine-scale 2.8",
        "sharp": "--refine-scale 1",
        "learned scale": "--learned-scale",
        "normed correlation space": "--correlation-norm",
        "window 20": "--max-len 20",
    }
    everywhere = ("wikipedia", "lastfm", "synthetic", "beauty")
    cells = [control(Cell("why", dataset, "additive", 1)) for dataset in everywhere]
    cells.append(control(Cell("why", "wikipedia", "additive", 2)))
    cells += [control(Cell("why", "beauty", "additive", 1, *options)) for options in (WIDE, BEGUN)]
    cells += [Cell("why", "wikipedia", "additive", 1, variant, options, seeds=LOOK) for variant, options in changes.items()]
    for name, options in (("default", ""), ("gate learned from 0", changes["gate learned from 0"])):
        cells.append(Cell("why", "wikipedia", "additive", 1, name, options, tables="content", seeds=LOOK))
    return [*cells, Cell("why", "wikipedia", "none", 1, "window 20", "--max-len 20", seeds=LOOK)]


def control(cell: Cell) -> Cell:
    """The same with higher-order weights that are all equal."""
    variant = EQUAL if cell.variant == "default" else f"{cell.variant} with {EQUAL}"
    return cell._replace(variant=variant, options=f"{cell.options} --table-std 0".strip())


def searched() -> list[Cell]:
    """Settings that searches of equal length chose on validation events with seed 0 (at the tag study-1), with more seeds."""
    cells = [Cell("searched", "wikipedia", "none", 1, "searched", SEARCHED_PLAIN)]
    cells.append(Cell("searched", "wikipedia", "none", 1, "searched and twice the epochs", f"{SEARCHED_PLAIN} --epochs 120"))
    cells += [Cell("searched", "wikipedia", "none", layers, AS_REFINED, SHARED) for layers in (1, 2, 3)]
    cells.append(Cell("searched", "wikipedia", "none", 2, "the same without cosines", f"{SHARED} --temperature 0"))
    return [*cells, Cell("searched", "wikipedia", "value", 2, "searched", SEARCHED, tables="content")]


def ablation() -> list[Cell]:
    """What the search chose for refined attention, with one thing changed at a time."""
    best = Cell("ablation", "wikipedia", "value", 2, "searched", SEARCHED, tables="content")
    additive = best._replace(refinement="additive")
    no_norm, no_cosines = (
        best._replace(variant=f"searched without {what}", options=f"{SEARCHED} {option}")
        for what, option in (("norm", "--no-correlation-norm"), ("cosines", "--temperature 0"))
    )
    changed = [no_norm, no_cosines, best._replace(tables="position"), best._replace(refinement="simple"), additive]
    return [control(best), control(additive), *changed, no_norm._replace(refinement="additive")]


def stosa() -> list[Cell]:
    """STOSA: corrected, and as published, where attention is never applied to the means of the blocks."""
    kinds, published = ("none", "simple", "value", "additive", "stochastic"), f"{STOSA} --mean-branch published"
    cells = []
    for dataset in ("wikipedia", "lastfm", "beauty"):
        cells += [Cell("stosa", dataset, kind, 1, options=STOSA, backbone="stosa") for kind in kinds]
        cells += [Cell("stosa", dataset, kind, 1, "published", published, "stosa", seeds=LOOK) for kind in ("none", "stochastic")]
    return cells


def losses() -> list[Cell]:
    """Binary cross-entropy with one negative, as SASRec was published with."""
    datasets = ("wikipedia", "lastfm", "beauty")
    cells = [Cell("losses", dataset, kind, 2, options=BCE, loss="bce") for dataset in datasets for kind in ("none", "additive")]
    return [*cells, control(cells[1])]
