"""Writes an analysis as one self-contained HTML page of text, tables and drawings."""

from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined

from ..config import WATCHED
from .analyse import ROLES, Analysis

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_BACK = 30  # distances that are drawn


def page(analysis: Analysis, title: str) -> str:
    """The report."""
    heads, buckets = analysis.heads, [*analysis.by_length, *analysis.by_popularity]
    most = max(heads, key=lambda head: head.moved)
    by_change = np.argsort(np.subtract(most.roles_m, most.roles), kind="stable")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        analysis=analysis,
        title=title,
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
