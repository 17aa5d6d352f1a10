"""Figures of the benchmarks: panels in rows and columns, drawn without a window."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.5  # inches of every picture: a page shows it 700 pixels wide, where SMALL letters are 10 pixels high
SMALL = 8  # points


def panels(rows: int, columns: int, height: float) -> "tuple[Figure, list[list[Any]]]":
    """A figure and the axes of its panels, row by row. height: inches of a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = [list(line) for line in figure.subplots(rows, columns, squeeze=False)]
    for axis in (axis for line in axes for axis in line):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=SMALL)
    return figure, axes
