"""Cells of the study beside one another: what is held to what, gains on the same users, and whether they are shown.

A gain is a difference on the same users: NDCG@10 of a user, averaged over a cell's seeds, minus that of the cell it is held to.
p is the larger of the paired t-test's and the sign-flip test's, over users with the seeds as they are, corrected by Holm for
all comparisons of cells that the plan gives five seeds, those that lack runs among them (they count as p = 1, so that runs to
come can only lower the p of others); the rest, which only show where to look, have none. Intervals are
bootstrapped over users and seeds. A gain is called better or worse where p < 0.05, the interval leaves 0 out and both cells
have five seeds.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from awrsr.evaluation import significance
from awrsr.evaluation.compare import FEWEST_SEEDS, LEVEL
from awrsr.evaluation.ranking import metric
from benchmarks.study.plan import AS_REFINED, EQUAL, Cell, control, plan
from benchmarks.study.run import KEY, Results

METRIC = "NDCG@10"
RESAMPLES = 10000
FLIPS = 50000  # of signs: p is 1 / FLIPS at least, which the correction multiplies by the number of comparisons


@dataclass(frozen=True)
class Found:
    """A cell with what its runs reached."""

    cell: Cell
    entries: list[dict[str, Any]]  # by seed
    values: np.ndarray  # (M, S) NDCG@10 of each target in each run

    def mean(self, part: str = "test", name: str = METRIC) -> float:
        return float(np.mean([entry[part][name] for entry in self.entries]))

    def sd(self, name: str = METRIC) -> float | None:
        return float(np.std([entry["test"][name] for entry in self.entries], ddof=1)) if len(self.entries) > 1 else None

    def average(self, name: str) -> float:
        return float(np.mean([entry[name] for entry in self.entries]))

    def after(self, seconds: float) -> float:
        """Best on validation within so many seconds of the processor, all epochs of a run taken as equally long."""
        best = []
        for entry in self.entries:
            epochs = int(seconds / entry["train_cpu_seconds"] * entry["epochs"] + 1e-9)
            best.append(max(entry["curve"][: max(epochs, 1)]))
        return float(np.mean(best))


@dataclass(frozen=True)
class Gain:
    """A cell minus the one it is held to."""

    question: str  # the part of the study that asks
    found: Found
    base: Found
    difference: float
    low: float
    high: float
    p: float = 1.0  # corrected; no number where none is due

    @property
    def relative(self) -> float:
        return self.difference / max(self.base.mean(), 1e-12)

    @property
    def complete(self) -> bool:
        """Whether both cells have the seeds that a claim takes."""
        return min(len(self.found.entries), len(self.base.entries)) >= FEWEST_SEEDS

    @property
    def paired(self) -> np.ndarray:
        """(M,) differences of users."""
        return self.found.values.mean(1) - self.base.values.mean(1)

    @property
    def verdict(self) -> str:
        if not self.complete:
            return "no claim"
        if self.p >= LEVEL or self.low <= 0 <= self.high:
            return "not shown"
        return "better" if self.difference > 0 else "worse"


def gather(results: Results) -> list[Found]:
    """Cells of the plan that have runs, in its order."""
    ranks = (
        {}
        if results.ranks is None
        else {tuple(row[name] for name in KEY): row["ranks"] for row in results.ranks.iter_rows(named=True)}
    )
    found = []
    for cell in plan():
        entries = [entry for seed in range(cell.seeds) if (entry := results.of(cell, seed))]
        if entries:
            values = [metric(METRIC, np.array(ranks[tuple(e[name] for name in KEY)])) for e in entries]
            found.append(Found(cell, entries, np.stack(values, 1)))
    return found


def pairs(cells: list[Found]) -> list[tuple[str, Found, Found]]:
    """What is held to what, and in which part of the study.

    A refined cell to plain attention of as many layers, of the same variant if there is one. In "depth" additive refinement to
    plain attention of more layers, up to twice as many, on made-up data from whatever start; in "control" to itself with higher-
    order weights that are all equal; in "recipe" plain attention to itself without the change; in "searched" what one search
    chose to what the other did, and to all other plain cells; in "ablation" that to itself with a change, and additive refinement
    with those settings, its weights learned or equal, to plain attention with them.
    """
    found = []
    for refined in cells:
        c = refined.cell
        like = (c.dataset, c.backbone, c.loss)
        plain = [o for o in cells if (o.cell.dataset, o.cell.backbone, o.cell.loss) == like and o.cell.refinement == "none"]
        if c.group == "ablation" and c.refinement == "additive":  # learned weights and equal ones, over plain ones and each other
            of = [o for o in plain if o.cell.variant == AS_REFINED]
            found += [(c.group, refined, base) for base in sorted(of, key=lambda o: o.cell.layers != c.layers)]
            equal = [o for o in cells if (o.cell.group, o.cell.refinement) == (c.group, c.refinement) and EQUAL in o.cell.variant]
            found += [(c.group, refined, o) for o in equal if EQUAL not in c.variant]
        if c.group == "ablation" or (c.refinement == "none" and c.group != "recipe"):
            continue
        if c.group == "searched":  # of whatever layers: each has those that its search chose
            of = [o for o in plain if o.cell.group in ("searched", "core", "depth")]
            found += [(c.group, refined, base) for base in sorted(of, key=lambda o: o.cell.group != c.group)]
            found += [("ablation", refined, o) for o in cells if (o.cell.group, o.cell.dataset) == ("ablation", c.dataset)]
            continue
        variants = [c.variant, c.variant.removesuffix(f" with {EQUAL}"), "default"]  # the first of these that there is
        level = [o for o in plain if o.cell.layers == c.layers and o.cell.variant in variants and o is not refined]
        found += [(c.group, refined, base) for base in sorted(level, key=lambda o: variants.index(o.cell.variant))[:1]]
        if c.refinement == "additive":
            found += [("control", refined, o) for o in cells if o.cell.key() == control(c).key()]
        if c.group == "core" and c.refinement == "additive":
            deeper = [o for o in plain if c.layers < o.cell.layers <= 2 * c.layers]
            found += [("depth", refined, o) for o in deeper if o.cell.variant == "default" or c.dataset == "synthetic"]
    return found


def planned() -> int:
    """Comparisons of cells that the plan gives the seeds that a claim takes, whether these were run or not."""
    cells = pairs([Found(cell, [], np.empty(0)) for cell in plan()])
    return sum(min(found.cell.seeds, base.cell.seeds) >= FEWEST_SEEDS for _, found, base in cells)


def randomness(*names: str) -> np.random.Generator:
    """Of one comparison or data set, whatever others there are: what more runs do not concern stays as it was."""
    return np.random.default_rng(zlib.crc32(" ".join(names).encode()))


def contrast(question: str, found: Found, base: Found) -> Gain:
    """The gain on the same users, without its p."""
    rng = randomness(found.cell.name, base.cell.name)
    gain = Gain(question, found, base, 0.0, 0.0, 0.0)
    draws = significance.resampled_means(gain.paired[:, None], RESAMPLES, rng)
    for each, sign in ((found, 1), (base, -1)):
        draws = draws + sign * significance.seed_deviations(each.values.mean(0)[:, None], RESAMPLES, rng)
    low, high = significance.interval(draws)
    return replace(gain, difference=float(gain.paired.mean()), low=float(low[0]), high=float(high[0]), p=float("nan"))


def gains(cells: list[Found]) -> list[Gain]:
    """Every comparison of the study, corrected for their number."""
    found = [contrast(*each) for each in pairs(cells)]
    raw: dict[int, float] = {}
    for dataset in dict.fromkeys(gain.found.cell.dataset for gain in found):  # one set of flipped signs for all who share users
        places = [i for i, gain in enumerate(found) if gain.complete and gain.found.cell.dataset == dataset]
        if places:
            paired = np.stack([found[i].paired for i in places], 1)
            p = np.maximum(significance.t_test(paired), significance.sign_flip_test(paired, FLIPS, randomness(dataset)))
            raw |= dict(zip(places, p.tolist(), strict=True))
    corrected = significance.holm([*raw.values(), *[1.0] * (planned() - len(raw))])
    for i, p in zip(raw, corrected[: len(raw)], strict=True):
        found[i] = replace(found[i], p=float(p))
    return found


def controlled(compared: list[Gain]) -> list[tuple[Gain, Gain, Gain]]:
    """Where plain attention, the same with the mean of the history added, and additive refinement were all run: gains of the mean
    over plain attention, of additive refinement over it, and of that over the mean."""
    found = []
    for learned in compared:
        if learned.found.cell.refinement == learned.base.cell.refinement == "additive" and EQUAL in learned.base.cell.variant:
            level = [g for g in compared if g.base.cell.refinement == "none" and g.base.cell.layers == g.found.cell.layers]
            over = {id(g.found): g for g in level}
            found.append((over[id(learned.base)], over[id(learned.found)], learned))
    return found
