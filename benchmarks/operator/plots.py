"""Plots of attn_bench.py: a picture per question, each against L, or a bar per layout where users' histories were measured."""

import io
from typing import Any, NamedTuple

from .measure import PASSES
from .providers import PROVIDERS
from .workloads import LAYOUTS, STOCHASTIC

Row = dict[str, Any]


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


def plot(rows: list[Row], column: str, axis: str, device: str) -> bytes:
    """A panel per problem (all but L) and pass: lines against L, or bars per layout where users' histories were measured."""
    from matplotlib import pyplot

    rows = [r for r in rows if column in r]  # older results lack what was not measured then
    panels = _panels(rows)
    passes = [p for p in PASSES if any(r["pass"] == p for r in rows)]
    size = (4.8 * len(passes) + 1.5, 3.6 * len(panels) + 0.4)
    figure, axes = pyplot.subplots(len(panels), len(passes), figsize=size, squeeze=False, layout="constrained")
    for line, (title, members) in zip(axes, panels.items(), strict=True):
        for ax, p in zip(line, passes, strict=True):
            chosen = [r for r in members if r["pass"] == p]
            (_bars if members[0]["source"] else lines)(ax, chosen, column)
            ax.set_title(f"{title}\n{p}", fontsize=8)
            ax.set_ylabel(axis)
    named = {name: handle for ax in axes.flat for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named, loc="outside right upper", fontsize=8)
    figure.suptitle(device, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _panels(rows: list[Row]) -> dict[str, list[Row]]:
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
