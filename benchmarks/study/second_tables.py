"""Tables and the picture of the second order."""

import numpy as np
from matplotlib.figure import Figure

from awrsr.evaluation.compare import LEVEL
from benchmarks.study.gains import METRIC, Gain, Runs, contrast
from benchmarks.study.plan import SEEDS
from benchmarks.study.plots import GREEN, GREY, draw, style
from benchmarks.study.second_gains import EXPECTED, HEADROOM, Second, criteria, predictions
from benchmarks.study.second_order import DATASETS, ELSEWHERE, NAMES, PREDICTED, SETTINGS, by_default, compared, planned
from benchmarks.study.tables import grid

PARTS = ("second order", "second order in brief")  # of pages, between <!-- PART: begin --> and <!-- PART: end -->
OTHERS = tuple(dataset for dataset in DATASETS if dataset not in PREDICTED)


def marked(page: str, texts: dict[str, str]) -> str:
    """A page with the text of each part between its marks; a page without marks stays."""
    for part, text in texts.items():
        begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
        if begin in page and end in page:
            before, rest = page.split(begin, 1)
            page = f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end, 1)[1]}"
    return page


def reached(second: Second, dataset: str, name: str, marks: bool = True) -> str:
    """NDCG@10 of a contestant; with `marks` also how many seeds, if not all, and whether its search goes on."""
    if (dataset, name) not in second.runs:
        return "not run"
    runs = second.runs[dataset, name]
    if not marks:
        return f"{runs.mean():.4f}"
    done = "" if len(runs.entries) >= SEEDS else f" ({len(runs.entries)} of {SEEDS})"
    return f"{runs.mean():.4f}{done}{'' if second.settings[dataset, name] else '*'}"


def predicted(second: Second, marks: bool = True) -> list[str]:
    """Rows of contestants, columns of the sets on which refinement is predicted to win; and what a contestant costs."""
    rows = []
    for name in NAMES:
        rows.append([name, *(reached(second, dataset, name, marks) for dataset in PREDICTED), *cost(second, name)])
    heads = [f"{dataset} ({HEADROOM[dataset][0]:.1f} %{'' if marks else made(second, dataset)})" for dataset in PREDICTED]
    return grid(" | ".join(["model", *heads, "parameters", "CPU time"]), rows)


def made(second: Second, dataset: str) -> str:
    """How many seeds the contestants have on a data set that is not finished, for its heading."""
    counts = [second.seeds(dataset, name) for name in NAMES]
    if all(second.finished(dataset, name) for name in NAMES):
        return ""
    least = f"{min(counts)} to " if min(counts) < max(counts) else ""
    return f", {least}{max(counts)} seed{'s' * (max(counts) > 1)}"


def cost(second: Second, name: str) -> list[str]:
    """Parameters on jazz, and processor time per epoch as a multiple of plain attention's, the median over the predicted sets."""
    both = [[second.runs.get((dataset, each)) for each in (name, "plain")] for dataset in PREDICTED]
    ratios = [seconds(model) / seconds(plain) for model, plain in both if model and plain]
    params = f"{second.runs['jazz', name].average('params'):,.0f}" if ("jazz", name) in second.runs else "-"
    return [params, f"{np.median(ratios):.2f}" if ratios else "-"]


def seconds(runs: Runs) -> float:
    return runs.average("train_cpu_seconds") / runs.average("epochs")


def others(second: Second) -> list[str]:
    """Rows of the sets on which no win is predicted."""
    rows = []
    for dataset in OTHERS:
        gains = [second.gains.get((dataset, name, "plain")) for name in ("refined", by_default(dataset))]
        ended = ["not run" if gain is None else gain_text(gain) for gain in gains]
        ended[1] = f"{by_default(dataset)}: {ended[1]}"
        rows.append([f"{dataset} ({HEADROOM[dataset][0]:.1f} %)", *(reached(second, dataset, name) for name in ELSEWHERE), *ended])
    return grid(" | ".join(["data (headroom)", *ELSEWHERE, "refined over plain", "the default over plain"]), rows)


def gain_text(gain: Gain) -> str:
    """A gain with its p, if it has one."""
    if np.isnan(gain.p):
        return f"{gain.relative:+.1%}, no claim"
    verdict = "not shown" if gain.p >= LEVEL else "better" if gain.difference > 0 else "worse"
    return f"{gain.relative:+.1%}, {verdict} (p {gain.p:.3f})" if gain.p >= 0.001 else f"{gain.relative:+.1%}, {verdict} (p < .001)"


def answers(second: Second) -> list[str]:
    """Rows of the comparisons that decide, on the predicted sets."""
    deciding = [("refined", "plain"), ("refined", "mean"), ("refined", "two plain layers"), ("lagged", "two plain layers")]
    deciding += [("lagged", "suffix-3 and unigram"), ("suffix-3 and lagged", "suffix-3 and unigram")]
    rows = []
    for dataset in PREDICTED:
        gains = [second.gains.get((dataset, *each)) for each in deciding]
        expected = " and ".join(EXPECTED[dataset])
        rows.append([dataset, expected, *("not run" if gain is None else gain_text(gain) for gain in gains)])
    heads = ["data", "predicted: refined over plain, lagged over two layers", *(f"{model} over {base}" for model, base in deciding)]
    return grid(" | ".join(heads), rows)


def missing(second: Second) -> list[str]:
    """Which runs are missing, a line per set and state."""
    lines = []
    for dataset in DATASETS:
        states: dict[str, list[str]] = {}
        for name in NAMES if dataset in PREDICTED else ELSEWHERE:
            if not second.finished(dataset, name):
                states.setdefault(second.state(dataset, name), []).append(name)
        lines += [[dataset, "all" if len(names) == len(NAMES) else ", ".join(names), state] for state, names in states.items()]
    if not lines:
        return ["All runs of these tables have been made."]
    return ["Missing runs:", "", *grid("data | models | done", lines)]


def short(second: Second) -> str:
    """What pages show: the tables, what was decided, and what is missing."""
    about = "Test NDCG@10, five seeds, by set with its headroom; `k of 5`: so many seeds so far; `*`: the search is not finished."
    lines = [f"{about} Parameters: on jazz. CPU time: of an epoch, as a multiple of plain attention's.", "", *predicted(second)]
    lines += ["", *answers(second), "", "Sets below the threshold:", "", *others(second), "", "What the plan calls success:", ""]
    lines += [*grid("criterion | found | verdict", [[*each] for each in criteria(second)]), "", "What else it predicts:", ""]
    lines += [*grid("prediction | found | verdict", [[*each] for each in predictions(second)]), "", *missing(second)]
    return "\n".join(lines)


def brief(second: Second) -> str:
    """What the README shows: the table of all models on the predicted sets, and how many of its runs there are."""
    wanted = [(dataset, name) for dataset in PREDICTED for name in NAMES]
    done = sum(second.seeds(*each) for each in wanted)
    ended = all(second.finished(*each) for each in wanted)
    missing = f"**{done} of {SEEDS * len(wanted)} runs have been made**; a heading says how many seeds so far."
    about = "Five seeds." if ended else missing
    return "\n".join(["Test NDCG@10, by set with its headroom. " + about, "", *predicted(second, marks=False)])


def markdown(second: Second, short: str) -> str:
    """The page of all tables."""
    finished = sum(not np.isnan(gain.p) for gain in second.gains.values())
    lines = [
        f"Of {planned()} planned comparisons, {finished} have all their runs; p-values are Holm-corrected for all {planned()}."
    ]
    lines += ["", short, "", "**All comparisons**", ""]
    rows = []
    for dataset in DATASETS:
        for model, base in compared(dataset):
            gain = second.gains.get((dataset, model, base))
            if gain is None:
                continue
            row = [dataset, model, base, f"{gain.model.mean():.4f}, {gain.base.mean():.4f}", gain_text(gain)]
            rows.append([*row, f"{gain.low:+.4f} .. {gain.high:+.4f}"])
    lines += [*grid("data | model | versus | NDCG@10 | gain | 95 % interval", rows), ""]
    more = [name for name in NAMES if name not in ELSEWHERE]
    rest = [[d, name, reached(second, d, name)] for d in OTHERS for name in more if (d, name) in second.runs]
    if rest:
        lines += ["**Other models below the threshold**", "", *grid("data | model | NDCG@10", rest), ""]
    rows = [[d, n, s] for (d, n), s in second.settings.items() if d in PREDICTED and s is not None]
    if rows:
        lines += [f"**Settings that the search chose** (of {', '.join(SETTINGS)})", "", *grid("data | model | setting", rows), ""]
    return "\n".join(lines)


def picture(second: Second) -> Figure | None:
    """Gains of every contestant over plain attention, a panel per predicted set."""
    names = [name for name in NAMES if name != "plain"][::-1]
    sets = [dataset for dataset in PREDICTED if {"plain"} < {name for of, name in second.runs if of == dataset}]
    if not sets:
        return None
    figure = Figure(figsize=(2.1 * len(sets) + 1.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(sets), squeeze=False)[0]
    for axis, dataset in zip(axes, sets, strict=True):
        for y, name in enumerate(names):
            if (dataset, name) in second.runs:
                gain = contrast(METRIC, second.runs[dataset, name], second.runs[dataset, "plain"])
                draw(axis, gain, y, GREEN if "refined" in name or "lagged" in name else GREY)
        style(axis, names if axis is axes[0] else [""] * len(names))
        state = "" if all(second.finished(dataset, name) for name in NAMES) else "\nruns missing"
        axis.set_title(f"{dataset}\n{HEADROOM[dataset][0]:.1f} % headroom{state}", fontsize=8)
    figure.supxlabel("gain in test NDCG@10 over one plain layer (%), with 95 % interval\ngreen: refined attention", fontsize=8)
    return figure
