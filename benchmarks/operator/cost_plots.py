"""Pictures of cost_report.py: time and memory against L, kernels under the roof, quality against seconds of training."""

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..common.report import device_ms
from .plots import lines
from .workloads import STOCHASTIC

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .cost_report import Point

Row = dict[str, Any]
SHOWN = ("simple", "stochastic")  # refinements that have a panel against L
COLUMNS = (("row_us", "time, us per row and head"), ("row_kib", "peak memory, KiB per row and head"))
MARKERS = {"fwd": "o", "bwd": "s", "fwd+bwd": "X", "step": "*", "decode_step": "*", "short_fwd": "o", "short_bwd": "s"} | {
    "tiled_fwd 1": "^", "tiled_fwd 2": "v", "tiled_bwd_rows 1": "<", "tiled_bwd_rows 2": ">", "tiled_bwd_columns 1": "D",
    "tiled_bwd_columns 2": "d", "tiled_bwd_tables 1": "P",
}  # fmt: skip
REFINEMENT_COLOURS = {"none": "#777777", "simple": "#6c8ebf", "value": "#e8a33d", "additive": "#0b7a75", "stochastic": "#d1495b"}


def _figure(columns: int, rows: int = 1, width: float = 5.0, height: float = 4.2) -> "tuple[Figure, list[list[Axes]]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [list(line) for line in figure.subplots(rows, columns, squeeze=False)]
    for axis in (axis for line in axes for axis in line):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def operator(files: list[Row]) -> "Figure | None":
    """Forward and backward where every row is an item, a column of panels per device, backbone and refinement: time, then memory.

    Both are divided by B * H * L: what costs O(L^2) rises with L, what costs O(L) is flat. Of several batches of one length the
    largest is drawn.
    """
    panels: dict[tuple[str, str, str, str], dict[tuple[str, int], Row]] = {}
    for results in files:
        for row in results["rows"]:
            if row["pass"] == "fwd+bwd" and not row["source"] and row["refinement"] in SHOWN and not row["dropout_p"]:
                panel = panels.setdefault((results["device"], row["backbone"], row["refinement"], row["dtype"]), {})
                rows = row["B"] * row["H"] * row["L"]
                per_row = {"row_us": device_ms(row) * 1e3 / rows, "row_kib": row["peak_mib"] * 1024 / rows}
                other = panel.get((row["provider"], row["L"]))
                if other is None or other["B"] < row["B"]:
                    panel[row["provider"], row["L"]] = row | per_row
    panels = {key: panel for key, panel in panels.items() if len({length for _, length in panel}) > 1}
    if not panels:
        return None
    figure, axes = _figure(len(panels), len(COLUMNS), height=3.4)
    for i, ((device, backbone, refinement, dtype), panel) in enumerate(panels.items()):
        members = sorted(panel.values(), key=lambda row: row["L"])
        for line, (column, label) in zip(axes, COLUMNS, strict=True):
            lines(line[i], members, column)
            line[i].set_ylabel(label, fontsize=8)
        between = "Gaussians" if backbone == STOCHASTIC else "vectors"
        axes[0][i].set_title(f"between {between}, {refinement}, {dtype}\n{_sizes(members)}\n{device}", fontsize=8, loc="left")
        axes[0][i].legend(fontsize=7, frameon=False)
    return figure


def _sizes(rows: list[Row]) -> str:
    """B, H, D, R of every length, once where they agree."""
    found = {row["L"]: f"B {row['B']} H {row['H']} D {row['D']} R {row['R']}" for row in rows}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    names = ("B", "H", "D", "R")
    each = {name: list(dict((row["L"], row[name]) for row in rows).values()) for name in names}
    texts = (f"{name} {'/'.join(map(str, values)) if len(set(values)) > 1 else values[0]}" for name, values in each.items())
    return f"{', '.join(texts)}, by length"


def roofline(points: "list[Point]") -> "Figure":
    """A panel per device and kind: share of the matrix rate against operations per byte. Filled is measured, hollow predicted."""
    from matplotlib.lines import Line2D

    panels: dict[tuple[str, bool], list[Point]] = {}
    for p in points:
        panels.setdefault((p.device, p.measured), []).append(p)
    figure, axes = _figure(len(panels), width=5.4, height=5.2)
    for axis, ((device, real), some) in zip(axes[0], panels.items(), strict=True):
        ridge = statistics.median(p.ridge for p in some)
        low, high = min(p.intensity for p in some) / 2, max(ridge, *(p.intensity for p in some)) * 2
        axis.plot([low, ridge, high], [low / ridge, 1, 1], color="#333333", linewidth=1)
        axis.axvline(ridge, color="#bbbbbb", linewidth=0.8, linestyle=":")
        axis.annotate(f"ridge {ridge:.3g}", (ridge, 1), (0, 4), textcoords="offset points", fontsize=7, ha="center")
        colours = {group: f"C{i % 10}" for i, group in enumerate(dict.fromkeys(p.group for p in some))}
        for p in some:
            face = colours[p.group] if real else "none"
            y = p.operations / p.ms * 1e3 / p.rates.matmul
            axis.scatter(p.intensity, y, s=34, marker=MARKERS.get(p.part, "X"), color=face, edgecolor=colours[p.group], alpha=0.8)
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("operations per byte of device memory", fontsize=8)
        axis.set_ylabel("share of the matrix rate", fontsize=8)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_major_formatter("{x:g}")
        title = "measured, a point per pass of a call" if real else "PREDICTION, a point per kernel"
        axis.set_title(f"{device}\n{title}", fontsize=9, loc="left", color="black" if real else "#b3261e")
        if not real:
            axis.text(0.5, 0.3, "PREDICTION", transform=axis.transAxes, fontsize=34, color="#eeeeee", ha="center", zorder=0)
        marks = [Line2D([], [], color=colour, marker="o", linestyle="", label=group) for group, colour in colours.items()]
        parts = dict.fromkeys(p.part for p in some)
        hollow: dict[str, Any] = {"color": "#333333", "linestyle": "", "fillstyle": "none"}
        marks += [Line2D([], [], marker=MARKERS.get(part, "X"), label=part, **hollow) for part in parts]
        axis.legend(handles=marks, fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
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
    order = list(REFINEMENT_COLOURS)
    kinds = sorted({kind for found in cells.values() for kind in found}, key=lambda kind: (kind[1], order.index(kind[0])))
    seconds = "train_cpu_seconds" if all("train_cpu_seconds" in entry for entry in entries) else "train_seconds"
    figure, axes = _figure(len(cells), width=4.0, height=3.9)
    for axis, (dataset, found) in zip(axes[0], cells.items(), strict=True):
        for (refinement, layers), runs in found.items():
            reached, took = ([float(x) for x in of] for of in ((r["test"]["NDCG@10"] for r in runs), (r[seconds] for r in runs)))
            style = _style(refinement, layers) | ({} if len(runs) > 1 else {"markerfacecolor": "white"})
            axis.errorbar(statistics.fmean(took), statistics.fmean(reached), _spread(reached), _spread(took), capsize=2, **style)
        axis.set_title(f"{dataset}, {_seeds(found.values())}", fontsize=9, loc="left")
        axis.set_xlabel("CPU seconds of training" if seconds == "train_cpu_seconds" else "seconds of training", fontsize=8)
        axis.margins(0.15)
    axes[0][0].set_ylabel("test NDCG@10", fontsize=8)
    for refinement, layers in kinds:
        name = "plain" if refinement == "none" else refinement
        axes[0][-1].plot([], [], label=f"{name}, {layers} layer{'s' * (layers > 1)}", **_style(refinement, layers))
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
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
