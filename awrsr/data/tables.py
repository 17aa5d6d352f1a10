"""Tables of events in whatever library they come, and answers in the same one: pandas, polars, PyArrow and all others that narwhals
knows. None of them need be installed."""

from typing import Any, NamedTuple

import narwhals as nw
import numpy as np
import polars as pl

from ._columns import find_columns, item_column
from .containers import UserLists, id_column
from .histories import Histories
from .ids import DataError, Index, id_series, number_ids
from .times import time_column

Frame = nw.DataFrame[Any] | nw.LazyFrame[Any]


class Names(NamedTuple):
    """What the columns of a table are called, of which library; time is None if it has none."""

    user: str = "user"
    item: str = "item"
    time: str | None = None
    library: Any = nw.Implementation.POLARS


def is_table(value: Any) -> bool:
    """Whether a value is a table of some library."""
    return isinstance(nw.from_native(value, pass_through=True), nw.DataFrame | nw.LazyFrame)


def read_table(
    table: Any, names: Names | None = None, *, user: str | None = None, item: str | None = None, time: str | None = None, **how: Any
) -> tuple[Histories, Names]:
    """The histories that a table holds, one row per event, and the names of its columns.

    Args:
        table: of any library; a lazy one is collected.
        names: of an earlier table, for columns that are not named.
        user, item, time: names of columns. By default those of `names` that the table has, otherwise the usual ones. With "none" as
            time, rows are in order of time.
        how: missing_ids and drop_duplicates, as for `Histories.from_events`.

    Raises:
        ValueError: a column is missing, or could be several; a value is missing or wrong. TypeError: a column holds neither numbers
            nor text.
    """
    frame: Any = nw.from_native(table)
    frame = frame.collect() if isinstance(frame, nw.LazyFrame) else frame
    columns = frame.columns
    headings = [str(name) for name in columns]
    wanted = {"user": user, "item": item, "time": time}
    if names is not None:
        wanted = {
            role: name if name is not None or (known := getattr(names, role)) not in headings else known
            for role, name in wanted.items()
        }
    moments = [place for place, kind in enumerate(frame.schema.values()) if kind.is_temporal()]
    places = find_columns("the table of histories", headings, wanted, moments)
    found = Names(**{role: headings[place] for role, place in places.items()}, library=frame.implementation)
    natives = {role: frame[columns[place]].to_native() for role, place in places.items()}
    given = {role: time_column(each) if role == "time" else id_column(role, each, "drop") for role, each in natives.items()}
    return Histories.from_columns(given, lambda role, row: f"{getattr(found, role)}[{row}]", **how), found


def histories_of(
    given: "Histories | UserLists | Any", names: Names | None = None, **columns: str | None
) -> tuple[Histories, Names | None]:
    """Histories in any form that is documented for `AWRSR.fit`, and the names of columns if they are a table, whose columns
    `columns` and `names` name as in `read_table`. Raises as that and `Histories.from_lists` do."""
    if not isinstance(given, Histories) and is_table(given):
        return read_table(given, names, **columns)
    if named := {role: name for role, name in columns.items() if name is not None}:
        role, name = next(iter(named.items()))
        kind = type(given).__name__
        raise TypeError(f"{role} is {name!r}, the name of a column, but histories is of type {kind}, must be a table")
    return Histories.from_lists(given), None


def as_given(table: pl.DataFrame, given: Any, names: Names | None = None) -> Any:
    """The table in the library of what was given, if that is a series or a table with these names of columns. Everything else gets
    a polars DataFrame."""
    library = nw.Implementation.POLARS
    if names is not None:
        library = names.library
        table.columns = [getattr(names, name) if name in ("user", "item") else name for name in table.columns]
    elif isinstance(series := nw.from_native(given, pass_through=True, allow_series=True), nw.Series):
        library = series.implementation
    if library.is_polars():
        return table
    columns = {c.name: c.to_list() if c.dtype == pl.String or c.null_count() else c.to_numpy() for c in table}
    return nw.from_dict(columns, backend=library).to_native()  # type: ignore[arg-type]


def with_titles(table: pl.DataFrame, titles: Any, names: Names | None = None) -> pl.DataFrame:
    """A table with further columns on its items, after the column "item"; null where nothing is known of one.

    Args:
        titles: a mapping from item ids to titles, or a Series with the ids as its index, which become the column "title"; or a
            table with a column of items, whose other columns are joined.
        names: its column of items is called so, or by a usual name.

    Raises:
        TypeError: this is neither. ValueError: no column of it is that of the items; an item occurs twice; a column is called like
            one of `table`.
    """
    if is_table(titles):
        frame: Any = nw.from_native(titles)
        frame = frame.collect() if isinstance(frame, nw.LazyFrame) else frame
        headings = [str(name) for name in frame.columns]
        wanted = names.item if names is not None and names.item in headings else None
        place = item_column("titles", headings, wanted)
        ids = id_column("item", frame[frame.columns[place]].to_native())
        columns = {
            heading: pl.Series(heading, frame[name].to_list())
            for heading, name in zip(headings, frame.columns, strict=True)
            if name != frame.columns[place]
        }
    elif callable(getattr(titles, "keys", None)) and callable(getattr(titles, "items", None)):
        pairs = list(titles.items())
        ids = id_series("item", [item for item, _ in pairs])
        columns = {"title": pl.Series("title", [title for _, title in pairs])}
    else:
        raise TypeError(f"titles is of type {type(titles).__name__}, must be a table, or a mapping from item ids to titles")
    distinct, number = number_ids(ids, lambda row: f"item {row} of titles", "keep")
    if len(distinct) < len(ids):
        twice = distinct.tolist()[int(np.bincount(number).argmax())]
        raise DataError(f"titles hold item {twice!r} more than once; must have one row per item")
    if taken := [name for name in columns if name in table.columns]:
        raise DataError(f"titles have a column {taken[0]!r}, which is one of recommendations; rename it")
    found = Index(distinct).find(table["item"].to_numpy()).tolist()
    places = pl.Series([place if place >= 0 else None for place in found], dtype=pl.UInt32)
    at = table.columns.index("item") + 1
    joined = [column.gather(places).alias(name) for name, column in columns.items()]
    return pl.DataFrame([*table.get_columns()[:at], *joined, *table.get_columns()[at:]])
