"""Writes an analysis as one self-contained HTML page of text, tables and drawings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from ..config import WATCHED
from .analyse import ROLES, Analysis

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_BACK = 30  # distances that are drawn
EVEN = (1.05 * 0.05) ** 0.5 - 0.05  # the luminance at which black and white text have the same contrast, 4.58 : 1


def shade(color: str, share: float) -> str:
    """The style of a cell: `color` (#rrggbb) mixed into white by its share, with black or white text, whichever reads better."""
    background = [round(255 + share * (int(color[i : i + 2], 16) - 255)) for i in (1, 3, 5)]
    text = "#000" if luminance(background) > EVEN else "#fff"
    return f"background:#{bytes(background).hex()};color:{text}"


def luminance(rgb: Sequence[int]) -> float:
    """Relative luminance of an sRGB colour, 0 (black) to 1 (white), as WCAG 2 defines it."""
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (each / 255 for each in rgb))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def page(analysis: Analysis, title: str, labels: Mapping[Any, str] | None = None) -> str:
    """The report. labels: what to call items, by their ids; the ids by default."""
    heads, buckets = analysis.heads, [*analysis.by_length, *analysis.by_popularity]
    most = max(heads, key=lambda head: head.moved)
    by_change = np.argsort(np.subtract(most.roles_m, most.roles), kind="stable")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        analysis=analysis,
        title=title,
        label=lambda item: (labels or {}).get(item, item),
        shade=shade,
        metric=WATCHED,
        roles=ROLES,
        most=most,
        lost=by_change[0],
        gained=by_change[-1],
        distances=min(MOST_BACK, len(most.distance)),
        peak=max(max(head.distance[:MOST_BACK] + head.distance_m[:MOST_BACK]) for head in heads),
        least=min([0.0, *(bucket.low for bucket in buckets)]),
        largest=max([1e-9, *(bucket.high for bucket in buckets)]),
    )
    return text + "\n"
