"""Tables and the picture of the trained models: `python -m benchmarks.theory.report` writes trained.md and trained.png beside
results/theory/trained.json, which it reads."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from awrsr.files import read_json
from benchmarks.theory.trained import PARTS, RESULTS, Entries, Results, Run, searched

Row = dict[str, Any]
Value = Callable[[Row], float]


def accuracy(row: Row) -> float:
    return float(row["accuracy"])


def chosen(entries: Entries, part: str, model: str, task: str) -> list[Row]:
    """The runs of a model on a task with the rate that its search chose, by seed."""
    of = next(each for each in PARTS[part].models if each.name == model)
    at = next(each for each in PARTS[part].tasks if each.name == task)
    rate = searched(part, of, entries)
    runs = [] if rate is None else [Run(part, at, of, rate, seed) for seed in range(PARTS[part].seeds)]
    return [entries[run.key] for run in runs if run.key in entries]


def cell(rows: Sequence[Row], value: Value, seeds: int, worst: Callable[[Iterable[float]], float] = min) -> str:
    """Mean and worst of the seeds; how many, if not all were run."""
    if not rows:
        return ""
    few = "" if len(rows) == seeds else f", {len(rows)} of {seeds} seeds"
    return f"{mean(map(value, rows)):.3f} ({worst(map(value, rows)):.3f}{few})"


def table(entries: Entries, part: str) -> list[str]:
    """A line per model: accuracy by task, or by what sequences ask for, or the loss in nats per byte; on the first task, parameters
    and processor time per step as a multiple of the first model's."""
    tasks = sorted(PARTS[part].tasks, key=lambda task: (task.length, task.name))
    kinds = {kind for row in entries.values() if row["part"] == part for kind in row.get("by_kind", ())}
    names = {kind: f"{kind} hop{'s' * (kind != '1')}" for kind in sorted(kinds - {"loss"}, key=int)}
    names |= {"loss": "loss"} if "loss" in kinds else {}
    heads = list(names.values()) or [task.name for task in tasks]
    lines = [f"| model | {' | '.join(heads)} | parameters | time per step |", f"|--|{'--|' * len(heads)}--|--|"]
    first, seeds = PARTS[part].tasks[0].name, PARTS[part].seeds
    base = chosen(entries, part, PARTS[part].models[0].name, first)
    for model in PARTS[part].models:
        rows = {task.name: chosen(entries, part, model.name, task.name) for task in tasks}
        if not any(rows.values()):
            continue
        cells = [
            cell(rows[first], lambda row, kind=kind: float(row["by_kind"][kind]), seeds, max if kind == "loss" else min)  # type: ignore[misc]
            for kind in names
        ] or [cell(rows[task.name], accuracy, seeds) for task in tasks]
        known = rows[first] and base
        costs = [f"{rows[first][0]['parameters']:,}", f"{per_step(rows[first]) / per_step(base):.2f}"] if known else ["", ""]
        lines.append(f"| {model.name} | {' | '.join([*cells, *costs])} |")
    return lines


def per_step(rows: Sequence[Row]) -> float:
    return mean(row["cpu_seconds"] / row["steps"] for row in rows)


def markdown(entries: Entries) -> str:
    """All tables that have runs."""
    texts = []
    for part, wanted in PARTS.items():
        lines = table(entries, part)
        if len(lines) > 2:
            texts += [f"**{part}**: {wanted.steps:,} steps, mean and (worst) of {wanted.seeds} seeds", "", *lines, ""]
    return "\n".join(texts)


def picture(entries: Entries) -> Figure:
    """Accuracy by length on induction, a line per model."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    tasks = sorted(PARTS["induction"].tasks, key=lambda task: task.length)
    for model in PARTS["induction"].models:
        found = {task.length: chosen(entries, "induction", model.name, task.name) for task in tasks}
        points = {length: mean(map(accuracy, rows)) for length, rows in found.items() if rows}
        refined = "refined" in model.name or "lagged" in model.name
        axis.plot(*zip(*points.items(), strict=True), "o-", label=model.name, linewidth=2 if refined else 1) if points else None
    axis.set_xscale("log", base=2)
    axis.set_xticks([task.length for task in tasks], [str(task.length) for task in tasks])
    axis.set(xlabel="items of a sequence", ylabel="accuracy", ylim=(-0.02, 1.02))
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.results.exists() or not read_json(options.results)["rows"]:
        parser.error(f"argument --results: {options.results} holds no runs; benchmarks.theory.trained makes them")
    entries = Results(options.results).entries
    options.results.with_suffix(".md").write_text(markdown(entries), encoding="utf-8")
    picture(entries).savefig(options.results.with_suffix(".png"), dpi=150)
    print(markdown(entries))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
