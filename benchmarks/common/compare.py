"""Compares two result files of attn_bench.py or train_bench.py, row by row: what is slower or faster, or only in one of them."""

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


def load(path: Path) -> Row:
    """The checked content of a results.json. Raises ValueError with the file's name and the reason if it is not one."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(results, dict) or not isinstance(results.get("rows"), list) or not isinstance(results.get("device"), str):
        raise ValueError(f'{path}: must hold an object with "device" and "rows", as a benchmark writes it with --out')
    keys: set[Key] = set()
    for number, row in enumerate(results["rows"]):
        missing = [k for k in (*REQUIRED, MEASURES[0]) if not isinstance(row, dict) or k not in row]
        if missing:
            raise ValueError(f"{path}: row {number} has no {', '.join(missing)}")
        for name in (name for name in (*MEASURES, "p20_ms", "p80_ms") if name in row):
            value, least = row[name], 0 if name == "peak_mib" else 5e-324
            if not isinstance(value, int | float) or not least <= value < math.inf:
                raise ValueError(f"{path}: row {number}: {name} was {value!r}, must be a positive number")
        if row_key(row) in keys:
            raise ValueError(f"{path}: row {number} is of the same problem, provider and pass as one before it; they must differ")
        keys.add(row_key(row))
    return results


def row_key(row: Row) -> Key:
    """What a row measured. Values that are lists or objects are compared as text."""
    values = (row.get(k) for k in (*REQUIRED, *OPTIONAL))
    return tuple(x if x is None or isinstance(x, str | int | float) else str(x) for x in values)


def compare(before: Row, after: Row, threshold: float) -> Comparison:
    """Join rows by key. A measure more than `threshold` times as large is a regression, one that shrank by it an improvement."""
    old, new = ({row_key(r): r for r in results["rows"]} for results in (before, after))
    changes = [
        Change(key, name, float(row[name]), float(new[key][name]), name == "median_ms" and (unsteady(row) or unsteady(new[key])))
        for key, row in old.items()
        if key in new
        for name in MEASURES
        if row.get(name) and new[key].get(name)
    ]
    changes.sort(key=lambda c: c.ratio)
    worse, better = [c for c in changes[::-1] if c.ratio > threshold], [c for c in changes if c.ratio < 1 / threshold]
    return Comparison(worse, better, [k for k in old if k not in new], [k for k in new if k not in old], sum(k in new for k in old))


def describe(key: Key) -> str:
    named = dict(zip((*REQUIRED, *OPTIONAL), key, strict=True))
    words = [named["provider"], named["layout"], named["pass"], *(f"{k} {named[k]}" for k in "BHLDR")]
    words += ["stochastic backbone"] * (named["backbone"] == "stochastic") + [named["dtype"], named["refinement"]]
    words += [f"dropout {named['dropout_p']:g}"] if named["dropout_p"] else []
    return " ".join(map(str, [*words, named["loss"] or "", named["source"] or ""])).strip()


def text(found: Comparison, threshold: float) -> str:
    """The comparison as lines to print."""
    lines = [f"{found.compared} rows compared; {len(found.regressions)} measures more than {threshold:g}x as large, "]
    lines[0] += f"{len(found.improvements)} less than 1/{threshold:g}"
    for title, changes in (("REGRESSION", found.regressions), ("improvement", found.improvements)):
        for c in changes:
            line = f"{title:<11}  {c.ratio:6.2f}x  {c.measure} {c.before:.4g} -> {c.after:.4g}  {describe(c.key)}"
            lines.append(line + "  (unsteady)" * c.unsteady)
    for name, keys in (("first", found.only_before), ("second", found.only_after)):
        lines += [f"only in the {name} file: {describe(key)}" for key in keys]
    return "\n".join(lines)
