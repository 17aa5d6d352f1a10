"""JSON lines: one object per event, as Amazon's and Yelp's reviews come.

T events.
"""

import json
from typing import Any

import numpy as np
import polars as pl

from ._columns import USUAL, find_columns, guesses
from ._text import Text
from .ids import DataError, id_series, shown

FIRST = 100  # objects whose keys are looked at; later ones may lack some of them


def read_json_lines(text: Text, wanted: dict[str, str | None]) -> tuple[dict[str, pl.Series], np.ndarray]:
    """The columns of users, items and, if there are any, times; and the (T,) lines, from 1, that they come from."""
    names: dict[str, None] = {}
    untimed = wanted["time"] is None
    columns: dict[str, str] = {}
    values: dict[str, list[Any]] = {}
    lines: list[int] = []
    ahead = []
    for number, line in enumerate(text.data.decode().split("\n"), 1):
        if line.strip():
            ahead.append((number, _object(text, number, line)))
        if len(ahead) == FIRST and not columns:
            columns = _columns(text, names, ahead, wanted)
        if columns and ahead:
            _take(ahead, names if untimed and "time" not in columns else None, columns, values, lines, text)
    if not columns:
        columns = _columns(text, names, ahead, wanted)
    _take(ahead, names if untimed and "time" not in columns else None, columns, values, lines, text)
    found = {role: id_series(role, values[role], "drop") for role in ("user", "item")}
    for role in columns.keys() - found.keys():
        found[role] = _times(values[role])
    return found, np.array(lines)


def _columns(text: Text, names: dict[str, None], objects: list[Any], wanted: dict[str, str | None]) -> dict[str, str]:
    """Role -> key."""
    for _, each in objects:
        names.update(dict.fromkeys(each))
    header = list(names)
    return {role: header[place] for role, place in find_columns(text.source, header, wanted).items()}


def _take(
    objects: list[Any],
    names: dict[str, None] | None,
    columns: dict[str, str],
    values: dict[str, list[Any]],
    lines: list[int],
    text: Text,
) -> None:
    """Move the values of objects into lists of columns. names: the keys so far, if a later one may be the time."""
    for number, each in objects:
        if names is not None and not names.keys() >= each.keys():
            late = [key for key in each if key not in names]
            names.update(dict.fromkeys(late))
            if places := guesses("time", late):
                problem = f"has {late[places[0]]!r}, which may be the time and which the lines before lack"
                raise DataError(f"{text.source}:{number}: {problem}; --time-column says which it is, or none")
        lines.append(number)
        for role, key in columns.items():
            value = each.get(key)
            if type(value) not in (str, int, float) and value is not None and not (type(value) is bool and role not in USUAL):
                raise DataError(f"{text.source}:{number}: {role} is {shown(json.dumps(value))}; must be one number or text")
            values.setdefault(role, []).append(value)
    objects.clear()


def _object(text: Text, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{text.source}:{number}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{text.source}:{number}: is {shown(line)}; must be an object, one per event")
    return value


def _times(values: list[Any]) -> pl.Series:
    """Values as numbers if all are, otherwise as text, which may be dates."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pl.Series(values, dtype=pl.Boolean)
    if kinds <= {int} and all(value is None or abs(value) < 2**63 for value in values):
        return pl.Series(values, dtype=pl.Int64)
    if kinds <= {int, float}:
        return pl.Series([None if value is None else float(value) for value in values], dtype=pl.Float64)
    return pl.Series([None if value is None else str(value) for value in values], dtype=pl.String)
