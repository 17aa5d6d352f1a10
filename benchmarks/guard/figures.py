"""Judges figures against those of the base, and prints both as a table."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

Figures = Mapping[str, float]
Measured = Figures | str  # or why there are none


class Kind(NamedTuple):
    """How figures are judged and printed: the share that they may lose, and whether larger is better."""

    tolerance: float
    more_is_better: bool
    format: str


QUALITY = Kind(0.03, True, ".4f")
RATIO = Kind(0.10, False, ".3f")  # of times
SECONDS = Kind(0.10, False, ".0f")
TESTS = Kind(0.03, True, ",.0f")
SIZE = Kind(0.03, False, ",.0f")


class Row(NamedTuple):
    """A line of the table; `verdict` is worse, better, same, new, or not measured."""

    name: str
    base: str
    now: str
    change: str
    verdict: str


def judge(part: str, kind: Kind, base: Measured, now: Measured) -> list[Row]:
    """A row per figure. A figure that the base has and `now` lacks is not measured; one that the base lacks is new."""
    if isinstance(now, str):
        return [Row(part, "", "", "", f"not measured: {now}")]
    if isinstance(base, str):
        return [Row(f"{part}: {name}", "", f"{x:{kind.format}}", "", f"not measured: base: {base}") for name, x in now.items()]
    rows = []
    for name in {**base, **now}:
        before, after = base.get(name), now.get(name)
        before_text, after_text = ("" if x is None else f"{x:{kind.format}}" for x in (before, after))
        rows.append(Row(f"{part}: {name}", before_text, after_text, *compare(kind, before, after)))
    return rows


def compare(kind: Kind, before: float | None, after: float | None) -> tuple[str, str]:
    """Change in per cent, and verdict."""
    if before is None or after is None:
        return "", "not measured" if after is None else "new"
    if before == after:
        return "", "same"
    growth = (after - before) / before if before else float("inf")
    change = f"{growth:+.1%}" if before else "from 0"
    if abs(growth) <= kind.tolerance:
        return change, "same"
    return change, "better" if (growth > 0) == kind.more_is_better else "worse"


def table(rows: Iterable[Row]) -> str:
    """The rows under a head, columns aligned."""
    lines = [Row("figure", "base", "now", "change", "verdict"), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"{a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}" for a, b, c, d, e in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def conclusion(rows: Iterable[Row]) -> tuple[str, int]:
    """A sentence, and the exit status: 1 if something is worse, otherwise 2 if something was not measured, otherwise 0."""
    verdicts = [row.verdict for row in rows]
    worse, unknown = verdicts.count("worse"), sum(verdict.startswith("not measured") for verdict in verdicts)
    judged = f"{worse} worse. Give the reason for a worse figure in the commit message." if worse else "Nothing measured is worse."
    gap = f" {unknown} not measured, and so possibly worse." if unknown else ""
    return judged + gap, 1 if worse else 2 if unknown else 0
