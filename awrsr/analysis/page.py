"""Writes an analysis as one HTML page that needs no other file: words computed from the numbers, and embedded pictures."""

import base64
import io
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..config import WATCHED
from .analyse import ROLES, Analysis

TEMPLATE = Path(__file__).with_suffix(".html")
P_COLOR, M_COLOR, INK, FAINT, GOOD, BAD = "#8aa1b1", "#0b7a75", "#333333", "#cccccc", "#1b7f5c", "#d1495b"
ROLE_COLORS = ("#d9d9d9", "#e8a33d", "#0b7a75", "#6c8ebf", "#f1f1f1")
MOST_BACK = 30  # distances on a picture


def page(analysis: Analysis, title: str) -> str:
    """The report."""
    pictures = {"distances": distances(analysis), "roles": role_bars(analysis)}
    if analysis.targets:
        pictures["gains"] = gains(analysis)
    most = max(analysis.heads, key=lambda head: head.moved)
    by_change = np.argsort(np.subtract(most.roles_m, most.roles), kind="stable")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        analysis=analysis,
        title=title,
        picture={name: encoded(each) for name, each in pictures.items()},
        most=most,
        roles=ROLES,
        lost=by_change[0],
        gained=by_change[-1],
        metric=WATCHED,
        colors={"P": P_COLOR, "M": M_COLOR},
    )
    return text + "\n"


def distances(analysis: Analysis) -> Figure:
    """A panel per head, a row of them per layer."""
    layers = analysis.heads[-1].layer
    heads = len(analysis.heads) // layers
    picture = Figure(figsize=(min(3.4 * heads, 11) + 0.6, 2.4 * layers + 0.5), layout="constrained")
    axes = picture.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    for head, axis in zip(analysis.heads, axes.flat, strict=True):
        lines = (("P", P_COLOR, head.distance), ("M", M_COLOR, head.distance_m))
        for name, color, weights in lines[: 1 if analysis.refinement == "none" else 2]:
            axis.plot(weights[:MOST_BACK], color=color, marker="o", markersize=3, label=name)
        gate = "" if head.gate is None else f", gate {head.gate:.2f}"
        tidy(axis, f"layer {head.layer}, head {head.head}{gate}")
    axes[0, 0].set_ylim(bottom=0)  # they share it
    axes[0, 0].legend(frameon=False, fontsize=8)
    picture.supxlabel("events back", fontsize=9, color=INK)
    picture.supylabel("mean weight", fontsize=9, color=INK)
    return picture


def role_bars(analysis: Analysis) -> Figure:
    """A bar for P and one for M of each head."""
    rows = []
    for head in analysis.heads:
        rows.append((f"layer {head.layer}, head {head.head}: P", head.roles))
        if analysis.refinement != "none":
            rows.append(("M", head.roles_m))
    picture = Figure(figsize=(8.5, 0.32 * len(rows) + 1.1), layout="constrained")
    axis = picture.subplots()
    left = np.zeros(len(rows))
    for i, name in enumerate(ROLES):
        shares = np.array([shares[i] for _, shares in rows])
        axis.barh(range(len(rows)), shares, left=left, color=ROLE_COLORS[i], edgecolor="white", label=name, height=0.8)
        for y, share in enumerate(shares):
            if share > 0.06:
                axis.text(left[y] + share / 2, y, f"{share:.0%}", ha="center", va="center", fontsize=7, color="#222222")
        left += shares
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    tidy(axis, "")
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    picture.legend(loc="outside upper center", ncols=len(ROLES), frameon=False, fontsize=8)
    return picture


def gains(analysis: Analysis) -> Figure:
    """Gains by length and by popularity, with their intervals."""
    picture = Figure(figsize=(9.5, 2.8), layout="constrained")
    left, right = picture.subplots(1, 2, sharex=True)
    for axis, title, buckets in (
        (left, "events before the target", analysis.by_length),
        (right, "training events of the target's item", analysis.by_popularity),
    ):
        for y, bucket in enumerate(buckets):
            color = GOOD if bucket.low > 0 else BAD if bucket.high < 0 else "#777777"
            axis.plot([bucket.low, bucket.high], [y, y], color=color, linewidth=2)
            axis.plot([bucket.gain], [y], "o", color=color, markersize=5)
        axis.set_yticks(range(len(buckets)), [f"{bucket.name} ({bucket.targets:,})" for bucket in buckets])
        axis.set_ylim(len(buckets) - 0.5, -0.5)
        axis.axvline(0, color=INK, linewidth=0.8)
        tidy(axis, title)
    picture.supxlabel(f"difference in {WATCHED}", fontsize=9, color=INK)
    return picture


def tidy(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=9, color=INK, loc="left", parse_math=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, color=FAINT, labelcolor=INK)


def encoded(picture: Figure) -> str:
    """A PNG file in base64, for an address that begins with data:."""
    file = io.BytesIO()
    picture.savefig(file, format="png", dpi=140, metadata={"Software": None})
    return base64.b64encode(file.getvalue()).decode()
