"""Turns columns of a file into histories: finds the columns, and reads ids and times. Every error says where in the file.

T events. A `Place` says where an event is in the file: "ratings.csv:17", or "ratings.parquet: row 17".
"""

import re
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from itertools import combinations

import numpy as np
import polars as pl

from .histories import Histories

Place = Callable[[int], str]

LONGEST_ID = 1000  # characters; longer "ids" are prose, and a table of them would fill the memory
EPOCH = datetime(1970, 1, 1)
MISSING = ["nan", "null", "none", "na", "<na>"]  # how programs write a missing number
USUAL = {
    "user": "user userid uid users usr customer customerid client clientid visitor visitorid reviewerid member memberid",
    "item": "item itemid iid items movie movieid product productid asin sid song songid track trackid article articleid"
    " artist artistid business businessid venue venueid book bookid isbn page pageid",
    "time": "time timestamp ts datetime date unixtime unixreviewtime eventtime unixtimestamp utctimestamp timems createdat",
}
UNTIMED = "none"  # as the name of the column of times: there is none
# A name that is not usual for times and yet might mean one: by a word in it, or by its end
TELLING = re.compile(
    r"(?:^|[^a-z])(times?|dates?|datetimes?|timestamps?|ts|dt|dat|when|epoch|unix|utc|created|updated)(?:[^a-z]|$)"
    r"|(time|date|stamp)s?[0-9]*$|(?:^|[^a-z])(at|on)$"
)
NO_TIMES = ("candidate", "update", "lifetime", "runtime", "overtime")  # in spite of their ends


class DataError(ValueError):
    """A file of histories that cannot be read; the message names the file, the line and what is wrong."""


def first(marks: "np.ndarray | pl.Series") -> int | None:
    """The index of the first True, if there is one."""
    marks = np.asarray(marks, dtype=bool)
    return int(marks.argmax()) if marks.any() else None


def find_columns(
    source: str, header: Sequence[str], wanted: dict[str, str | None], moments: Collection[int] = ()
) -> dict[str, int]:
    """The columns of users, items and, if there is one, times: those named in `wanted`, otherwise a guess.

    Case is ignored, and guesses consider only letters and digits. If a column may be the time but has an unusual name, the caller
    must decide, because a file without times is taken to be in order of time; UNTIMED as the name says that it is. moments: columns
    that hold dates by their type.
    """
    names = [name.strip() for name in header]

    def refused(problem: str) -> DataError:
        return DataError(f"{source}: {problem}; columns: {', '.join(map(repr, names))}")

    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise refused(f"column {twice[0]!r} occurs more than once")
    chosen: dict[str, int] = {}
    for role, name in wanted.items():
        if role == "time" and name == UNTIMED and UNTIMED not in map(str.casefold, names):
            continue
        if name is not None:
            exact = [i for i, other in enumerate(names) if other == name]
            matches = exact or [i for i, other in enumerate(names) if other.casefold() == name.casefold()]
            problem = f"has more than one column {name!r} if case is ignored" if matches else f"has no column {name!r}"
        else:
            matches = guesses(role, names)
            problem = "has more than one column that may be" if matches else "has no column whose name suggests"
            problem = f"{problem} the {role}; name it with --{role}-column NAME (in Python {role}=NAME)"
        if len(matches) > 1 or (not matches and (name is not None or role != "time")):
            raise refused(problem)
        if matches:
            chosen[role] = matches[0]
        elif maybe := [name for i, name in enumerate(names) if i not in chosen.values() and (i in moments or _may_be_time(name))]:
            untimed = f"--time-column {UNTIMED} if the lines are in order of time (in Python time=NAME)"
            raise refused(f"column {maybe[0]!r} may be the time; use --time-column {maybe[0]!r} if it is, or {untimed}")
    for (role, column), (other, its_column) in combinations(chosen.items(), 2):
        if column == its_column:
            raise refused(f"column {names[column]!r} is both {role} and {other}")
    return chosen


def guesses(role: str, names: Sequence[str]) -> list[int]:
    """Columns with a usual name of the user, item or time."""
    usual = USUAL[role].split()
    return [i for i, name in enumerate(names) if re.sub(r"[\W_]", "", name.casefold()) in usual]


def _may_be_time(name: str) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()  # a capital inside a name begins a word
    return TELLING.search(words) is not None and not words.endswith(NO_TIMES)


def to_histories(columns: dict[str, pl.Series], place: Place) -> Histories:
    """From one value per event in columns "user", "item" and, where there are times, "time"."""
    users, items = (to_ids(columns[role], role, place) for role in ("user", "item"))
    return Histories.from_events(users, items, to_times(columns["time"], place) if "time" in columns else None)


def to_ids(values: pl.Series, role: str, place: Place) -> pl.Series:
    """(T,) int64 if all ids are whole numbers that fit int64, in the form that int64 prints; otherwise text."""
    if values.dtype.is_nested() or values.dtype in (pl.Binary, pl.Object):
        raise DataError(f"{place(0)}: {role} is of type {values.dtype}; must be one number or text per row")
    if values.dtype.is_float():
        values = values.fill_nan(None)
    if values.dtype.is_float() or values.dtype.is_integer():
        exact = values.cast(pl.Int64, strict=False)
        if exact.null_count() == values.null_count() and (exact.cast(values.dtype) == values).all():
            _refuse_missing(values, role, place)
            return exact  # tables with gaps write 7 as 7.0
    text = values.cast(pl.String).str.strip_chars(" \t")
    _refuse_missing(text, role, place)
    whole = text.str.contains(r"^(0|-?[1-9][0-9]*)$")
    if whole.all():
        exact = text.cast(pl.Int64, strict=False)
        if not exact.null_count():
            return exact
    elif whole.any() and text.filter(~whole).str.to_lowercase().is_in(MISSING).all() and (row := first(~whole)) is not None:
        raise DataError(f"{place(row)}: {role} is {text[row]!r} among whole numbers; must be an id")
    if (row := first(text.str.len_chars() > LONGEST_ID)) is not None:
        length = f"has {len(text[row])} characters; must have at most {LONGEST_ID}"
        raise DataError(f"{place(row)}: {role} {shown(text[row])} {length}")
    return text


def to_times(values: pl.Series, place: Place) -> np.ndarray:
    """(T,) int64 if all are whole numbers, float64 otherwise; dates become seconds since 1970, in UTC if they name no zone."""
    if values.dtype in (pl.Date, pl.Datetime):
        _refuse_missing(values, "time", place)
        return values.dt.epoch("us").to_numpy() / 1e6
    if values.dtype == pl.String:
        values = values.str.strip_chars(" \t")
    elif not values.dtype.is_numeric():
        raise DataError(f"{place(0)}: time is of type {values.dtype}; must be numbers, dates or ISO 8601 text")
    _refuse_missing(values, "time", place)
    exact = values.cast(pl.Int64, strict=False) if values.dtype == pl.String or values.dtype.is_integer() else None
    if exact is not None and not exact.null_count():
        return exact.to_numpy()
    numbers = values.cast(pl.Float64, strict=False)
    if numbers[0] is None:
        return _iso_seconds(values, place)
    if (row := first(~numbers.is_finite().fill_null(False))) is not None:
        raise DataError(f"{place(row)}: time is {shown(values[row])}; must be a finite number, as the first one is")
    return numbers.to_numpy()


def _iso_seconds(text: pl.Series, place: Place) -> np.ndarray:
    """Seconds since 1970 of ISO 8601 dates: common formats together, others one by one."""
    tidy = text.str.replace(r"^([0-9-]{10}) ", "${1}T").str.replace(r"Z$", "+00:00")
    zoned = tidy.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", time_unit="us", strict=False).dt.replace_time_zone(None)
    plain = tidy.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False)
    day = tidy.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
    parsed = zoned.zip_with(zoned.is_not_null(), plain.zip_with(plain.is_not_null(), day))
    seconds = parsed.fill_null(EPOCH).dt.epoch("us").to_numpy() / 1e6
    for row in np.flatnonzero(parsed.is_null().to_numpy()).tolist():
        try:
            moment = datetime.fromisoformat(tidy[row])
        except ValueError:
            rule = "must be a number or an ISO 8601 date such as 2024-05-31T12:00:00"
            untimed = f"if the lines are in order of time, --time-column {UNTIMED} ignores the column"
            raise DataError(f"{place(row)}: time is {shown(text[row])}; {rule}; {untimed}") from None
        seconds[row] = moment.timestamp() if moment.tzinfo else (moment - EPOCH).total_seconds()
    return seconds


def _refuse_missing(values: pl.Series, role: str, place: Place) -> None:
    missing = values.is_null() if values.dtype != pl.String else values.is_null() | (values == "")
    if (row := first(missing.fill_null(True))) is not None:
        raise DataError(f"{place(row)}: {role} is missing")


def shown(value: object) -> str:
    """A value in quotes, shortened if it is long."""
    return repr(value if not isinstance(value, str) or len(value) <= 40 else value[:40] + "...")
