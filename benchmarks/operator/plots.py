"""Pictures of attn_bench.py and cost_report.py: time and memory against L, calls under the roof, quality against training time."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..common.plots import SMALL, panels
from ..common.report import Row, device_ms
from .providers import PROVIDERS
from .roofline import Point
from .workloads import STOCHASTIC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (("row_us", "time, us per row and head"), ("row_kib", "peak KiB per row and head"))
MARKERS = {"fwd": "o", "bwd": "s", "fwd+bwd": "X", "step": "*"}
REFINEMENT_COLOURS = {"none": "#777777", "simple": "#6c8ebf", "value": "#e8a33d", "additive": "#0b7a75", "stochastic": "#d1495b"}


def against_length(files: list[Row], refinements: Sequence[str] = ()) -> "Figure | None":
    """Forward and backward where every row is an item, a row of panels per device and kind of problem: time, then memory.

    Both are divided by B * H * L: what costs O(L^2) rises with L, what costs O(L) is flat. Of several batches of one length the
    largest is drawn. refinements: these alone, without dropout. None where no kind of problem was measured at several lengths.
    """
    problems: dict[tuple[str, ...], dict[tuple[str, int], Row]] = {}
    for device, row in ((results["device"], row) for results in files for row in results["rows"]):
        left_out = refinements and (row["refinement"] not in refinements or row["dropout_p"])
        if row["pass"] != "fwd+bwd" or row["source"] or left_out:
            continue
        between = "Gaussians" if row["backbone"] == STOCHASTIC else "vectors"
        drop = f", dropout {row['dropout_p']:g}" if row["dropout_p"] else ""
        title = f"between {between}, {row['refinement']}, {row['dtype']}{drop}"
        panel, rows = problems.setdefault((title, device), {}), row["B"] * row["H"] * row["L"]
        other = panel.get((row["provider"], row["L"]))
        if other is None or other["B"] < row["B"]:
            per_row = {"row_us": device_ms(row) * 1e3 / rows, "row_kib": row["peak_mib"] * 1024 / rows}
            panel[row["provider"], row["L"]] = row | per_row
    problems = {key: panel for key, panel in problems.items() if len({length for _, length in panel}) > 1}
    if not problems:
        return None
    figure, axes = panels(len(problems), len(COLUMNS), height=2.7)
    present = {row["provider"] for panel in problems.values() for row in panel.values()}
    colours = {name: f"C{i % 10}" for i, name in enumerate(name for name in PROVIDERS if name in present)}
    lines: dict[str, Any] = {}
    for row_of_panels, ((title, device), panel) in zip(axes, problems.items(), strict=True):
        members = sorted(panel.values(), key=lambda row: row["L"])
        for axis, (column, label) in zip(row_of_panels, COLUMNS, strict=True):
            lines |= _lines(axis, members, column, colours)
            axis.set_ylabel(label, fontsize=SMALL)
        row_of_panels[0].set_title(f"{title}; {device}\n{_sizes(members)}", fontsize=SMALL, loc="left")
    handles = [lines[name] for name in colours]
    figure.legend(handles, list(colours), loc="outside upper left", fontsize=SMALL, frameon=False, ncols=4)
    return figure


def _lines(ax: Any, rows: list[Row], column: str, colours: dict[str, str]) -> dict[str, Any]:
    """Draws the line of each provider and returns them by name."""
    from matplotlib.ticker import LogLocator

    drawn = {}
    for name in dict.fromkeys(r["provider"] for r in rows):
        points = sorted((r["L"], r[column]) for r in rows if r["provider"] == name)
        style = "-" if PROVIDERS[name].role == "ours" else "--"
        drawn[name] = ax.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=colours[name])[0]
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("L", fontsize=SMALL)
    ticks = sorted({r["L"] for r in rows})
    ax.set_xticks(ticks, [str(x) for x in ticks])
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_minor_formatter("{x:g}")
    return drawn


def _sizes(rows: list[Row]) -> str:
    """B, H, D, R of every length, once where they agree."""
    sizes = {row["L"]: [row[name] for name in "BHDR"] for row in rows}
    columns = [list(dict.fromkeys(values)) if len(set(values)) == 1 else values for values in zip(*sizes.values(), strict=True)]
    texts = [f"{name} {'/'.join(map(str, values))}" for name, values in zip("BHDR", columns, strict=True)]
    return f"{', '.join(texts)}, by length" if any(len(values) > 1 for values in columns) else " ".join(texts)


def roofline(points: list[Point]) -> "Figure | None":
    """A panel per device: share of the matrix rate against operations per byte, a point per pass of a call."""
    devices: dict[str, list[Point]] = {}
    for p in points:
        devices.setdefault(p.device, []).append(p)
    if not devices:
        return None
    from matplotlib.lines import Line2D

    figure, axes = panels(len(devices), 1, height=3.1)
    for (axis,), (device, some) in zip(axes, devices.items(), strict=True):
        ridge = statistics.median(p.ridge for p in some)
        low, high = min(p.intensity for p in some) / 2, max(ridge, *(p.intensity for p in some)) * 2
        axis.plot([low, ridge, high], [low / ridge, 1, 1], color="#333333", linewidth=1)
        axis.axvline(ridge, color="#bbbbbb", linewidth=0.8, linestyle=":")
        axis.annotate(f"ridge {ridge:.3g}", (ridge, 1), (0, 4), textcoords="offset points", fontsize=SMALL, ha="center")
        colours = {group: f"C{i % 10}" for i, group in enumerate(dict.fromkeys(p.group for p in some))}
        for p in some:
            y = p.operations / p.ms * 1e3 / p.rates.matmul
            axis.scatter(p.intensity, y, s=34, marker=MARKERS[p.part], color=colours[p.group], alpha=0.8)
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("operations per byte of device memory", fontsize=SMALL)
        axis.set_ylabel("share of the matrix rate", fontsize=SMALL)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{device}: measured, a point per pass of a call", fontsize=9, loc="left")
        marks = [Line2D([], [], color=colour, marker="o", linestyle="", label=group) for group, colour in colours.items()]
        hollow: dict[str, Any] = {"color": "#333333", "linestyle": "", "fillstyle": "none"}
        marks += [Line2D([], [], marker=MARKERS[part], label=part, **hollow) for part in dict.fromkeys(p.part for p in some)]
        axis.legend(handles=marks, fontsize=SMALL, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def quality(entries: list[Row]) -> "Figure | None":
    """Test NDCG@10 against seconds of training, a panel per data set; cells of the usual tables, loss and options alone."""
    usual = {"variant": "default", "backbone": "sasrec", "tables": "position", "loss": "sampled_softmax"}
    cells: dict[str, dict[tuple[str, int], list[Row]]] = {}
    for entry in entries:
        if all(entry[name] == value for name, value in usual.items()):
            cells.setdefault(entry["dataset"], {}).setdefault((entry["refinement"], entry["layers"]), []).append(entry)
    if not cells:
        return None
    from matplotlib.lines import Line2D

    order = list(REFINEMENT_COLOURS)
    kinds = sorted({kind for by_kind in cells.values() for kind in by_kind}, key=lambda kind: (kind[1], order.index(kind[0])))
    seconds = "train_cpu_seconds" if all("train_cpu_seconds" in entry for entry in entries) else "train_seconds"
    figure, axes = panels(math.ceil(len(cells) / 2), 2, height=3.1)
    all_axes = [axis for line in axes for axis in line]
    for axis in all_axes[len(cells) :]:
        axis.remove()
    for axis, (dataset, by_kind) in zip(all_axes, cells.items(), strict=False):
        for (refinement, layers), runs in by_kind.items():
            reached, took = ([float(x) for x in of] for of in ((r["test"]["NDCG@10"] for r in runs), (r[seconds] for r in runs)))
            style = _style(refinement, layers) | ({} if len(runs) > 1 else {"markerfacecolor": "white"})
            axis.errorbar(statistics.fmean(took), statistics.fmean(reached), _spread(reached), _spread(took), capsize=2, **style)
        axis.set_title(f"{dataset}, {_seeds(by_kind.values())}", fontsize=9, loc="left")
        axis.set_xlabel("CPU seconds of training" if seconds == "train_cpu_seconds" else "seconds of training", fontsize=SMALL)
        axis.margins(0.15)
    for line in axes:
        line[0].set_ylabel("test NDCG@10", fontsize=SMALL)
    marks = []
    for refinement, layers in kinds:
        name = "plain" if refinement == "none" else refinement
        marks.append(Line2D([], [], label=f"{name}, {layers} layer{'s' * (layers > 1)}", **_style(refinement, layers)))
    figure.legend(handles=marks, loc="outside lower center", fontsize=SMALL, frameon=False, ncols=4)
    figure.suptitle("Mean and deviation over seeds; hollow: one seed", fontsize=9)
    return figure


def _style(refinement: str, layers: int) -> dict[str, Any]:
    return {"color": REFINEMENT_COLOURS[refinement], "marker": "o^sD"[(layers - 1) % 4], "linestyle": "", "markersize": 6}


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _seeds(cells: Iterable[list[Row]]) -> str:
    counts = sorted({len(runs) for runs in cells})
    text = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{text} seed{'' if counts == [1] else 's'}"
