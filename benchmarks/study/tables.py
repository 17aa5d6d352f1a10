"""Tables of the study as Markdown."""

from collections.abc import Iterable

import numpy as np

from awrsr.evaluation import significance
from awrsr.evaluation.compare import LEVEL
from benchmarks.common.report import page_table
from benchmarks.study.gains import Gain, Runs, controlled, planned
from benchmarks.study.plan import REMOVED, TAG, Cell, plan
from benchmarks.study.run import Results

RESAMPLES = 500  # of users, for intervals that only suggest where to look
LENGTHS = ((1, 3), (4, 5), (6, 10), (11, 20), (21, 10**9))  # events before the target
POPULAR = ((0, 5), (6, 10), (11, 20), (21, 50), (51, 10**9))  # times that the target's item is in the training events
QUESTIONS = {
    "core": "Refinements versus plain attention, with one and two layers",
    "recipe": "Other settings and initialisations, for both plain and refined attention",
    "depth": "Depth: refined layers versus more plain layers",
    "control": "Control: learned versus equal higher-order weights; equal weights only add the mean of the history",
    "why": "Which options matter: tables, gates, learning rates",
    "searched": "Each model with the settings that a search of the same length chose for it",
    "ablation": "Which of the searched settings matter: the refined model versus itself with one setting changed",
    "stosa": "Stochastic attention (STOSA)",
    "losses": "Other losses",
}
APART = ("depth", "control", "searched", "ablation")  # not, or not only, compared with plain attention of as many layers


def grid(columns: str, rows: Iterable[list[str]]) -> list[str]:
    """Lines of a table with these column heads, separated by " | "; none if there are no rows."""
    lines = list(rows)
    return page_table(columns.split(" | "), lines) if lines else []


def table(cells: list[Runs], compared: list[Gain]) -> list[str]:
    """Rows of a group: the metrics of each cell, and its gain."""
    rows = []
    for runs in cells:
        c, sd = runs.cell, runs.sd()
        gain = next((g for g in compared if g.model is runs and g.question == c.group), None)
        shown = f"{runs.mean():.4f}" + ("" if sd is None else f" ± {sd:.4f}")
        row = [c.dataset, label(c), str(c.layers), str(len(runs.entries)), shown]
        row += [f"{runs.mean(name):.4f}" for name in ("HR@10", "MRR")]
        row += [""] * 5 if gain is None else [f"{label(gain.base.cell)} {gain.base.mean():.4f}", *gain_cells(gain)]
        rows.append([*row, f"{runs.average('params'):,.0f}", f"{runs.average('train_cpu_seconds'):.0f}"])
    columns = "data | model | layers | seeds | NDCG@10 | HR@10 | MRR | versus | gain | 95 % interval | p |  | parameters | CPU s"
    return grid(columns, rows)


def contrasts(compared: list[Gain], question: str) -> list[str]:
    """Rows of a question in APART: quality, parameters and time of both cells."""
    rows = []
    for g in compared:
        if g.question == question:
            both = (g.model, g.base)
            seconds = min(each.average("train_cpu_seconds") for each in both)
            row = [g.model.cell.dataset, *(label_layers(each.cell) for each in both)]
            row += [", ".join(f"{each.mean():.4f}" for each in both), *gain_cells(g)]
            row.append(", ".join(f"{each.average('params'):,.0f}" for each in both))
            row.append(", ".join(f"{each.average('train_cpu_seconds') / each.average('epochs'):.2f}" for each in both))
            rows.append([*row, f"{', '.join(f'{each.after(seconds):.4f}' for each in both)} ({seconds:.0f} s)"])
    columns = "data | model | versus | NDCG@10 | gain | 95 % interval | p |  | parameters | CPU s per epoch"
    return grid(f"{columns} | validation after equal CPU s", rows)


def summary(compared: list[Gain]) -> list[str]:
    """Rows of what refinement adds, and how much of that the mean of the history adds by itself."""
    rows = []
    for mean, additive, learned in controlled(compared):
        c = learned.model.cell
        reached = [f"{each.mean():.4f}" for each in (mean.base, mean.model, additive.model)]
        rows.append([c.dataset, settings(c), str(c.layers), *reached, *map(verdict_text, (mean, additive, learned))])
    columns = "data | settings | layers | plain | plain + mean | additive"
    return grid(f"{columns} | mean over plain | additive over plain | additive over mean", rows)


def settings(c: Cell) -> str:
    return ", ".join(x for x, usual in ((c.variant, "default"), (c.loss, "sampled_softmax")) if x != usual) or "usual"


def label(c: Cell) -> str:
    unusual = [x for x, usual in ((c.tables, "position"), (c.loss, "sampled_softmax"), (c.variant, "default")) if x != usual]
    return ", ".join(["plain" if c.refinement == "none" else c.refinement, *unusual])


def layers_text(layers: int) -> str:
    return f"{layers} layer" + ("s" if layers > 1 else "")


def label_layers(c: Cell) -> str:
    return f"{label(c)}, {layers_text(c.layers)}"


def gain_cells(g: Gain) -> list[str]:
    return [f"{g.relative:+.1%}", f"{g.low:+.4f} .. {g.high:+.4f}", p_text(g.p), g.verdict]


def verdict_text(g: Gain) -> str:
    return f"{g.relative:+.1%}, {g.verdict}" + (f" (p {p_text(g.p)})" if g.p < LEVEL else "")


def p_text(p: float) -> str:
    return "" if np.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def buckets(results: Results, compared: list[Gain]) -> list[str]:
    """Gains of the additive cells of the core by length of history and by popularity of the target."""
    rows: list[list[str]] = []
    rng = np.random.default_rng(1)
    targets = {} if results.targets is None else {row["dataset"]: row for row in results.targets.iter_rows(named=True)}
    for gain in compared if targets else []:
        c = gain.model.cell
        if gain.question == "core" and c.refinement == "additive":
            for name, ends in (("history", LENGTHS), ("popularity", POPULAR)):
                of = np.array(targets[c.dataset][name])
                cells = [bucket(gain.paired[(of >= low) & (of <= high)], low, high, rng) for low, high in ends]
                rows.append([c.dataset, str(c.layers), name, *cells])
    return grid("data | layers | by" + " | targets and gain" * len(LENGTHS), rows)


def bucket(difference: np.ndarray, low: int, high: int, rng: np.random.Generator) -> str:
    text = f"{low}-{high}: " if high < 10**9 else f"{low}+: "
    if len(difference) < 30:
        return f"{text}{len(difference)}, too few"
    ends = significance.interval(significance.resampled_means(difference[:, None], RESAMPLES, rng))
    return f"{text}{len(difference)}, {difference.mean():+.4f} ({ends[0][0]:+.4f} .. {ends[1][0]:+.4f})"


def missing(results: Results) -> list[str]:
    """Cells of the plan whose runs are missing, a row per part and data set."""
    lacking: dict[tuple[str, str], list[str]] = {}
    for cell in plan():
        done = len(results.done(cell))
        if done < cell.seeds:
            lacking.setdefault((cell.group, cell.dataset), []).append(f"{label_layers(cell)} ({done} of {cell.seeds})")
    if not lacking:
        return ["Every cell of the plan has been run with all its seeds."]
    rows = ([*key, "; ".join(cells)] for key, cells in lacking.items())
    return ["Not run yet (number of seeds done):", "", *grid("part | data | cells", rows)]


def markdown(results: Results, cells: list[Runs], compared: list[Gain]) -> str:
    """The page of the study's tables."""
    devices, commits = (sorted({entry[name] for entry in results.entries.values()}) for name in ("device", "commit"))
    lines = [
        f"{len(results.entries)} runs; each ranks the whole catalogue once for every test event. Metrics are means and standard "
        f"deviations over seeds. Of {planned()} planned comparisons, {sum(gain.complete for gain in compared)} have been run; "
        f"p-values are Holm-corrected for all {planned()}. "
        f"{'; '.join(devices)}; commits {', '.join(name[:12] for name in commits)}."
    ]
    if any(runs.cell.removed for runs in cells):
        lines[0] += f" Rows with {' or '.join(REMOVED)}, options that have since been removed, can be rerun at the tag {TAG}."

    def section(title: str, *tables: list[str]) -> None:
        for rows in filter(None, tables):
            lines.extend(["", *([] if title in lines else [title, ""]), *rows])

    section("**In short**: what refinement adds, and how much of that the mean of the history adds by itself", summary(compared))
    for question, title in QUESTIONS.items():
        of = [runs for runs in cells if runs.cell.group == question]
        section(f"**{title}**", table(of, compared), contrasts(compared, question) if question in APART else [])
    by = "by number of events before the target (history), and by number of training events of its item (popularity)"
    title = f"**Where additive refinement gains**: NDCG@10 over plain attention, {by}"
    section(f"{title}. Intervals are over users only, and not corrected", buckets(results, compared))
    return "\n".join([*lines, "", *missing(results)]) + "\n"
