"""Pictures of the study: gains with their intervals."""

from matplotlib.figure import Figure

from benchmarks.study.gains import Gain, controlled
from benchmarks.study.tables import APART, label, layers_text, settings


def short_picture(compared: list[Gain]) -> Figure | None:
    """Gains over plain attention of the mean alone and of additive refinement; made-up data, of another scale, beside the rest."""
    rows = controlled(compared)
    sides = [[row for row in rows if (row[0].found.cell.dataset == "synthetic") == made_up] for made_up in (False, True)]
    sides = [side for side in sides if side]
    if not sides:
        return None
    most = max(map(len, sides))
    figure = Figure(figsize=(7.5, 1.2 + 0.55 * most), layout="constrained")
    axes = figure.subplots(1, len(sides), squeeze=False, width_ratios=[3, 2][: len(sides)])[0]
    for axis, side in zip(axes, sides, strict=True):
        for y, (mean, additive, _) in enumerate(side[::-1]):
            for gain, height, color in ((mean, y + 0.14, "#e09f3e"), (additive, y - 0.14, "#1b7f5c")):
                low, middle, high = (100 * value / gain.base.mean() for value in (gain.low, gain.difference, gain.high))
                axis.plot([low, high], [height, height], color=color, linewidth=2, solid_capstyle="round")
                inside = color if gain.verdict in ("better", "worse") else "white"
                axis.plot([middle], [height], "o", color=color, markersize=6, markerfacecolor=inside)
        names = [f"{c.dataset}, {settings(c)},\n{layers_text(c.layers)}" for c in (row[1].found.cell for row in side[::-1])]
        axis.set_yticks(range(len(side)), names, fontsize=8)
        axis.set_ylim(-0.6 - (most - len(side)) / 2, len(side) - 0.4 + (most - len(side)) / 2)
        axis.axvline(0, color="#333333", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    lines = axes[0].get_lines()[:3:2]
    names = ["the mean of the history added", "additive refinement"]
    figure.legend(lines, names, loc="outside upper left", fontsize=8, frameon=False, ncols=2)
    figure.supxlabel("gain in test NDCG@10 over plain attention, %, and 95 % interval; hollow: not shown", fontsize=8)
    return figure


def forest(compared: list[Gain], group: str) -> Figure | None:
    """Gains with their intervals, a panel per data set."""
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
