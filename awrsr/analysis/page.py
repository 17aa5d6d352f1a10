"""Writes an analysis as one HTML page that needs no other file: words computed from the numbers, and embedded pictures."""

import base64
import html
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import WATCHED
from .analyse import ROLES, Analysis, Example, Head

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P_COLOR, M_COLOR, INK, FAINT, GOOD, BAD = "#8aa1b1", "#0b7a75", "#333333", "#cccccc", "#1b7f5c", "#d1495b"
ROLE_COLORS = ("#d9d9d9", "#e8a33d", "#0b7a75", "#6c8ebf", "#f1f1f1")
MOST_BACK = 30  # distances on a picture

STYLE = """
body{font:16px/1.55 system-ui,sans-serif;color:#222;background:#fff;max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{margin-top:2.4rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
figure{margin:1.2rem 0;background:#fff;border-radius:6px;padding:.4rem}img{max-width:100%;height:auto}
figcaption,.small{color:#666;font-size:.9rem}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left}.event{text-align:center;white-space:nowrap;max-width:9rem;overflow:hidden;
text-overflow:ellipsis}.good{color:#1b7f5c}.bad{color:#d1495b}.summary{font-size:1.08rem}
.weight td{border:1px solid #fff}.hit{font-weight:700;text-decoration:underline}dt{font-weight:600}dd{margin:0 0 .5rem 1rem}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181a1b}figure{background:#fff}figcaption{color:#555}
td,th{border-color:#333}h2{border-color:#444}.weight td{color:#222}.small{color:#aaa}}
"""

TERMS = {
    "P": "first-order weights: what attention computes from queries and keys.",
    "M": "refined weights, which multiply the values; divided by their sum here so that they can be compared with P.",
    "span": "how many events a row attends to: the exponential of its entropy. 1 is a single event, n is n events alike.",
    "moved": "the share of weight that M puts elsewhere than P, their total variation distance: 0 is the same row, 1 is weight on "
    "entirely different events.",
    "two hops": "paths i → k → j: what is attended to by the events that i attends to, P times P. Of the weight that moved, the "
    "share that went to events with more of P P than of P; “by chance” is that share if spread evenly over all visible events.",
    "what followed": "events right after those that P attends to: the same for events whose predecessor has more of P than they.",
}


def page(analysis: Analysis, title: str) -> str:
    """The report."""
    heading = html.escape(title)
    parts = [f"<h1>{heading}</h1><p class=small>{html.escape(about(analysis))}</p>"]
    parts += [f"<p class=summary>{html.escape(' '.join(summary(analysis)))}</p><h2>Where the last event looks</h2>"]
    parts += [figure(distances(analysis), DISTANCES), figure(role_bars(analysis), ROLES_TEXT)]
    parts += [heads_table(analysis.heads, refined=analysis.refinement != "none")]
    if analysis.targets:
        parts += ["<h2>Which predictions change</h2>", figure(gains(analysis), GAINS), bucket_table(analysis)]
        for name, examples, sign in (("helped", analysis.helped, "good"), ("hurt", analysis.hurt, "bad")):
            shown = "".join(example(each, sign, analysis.other) for each in examples)
            parts += [f"<h2>Histories that it {name} most</h2>", shown or "<p>None.</p>"]
    parts += ["<h2>Terms</h2><dl>", *(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in TERMS.items()), "</dl>"]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{heading}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def about(analysis: Analysis) -> str:
    layers = analysis.heads[-1].layer
    heads = len(analysis.heads) // layers
    return (
        f"Backbone {analysis.backbone}, refinement {analysis.refinement}, {layers} layer{'s' * (layers > 1)} of "
        f"{heads} head{'s' * (heads > 1)}; attention of the event that predicts, in {analysis.histories:,} histories before "
        f"{analysis.part} targets. In {analysis.repeats:.0%} of them the item of that event had occurred before."
    )


def summary(analysis: Analysis) -> list[str]:
    """What stands out, in sentences."""
    heads = analysis.heads
    if analysis.refinement == "none":
        spans = [head.span for head in heads]
        return [
            "This model has no refinement: M is P, and one row serves both.",
            f"Its heads attend to {min(spans):.1f} to {max(spans):.1f} events.",
        ]
    most = max(heads, key=lambda head: head.moved)
    by_change = sorted(range(len(ROLES)), key=lambda i: most.roles_m[i] - most.roles[i])
    gained, lost = by_change[-1], by_change[0]
    sentences = [
        f"Refinement moves between {min(head.moved for head in heads):.0%} and {most.moved:.0%} of a head's weight.",
        f"It changes most in head {most.head} of layer {most.layer}: there {ROLES[gained]} get{'s' * (gained in (0, 3))} "
        f"{most.roles_m[gained]:.0%} of the weight rather than {most.roles[gained]:.0%}, {ROLES[lost]} {most.roles_m[lost]:.0%} "
        f"rather than {most.roles[lost]:.0%}, and the row spans {most.span_m:.1f} events rather than {most.span:.1f}.",
        f"Of what moved there, {most.two_hops:.0%} went where two hops lead (by chance {most.two_hops_chance:.0%}) and "
        f"{most.followed:.0%} to what followed the events that P looks at (by chance {most.followed_chance:.0%}).",
    ]
    if analysis.targets:
        equal = analysis.targets - analysis.better - analysis.worse
        sentences += [
            f"Compared with {analysis.other}, {analysis.better:,} of {analysis.targets:,} targets rank higher, {analysis.worse:,} "
            f"lower and {equal:,} the same: {WATCHED} is {analysis.value:.4f} rather than {analysis.other_value:.4f}."
        ]
    return sentences


# Pictures

DISTANCES = (
    "Mean weight of the event that is so many steps before the last one (0 is the last event itself), over histories that reach so "
    "far. Where the two lines part, refinement looks elsewhere."
)
ROLES_TEXT = "Where the weight goes: what each event is to the one that predicts. The first description that fits counts."
GAINS = (
    f"Difference in {WATCHED} by the length of the history and by how often the target was trained on, with 95 % intervals over "
    "targets. Right of the line, refinement is ahead."
)


def distances(analysis: Analysis) -> "Figure":
    """A panel per head, a row of them per layer."""
    from matplotlib.figure import Figure

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


def role_bars(analysis: Analysis) -> "Figure":
    """A bar for P and one for M of each head."""
    from matplotlib.figure import Figure

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


def gains(analysis: Analysis) -> "Figure":
    """Gains by length and by popularity, with their intervals."""
    from matplotlib.figure import Figure

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


def tidy(axis: "Axes", title: str) -> None:
    axis.set_title(title, fontsize=9, color=INK, loc="left", parse_math=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, color=FAINT, labelcolor=INK)


def figure(picture: "Figure", caption: str) -> str:
    file = io.BytesIO()
    picture.savefig(file, format="png", dpi=140, metadata={"Software": None})
    image = f"<img alt='{html.escape(caption)}' src='data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'>"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


# Tables


def heads_table(heads: list[Head], refined: bool) -> str:
    """A row per head; without refinement, only what P has."""
    if not refined:
        rows = [[f"layer {h.layer}, head {h.head}", f"{h.span:.2f}", f"{h.back:.2f}"] for h in heads]
        return table(["head", "span", "events back"], rows)
    titles = ["head", "gate", "span P", "span M", "back P", "back M", "moved"]
    titles += ["by two hops", "by chance", "to what followed", "by chance"]
    rows = []
    for h in heads:
        numbers = [f"{x:.2f}" for x in (h.span, h.span_m, h.back, h.back_m)]
        shares = [f"{x:.0%}" for x in (h.moved, h.two_hops, h.two_hops_chance, h.followed, h.followed_chance)]
        rows.append([f"layer {h.layer}, head {h.head}", "" if h.gate is None else f"{h.gate:.2f}", *numbers, *shares])
    return table(titles, rows)


def bucket_table(analysis: Analysis) -> str:
    named = [(f"events before: {b.name}", b) for b in analysis.by_length]
    named += [(f"target trained on: {b.name}", b) for b in analysis.by_popularity]
    rows = [[name, f"{b.targets:,}", f"{b.gain:+.4f}", f"{b.low:+.4f} .. {b.high:+.4f}"] for name, b in named]
    return table(["", "targets", f"difference in {WATCHED}", "95 % interval"], rows)


def table(titles: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    return f"<div class=scroll><table>{line(titles, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"


def example(each: Example, sign: str, other: str) -> str:
    """One history as a strip of events, coloured by weight, and what either model recommends."""

    def strip(name: str, weights: list[float], color: str) -> str:
        most = max(weights) or 1.0
        cells = (f"<td style='background:{color}{round(255 * w / most):02x}'>{w:.2f}</td>" for w in weights)
        return f"<tr class=weight><th>{name}</th>{''.join(cells)}</tr>"

    def top(name: str, items: list[Any], rank: int) -> str:
        names = (f"<span class=hit>{text(item)}</span>" if item == each.target else text(item) for item in items)
        return f"<tr><td>{text(name)}</td><td>{rank:,}</td><td style='text-align:left'>{', '.join(names)}</td></tr>"

    events = "".join(f"<td class=event title='{text(item)}'>{text(item)}</td>" for item in each.history)
    return (
        f"<p>User {text(each.user)}; next came <b>{text(each.target)}</b>, rank <b class={sign}>{each.rank:,}</b> rather than "
        f"{each.other_rank:,}.</p><div class=scroll><table><tr><th>events</th>{events}</tr>"
        f"{strip('P', each.p, P_COLOR)}{strip('M', each.m, M_COLOR)}</table></div>"
        f"<div class=scroll><table><tr><th></th><th>rank</th><th style='text-align:left'>recommended</th></tr>"
        f"{top('this model', each.top, each.rank)}{top(other, each.other_top, each.other_rank)}</table></div>"
    )


def text(value: Any) -> str:
    return html.escape(str(value))
