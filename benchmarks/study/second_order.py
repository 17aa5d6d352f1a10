"""What the plan of docs/study-plan.md runs and compares: refinement and its rivals, on data with and without headroom.

A contestant is a model; a setting, its learning rate and dropout. Where refinement is predicted to win, each contestant is tried
with every setting, with seed 0, and the setting with the best validation NDCG@10 gets the other seeds.
"""

from typing import Any, NamedTuple, Protocol

from benchmarks.study.plan import EQUAL, SEEDS, Cell, core, why

# Rows of the README's table, and the other contestants where refinement is not predicted to win
GROUPS = ("second-order", "second-order-more")
MUSIC = ("jazz", "nottingham", "oneill", "essen")
PREDICTED = ("jazz", "nottingham", "python", "oneill", "essen")  # headroom of 5 % or more
OTHERS = ("redis", "loans", "sepsis", "wikispeedia", "assistments")
OLDER = ("wikipedia", "lastfm", "beauty")  # with the settings of the group core, whose cells they share where there is one
DATASETS = (*PREDICTED, *OTHERS, *OLDER)

USUAL = "usual"
SETTINGS = {  # the first was chosen on jazz by validation of plain attention
    USUAL: "--learning-rate 0.008 --hidden-dropout 0.15",
    "half the rate": "--learning-rate 0.004 --hidden-dropout 0.15",
    "twice the dropout": "--learning-rate 0.008 --hidden-dropout 0.3",
}


class Made(Protocol):
    """Runs that were made, with their results."""

    def of(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """The entry of a run, or None."""


class Contestant(NamedTuple):
    """A model that is compared."""

    name: str
    refinement: str
    options: str
    layers: int = 1


CONTESTANTS = (
    Contestant("plain", "none", "--preset plain"),
    Contestant("two plain layers", "none", "--preset plain", layers=2),
    Contestant("mean", "additive", "--preset mean"),
    Contestant("shifted values", "none", "--preset shifted"),
    Contestant("smeared keys", "none", "--preset smeared"),
    Contestant("suffix-3", "none", "--preset suffix --no-unigram --shift-gate 3"),
    Contestant("suffix-5", "none", "--preset suffix --no-unigram --shift-gate 3 --suffix 5"),
    Contestant("suffix-3 and unigram", "none", "--preset suffix"),
    Contestant("suffix-5 and unigram", "none", "--preset suffix --suffix 5"),
    Contestant("refined", "additive", "--preset refined"),
    Contestant("lagged", "additive", "--preset lagged"),
    Contestant("suffix-3 and lagged", "additive", "--preset lagged-suffix"),
)
PUBLISHED = Contestant("published", "additive", "--preset published")  # what the default takes where refinement does not pay
NAMES = tuple(each.name for each in CONTESTANTS)
ELSEWHERE = ("plain", "mean", "refined", "lagged", "published")  # of the tables where refinement is not predicted to win
PAYING = ("redis", "wikipedia")  # sets elsewhere on which `--preset auto` takes lagged

# Model and base of each comparison that counts; of the first kind everywhere, of the second where refinement is predicted to win
EVERYWHERE = (("refined", "plain"), ("refined", "mean"))
RIVALS = ("shifted values", "smeared keys", "suffix-3", "suffix-5", "suffix-3 and unigram", "suffix-5 and unigram")
SUFFIXES = RIVALS[2:]
WHERE_PREDICTED = (
    ("refined", "two plain layers"),
    *(("refined", rival) for rival in RIVALS[:2]),
    *(("lagged", base) for base in ("plain", "mean", "two plain layers", "refined", *RIVALS)),
    *(("suffix-3 and lagged", base) for base in ("lagged", *SUFFIXES)),
    *((rival, base) for rival in RIVALS for base in ("plain", "two plain layers")),
)


def compared(dataset: str) -> tuple[tuple[str, str], ...]:
    """The comparisons of contestants that count on a data set, as (model, base)."""
    return (*EVERYWHERE, *(WHERE_PREDICTED if dataset in PREDICTED else ((by_default(dataset), "plain"),)))


def by_default(dataset: str) -> str:
    """The contestant that `--preset auto` takes; a test holds it to what was measured without test events."""
    return "lagged" if dataset in (*PREDICTED, *PAYING) else "published"


def names(dataset: str) -> tuple[str, ...]:
    """The contestants of a data set."""
    return NAMES if dataset in PREDICTED else (*NAMES, PUBLISHED.name)


def planned() -> int:
    """The number of comparisons that p-values are corrected for, whether they were run or not."""
    return sum(len(compared(dataset)) for dataset in DATASETS)


def cell(dataset: str, name: str, setting: str = USUAL, seeds: int = SEEDS) -> Cell:
    """The cell of a contestant."""
    contestant = next(each for each in (*CONTESTANTS, PUBLISHED) if each.name == name)
    group = GROUPS[0] if dataset in PREDICTED or name in ELSEWHERE else GROUPS[1]
    kind, layers = contestant.refinement, contestant.layers
    if dataset in OLDER:
        of_it = [c for c in (*core(), *why()) if c.dataset == dataset and c.tables == "position"]
        older = {(c.refinement, c.layers, c.variant): c for c in of_it}
        same = {"plain": ("none", 1, "default"), "two plain layers": ("none", 2, "default"), "mean": ("additive", 1, EQUAL)}
        same["published"] = ("additive", 1, "default")
        if name in same:
            return older[same[name]]
        return Cell(group, dataset, kind, layers, name, contestant.options, seeds=seeds)
    options = f"{contestant.options} {SETTINGS[setting]}".strip()
    variant = name if setting == USUAL else f"{name} with {setting}"
    return Cell(group, dataset, kind, layers, variant, options, loss="cross_entropy", seeds=seeds)


def chosen(dataset: str, name: str, results: Made) -> str | None:
    """The setting with the best validation NDCG@10 with seed 0; None until all were run. Without a search, the usual one."""
    if dataset not in PREDICTED:
        return USUAL
    first = {setting: results.of(cell(dataset, name, setting), 0) for setting in SETTINGS}
    reached = {setting: entry["validation"]["NDCG@10"] for setting, entry in first.items() if entry is not None}
    return max(reached, key=lambda setting: reached[setting]) if len(reached) == len(SETTINGS) else None


def contestants(dataset: str, results: Made) -> dict[str, Cell]:
    """The cell of each contestant with its chosen setting, or the usual one as long as none is chosen."""
    return {name: cell(dataset, name, chosen(dataset, name, results) or USUAL) for name in names(dataset)}


def cells(results: Made) -> list[Cell]:
    """All cells that are to be run: of those that a search tries, all but the chosen one have one seed. What an older group has in
    its plan is left out."""
    found = []
    for dataset in DATASETS:
        for name in names(dataset):
            best = chosen(dataset, name, results)
            for setting in SETTINGS if dataset in PREDICTED else (USUAL,):
                found.append(cell(dataset, name, setting, SEEDS if setting == best else 1))
    return [each for each in found if each.group in GROUPS]


def rank(each: Cell, seed: int) -> tuple[int, ...]:
    """Runs are made in the order of this: first a look at all contestants with the usual setting, then the rest of the search, then
    seed by seed; each of these where refinement is predicted to win, and then elsewhere."""
    searching = not seed and each.variant not in names(each.dataset)
    return each.dataset not in PREDICTED, seed, searching, DATASETS.index(each.dataset)


def searching(each: Cell) -> bool:
    """Whether a run with seed 0 belongs to a search."""
    return each.group in GROUPS and each.dataset in PREDICTED
