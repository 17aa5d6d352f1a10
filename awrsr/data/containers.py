"""Histories in Python's own containers and in tables: mappings, lists, pandas' and polars' series, groups and tensors.

Libraries of tables are recognised by what their objects can do, so that none of them need be installed.
"""

from collections.abc import ItemsView, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import polars as pl

from .ids import DataError, id_series

UserLists = Mapping[Any, Sequence[Any]] | Iterable[Sequence[Any]]


def lists_of(histories: UserLists, missing: str) -> tuple[pl.Series, list[list[Any]]]:
    """The ids of users, and the items of each.

    Whatever has keys names its users: a mapping, a pandas Series (its index) or its groups. In anything else users are 0, 1, ...

    Raises:
        TypeError: it is no container of sequences of ids.
    """
    kind = type(histories).__name__
    if isinstance(histories, str | bytes | set | frozenset) or hasattr(histories, "columns") or not isinstance(histories, Iterable):
        groups = "; groups of a table are df.groupby('user')['item']" if hasattr(histories, "columns") else ""
        raise TypeError(
            f"histories is of type {kind}, must be a mapping or lists of item ids; awrsr.read(path) reads a file, "
            f"Histories.from_events(users, items, times) takes columns{groups}"
        )
    keyed: Any = histories
    if hasattr(keyed, "ngroups"):  # pandas' groups are pairs of a key and a series
        pairs = [(key[0] if isinstance(key, tuple) and len(key) == 1 else key, group) for key, group in keyed]
    elif isinstance(keyed, ItemsView):
        pairs = list(keyed)
    elif callable(getattr(keyed, "keys", None)) and callable(getattr(keyed, "items", None)):
        pairs = list(keyed.items())
    else:
        pairs = list(enumerate(histories))
    return id_series("user", [user for user, _ in pairs], missing), [_items_of(user, items) for user, items in pairs]


def all_items(lists: list[list[Any]], missing: str) -> pl.Series:
    """The items of all histories, one after another."""
    return id_series("item", list(chain.from_iterable(lists)), missing)


def id_column(role: str, ids: Any, missing: str = "refuse") -> pl.Series:
    """Ids of one column, from any container, in its order; a table's index is ignored. missing: "drop" lets None and NaN pass."""
    if (
        isinstance(ids, pl.Series)
        and not ids.dtype.is_nested()
        and ids.dtype != pl.Object
        and (missing == "drop" or not ids.null_count())
    ):
        column = ids
    elif isinstance(ids, list | tuple):
        return id_series(role, list(ids), missing)  # numpy would turn 2**53 + 1 and 0.5 into floats
    else:
        values = np.asarray(ids)
        if values.ndim != 1:
            raise DataError(f"{role}s are of shape {values.shape}, must be (T,), one id per event")
        if values.dtype.kind not in "iuf":
            return id_series(role, values.tolist(), missing)
        column = pl.Series(values)
    if missing != "drop" and column.dtype.is_float() and column.is_nan().any():
        raise DataError(f"{role} id is nan, must be a number or text")
    return column


def _items_of(user: Any, items: Any) -> list[Any]:
    """The items of a history, as Python's own values."""
    if type(items) is list:
        return items
    if isinstance(items, set | frozenset | Mapping):
        raise TypeError(f"history of user {user!r} is a {type(items).__name__}, must be a sequence of item ids in order of time")
    if isinstance(items, str | bytes) or not isinstance(items, Iterable) or getattr(items, "ndim", 1) != 1:
        was = repr(items) if items is None or isinstance(items, str | bytes | int | float) else f"of type {type(items).__name__}"
        raise TypeError(f"history of user {user!r} is {was}, must be a sequence of item ids")
    return list(items.tolist() if hasattr(items, "tolist") else items)
