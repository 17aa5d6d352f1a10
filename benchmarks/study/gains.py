"""Comparisons of the study's cells: which comparisons are made, the gains on the same users, and their significance.

A gain is a difference on the same users: a user's NDCG@10, averaged over the seeds of a cell, minus the same for the cell that it
is compared with. p is the larger of the p-values of a paired t-test and a sign-flip test over users, with the seeds held fixed. It
is Holm-corrected for all comparisons between cells that are planned with five seeds. Comparisons whose runs are missing are
included with p = 1, so later runs can only lower the p of the others. Cells with fewer seeds only suggest where to look, and their
comparisons have no p. Intervals are bootstrapped over users and seeds. A gain is called better or worse if p < 0.05, the interval
excludes 0 and both cells have five seeds.
"""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from awrsr.evaluation import significance
from awrsr.evaluation.compare import FEWEST_SEEDS, LEVEL
from awrsr.evaluation.ranking import metric
from benchmarks.study.plan import AS_REFINED, EQUAL, Cell, control, plan
from benchmarks.study.run import Results, run_key

METRIC = "NDCG@10"
RESAMPLES = 10000
FLIPS = 50000  # of signs: p is 1 / FLIPS at least, which the correction multiplies by the number of comparisons


@dataclass(frozen=True)
class Runs:
    """A cell and the results of its runs."""

    cell: Cell
    entries: list[dict[str, Any]]  # by seed
    values: np.ndarray  # (M, S) NDCG@10 of each target in each run

    def mean(self, name: str = METRIC) -> float:
        return float(np.mean([entry["test"][name] for entry in self.entries]))

    def sd(self) -> float | None:
        return float(np.std([entry["test"][METRIC] for entry in self.entries], ddof=1)) if len(self.entries) > 1 else None

    def average(self, name: str) -> float:
        return float(np.mean([entry[name] for entry in self.entries]))

    def after(self, seconds: float) -> float:
        """Best validation metric within so much CPU time, taking all epochs of a run as equally long."""
        epochs = [int(seconds / entry["train_cpu_seconds"] * entry["epochs"] + 1e-9) for entry in self.entries]
        return float(np.mean([max(entry["curve"][: max(n, 1)]) for entry, n in zip(self.entries, epochs, strict=True)]))


@dataclass(frozen=True)
class Gain:
    """A model compared with a base."""

    question: str  # the part of the study that makes the comparison
    model: Runs
    base: Runs
    low: float
    high: float
    p: float = float("nan")  # corrected; NaN for comparisons that have none

    @property
    def paired(self) -> np.ndarray:
        """(M,) differences of users."""
        return self.model.values.mean(1) - self.base.values.mean(1)

    @property
    def difference(self) -> float:
        return float(self.paired.mean())

    @property
    def relative(self) -> float:
        return self.difference / max(self.base.mean(), 1e-12)

    @property
    def complete(self) -> bool:
        """Whether both cells have as many seeds as a claim requires."""
        return min(len(self.model.entries), len(self.base.entries)) >= FEWEST_SEEDS

    @property
    def verdict(self) -> str:
        if not self.complete:
            return "no claim"
        if self.p >= LEVEL or self.low <= 0 <= self.high:
            return "not shown"
        return "better" if self.difference > 0 else "worse"


def gather(results: Results) -> list[Runs]:
    """Cells of the plan that have runs, in its order."""
    rows: Iterable[dict[str, Any]] = [] if results.ranks is None else results.ranks.iter_rows(named=True)
    values = {run_key(row): metric(METRIC, np.array(row["ranks"])) for row in rows}
    done = [(cell, entries) for cell in plan() if (entries := results.done(cell))]
    return [Runs(cell, entries, np.stack([values[run_key(entry)] for entry in entries], 1)) for cell, entries in done]


def pairs(cells: list[Runs]) -> list[tuple[str, Runs, Runs]]:
    """The comparisons as (question, model, base).

    A refined cell is compared with plain attention of the same number of layers, and of the same variant if there is one. Further:

    depth: additive refinement with plain attention of more layers, up to twice as many; on synthetic data with any initialisation.
    control: additive refinement with the same model whose higher-order weights are all equal.
    recipe: plain attention with itself without the change.
    searched: the refined model that one search chose with the plain model that the other chose, and with all other plain cells.
    ablation: the searched refined model with itself after one change; and additive refinement with those settings, its weights
        learned or equal, with plain attention with the same settings.
    """
    comparisons = []
    for model in cells:
        c = model.cell
        alike = [o for o in cells if (o.cell.dataset, o.cell.backbone, o.cell.loss) == (c.dataset, c.backbone, c.loss)]
        plain = [o for o in alike if o.cell.refinement == "none"]
        if c.group == "ablation" and c.refinement == "additive":  # learned weights and equal ones, over plain ones and each other
            bases = [o for o in plain if o.cell.variant == AS_REFINED]
            comparisons += [(c.group, model, base) for base in sorted(bases, key=lambda o: o.cell.layers != c.layers)]
            equal = [o for o in cells if (o.cell.group, o.cell.refinement) == (c.group, c.refinement) and EQUAL in o.cell.variant]
            comparisons += [(c.group, model, o) for o in equal if EQUAL not in c.variant]
        if c.group == "ablation" or (c.refinement == "none" and c.group != "recipe"):
            continue
        if c.group == "searched":  # of whatever layers: each has those that its search chose
            bases = [o for o in plain if o.cell.group in ("searched", "core", "depth")]
            comparisons += [(c.group, model, base) for base in sorted(bases, key=lambda o: o.cell.group != c.group)]
            comparisons += [("ablation", model, o) for o in cells if (o.cell.group, o.cell.dataset) == ("ablation", c.dataset)]
            continue
        variants = [c.variant, c.variant.removesuffix(f" with {EQUAL}"), "default"]  # the first of these that there is
        level = [o for o in plain if o.cell.layers == c.layers and o.cell.variant in variants and o is not model]
        comparisons += [(c.group, model, base) for base in sorted(level, key=lambda o: variants.index(o.cell.variant))[:1]]
        if c.refinement == "additive":
            comparisons += [("control", model, o) for o in cells if o.cell.key() == control(c).key()]
        if c.group == "core" and c.refinement == "additive":
            deeper = [o for o in plain if c.layers < o.cell.layers <= 2 * c.layers]
            comparisons += [("depth", model, o) for o in deeper if o.cell.variant == "default" or c.dataset == "synthetic"]
    return comparisons


def planned() -> int:
    """Number of comparisons between cells planned with as many seeds as a claim requires, whether they were run or not."""
    cells = pairs([Runs(cell, [], np.empty(0)) for cell in plan()])
    return sum(min(model.cell.seeds, base.cell.seeds) >= FEWEST_SEEDS for _, model, base in cells)


def randomness(*names: str) -> np.random.Generator:
    """A generator that depends only on one comparison or data set, so that results do not change when others are added."""
    return np.random.default_rng(zlib.crc32(" ".join(names).encode()))


def contrast(question: str, model: Runs, base: Runs) -> Gain:
    """The gain on the same users, without its p."""
    rng = randomness(model.cell.name, base.cell.name)
    gain = Gain(question, model, base, 0.0, 0.0)
    draws = significance.resampled_means(gain.paired[:, None], RESAMPLES, rng)
    for each, sign in ((model, 1), (base, -1)):
        draws = draws + sign * significance.seed_deviations(each.values.mean(0)[:, None], RESAMPLES, rng)
    low, high = significance.interval(draws)
    return replace(gain, low=float(low[0]), high=float(high[0]))


def gains(cells: list[Runs]) -> list[Gain]:
    """All comparisons of the study, with p corrected for their number."""
    compared = [contrast(*each) for each in pairs(cells)]
    raw: dict[int, float] = {}
    for dataset in dict.fromkeys(gain.model.cell.dataset for gain in compared):  # the same flipped signs for all that share users
        of = [i for i, gain in enumerate(compared) if gain.complete and gain.model.cell.dataset == dataset]
        if of:
            paired = np.stack([compared[i].paired for i in of], 1)
            p = np.maximum(significance.t_test(paired), significance.sign_flip_test(paired, FLIPS, randomness(dataset)))
            raw |= dict(zip(of, p.tolist(), strict=True))
    corrected = significance.holm([*raw.values(), *[1.0] * (planned() - len(raw))])
    for i, p in zip(raw, corrected.tolist(), strict=False):  # the rest are of comparisons that lack runs
        compared[i] = replace(compared[i], p=p)
    return compared


def controlled(compared: list[Gain]) -> list[tuple[Gain, Gain, Gain]]:
    """Three gains for each setting in which plain attention, plain attention plus the mean of the history, and additive refinement
    were all run: of the mean over plain attention, of additive refinement over plain attention, and of refinement over the mean."""
    comparisons = []
    for learned in compared:
        if learned.model.cell.refinement == learned.base.cell.refinement == "additive" and EQUAL in learned.base.cell.variant:
            level = [g for g in compared if g.base.cell.refinement == "none" and g.base.cell.layers == g.model.cell.layers]
            over = {id(g.model): g for g in level}
            comparisons.append((over[id(learned.base)], over[id(learned.model)], learned))
    return comparisons
