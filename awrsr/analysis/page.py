"""The analysis as one HTML page that needs nothing else: words computed from the numbers, pictures inside."""

import base64
import html
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import WATCHED
from .analyse import ROLES, Analysis, Bucket, Example, Head

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
    "M": "refined weights, which meet the values; divided by their sum here, so that they compare with P.",
    "span": "how many events a row attends to: the exponential of its entropy. 1 is a single event, n is n events alike.",
    "moved": "the share of weight that M puts elsewhere than P, their total variation distance: 0 is no change, 1 another row.",
    "two hops": "paths i → k → j: where the events that i attends to attend themselves, P times P. Of the weight that moved, the "
    "share that went to events with more of P P than of P; “by chance” is that share had it been spread over all events in sight.",
    "what followed": "events right after those that P attends to: the same for events whose predecessor has more of P than they.",
}


def page(found: Analysis, title: str) -> str:
    """The report."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p class=small>{html.escape(about(found))}</p>"]
    parts += ["<p class=summary>" + " ".join(html.escape(line) for line in summary(found)) + "</p>"]
    parts += ["<h2>Where the last event looks</h2>", figure(distances(found), DISTANCES), figure(role_bars(found), ROLES_TEXT)]
    parts += [heads_table(found)]
    if found.targets:
        parts += [f"<h2>Which predictions change</h2><p>{html.escape(totals(found))}</p>"]
        parts += [figure(gains(found), GAINS), bucket_table(found)]
        for name, which, sign in (("helped", found.helped, "good"), ("hurt", found.hurt, "bad")):
            parts += [f"<h2>Histories that it {name} most</h2>", *(example(each, sign, found.other) for each in which)]
            parts += [] if which else ["<p>None.</p>"]
    parts += ["<h2>Terms</h2><dl>", *(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in TERMS.items()), "</dl>"]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def about(found: Analysis) -> str:
    layers = max(head.layer for head in found.heads)
    return (
        f"Backbone {found.backbone}, refinement {found.refinement}, {layers} layer{'s' * (layers > 1)} of "
        f"{len(found.heads) // layers} head{'s' * (len(found.heads) > layers)}; attention of the event that predicts, in "
        f"{found.histories:,} histories before {found.part} targets, in {found.repeats:.0%} of which its item had occurred before."
    )


def summary(found: Analysis) -> list[str]:
    """What stands out, in words."""
    if found.refinement == "none":
        widest = max(found.heads, key=lambda head: head.span)
        return [
            "This model has no refinement: M is P, and one row serves both.",
            f"Its heads attend to {min(head.span for head in found.heads):.1f} to {widest.span:.1f} events.",
        ]
    most = max(found.heads, key=lambda head: head.moved)
    change = sorted(range(len(ROLES)), key=lambda i: most.roles_m[i] - most.roles[i])
    gained, lost = change[-1], change[0]
    lines = [
        f"Refinement moves between {min(head.moved for head in found.heads):.0%} and {most.moved:.0%} of a head's weight.",
        f"It changes most in head {most.head} of layer {most.layer}: there {ROLES[gained]} get{'s' * (gained in (0, 3))} "
        f"{most.roles_m[gained]:.0%} of the weight rather than {most.roles[gained]:.0%}, {ROLES[lost]} {most.roles_m[lost]:.0%} "
        f"rather than {most.roles[lost]:.0%}, and the row spans {most.span_m:.1f} events rather than {most.span:.1f}.",
        f"Of what moved there, {most.two_hops:.0%} went where two hops lead (by chance {most.two_hops_chance:.0%}), "
        f"{most.followed:.0%} to what followed the events that P looks at (by chance {most.followed_chance:.0%}).",
    ]
    return [*lines, totals(found)] if found.targets else lines


def totals(found: Analysis) -> str:
    same = found.targets - found.better - found.worse
    return (
        f"Beside {found.other}, {found.better:,} of {found.targets:,} targets rank higher, {found.worse:,} lower, {same:,} the "
        f"same: {WATCHED} {found.value:.4f} rather than {found.other_value:.4f}."
    )


# Pictures

DISTANCES = (
    "Mean weight of the event so many steps before the last one (0 is the last event itself), over histories that reach so far. "
    "Where the two lines part, refinement looks elsewhere."
)
ROLES_TEXT = "Whose weight it is: what each event is to the one that predicts. The first description that fits counts."
GAINS = (
    f"Difference in {WATCHED} by how long the history is and by how often the target was trained on, with 95 % intervals over "
    "targets. Right of the line refinement is ahead."
)


def distances(found: Analysis) -> "Figure":
    """A panel per head, a row of them per layer."""
    from matplotlib.figure import Figure

    layers = max(head.layer for head in found.heads)
    heads = len(found.heads) // layers
    picture = Figure(figsize=(min(3.4 * heads, 11) + 0.6, 2.4 * layers + 0.5), layout="constrained")
    axes = picture.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    for head in found.heads:
        axis = axes[head.layer - 1, head.head - 1]
        axis.plot(head.distance[:MOST_BACK], color=P_COLOR, marker="o", markersize=3, label="P")
        if found.refinement != "none":
            axis.plot(head.distance_m[:MOST_BACK], color=M_COLOR, marker="o", markersize=3, label="M")
        gate = "" if head.gate is None else f", gate {head.gate:.2f}"
        tidy(axis, f"layer {head.layer}, head {head.head}{gate}")
    axes[0, 0].set_ylim(bottom=0)  # they share it
    axes[0, 0].legend(frameon=False, fontsize=8)
    picture.supxlabel("events back", fontsize=9, color=INK)
    picture.supylabel("mean weight", fontsize=9, color=INK)
    return picture


def role_bars(found: Analysis) -> "Figure":
    """A bar for P and one for M of each head."""
    from matplotlib.figure import Figure

    rows = [(f"layer {h.layer}, head {h.head}: P", h.roles) for h in found.heads]
    if found.refinement != "none":
        rows = [row for h, row in zip(found.heads, rows, strict=True) for row in (row, ("M", h.roles_m))]
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


def gains(found: Analysis) -> "Figure":
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9.5, 2.8), layout="constrained")
    titles = ("events before the target", "training events of the target's item")
    for axis, title, buckets in zip(
        picture.subplots(1, 2, sharex=True), titles, (found.by_length, found.by_popularity), strict=True
    ):
        for y, bucket in enumerate(buckets):
            color = GOOD if bucket.low > 0 else BAD if bucket.high < 0 else "#777777"
            axis.plot([bucket.low, bucket.high], [y, y], color=color, linewidth=2)
            axis.plot([bucket.gain], [y], "o", color=color, markersize=5)
        axis.set_yticks(range(len(buckets)), [f"{b.name} ({b.targets:,})" for b in buckets])
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
    held = io.BytesIO()
    picture.savefig(held, format="png", dpi=140, metadata={"Software": None})
    data = base64.b64encode(held.getvalue()).decode()
    return (
        f"<figure><img alt='{html.escape(caption)}' src='data:image/png;base64,{data}'><figcaption>{caption}</figcaption></figure>"
    )


# Tables


def heads_table(found: Analysis) -> str:
    """A row per head; without refinement only what P has."""
    refined = found.refinement != "none"
    titles = ["head", "span", "events back"]
    if refined:
        titles = [
            "head",
            "gate",
            "span P",
            "span M",
            "back P",
            "back M",
            "moved",
            "by two hops",
            "by chance",
            "to what followed",
            "by chance",
        ]

    def row(h: Head) -> list[str]:
        name = f"layer {h.layer}, head {h.head}"
        if not refined:
            return [name, f"{h.span:.2f}", f"{h.back:.2f}"]
        numbers = (h.span, h.span_m, h.back, h.back_m)
        shares = (h.moved, h.two_hops, h.two_hops_chance, h.followed, h.followed_chance)
        gate = "" if h.gate is None else f"{h.gate:.2f}"
        return [name, gate, *(f"{x:.2f}" for x in numbers), *(f"{x:.0%}" for x in shares)]

    return table(titles, [row(head) for head in found.heads])


def bucket_table(found: Analysis) -> str:
    def rows(title: str, buckets: list[Bucket]) -> list[list[str]]:
        return [[f"{title}: {b.name}", f"{b.targets:,}", f"{b.gain:+.4f}", f"{b.low:+.4f} .. {b.high:+.4f}"] for b in buckets]

    body = rows("events before", found.by_length) + rows("target trained on", found.by_popularity)
    return table(["", "targets", f"difference in {WATCHED}", "95 % interval"], body)


def table(titles: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], kind: str) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"

    return f"<div class=scroll><table>{line(titles, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"


def example(each: Example, sign: str, other: str) -> str:
    """One history as a strip of events, coloured by weight, and what either model recommends."""

    def weights(name: str, values: list[float], color: tuple[int, int, int]) -> str:
        most = max(values) or 1.0
        cells = (
            f"<td style='background:rgba({color[0]},{color[1]},{color[2]},{value / most:.2f})'>{value:.2f}</td>" for value in values
        )
        return f"<tr class=weight><th>{name}</th>{''.join(cells)}</tr>"

    def top(name: str, items: list[Any], rank: int) -> str:
        names = (f"<span class=hit>{text(item)}</span>" if item == each.target else text(item) for item in items)
        return f"<tr><td>{name}</td><td>{rank:,}</td><td style='text-align:left'>{', '.join(names)}</td></tr>"

    events = "".join(f"<td class=event title='{text(item)}'>{text(item)}</td>" for item in each.history)
    return (
        f"<p>User {text(each.user)}; next came <b>{text(each.target)}</b>, rank <b class={sign}>{each.rank:,}</b> rather than "
        f"{each.other_rank:,}.</p><div class=scroll><table><tr><th>events</th>{events}</tr>"
        f"{weights('P', each.p, (138, 161, 177))}{weights('M', each.m, (11, 122, 117))}</table></div>"
        f"<div class=scroll><table><tr><th></th><th>rank</th><th style='text-align:left'>recommended</th></tr>"
        f"{top('this model', each.top, each.rank)}{top(html.escape(other), each.other_top, each.other_rank)}</table></div>"
    )


def text(value: Any) -> str:
    return html.escape(str(value), quote=True)
