"""From columns as a file holds them to histories: ids, times, names of columns. Every complaint says where in the file.

T events. A `Place` names the place of an event in the file: "ratings.csv:17", or "ratings.parquet: row 17".
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import datetime

import numpy as np
import polars as pl

from .histories import Histories

Place = Callable[[int], str]

LONGEST_ID = 1000  # characters; longer "ids" are running text, and a table of them would fill the memory
EPOCH = datetime(1970, 1, 1)
MISSING = ["nan", "null", "none", "na", "<na>"]  # how programs write a missing number
USUAL = {
    "user": "user userid uid users usr customer customerid client clientid visitor visitorid reviewerid member memberid",
    "item": "item itemid iid items movie movieid product productid asin sid song songid track trackid article articleid"
    " artist artistid business businessid venue venueid book bookid isbn page pageid",
    "time": "time timestamp ts datetime date unixtime unixreviewtime eventtime unixtimestamp utctimestamp timems createdat",
}
UNTIMED = "none"  # as the name of the column of times: that there is none
# What a guess makes nothing of but that it might be a time: by a word of its name, or by its end
TELLING = re.compile(
    r"(?:^|[^a-z])(times?|dates?|datetimes?|timestamps?|ts|dt|dat|when|epoch|unix|utc|created|updated)(?:[^a-z]|$)"
    r"|(time|date|stamp)s?[0-9]*$|(?:^|[^a-z])(at|on)$"
)
NO_TIMES = ("candidate", "update", "lifetime", "runtime", "overtime")  # though they end so


class DataError(ValueError):
    """A file of histories that cannot be read as it stands: which file, which line and what is wrong with it."""


def find_columns(
    source: str, header: Sequence[str], wanted: dict[str, str | None], moments: Collection[int] = ()
) -> dict[str, int]:
    """Which column is the user, which the item and, where there is one, the time: those named in `wanted`, otherwise a guess.

    Capitals do not matter, nor, in a guess, does anything but letters and digits. A file whose times have an unusual name is not
    taken for one without times, whose order of lines would be that of time: UNTIMED as the name says that it is. moments: columns
    that hold dates by their type.
    """
    names = [name.strip() for name in header]
    listed = ", ".join(repr(name) for name in names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{source}: column {twice[0]!r} is there more than once; columns: {listed}")
    found: dict[str, int] = {}
    for role, name in wanted.items():
        if role == "time" and name == UNTIMED and UNTIMED not in map(str.casefold, names):
            continue
        if name is not None:
            exact = [i for i, there in enumerate(names) if there == name]
            matches = exact or [i for i, there in enumerate(names) if there.casefold() == name.casefold()]
            problem = f"has no column {name!r}" if not matches else f"has more than one column {name!r} but for capitals"
        else:
            matches = guesses(role, names)
            problem = "has more than one column that" if matches else "has no column whose name says that it"
            problem = f"{problem} may be the {role}; say which with --{role}-column NAME (in Python {role}=NAME)"
        if len(matches) > 1 or (not matches and (name is not None or role != "time")):
            raise DataError(f"{source}: {problem}; columns: {listed}")
        if matches:
            found[role] = matches[0]
        elif maybe := [name for i, name in enumerate(names) if i not in found.values() and (i in moments or _may_be_time(name))]:
            problem = (
                f"column {maybe[0]!r} may be the time; say so with --time-column {maybe[0]!r}, or --time-column {UNTIMED} where"
            )
            raise DataError(f"{source}: {problem} the lines are in order of time (in Python time=NAME); columns: {listed}")
    roles: dict[int, str] = {}
    for role, column in found.items():
        if column in roles:
            raise DataError(f"{source}: column {names[column]!r} is both {roles[column]} and {role}; columns: {listed}")
        roles[column] = role
    return found


def guesses(role: str, names: Sequence[str]) -> list[int]:
    """Columns that by their names may be the user, item or time."""
    usual = USUAL[role].split()
    return [i for i, name in enumerate(names) if re.sub(r"[\W_]", "", name.casefold()) in usual]


def _may_be_time(name: str) -> bool:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()  # a capital inside a name begins a word
    return TELLING.search(words) is not None and not words.endswith(NO_TIMES)


def to_histories(columns: dict[str, pl.Series], place: Place) -> Histories:
    """From one value per event in columns "user", "item" and, where there are times, "time"."""
    users, user_labels = to_ids(columns["user"], "user", place)
    items, item_labels = to_ids(columns["item"], "item", place)
    times = to_times(columns["time"], place) if "time" in columns else None
    read = Histories.from_events(users, items, times)
    return replace(read, user_ids=labels_of(read.user_ids, user_labels), item_ids=labels_of(read.item_ids, item_labels))


def to_ids(values: pl.Series, role: str, place: Place) -> tuple[np.ndarray, pl.Series | None]:
    """(T,) int64: the ids themselves where all are whole numbers that int64 holds, written as int64 writes them.
    Otherwise numbers that stand for the ids, and the (N,) ids that they stand for as text."""
    if values.dtype.is_integer():
        exact = values.cast(pl.Int64, strict=False)
        if not (exact.is_null() & values.is_not_null()).any():
            _refuse_missing(values, role, place)
            return exact.to_numpy(), None
    if values.dtype.is_nested() or values.dtype in (pl.Binary, pl.Object):
        raise DataError(f"{place(0)}: {role} is of type {values.dtype}; must be one number or text per row")
    if values.dtype.is_float():
        values = values.fill_nan(None)
        exact = values.cast(pl.Int64, strict=False)
        if exact.null_count() == values.null_count() and (exact.cast(values.dtype) == values).all():
            _refuse_missing(values, role, place)
            return exact.to_numpy(), None  # 7.0, as tables with gaps write it, is 7
    text = values.cast(pl.String).str.strip_chars(" \t")
    _refuse_missing(text, role, place)
    whole = text.str.contains(r"^(0|-?[1-9][0-9]*)$")
    if whole.all():
        exact = text.cast(pl.Int64, strict=False)
        if not exact.null_count():
            return exact.to_numpy(), None
    elif whole.any() and text.filter(~whole).str.to_lowercase().is_in(MISSING).all():
        row = int(whole.arg_min() or 0)
        raise DataError(f"{place(row)}: {role} is {text[row]!r} among whole numbers; must be an id")
    too_long = text.str.len_chars() > LONGEST_ID
    if too_long.any():
        row = int(too_long.arg_max() or 0)
        problem = f"{role} {_shown(text[row])} has {len(text[row])} characters; an id has at most {LONGEST_ID}"
        raise DataError(f"{place(row)}: {problem}")
    numbers = text.cast(pl.Categorical(pl.Categories.random())).to_physical().cast(pl.Int64).to_numpy()
    some_row = np.zeros(numbers.max(initial=-1) + 1, dtype=np.int64)
    some_row[numbers] = np.arange(len(numbers))
    return numbers, text.gather(some_row)


def labels_of(numbers: np.ndarray, labels: pl.Series | None) -> np.ndarray:
    """What the numbers of `to_ids` stand for."""
    return numbers if labels is None else np.array(labels.gather(numbers).to_list(), dtype=np.str_)


def to_times(values: pl.Series, place: Place) -> np.ndarray:
    """(T,) int64 where all are whole numbers, float64 otherwise; dates become seconds since 1970, in UTC if they name no zone."""
    if values.dtype in (pl.Date, pl.Datetime):
        _refuse_missing(values, "time", place)
        return _seconds(values)
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
    bad = numbers.is_null() | ~numbers.is_finite()
    if bad.any():
        row = int(bad.arg_max() or 0)
        raise DataError(f"{place(row)}: time is {_shown(values[row])}; must be a finite number, as the first one is")
    return numbers.to_numpy()


def _iso_seconds(text: pl.Series, place: Place) -> np.ndarray:
    """Seconds of ISO 8601 dates: at once what is written in the common ways, one by one the rest."""
    tidy = text.str.replace(r"^([0-9-]{10}) ", "${1}T").str.replace(r"Z$", "+00:00")
    zoned = tidy.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", time_unit="us", strict=False).dt.replace_time_zone(None)
    plain = tidy.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False)
    day = tidy.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
    parsed = zoned.zip_with(zoned.is_not_null(), plain.zip_with(plain.is_not_null(), day))
    seconds = np.array(_seconds(parsed.fill_null(EPOCH)))
    for row in np.flatnonzero(parsed.is_null().to_numpy()).tolist():
        try:
            moment = datetime.fromisoformat(tidy[row])
        except ValueError:
            problem = (
                f"time is {_shown(text[row])}; must be a number or an ISO 8601 date such as 2024-05-31T12:00:00, or the lines be"
            )
            problem = f"{problem} in order of time and the column passed over: --time-column {UNTIMED}"
            raise DataError(f"{place(row)}: {problem}") from None
        seconds[row] = moment.timestamp() if moment.tzinfo else (moment - EPOCH).total_seconds()
    return seconds


def _seconds(moments: pl.Series) -> np.ndarray:
    return moments.dt.epoch("us").to_numpy() / 1e6


def _refuse_missing(values: pl.Series, role: str, place: Place) -> None:
    missing = values.is_null() if values.dtype != pl.String else values.is_null() | (values == "")
    if missing.any():
        raise DataError(f"{place(int(missing.arg_max() or 0))}: {role} is missing")


def _shown(value: object) -> str:
    return repr(value if not isinstance(value, str) or len(value) <= 40 else value[:40] + "...")
