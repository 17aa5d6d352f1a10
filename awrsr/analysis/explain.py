"""Shows the attention on one history: pictures of first-order and refined weights, and the largest weights as text.

H heads, n events of the history. Rows attend to columns. The last row makes the prediction.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")

_PANEL = (2.9, 7.0)  # inches: smallest and largest side of a panel
_INCHES_PER_EVENT = 0.14
_MARGINS = (3.6, 2.9)  # inches to the right of the panels and above them, for names, headings and colour bars
_MOST_NAMES = 60
_LABEL_CHARACTERS = 18
_TICKS = np.array([0.01, 0.05, 0.1, 0.2, 0.5, 1, 2])  # of colour bars
_INK, _FAINT, _MARK = "#333333", "#b5b5b5", "#d1495b"
_WEIGHTS, _DIFFERENCE = "YlGnBu", "RdBu_r"


def picture(P: Any, M: Any, labels: Sequence[Any], *, refinement: str, title: str = "") -> "Figure":
    """Heat maps of one layer on one history: a row per head, with first-order weights P, refined weights M and M - P.

    P, M: (H, n, n) tensors or arrays. labels: (n,) names of the events' items. With refinement "none", M equals P and only P is
    drawn. P and M of a head share a colour scale. Colours follow the square root of a weight, because most weights of a long
    history are small. The future, which an event cannot see, is left blank.

    Raises:
        ValueError: shapes do not fit, or weights are not finite. ImportError: matplotlib is not installed.
    """
    P, M, names = _checked(P, M, labels)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    heads, n, _ = P.shape
    columns = 1 if refinement == "none" else 3
    side = min(max(_INCHES_PER_EVENT * n, _PANEL[0]), _PANEL[1])
    figure = Figure(figsize=(columns * side + _MARGINS[0], heads * side + _MARGINS[1]), layout="compressed")
    grid = figure.subplots(heads, columns, squeeze=False)
    for head, axes in enumerate(grid):
        _draw_head(figure, axes, P[head], M[head])
        axes[0].set_ylabel(f"head {head + 1}" if heads > 1 else "", color=_INK, fontsize=11)
        _label_events(axes, names, side, last=head == heads - 1)
    headings = ("P: first-order weights", f"M: refined weights ({refinement})", "M − P: what refinement changes")
    for axis, heading in zip(grid[0], headings, strict=False):
        axis.set_title(heading, color=_INK, fontsize=11)
    remark = "rows attend to columns; outlined: the last event, which predicts the next item"
    if refinement == "none":
        remark = f"no refinement: M is P\n{remark}"
    figure.suptitle(title, color=_INK, fontsize=13, parse_math=False)
    figure.supxlabel(remark, color=_INK, fontsize=9)
    return figure


def save(figure: "Figure", path: Path | str) -> Path:
    """Write the picture in the format of the suffix: .png, .svg or .pdf. The file appears only when it is complete."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"picture is {str(path)!r}, must end in one of {', '.join(SUFFIXES)}")
    with atomic(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], dpi=150)
    return path


def summary(P: Any, M: Any, labels: Sequence[Any], *, top: int = 5) -> str:
    """The events that the last event attends to most in each head, by P and by M, as text."""
    P, M, names = _checked(P, M, labels)
    n, width = len(names), max(map(len, names))
    refined = not np.array_equal(P, M)

    def column(name: str, head: int, row: np.ndarray) -> list[str]:
        lines = []
        for event in np.argsort(-row, kind="stable")[:top]:
            back = n - 1 - event
            lines.append(f"{row[event]:.3f}  {names[event]:{width}}  {f'{back} back' if back else 'itself':>8}")
        return [f"{name} of head {head + 1}".ljust(len(lines[0])), *lines]

    lines = [f"The last event, {names[-1]}, attends most to" + ("" if refined else " (M is P)")]
    for head in range(len(P)):
        columns = [column("P", head, P[head, -1])] + ([column("M", head, M[head, -1])] if refined else [])
        heading, *rows = ("    ".join(cells) for cells in zip(*columns, strict=True))
        lines += ["", heading.rstrip(), *rows]
    return "\n".join(lines)


def _checked(P: Any, M: Any, labels: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Weights as arrays, labels as short lines of text."""
    arrays, n = [], len(labels)
    for name, weights in (("P", P), ("M", M)):
        array = np.asarray(weights.detach().float().cpu() if hasattr(weights, "detach") else weights, dtype=float)
        if array.ndim != 3 or not array.shape[0] or array.shape[1:] != (n, n) or not n:
            raise ValueError(f"{name} has shape {array.shape}, must be (heads, n, n) for {n} labels, and at least one event")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has weights that are NaN or infinite, must be finite")
        arrays.append(array)
    if arrays[0].shape != arrays[1].shape:
        raise ValueError(f"P has shape {arrays[0].shape} and M {arrays[1].shape}, must be the same")
    names = [" ".join(str(label).split()) for label in labels]
    names = [name if len(name) <= _LABEL_CHARACTERS else name[: _LABEL_CHARACTERS - 1] + "…" for name in names]
    return arrays[0], arrays[1], names


def _draw_head(figure: "Figure", axes: Sequence["Axes"], P: np.ndarray, M: np.ndarray) -> None:
    """P, or P, M and their difference, with colour bars."""
    from matplotlib.colors import FuncNorm, PowerNorm
    from matplotlib.patches import Rectangle

    n = len(P)
    corners = np.repeat(np.arange(n + 1), 2) - 0.5
    visible = np.tril(np.ones((n, n), dtype=bool))
    maps = [P, M, M - P][: len(axes)]
    largest, furthest = (max(float(np.abs(x[..., visible]).max()), 1e-6) for x in (np.stack(maps[:2]), maps[-1]))
    signed = (lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * np.square(x))  # root and its inverse
    norms = [PowerNorm(0.5, 0, largest)] * 2 + [FuncNorm(signed, -furthest, furthest)]
    images = []
    for axis, values, norm, colours in zip(axes, maps, norms, (_WEIGHTS, _WEIGHTS, _DIFFERENCE), strict=False):
        images.append(axis.imshow(np.ma.array(values, mask=~visible), interpolation="nearest", norm=norm, cmap=colours))
        axis.plot(corners[1:], corners[:-1], color=_FAINT, linewidth=0.7, zorder=2)  # outlines: the visible part, a staircase
        axis.plot([-0.5, -0.5], [-0.5, n - 0.5], color=_FAINT, linewidth=0.7, zorder=2)
        axis.add_patch(Rectangle((-0.5, n - 1.5), n, 1, fill=False, edgecolor=_MARK, linewidth=1.4, zorder=3, clip_on=False))
        axis.set_xlim(-0.5, n - 0.5)
        axis.set_ylim(n - 0.5, -0.5)
        axis.spines[:].set_visible(False)
    for image, panels, end in ((images[0], axes[:2], largest), (images[-1], axes[2:], furthest)):
        if len(panels):
            ticks = _TICKS[end + 1e-6 >= _TICKS]
            bar = figure.colorbar(image, ax=list(panels), shrink=0.85, aspect=28, pad=0.015, format="%g")
            if len(ticks) > 1:
                bar.set_ticks([*(-ticks[::-1] if image.norm.vmin else []), 0, *ticks])
            bar.outline.set_visible(False)  # type: ignore[operator]
            bar.ax.tick_params(labelsize=8, color=_FAINT, labelcolor=_INK)


def _label_events(axes: Sequence["Axes"], names: list[str], side: float, *, last: bool) -> None:
    """Item names, thinned if there are many: to the left of the first panel, and below those of the last head. side: of a panel."""
    n = len(names)
    places = list(range(n - 1, -1, -math.ceil(n / _MOST_NAMES)))[::-1]  # the last event always has its name
    shown = [names[i] for i in places]
    size = min(9.0, 72 * 0.72 * side / len(shown))  # points: names must not touch
    for i, axis in enumerate(axes):
        axis.tick_params(length=2, color=_FAINT, labelcolor=_INK, labelsize=size)
        axis.set_xticks(places, shown if last else [""] * len(places), rotation=90, parse_math=False)
        axis.set_yticks(places, shown if i == 0 else [""] * len(places), parse_math=False)
    axes[0].get_yticklabels()[-1].set(color=_MARK, fontweight="bold")
