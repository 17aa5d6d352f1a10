"""Pictures of attn_bench.py, one per question, and of cost_report.py: against L, under the roof, quality against training time."""

import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common.plots import panels
from ..common.report import Row, device_ms
from .measure import PASSES
from .providers import PROVIDERS
from .roofline import Point
from .workloads import LAYOUTS, STOCHASTIC

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Question(NamedTuple):
    """A picture: the column of a row that answers it, and what its axis says."""

    name: str
    column: str
    axis: str


QUESTIONS = (
    Question("time", "median_ms", "time, ms"),
    Question("memory", "peak_mib", "memory, MiB above the inputs"),
    Question("floor", "to_floor", "time over its floor"),
)
SHOWN = ("simple", "stochastic")  # refinements that have a panel against L in the cost report
COLUMNS = (("row_us", "time, us per row and head"), ("row_kib", "peak memory, KiB per row and head"))
MARKERS = {"fwd": "o", "bwd": "s", "fwd+bwd": "X", "step": "*"}
REFINEMENT_COLOURS = {"none": "#777777", "simple": "#6c8ebf", "value": "#e8a33d", "additive": "#0b7a75", "stochastic": "#d1495b"}


def plot(rows: list[Row], column: str, axis: str, device: str) -> "Figure":
    """A panel per problem (all but L) and pass: lines against L, or bars per layout where users' histories were measured."""
    rows = [r for r in rows if column in r]  # older results lack what was not measured then
    problems = _problems(rows)
    passes = [p for p in PASSES if any(r["pass"] == p for r in rows)]
    figure, axes = panels(len(problems), len(passes), width=5.2, height=3.7)
    for line, (title, members) in zip(axes, problems.items(), strict=True):
        for ax, p in zip(line, passes, strict=True):
            chosen = [r for r in members if r["pass"] == p]
            (_bars if members[0]["source"] else lines)(ax, chosen, column)
            ax.set_title(f"{title}\n{p}", fontsize=8)
            ax.set_ylabel(axis)
    named = {name: handle for ax in figure.axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=8)
    figure.suptitle(device, fontsize=9)
    return figure


def _problems(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows that share a panel, by its title. A batch size is part of it only where one length was measured with several."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        heads = row["H"] if row["H"] == row["H_kv"] else f"{row['H']}/{row['H_kv']}"
        title = f"{row['source']} H {heads} D {row['D']} R {row['R']} {row['dtype']} {row['refinement']}".strip()
        title += " between Gaussians" if row["backbone"] == STOCHASTIC else ""
        found.setdefault(title, []).append(row)
    split: dict[str, list[Row]] = {}
    for title, members in found.items():
        several = len({(r["B"], r["L"]) for r in members}) > len({r["L"] for r in members})
        every = sorted({r["B"] for r in members})
        for row in members:
            batch = row["B"] if several or len(every) == 1 else f"{every[0]}..{every[-1]}"
            split.setdefault(title if row["source"] else f"B {batch} {title}", []).append(row)
    return split


def _colour(provider: str) -> str:
    return f"C{list(PROVIDERS).index(provider) % 10}"  # no backbone has two of a colour


def lines(ax: Any, rows: list[Row], column: str) -> None:
    from matplotlib.ticker import LogLocator

    for name in dict.fromkeys(r["provider"] for r in rows):
        points = sorted((r["L"], r[column]) for r in rows if r["provider"] == name)
        style = "-" if PROVIDERS[name].role == "ours" else "--"
        ax.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name, color=_colour(name))
    ax.set(xscale="log", yscale="log", xlabel="L")
    ticks = sorted({r["L"] for r in rows})
    ax.set_xticks(ticks, [str(x) for x in ticks])
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_minor_formatter("{x:g}")


def _bars(ax: Any, rows: list[Row], column: str) -> None:
    names = list(dict.fromkeys(r["provider"] for r in rows))
    for row in rows:
        x = LAYOUTS.index(row["layout"]) + (names.index(row["provider"]) - len(names) / 2) * 0.8 / len(names)
        ax.bar(x, row[column], 0.8 / len(names), align="edge", label=row["provider"], color=_colour(row["provider"]))
    ax.set_xticks(range(len(LAYOUTS)), LAYOUTS)

# The cost report


def against_length(files: list[Row]) -> "Figure | None":
    """Forward and backward where every row is an item, a column of panels per device, backbone and refinement: time, then memory.

    Both are divided by B * H * L: what costs O(L^2) rises with L, what costs O(L) is flat. Of several batches of one length the
    largest is drawn.
    """
    problems: dict[tuple[str, str, str, str], dict[tuple[str, int], Row]] = {}
    for results in files:
        for row in results["rows"]:
            if row["pass"] == "fwd+bwd" and not row["source"] and row["refinement"] in SHOWN and not row["dropout_p"]:
                panel = problems.setdefault((results["device"], row["backbone"], row["refinement"], row["dtype"]), {})
                rows = row["B"] * row["H"] * row["L"]
                per_row = {"row_us": device_ms(row) * 1e3 / rows, "row_kib": row["peak_mib"] * 1024 / rows}
                other = panel.get((row["provider"], row["L"]))
                if other is None or other["B"] < row["B"]:
                    panel[row["provider"], row["L"]] = row | per_row
    problems = {key: panel for key, panel in problems.items() if len({length for _, length in panel}) > 1}
    if not problems:
        return None
    figure, axes = panels(len(COLUMNS), len(problems), width=5.0, height=3.4)
    for i, ((device, backbone, refinement, dtype), panel) in enumerate(problems.items()):
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


def roofline(points: list[Point]) -> "Figure | None":
    """A panel per device: share of the matrix rate against operations per byte, a point per pass of a call."""
    devices: dict[str, list[Point]] = {}
    for p in points:
        devices.setdefault(p.device, []).append(p)
    if not devices:
        return None
    from matplotlib.lines import Line2D

    figure, axes = panels(1, len(devices), width=5.4, height=5.2)
    for axis, (device, some) in zip(axes[0], devices.items(), strict=True):
        ridge = statistics.median(p.ridge for p in some)
        low, high = min(p.intensity for p in some) / 2, max(ridge, *(p.intensity for p in some)) * 2
        axis.plot([low, ridge, high], [low / ridge, 1, 1], color="#333333", linewidth=1)
        axis.axvline(ridge, color="#bbbbbb", linewidth=0.8, linestyle=":")
        axis.annotate(f"ridge {ridge:.3g}", (ridge, 1), (0, 4), textcoords="offset points", fontsize=7, ha="center")
        colours = {group: f"C{i % 10}" for i, group in enumerate(dict.fromkeys(p.group for p in some))}
        for p in some:
            y = p.operations / p.ms * 1e3 / p.rates.matmul
            axis.scatter(p.intensity, y, s=34, marker=MARKERS[p.part], color=colours[p.group], alpha=0.8)
        axis.set(xscale="log", yscale="log")
        axis.set_xlabel("operations per byte of device memory", fontsize=8)
        axis.set_ylabel("share of the matrix rate", fontsize=8)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{device}\nmeasured, a point per pass of a call", fontsize=9, loc="left")
        marks = [Line2D([], [], color=colour, marker="o", linestyle="", label=group) for group, colour in colours.items()]
        hollow: dict[str, Any] = {"color": "#333333", "linestyle": "", "fillstyle": "none"}
        marks += [Line2D([], [], marker=MARKERS[part], label=part, **hollow) for part in dict.fromkeys(p.part for p in some)]
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
    figure, axes = panels(1, len(cells), width=4.0, height=3.9)
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
