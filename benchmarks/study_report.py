"""Tables and pictures of the study, from its two files alone.

    python benchmarks/study_report.py          # benchmarks/results/study.md and study_*.png

Gains are differences on the same users: NDCG@10 of a user, averaged over a cell's seeds, minus that of the cell it is held to. p is
the larger of the paired t-test's and the sign-flip test's, over users with the seeds as they are, corrected by Holm for all
comparisons of cells that the plan gives five seeds; others, which only show where to look, have none. Intervals are bootstrapped
over users and seeds. A gain is called better or worse where p < 0.05, the interval leaves 0 out and both cells have five seeds.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __package__ is None:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from awrsr import significance  # noqa: E402
from awrsr.compare import FEWEST_SEEDS, LEVEL  # noqa: E402
from awrsr.files import atomic  # noqa: E402
from awrsr.ranking import metric  # noqa: E402
from benchmarks.study import KEY, RESULTS, Results  # noqa: E402
from benchmarks.study_plan import AS_REFINED, EQUAL, Cell, control, plan  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC = "NDCG@10"
RESAMPLES = 2000
FLIPS = 50000  # of signs: p is 1 / FLIPS at least, which the correction multiplies by the number of comparisons
LENGTHS = ((1, 3), (4, 5), (6, 10), (11, 20), (21, 10**9))  # events before the target
POPULAR = ((0, 5), (6, 10), (11, 20), (21, 50), (51, 10**9))  # times that the target's item is in the training events
QUESTIONS = {
    "core": "Refinements beside plain attention, one layer and two",
    "recipe": "Other settings and starts, for plain and refined attention alike",
    "depth": "Depth: refined layers beside more plain ones",
    "control": "Control: learned higher-order weights beside equal ones, which add the mean of the history and refine nothing",
    "why": "What decides: tables, gates, rates",
    "searched": "Each at the settings that a search of equal length chose for it",
    "ablation": "What of these settings decides: the refined model beside itself with one of them changed",
    "stosa": "Between Gaussians (STOSA)",
    "losses": "Other losses",
}
APART = ("depth", "control", "searched", "ablation")  # held to something else than plain attention of as many layers


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
    def planned(self) -> bool:
        """Whether the plan gives both cells the seeds that a claim takes."""
        return min(self.found.cell.seeds, self.base.cell.seeds) >= FEWEST_SEEDS

    @property
    def paired(self) -> np.ndarray:
        """(M,) differences of users."""
        return self.found.values.mean(1) - self.base.values.mean(1)

    @property
    def verdict(self) -> str:
        if min(len(self.found.entries), len(self.base.entries)) < FEWEST_SEEDS:
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
            found += [(c.group, refined, o) for o in plain if (o.cell.variant, o.cell.layers) == (AS_REFINED, c.layers)]
            found += [(c.group, refined, o) for o in cells if o is not refined and o.cell.key() == control(c).key()]
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


def contrast(question: str, found: Found, base: Found, rng: np.random.Generator) -> Gain:
    """The gain on the same users, without its p."""
    gain = Gain(question, found, base, 0.0, 0.0, 0.0)
    draws = significance.resampled_means(gain.paired[:, None], RESAMPLES, rng)
    for each, sign in ((found, 1), (base, -1)):
        draws = draws + sign * significance.seed_deviations(each.values.mean(0)[:, None], RESAMPLES, rng)
    low, high = significance.interval(draws)
    return replace(gain, difference=float(gain.paired.mean()), low=float(low[0]), high=float(high[0]), p=float("nan"))


def gains(cells: list[Found]) -> list[Gain]:
    """Every comparison of the study, corrected for their number."""
    rng = np.random.default_rng(0)
    found = [contrast(*each, rng) for each in pairs(cells)]
    raw: dict[int, float] = {}
    for dataset in dict.fromkeys(gain.found.cell.dataset for gain in found):  # one set of flipped signs for all who share users
        places = [i for i, gain in enumerate(found) if gain.planned and gain.found.cell.dataset == dataset]
        if places:
            paired = np.stack([found[i].paired for i in places], 1)
            p = np.maximum(significance.t_test(paired), significance.sign_flip_test(paired, FLIPS, rng))
            raw |= dict(zip(places, p.tolist(), strict=True))
    for i, p in zip(raw, significance.holm(list(raw.values())), strict=True):
        found[i] = replace(found[i], p=float(p))
    return found


def table(cells: list[Found], compared: list[Gain]) -> list[str]:
    """Rows of a group: what each cell reached, and its gain."""
    columns = [
        "data",
        "model",
        "layers",
        "seeds",
        "NDCG@10",
        "HR@10",
        "MRR",
        "beside",
        "gain",
        "95 % interval",
        "p",
        "",
        "parameters",
        "CPU s",
    ]
    lines = [f"| {' | '.join(columns)} |", "|--" * len(columns) + "|"]
    for found in cells:
        c, gain = found.cell, next((g for g in compared if g.found is found and g.question == found.cell.group), None)
        sd = found.sd()
        shown = f"{found.mean():.4f}" + ("" if sd is None else f" ± {sd:.4f}")
        row = [c.dataset, label(c), str(c.layers), str(len(found.entries)), shown]
        row += [f"{found.mean(name=name):.4f}" for name in ("HR@10", "MRR")]
        if gain is None:
            row += ["", "", "", "", ""]
        else:
            row += [f"{label(gain.base.cell)} {gain.base.mean():.4f}"]
            row += [f"{gain.relative:+.1%}", f"{gain.low:+.4f} .. {gain.high:+.4f}", p_text(gain.p), gain.verdict]
        row += [f"{found.average('params'):,.0f}", f"{found.average('train_cpu_seconds'):.0f}"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def contrasts(compared: list[Gain], question: str) -> list[str]:
    """Rows of cells beside others than plain attention of as many layers: quality, parameters and time."""
    columns = ["data", "model", "beside", "NDCG@10", "gain", "95 % interval", "p", "", "parameters", "CPU s an epoch"]
    columns.append("validation after as many CPU s")
    lines = [f"| {' | '.join(columns)} |", "|--" * len(columns) + "|"]
    for g in compared:
        if g.question == question:
            both = (g.found, g.base)
            row = [g.found.cell.dataset, *(f"{label(each.cell)}, {layers_text(each.cell.layers)}" for each in both)]
            row.append(", ".join(f"{each.mean():.4f}" for each in both))
            row += [f"{g.relative:+.1%}", f"{g.low:+.4f} .. {g.high:+.4f}", p_text(g.p), g.verdict]
            row.append(", ".join(f"{each.average('params'):,.0f}" for each in both))
            row.append(", ".join(f"{each.average('train_cpu_seconds') / each.average('epochs'):.2f}" for each in both))
            seconds = min(each.average("train_cpu_seconds") for each in both)
            row.append(f"{', '.join(f'{each.after(seconds):.4f}' for each in both)} ({seconds:.0f} s)")
            lines.append(f"| {' | '.join(row)} |")
    return lines if len(lines) > 2 else []


def summary(compared: list[Gain]) -> list[str]:
    """Plain attention, the same with the mean of the history added, and additive refinement, wherever all three were run."""
    columns = ["data", "settings", "layers", "plain", "plain + mean", "additive"]
    columns += ["mean over plain", "additive over plain", "additive over mean"]
    lines = [f"| {' | '.join(columns)} |", "|--" * len(columns) + "|"]
    for learned in compared:
        if learned.found.cell.refinement == "additive" and learned.base.cell.key() == control(learned.found.cell).key():
            over = {id(g.found): g for g in compared if g.base.cell.refinement == "none" and g.question not in APART[:1]}
            equal, additive = over[id(learned.base)], over[id(learned.found)]
            c = learned.found.cell
            row = [c.dataset, {"default": "usual"}.get(c.variant, c.variant), str(c.layers)]
            row += [f"{each.mean():.4f}" for each in (equal.base, equal.found, additive.found)]
            lines.append(f"| {' | '.join([*row, *(verdict_text(g) for g in (equal, additive, learned))])} |")
    return lines if len(lines) > 2 else []


def verdict_text(gain: Gain) -> str:
    return f"{gain.relative:+.1%}, {gain.verdict}" + ("" if np.isnan(gain.p) or gain.p >= LEVEL else f" (p {p_text(gain.p)})")


def label(c: Cell) -> str:
    name = "plain" if c.refinement == "none" else c.refinement
    beside = [x for x, usual in ((c.tables, "position"), (c.loss, "sampled_softmax"), (c.variant, "default")) if x != usual]
    return ", ".join([name, *beside])


def p_text(p: float) -> str:
    return "" if np.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def buckets(results: Results, compared: list[Gain]) -> list[str]:
    """Gains of the additive cells of the core by length of history and by popularity of the target."""
    if results.targets is None:
        return []
    targets = {row["dataset"]: row for row in results.targets.iter_rows(named=True)}
    lines = ["| data | layers | by | " + " | ".join(["targets and gain"] * len(LENGTHS)) + " |", "|--" * (3 + len(LENGTHS)) + "|"]
    rng = np.random.default_rng(1)
    for gain in compared:
        c = gain.found.cell
        if gain.question != "core" or c.refinement != "additive":
            continue
        difference = gain.found.values.mean(1) - gain.base.values.mean(1)
        for name, ends in (("history", LENGTHS), ("popularity", POPULAR)):
            of = np.array(targets[c.dataset][name])
            cells = [bucket(difference[(of >= low) & (of <= high)], low, high, rng) for low, high in ends]
            lines.append(f"| {c.dataset} | {c.layers} | {name} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def bucket(difference: np.ndarray, low: int, high: int, rng: np.random.Generator) -> str:
    span = f"{low}-{high}" if high < 10**9 else f"{low}+"
    if len(difference) < 30:
        return f"{span}: {len(difference)}, too few"
    ends = significance.interval(significance.resampled_means(difference[:, None], 500, rng))
    return f"{span}: {len(difference)}, {difference.mean():+.4f} ({ends[0][0]:+.4f} .. {ends[1][0]:+.4f})"


def missing(results: Results) -> list[str]:
    """What the plan has and the results lack, a row per part and data set."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for cell in plan():
        done = sum(results.of(cell, seed) is not None for seed in range(cell.seeds))
        if done < cell.seeds:
            text = f"{label(cell)}, {layers_text(cell.layers)} ({done} of {cell.seeds})"
            lacking.setdefault((cell.group, cell.dataset), []).append(text)
    if not lacking:
        return ["Every cell of the plan has all its seeds."]
    rows = [f"| {group} | {dataset} | {'; '.join(cells)} |" for (group, dataset), cells in lacking.items()]
    return ["Not run yet (seeds done):", "", "| part | data | cells |", "|--|--|--|", *rows]


def markdown(results: Results, cells: list[Found], compared: list[Gain]) -> str:
    """The page of the study's tables."""
    devices = sorted({entry["device"] for entry in results.entries})
    commits = sorted({entry["commit"][:12] for entry in results.entries})
    lines = [
        f"{len(results.entries)} runs; test events ranked once, whole catalogue, mean and deviation over seeds; "
        f"{sum(gain.planned for gain in compared)} comparisons, Holm-corrected together. {'; '.join(devices)}; commits "
        f"{', '.join(commits)}.",
    ]
    short = summary(compared)
    if short:
        lines += ["", "**In short**: what refinement adds, and what of it the mean of the history adds", "", *short]
    for question, title in QUESTIONS.items():
        of = [found for found in cells if found.cell.group == question]
        rows, beside = table(of, compared) if of else [], contrasts(compared, question) if question in APART else []
        if rows or beside:
            lines += ["", f"**{title}**", "", *rows, *([""] if rows and beside else []), *beside]
    by = buckets(results, compared)
    if by:
        lines += [
            "",
            "**Where the gain of additive refinement lies**: NDCG@10 over plain attention, by events before the target and by ",
        ]
        lines[-1] += "how often its item was trained on; intervals over users alone, not corrected"
        lines += ["", *by]
    return "\n".join([*lines, "", *missing(results)]) + "\n"


def forest(compared: list[Gain], group: str) -> "Figure | None":
    """Gains with their intervals, a panel per data set."""
    from matplotlib.figure import Figure

    of = [g for g in compared if g.question == group]
    datasets = list(dict.fromkeys(g.found.cell.dataset for g in of))
    if not of:
        return None
    heights = [sum(g.found.cell.dataset == name for g in of) for name in datasets]
    height = 0.9 + (0.42 if group in APART else 0.34) * sum(heights) + 0.5 * len(datasets)
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots(len(datasets), 1, squeeze=False, height_ratios=[h + 1 for h in heights])[:, 0]
    for axis, name in zip(axes, datasets, strict=True):
        rows = [g for g in of if g.found.cell.dataset == name][::-1]
        for y, g in enumerate(rows):
            base = g.base.mean()
            color = {"better": "#1b7f5c", "worse": "#d1495b"}.get(g.verdict, "#777777")
            axis.plot([100 * g.low / base, 100 * g.high / base], [y, y], color=color, linewidth=2, solid_capstyle="round")
            axis.plot([100 * g.relative], [y], "o", color=color, markersize=6)
        names = [f"{label(g.found.cell)}, {layers_text(g.found.cell.layers)}" for g in rows]
        if group in APART:
            over = [f"over {label(g.base.cell)}, {layers_text(g.base.cell.layers)}" for g in rows]
            names = [f"{name}\n{beside}" for name, beside in zip(names, over, strict=True)]
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.axvline(0, color="#333333", linewidth=0.8)
        beside = dict.fromkeys(f"{g.base.mean():.4f}" for g in rows[::-1])
        axis.set_title(name if group in APART else f"{name}: plain {' and '.join(beside)}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    to = "" if group in APART else " over plain attention"
    figure.supxlabel(f"gain in test NDCG@10{to}, %, and 95 % interval over users and seeds", fontsize=8)
    return figure


def layers_text(layers: int) -> str:
    return f"{layers} layer" + ("s" if layers > 1 else "")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of study.json, where tables and pictures go; default %(default)s"
    )
    options = parser.parse_args(arguments)
    results = Results(options.out)
    cells = gather(results)
    if not cells:
        parser.error(f"{options.out} holds no run of the plan; python benchmarks/study.py makes them")
    compared = gains(cells)
    page = markdown(results, cells, compared)
    with atomic(options.out / "study.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    for group in QUESTIONS:
        figure = forest(compared, group)
        if figure is not None:
            with atomic(options.out / f"study_{group}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=150)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
