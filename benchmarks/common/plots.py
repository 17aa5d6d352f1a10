"""Figures of the benchmarks: panels in rows and columns, drawn without a window."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def panels(rows: int, columns: int, width: float, height: float) -> "tuple[Figure, list[list[Any]]]":
    """A figure and the axes of its panels, row by row, with the size of a panel in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [list(line) for line in figure.subplots(rows, columns, squeeze=False)]
    for axis in (axis for line in axes for axis in line):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes
