"""Which rows of a file count: a condition on its columns in the words of SQL, such as "rating >= 4 AND kind = 'buy'"."""

from collections.abc import Callable

import polars as pl

from .ids import DataError, many, warn

ROLE = "where "  # before the name of a column that a condition needs, among the roles of columns
RULE = (
    "must be a condition on the columns, such as \"rating >= 4\" or \"event == 'purchase'\"; a name that is a word of SQL, such as "
    "user, goes in double quotes"
)


def condition(where: str) -> tuple[pl.Expr, dict[str, str]]:
    """The condition, and the columns that it needs, by role. Raises ValueError if it is none."""
    try:
        found = pl.sql_expr(where)
        names = list(dict.fromkeys(found.meta.root_names()))
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"where is {where!r}, {RULE} ({' '.join(str(error).split())})") from None
    if not names:
        raise ValueError(f"where is {where!r}, which names no column; {RULE}")
    return found, {ROLE + name: name for name in names}


def kept_rows(
    source: str, where: str, by_role: dict[str, pl.Series], place: Callable[[int], str]
) -> tuple[dict[str, pl.Series], Callable[[int], str]]:
    """The rows for which a condition holds, without the columns that it alone needs; a missing value fulfils none. Warns of how
    many are left out. place: says where a row is.

    Raises:
        DataError: it compares text with numbers, is no condition, or leaves nothing.
    """
    found, _ = condition(where)
    columns = {role.removeprefix(ROLE): _typed(column) for role, column in by_role.items() if role.startswith(ROLE)}
    try:
        fulfilled = pl.DataFrame(columns).select(found.alias("kept"))["kept"]
    except pl.exceptions.PolarsError as error:
        kinds = ", ".join(f"{name} holds {'numbers' if column.dtype.is_numeric() else 'text'}" for name, column in columns.items())
        raise DataError(f"{source}: where {where!r} cannot be decided ({kinds}): {' '.join(str(error).split())}") from None
    if fulfilled.dtype != pl.Boolean:
        raise DataError(f"{source}: where is {where!r}, whose values are of type {fulfilled.dtype}; {RULE}")
    rows = fulfilled.fill_null(False).arg_true()
    if not len(rows):
        raise DataError(f"{source}: where {where!r} leaves none of {many(len(fulfilled), 'event')}")
    if len(rows) < len(fulfilled):
        warn(f"{source}: where {where!r} left out {len(fulfilled) - len(rows):,} of {many(len(fulfilled), 'event')}")
    kept = {role: column.gather(rows) for role, column in by_role.items() if not role.startswith(ROLE)}
    numbers = rows.to_numpy()
    return kept, lambda row: place(int(numbers[row]))


def _typed(column: pl.Series) -> pl.Series:
    """Text as numbers if all of it is; nothing at all is a missing value."""
    if column.dtype != pl.String:
        return column
    column = column.str.strip_chars(" \t").replace("", None)
    numbers = column.cast(pl.Float64, strict=False)
    return numbers if numbers.null_count() == column.null_count() and numbers.null_count() < len(numbers) else column
