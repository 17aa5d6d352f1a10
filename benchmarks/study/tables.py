"""Tables of the study as Markdown."""

import numpy as np

from awrsr.evaluation import significance
from awrsr.evaluation.compare import LEVEL
from benchmarks.study.gains import Found, Gain, controlled, planned
from benchmarks.study.plan import Cell, plan
from benchmarks.study.run import Results

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
    """Rows of what refinement adds, and what of it the mean of the history adds."""
    columns = ["data", "settings", "layers", "plain", "plain + mean", "additive"]
    columns += ["mean over plain", "additive over plain", "additive over mean"]
    lines = [f"| {' | '.join(columns)} |", "|--" * len(columns) + "|"]
    for mean, additive, learned in controlled(compared):
        row = [learned.found.cell.dataset, settings(learned.found.cell), str(learned.found.cell.layers)]
        row += [f"{each.mean():.4f}" for each in (mean.base, mean.found, additive.found)]
        lines.append(f"| {' | '.join([*row, *map(verdict_text, (mean, additive, learned))])} |")
    return lines if len(lines) > 2 else []


def settings(c: Cell) -> str:
    beside = [x for x, usual in ((c.variant, "default"), (c.loss, "sampled_softmax")) if x != usual]
    return ", ".join(beside) or "usual"


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
        f"{planned()} comparisons planned, {sum(gain.complete for gain in compared)} of them run, Holm-corrected for all. "
        f"{'; '.join(devices)}; commits "
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


def layers_text(layers: int) -> str:
    return f"{layers} layer" + ("s" if layers > 1 else "")
