"""Two result files of attn_bench.py or train_bench.py, row by row: what became slower or faster, what only one of them has."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from .report import Row, unsteady

Key = tuple[Any, ...]

REQUIRED = ("provider", "backbone", "refinement", "layout", "B", "H", "L", "D", "R", "dtype", "pass")
OPTIONAL = ("H_kv", "D_v", "dropout_p", "source", "batch_size", "loss", "layers")
MEASURES = ("median_ms", "graph_ms", "peak_mib")  # the first must be there, the others are compared where both files have them


class Change(NamedTuple):
    """One measure of one row: `after` over `before` is its ratio. Of an unsteady row p80 is above twice p20, in either file."""

    key: Key
    measure: str
    before: float
    after: float
    unsteady: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before


class Comparison(NamedTuple):
    """Changes worst first, and the keys of rows that only one file has."""

    regressions: list[Change]
    improvements: list[Change]
    only_before: list[Key]
    only_after: list[Key]
    compared: int


def load(path: Path) -> dict[str, Any]:
    """A results.json, checked. ValueError with the file's name and the reason if it is none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list) or not isinstance(results.get("device"), str):
        raise ValueError(f'{path}: must hold an object with "device" and "rows", as a benchmark writes it with --out')
    seen: dict[Key, int] = {}
    for number, row in enumerate(results["rows"]):
        missing = [k for k in (*REQUIRED, MEASURES[0]) if not isinstance(row, dict) or k not in row]
        if missing:
            raise ValueError(f"{path}: row {number} has no {', '.join(missing)}")
        for name in (*MEASURES, "p20_ms", "p80_ms"):
            value = row.get(name, 1.0)
            positive = isinstance(value, int | float) and math.isfinite(value) and value >= 0 and (value > 0 or name == "peak_mib")
            if not positive:
                raise ValueError(f"{path}: row {number}: {name} was {value!r}, must be a positive number")
        first = seen.setdefault(row_key(row), number)
        if first != number:
            raise ValueError(f"{path}: rows {first} and {number} are the same problem, provider and pass; they must differ")
    return results


def row_key(row: Row) -> Key:
    """What a row measured; values that are lists or objects compare by their text."""
    values = (row.get(k) for k in (*REQUIRED, *OPTIONAL))
    return tuple(x if x is None or isinstance(x, str | int | float) else str(x) for x in values)


def compare(before: dict[str, Any], after: dict[str, Any], threshold: float) -> Comparison:
    """Join rows by key. A measure more than `threshold` times as large is a regression, one that shrank by it an improvement."""
    old, new = ({row_key(r): r for r in results["rows"]} for results in (before, after))
    changes = [
        Change(key, name, float(row[name]), float(new[key][name]), name == "median_ms" and (unsteady(row) or unsteady(new[key])))
        for key, row in old.items()
        if key in new
        for name in MEASURES
        if row.get(name) and new[key].get(name)
    ]
    worse = sorted((c for c in changes if c.ratio > threshold), key=lambda c: -c.ratio)
    better = sorted((c for c in changes if c.ratio < 1 / threshold), key=lambda c: c.ratio)
    only_old, only_new = [k for k in old if k not in new], [k for k in new if k not in old]
    return Comparison(worse, better, only_old, only_new, sum(k in new for k in old))


def describe(key: Key) -> str:
    named = dict(zip((*REQUIRED, *OPTIONAL), key, strict=True))
    sizes = " ".join(f"{k} {named[k]}" for k in ("B", "H", "L", "D", "R"))
    words = [str(named[k]) for k in ("provider", "layout", "pass")] + [sizes]
    words += ["stochastic backbone"] if named["backbone"] == "stochastic" else []
    words += [str(named["dtype"]), str(named["refinement"])]
    words += [f"dropout {named['dropout_p']:g}"] if named["dropout_p"] else []
    return " ".join([*words, named["loss"] or "", named["source"] or ""]).strip()


def text(found: Comparison, threshold: float) -> str:
    """The comparison as lines to print."""
    lines = [f"{found.compared} rows compared; {len(found.regressions)} measures more than {threshold:g}x as large, "]
    lines[0] += f"{len(found.improvements)} less than 1/{threshold:g}"
    for title, changes in (("REGRESSION", found.regressions), ("improvement", found.improvements)):
        for c in changes:
            line = f"{title:<11}  {c.ratio:6.2f}x  {c.measure} {c.before:.4g} -> {c.after:.4g}  {describe(c.key)}"
            lines.append(line + ("  (unsteady)" if c.unsteady else ""))
    for name, keys in (("first", found.only_before), ("second", found.only_after)):
        lines += [f"only in the {name} file: {describe(key)}" for key in keys]
    return "\n".join(lines)


def refusal(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Why two files do not compare; None where they do."""
    if before["device"] == after["device"]:
        return None
    return f"the files are of different devices, {before['device']!r} and {after['device']!r}; --force compares them all the same"
