"""Times of events: numbers are kept as they are, dates become seconds since 1970, in UTC unless they name a zone.

T events.
"""

from datetime import date, datetime, timezone
from typing import Any

import numpy as np
import polars as pl

from ..processes import unforked
from .ids import DataError, Subject, first, is_missing, shown, warn

EPOCH = datetime(1970, 1, 1)
RULE = "must be a number or an ISO 8601 date such as 2024-05-31T12:00:00"
UNTIMED = "none"  # as the name of the column of times: there is none
DATES = (3.15e8, 4.1e9)  # seconds since 1970 of dates from 1980 to 2100
UNITS = {"seconds": 1.0, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}  # how many make a second
ZONE = r"[ ]?(?:Z|z|UTC|GMT)$"


def to_times(values: pl.Series, subject: Subject) -> np.ndarray:
    """(T,) int64 if all are whole numbers, float64 otherwise; dates become seconds since 1970, in UTC if they name no zone."""
    simple = values.dtype.is_integer() and not values.null_count()
    times, row, problem = (values.to_numpy(), 0, "") if simple and values.dtype == pl.Int64 else _times_of(values)
    if problem:
        raise DataError(f"{subject(row)} {problem}")
    return _of_one_unit(times, subject)


@unforked
def _times_of(values: pl.Series) -> tuple[np.ndarray, int, str]:
    """The times, or the first row that has none and what is wrong with it."""
    none = np.empty(0)
    if values.dtype in (pl.Categorical, pl.Enum):
        values = values.cast(pl.String)
    if values.dtype != pl.String and not values.dtype.is_numeric() and values.dtype not in (pl.Date, pl.Datetime, pl.Null):
        return none, 0, f"is of type {values.dtype}; must be numbers, dates or ISO 8601 text"
    if values.dtype == pl.String or values.dtype.is_integer():
        exact = values.cast(pl.Int64, strict=False)
        if exact.null_count() and values.dtype == pl.String:
            values = values.str.strip_chars(" \t")
            exact = values.cast(pl.Int64, strict=False)
        if not exact.null_count():
            return exact.to_numpy(), 0, ""
    missing = values.is_null() if values.dtype != pl.String else values.is_null() | (values == "")
    if missing.any():
        return none, first(missing), "is missing"
    if values.dtype in (pl.Date, pl.Datetime):
        return values.dt.epoch("us").to_numpy() / 1e6, 0, ""
    numbers = values.cast(pl.Float64, strict=False)
    if numbers[0] is None:
        return _iso_seconds(values)
    wrong = ~numbers.is_finite().fill_null(False)
    if wrong.any():
        row = first(wrong)
        return none, row, f"is {shown(values[row])}; must be a finite number, as the first one is"
    return numbers.to_numpy(), 0, ""


def _of_one_unit(times: np.ndarray, subject: Subject) -> np.ndarray:
    """The same times. Warns if the earliest looks like a date in one unit and the latest like one in another."""
    if (
        len(times)
        and (first := unit_of(times.min(), times.min()))
        and (last := unit_of(times.max(), times.max()))
        and first != last
    ):
        where = subject(int(times.argmax()))
        warn(
            f"{where} is {times.max()}, which looks like {last} since 1970, but {times.min()} in the same column looks like "
            f"{first}; times are ordered as numbers, so give them one unit"
        )
    return times


def unit_of(first: float, last: float) -> str | None:
    """The unit since 1970 in which both times are dates between 1980 and 2100, if there is one."""
    fitting = (name for name, unit in UNITS.items() if DATES[0] * unit < first <= last < DATES[1] * unit)
    return next(fitting, None)


def _iso_seconds(text: pl.Series) -> tuple[np.ndarray, int, str]:
    """Seconds since 1970 of ISO 8601 dates, also with UTC as the name of the zone: common formats together, others one by one."""
    tidy = text.str.replace(r"^([0-9-]{10}) ", "${1}T").str.replace(ZONE, "+00:00")
    parsed = pl.Series([None], dtype=pl.Datetime("us")).new_from_index(0, len(tidy))
    for form in ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f%:z", "%Y-%m-%d"):
        left = parsed.is_null()
        if not left.any():
            break
        found = tidy.filter(left).str.strptime(pl.Datetime("us"), form, strict=False).dt.replace_time_zone(None)
        parsed = found if left.all() else parsed.scatter(left.arg_true(), found)
    seconds = parsed.fill_null(EPOCH).dt.epoch("us").to_numpy() / 1e6
    for row in np.flatnonzero(parsed.is_null().to_numpy()).tolist():
        try:
            moment = datetime.fromisoformat(tidy[row])
        except ValueError:
            untimed = f"if the lines are in order of time, --time-column {UNTIMED} ignores the column"
            return seconds, row, f"is {shown(text[row])}; {RULE}; {untimed}"
        seconds[row] = moment.timestamp() if moment.tzinfo else (moment - EPOCH).total_seconds()
    return seconds, 0, ""


def time_column(times: Any) -> pl.Series:
    """Times in Python as a column, from any container: numbers, dates with or without a zone, or ISO 8601 text.

    Raises:
        TypeError: they are something else. ValueError: a time is missing, or the shape is not (T,).
    """
    if isinstance(times, pl.Series):
        return times
    values = np.asarray(times) if not isinstance(times, list | tuple) else _array(times)
    if values.ndim != 1:
        raise DataError(f"times are of shape {values.shape}, must be (T,), one time per event")
    kind = values.dtype.kind
    if kind in "iu":
        return pl.Series(values)
    if kind in "fM":
        wrong = np.isnat(values) if kind == "M" else np.isnan(values)
        if wrong.any():
            raise DataError(f"times[{int(wrong.argmax())}] is missing, must be a number or a date")
        return pl.Series(values.astype("datetime64[us]") if kind == "M" else values)
    listed = values.tolist()
    for row, value in enumerate(listed):
        if is_missing(value):
            raise DataError(f"times[{row}] is missing, must be a number or a date")
    if listed and all(isinstance(value, date) for value in listed):
        return pl.Series([_utc(value) for value in listed], dtype=pl.Datetime("us"))
    if listed and all(isinstance(value, str) for value in listed) and not _is_number(listed[0]):
        return pl.Series(listed, dtype=pl.String)
    if listed and all(isinstance(value, int | float | np.number) and not isinstance(value, bool) for value in listed):
        return pl.Series(np.array(listed))
    kinds = values.dtype if kind != "O" else ", ".join(sorted({type(value).__name__ for value in listed}))
    raise TypeError(
        f"times are of type {kinds}, must be numbers or datetime64, datetimes or ISO 8601 text such as 2024-05-31T12:00"
    )


def _array(values: "list[Any] | tuple[Any, ...]") -> np.ndarray:
    """A list as an array; dates stay Python's own, because numpy would drop their zones."""
    return np.array(values, dtype=object if any(isinstance(value, date) for value in values) else None)


def _is_number(text: str) -> bool:
    try:
        return bool(float(text)) or True
    except ValueError:
        return False


def _utc(value: date) -> datetime:
    """A date or datetime as a datetime without a zone, in UTC."""
    if not isinstance(value, datetime):
        return datetime(value.year, value.month, value.day)
    return value.astimezone(timezone.utc).replace(tzinfo=None) if value.tzinfo else value


def moment(name: str, value: Any, times: np.ndarray | None = None) -> float | None:
    """A moment in the unit of `times`: a number as it is; a date, as text or as an object, in seconds or in the unit since 1970
    that the times are in. None if there is none.

    Raises:
        ValueError: it is neither, or it is a date and the times are not.
    """
    if value is None or (isinstance(value, str) and not value):
        return None
    try:
        column = time_column([float(value) if isinstance(value, str) and _is_number(value) else value])
        is_date = not column.dtype.is_numeric()
        point = float(to_times(column, lambda _: name)[0])
    except (DataError, TypeError):
        rule = "must be a number, as times are in the data, or a date such as 2014-05-31"
        raise ValueError(f"{name} is {value!r}, {rule}") from None
    if is_date and times is not None and len(times):
        first, last = times.min(), times.max()
        unit = unit_of(first, last)
        if unit is None and times.dtype.kind == "i":
            problem = f"times run from {first} to {last}, which are not all dates in one unit since 1970"
            raise ValueError(f"{name} is the date {value}, but {problem}; give a number as in the data")
        point *= UNITS[unit or "seconds"]
    return point


def as_date(time: float) -> str:
    """The date that a number may be, in any unit since 1970; empty if it can be none."""
    unit = unit_of(time, time)
    return f"{datetime.fromtimestamp(float(time) / UNITS[unit], timezone.utc):%Y-%m-%d %H:%M:%S}" if unit else ""
