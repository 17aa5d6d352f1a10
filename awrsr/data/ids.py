"""What an id is, in files, tables and Python alike: a whole number, however it is written (17, "17", 17.0), or else text.

Blanks around an id are no part of it. Everything that is not plainly a whole number is compared as text: 007, +7, 1.5. Ids of a
role are held as int64 if all of them are whole numbers that fit, as float64 if all came as floats, and otherwise as Python's own
strings in an array of objects, so that memory follows the sum of their lengths.

T values, U distinct ids.
"""

import re
import sys
import warnings
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Any

import numpy as np
import polars as pl

from ..processes import forked

WHOLE = "0|-?[1-9][0-9]*"
WHOLE_WITH_POINT = rf"({WHOLE})\.0*"  # tables with gaps write 7 as 7.0
ROUNDED = r"-?[0-9](\.[0-9]+)?[eE]\+[0-9]{2,3}"  # how spreadsheets and pandas write a long number
MISSING = r"nan|NaN|NaT|null|NULL|None|NA|N/A|#N/A|<NA>|\\N"  # how programs write that there is none
MISSING_NUMBER = f"(?i:{MISSING})"  # among whole numbers in any case: none of them can be an id there
MISSING_IDS = ("refuse", "drop", "keep")
WAY_OUT = "--missing-ids drop leaves such events out (in Python missing_ids='drop')"
ROUNDED_RULE = "a number whose last digits are lost, so that different ids look alike; write ids in full, or as text"
Subject = Callable[[int], str]  # what a message begins with: row -> "ratings.csv:17: item"


class DataError(ValueError):
    """Histories that cannot be read; the message names the file and line, or the value, and what is wrong."""


class DataWarning(UserWarning):
    """Something about the data that does not stop a call and yet should be known, such as events that are left out."""


def warn(message: str) -> None:
    """Warn the caller of this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).split(".")[0] == __name__.split(".")[0]:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, DataWarning, stacklevel=level)


def number_ids(values: pl.Series, subject: Subject, missing: str = "refuse") -> tuple[np.ndarray, np.ndarray]:
    """(U,) distinct ids in the order of their first appearance, and the (T,) index of each value's id among them.

    missing: what to do with a missing value, or text that stands for one: "refuse" it; "drop" it, which gives it the index -1; or
    "keep" such text as an id.
    """
    if values.dtype.is_float() and np.isnan(numbers := values.to_numpy()).any():
        values = pl.Series(numbers, nan_to_null=True)
    kind = values.dtype
    if kind.is_nested() or kind.is_temporal() or kind in (pl.Binary, pl.Object, pl.Boolean):
        raise DataError(f"{subject(0)} is of type {kind}; must be one number or text per row")
    exact = _whole_numbers(values, subject)
    if exact is not None:
        return number(exact)
    if kind == pl.Float64 and not values.null_count():
        return number(values)
    unique, index = _places(values if kind == pl.String else values.cast(pl.String))
    text = tidy(unique)
    whole, absent = matches(text, WHOLE), matches(text, "") | text.is_null().to_numpy()
    stands = matches(text, MISSING_NUMBER)
    among_numbers = whole.any() and (whole | absent | stands).all()
    if not among_numbers:
        stands = matches(text, MISSING)

    def refuse(marks: np.ndarray, problem: str) -> None:
        """Raise DataError for the first row whose id is marked; {} in the problem stands for it."""
        if marks.any():
            row = int(marks[index].argmax())
            raise DataError(f"{subject(row)} is {problem.format(shown(unique[int(index[row])]))}")

    refuse(matches(text, ROUNDED), f"{{}}, {ROUNDED_RULE}")
    if missing == "refuse":
        refuse(absent, f"missing; {WAY_OUT}")
        meaning = " among whole numbers" if among_numbers else ", which programs write for a missing value"
        refuse(stands, f"{{}}{meaning}; must be an id; {WAY_OUT}, and keep takes the text as an id")
    elif missing == "keep":
        refuse(absent, "missing")
    else:
        kept = ~(absent | stands)
        index = np.where(kept, np.cumsum(kept) - 1, -1)[index]
        text, whole = text.filter(pl.Series(kept)), whole[kept]
    exact = text.cast(pl.Int64, strict=False) if whole.all() else None
    ids = text if exact is None or exact.null_count() else exact
    if text.equals(unique):
        return as_array(ids), index
    distinct, again = number(ids)  # some may have become equal
    return distinct, np.append(again, -1)[index]


def _whole_numbers(values: pl.Series, subject: Subject) -> pl.Series | None:
    """All values as int64, or None if one of them is something else."""
    if values.dtype == pl.String:
        if values.null_count() or not matches(values.head(1000), WHOLE).all() or not matches(values, WHOLE).all():
            return None
    elif values.dtype.is_float():
        _refuse_rounded(values, subject)
        if not (values == values.round(0)).all():
            return None
    elif not values.dtype.is_integer():
        return None
    exact = values.cast(pl.Int64, strict=False)
    return None if exact.null_count() else exact


def _refuse_rounded(values: pl.Series, subject: Subject) -> None:
    """Raise DataError for numbers so large that a float cannot tell neighbours apart."""
    most = 2**24 if values.dtype == pl.Float32 else 2**53
    large = values.abs() > most
    if large.any():
        row = first(large)
        problem = "not finite" if np.isinf(values[row]) else f"a float beyond {most}, where different ids look alike"
        raise DataError(f"{subject(row)} is {values[row]!r}, {problem}; must be a whole number or text")


def matches(text: pl.Series, pattern: str) -> np.ndarray:
    """(T,) whether each value is of the pattern as a whole; null never is."""
    if forked():
        return np.array([each is not None and re.fullmatch(pattern, each) is not None for each in text.to_list()], dtype=bool)
    return text.str.contains(f"^(?:{pattern})$").fill_null(False).to_numpy()


def tidy(text: pl.Series) -> pl.Series:
    """Ids as text in the form that they are compared in: without blanks around them, and 7 for 7.0."""
    if forked():
        return pl.Series([None if each is None else tidy_text(each) for each in text.to_list()], dtype=pl.String)
    text = text.str.strip_chars(" \t")
    pointed = matches(text, WHOLE_WITH_POINT)
    return text.zip_with(pl.Series(~pointed), text.str.replace(r"\.0*$", "")) if pointed.any() else text


def tidy_text(text: str) -> str:
    """The same for a single text."""
    text = text.strip(" \t")
    return text.partition(".")[0] if re.fullmatch(WHOLE_WITH_POINT, text) else text


def id_text(value: Any) -> str:
    """The same for a single Python value."""
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real) and float(value).is_integer():
        return str(int(float(value)))
    return tidy_text(pl.Series([value]).cast(pl.String)[0] if type(value) is float else str(value))


def id_series(role: str, values: list[Any], missing: str = "refuse") -> pl.Series:
    """Ids of any types as a column: numbers if all of them are, otherwise text. missing: "drop" turns missing values into nulls.

    Raises:
        TypeError: a value is neither a number nor text. ValueError: a value is missing (None, NaN, pandas' NA).
    """
    kinds = set(map(type, values))
    if kinds <= {str}:
        return pl.Series(values, dtype=pl.String)
    for kind in kinds:
        if kind in (bool, np.bool_) or issubclass(kind, Collection) and not issubclass(kind, str) or not _says_what_it_is(kind):
            raise TypeError(f"{role} id is {next(x for x in values if type(x) is kind)!r}, must be a number or text")
    if any(not issubclass(kind, str | Integral) for kind in kinds) and any(absent := list(map(is_missing, values))):
        if missing != "drop":
            raise DataError(f"{role} id is {values[absent.index(True)]!r}, must be a number or text")
        there = iter(id_series(role, [value for value, gone in zip(values, absent, strict=True) if not gone]).cast(pl.String))
        return pl.Series([None if gone else next(there) for gone in absent], dtype=pl.String)
    if all(issubclass(kind, Integral) for kind in kinds):
        try:
            return pl.Series(np.array(values if kinds <= {int} else [int(x) for x in values], dtype=np.int64))
        except OverflowError:  # beyond int64; numpy would use floats, which cannot tell neighbours apart
            return pl.Series([str(int(x)) for x in values], dtype=pl.String)
    if all(issubclass(kind, float) for kind in kinds):
        return pl.Series(np.array(values, dtype=np.float64))
    for value in values:
        if isinstance(value, float | np.floating):
            _refuse_rounded(pl.Series([float(value)]), lambda _: f"{role} id")
    return pl.Series([value if type(value) is str else id_text(value) for value in values], dtype=pl.String)


def _says_what_it_is(kind: type) -> bool:
    """Whether text of a value is more than the name of its type and its place in memory."""
    return kind.__str__ is not object.__str__ or kind.__repr__ is not object.__repr__


def is_missing(value: Any) -> bool:
    """None, NaN, NaT or pandas' NA."""
    try:
        return value is None or bool(value != value)
    except TypeError:  # of NA, nothing is true
        return True


def number(values: np.ndarray | pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values in the order of their first appearance, and the index of each entry among them."""
    column = pl.Series("id", values)
    if column.dtype == pl.Int64:
        unique = column.unique(maintain_order=True)
        distinct = unique.to_numpy()
        if len(column):
            low, span = int(distinct.min()), int(distinct.max()) - int(distinct.min()) + 1
            if span < 2 * len(column) + 1000:  # a table is several times as fast as a join
                table = np.empty(span, dtype=np.int64)
                table[distinct - low] = np.arange(len(distinct))
                return distinct, table[column.to_numpy() - low]
    unique, index = _places(column)
    return as_array(unique), index


def _places(column: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """Distinct values in the order of their first appearance, and the index of each entry among them; null equals null."""
    column = column.alias("id")
    unique = column.unique(maintain_order=True)
    if forked():
        place = {key: i for i, key in enumerate(unique.to_list())}
        return unique, np.array([place[key] for key in column.to_list()], dtype=np.int64)
    places = pl.DataFrame(unique).with_row_index()
    index = pl.DataFrame(column).join(places, on="id", how="left", maintain_order="left", nulls_equal=True)["index"]
    return unique, index.to_numpy().astype(np.int64)


def as_array(ids: pl.Series) -> np.ndarray:
    """Ids as an array: int64, or strings as objects."""
    return ids.to_numpy()


def as_column(ids: np.ndarray) -> pl.Series:
    """Ids as a column of a table."""
    return pl.Series(ids) if ids.dtype.kind in "if" else pl.Series(list(map(str, ids.tolist())), dtype=pl.String)


def as_texts(ids: np.ndarray) -> list[str]:
    """Ids in the form that they are compared in."""
    return tidy(as_column(ids).cast(pl.String)).to_list()


class Index:
    """Finds ids among those of a catalogue, by what they look like: the number 7 and the text "7" are the same id.

    Args:
        ids: (N,) ids of the catalogue.
    """

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids
        if ids.dtype.kind == "i":
            self._order = np.argsort(ids, kind="stable")
            self._sorted = ids[self._order]
        else:
            texts = as_texts(ids)
            self._places = dict(zip(reversed(texts), range(len(texts) - 1, -1, -1), strict=True))  # of equal ones the first

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The place of each of these ids, -1 for an id that is not there."""
        if self.ids.dtype.kind != "i":
            texts = map(str, ids.tolist()) if ids.dtype.kind == "i" else as_texts(ids)
            return np.array([self._places.get(text, -1) for text in texts], dtype=np.int64)
        if ids.dtype.kind != "i":
            text = pl.Series(as_texts(ids), dtype=pl.String)
            number = text.cast(pl.Int64, strict=False)
            is_number = matches(text, WHOLE) & ~number.is_null().to_numpy()
            places = np.full(len(ids), -1, dtype=np.int64)
            places[is_number] = self.find(number.filter(pl.Series(is_number)).to_numpy())
            return places
        if not len(self._sorted):
            return np.full(len(ids), -1, dtype=np.int64)
        at = np.searchsorted(self._sorted, ids).clip(max=len(self._sorted) - 1)
        return np.where(self._sorted[at] == ids, self._order[at], -1)


def many(count: int, noun: str) -> str:
    """3 -> "3 events"."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def first(marks: pl.Series) -> int:
    """The place of the first True; there must be one."""
    return int(np.array(marks.to_list() if marks.null_count() else marks, dtype=bool).argmax())


def shown(value: object) -> str:
    """A value in quotes, shortened if it is long."""
    return repr(value if not isinstance(value, str) or len(value) <= 40 else value[:40] + "...")
