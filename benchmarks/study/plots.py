"""Pictures of the study: gains with their intervals."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.study.gains import Gain, controlled
from benchmarks.study.tables import APART, label_layers, layers_text, settings

GREEN, RED, GREY, ORANGE = "#1b7f5c", "#d1495b", "#777777", "#e09f3e"


def short_picture(compared: list[Gain]) -> Figure | None:
    """Gains over plain attention of the mean alone and of additive refinement; synthetic data, on another scale, on the right."""
    rows = controlled(compared)
    sides = [[row for row in rows if (row[0].model.cell.dataset == "synthetic") == synthetic] for synthetic in (False, True)]
    sides = [side[::-1] for side in sides if side]
    if not sides:
        return None
    most = max(map(len, sides))
    figure = Figure(figsize=(7.5, 1.2 + 0.55 * most), layout="constrained")
    axes = figure.subplots(1, len(sides), squeeze=False, width_ratios=[3, 2][: len(sides)])[0]
    for axis, side in zip(axes, sides, strict=True):
        for y, (mean, additive, _) in enumerate(side):
            for gain, height, color in ((mean, y + 0.14, ORANGE), (additive, y - 0.14, GREEN)):
                dot = draw(axis, gain, height, color)
                dot.set_markerfacecolor(color if gain.verdict in ("better", "worse") else "white")
        cells = [row[1].model.cell for row in side]
        style(axis, [f"{c.dataset}, {settings(c)},\n{layers_text(c.layers)}" for c in cells], (most - len(side)) / 2)
    lines = axes[0].get_lines()[:3:2]
    names = ["plain attention + mean of the history", "additive refinement"]
    figure.legend(lines, names, loc="outside upper left", fontsize=8, frameon=False, ncols=2)
    figure.supxlabel("gain in test NDCG@10 over plain attention (%), with 95 % interval; hollow: no difference shown", fontsize=8)
    return figure


def forest(compared: list[Gain], group: str) -> Figure | None:
    """Gains with their intervals, a panel per data set."""
    panels: dict[str, list[Gain]] = {}
    for gain in compared:
        if gain.question == group:
            panels.setdefault(gain.model.cell.dataset, []).insert(0, gain)
    if not panels:
        return None
    heights, apart = [len(rows) for rows in panels.values()], group in APART
    height = 0.9 + (0.42 if apart else 0.34) * sum(heights) + 0.5 * len(panels)
    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[h + 1 for h in heights])[:, 0]
    for axis, (dataset, rows) in zip(axes, panels.items(), strict=True):
        for y, gain in enumerate(rows):
            draw(axis, gain, y, {"better": GREEN, "worse": RED}.get(gain.verdict, GREY))
        style(axis, [label_layers(g.model.cell) + (f"\nversus {label_layers(g.base.cell)}" if apart else "") for g in rows])
        plain = dict.fromkeys(f"{g.base.mean():.4f}" for g in rows[::-1])
        axis.set_title(dataset if apart else f"{dataset}: plain {' and '.join(plain)}", fontsize=9, loc="left")
    over = "" if apart else " over plain attention"
    figure.supxlabel(f"gain in test NDCG@10{over} (%), with 95 % interval over users and seeds", fontsize=8)
    return figure


def draw(axis: Axes, gain: Gain, y: float, color: str) -> Line2D:
    """The interval of a gain as a line and the gain as a dot, in % of the base; returns the dot."""
    low, middle, high = (100 * value / gain.base.mean() for value in (gain.low, gain.difference, gain.high))
    axis.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="round")
    return axis.plot([middle], [y], "o", color=color, markersize=6)[0]


def style(axis: Axes, names: list[str], space: float = 0.0) -> None:
    """A named row per height, with some more space above and below."""
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(-0.6 - space, len(names) - 0.4 + space)
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
