"""Who gets what: which items may be recommended to whom, and the best of them by their scores.

B users of a batch, N items of the catalogue, C of them that may be recommended to somebody.
"""

import operator
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from .data.containers import id_column
from .data.histories import Histories, spans
from .data.ids import Index, as_column, id_series, many, number_ids, warn
from .data.tables import histories_of, is_table
from .models.network import in_evaluation

SCORE_BLOCK = 1 << 24  # scores held at a time


class Lists(NamedTuple):
    """Items for all users, or for each of U users: user u has items[offsets[u] : offsets[u + 1]], rows of the catalogue."""

    items: np.ndarray
    offsets: np.ndarray | None = None

    def of(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers, within `users`, of those who have an item, and the items, pair by pair."""
        assert self.offsets is not None
        events, _ = spans(self.offsets[users], np.diff(self.offsets)[users])
        return np.repeat(np.arange(len(users)), np.diff(self.offsets)[users]), self.items[events]


class Rules(NamedTuple):
    """What may be recommended. candidates, exclude: items to choose from, and to leave out. filter_seen: leave out the items of the
    history. fallback: what a user without any known item gets, one of FALLBACKS."""

    candidates: Lists | None = None
    exclude: Lists | None = None
    filter_seen: bool = True
    filter_untrained: bool = True
    fallback: str = "popular"

    def columns(self, trained: np.ndarray | None, count: int) -> np.ndarray:
        """(C,) rows of the items that may be recommended to somebody."""
        may = np.ones(count, dtype=bool)
        if self.candidates is not None:
            may[:] = False
            may[self.candidates.items] = True
        if self.exclude is not None and self.exclude.offsets is None:
            may[self.exclude.items] = False
        if self.filter_untrained and trained is not None:
            may &= trained > 0
        return np.flatnonzero(may)


def item_lists(name: str, given: Any, index: Index, users: np.ndarray) -> Lists | None:
    """Items for all users or for each, from what a caller gave.

    Args:
        name: of the argument, for messages.
        given: ids for all users, in any container; or for each user: a mapping, a Series of lists, a table of users and items, or
            `Histories`. A table without a column of users is for all.
        index: finds items of the catalogue. users: (U,) ids of those that items are for.

    Raises:
        ValueError: candidates hold no item of the catalogue. TypeError: this is no such container.
    """
    if given is None:
        return None
    per_user = isinstance(given, Histories | Mapping) or callable(getattr(given, "keys", None)) and _holds_lists(given)
    if is_table(given):
        columns = {str(name).casefold() for name in given.columns}
        per_user = len(columns) > 1
        given = given if per_user else given[given.columns[0]]
    if not per_user:
        if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
            raise TypeError(f"{name} is {given!r}, must be item ids, or a mapping from users to item ids")
        ids, place = number_ids(id_column("item", list(given)), lambda row: f"{name}[{row}]", "keep")
        found = index.find(ids)[place] if len(place) else np.empty(0, dtype=np.int64)
        check_known(name, len(found), int((found < 0).sum()))
        return Lists(found[found >= 0])
    lists, _ = histories_of(given)
    known, unknown = lists.numbered_as(index)
    check_known(name, len(lists.items), unknown)
    place = Index(users).find(lists.user_ids)
    owner = place[known.owners]
    order = np.argsort(owner, kind="stable")
    order = order[np.searchsorted(owner[order], 0) :]  # without those of other users
    offsets = np.append(0, np.cumsum(np.bincount(owner[order], minlength=len(users))))
    return Lists(known.items[order], offsets)


def _holds_lists(series: Any) -> bool:
    """Whether a Series is of lists, so that its index is the users."""
    first = next(iter(series), None)
    return first is not None and not isinstance(first, str | bytes) and hasattr(first, "__iter__")


def check_known(name: str, count: int, unknown: int) -> None:
    """Of candidates, warn of those that the model does not know, and raise ValueError if it knows none. What it does not know need
    not be excluded."""
    if name != "candidates":
        return
    if unknown == count:
        raise ValueError(f"candidates are {many(unknown, 'item')}, of which the model knows none")
    if unknown:
        warn(f"{unknown:,} of {count:,} candidates are left out, since the model does not know them")


def top_items(
    model: Any, histories: Histories, k: int | np.ndarray, rules: Rules, batch_size: int
) -> Iterator[pl.DataFrame]:
    """Tables of bounded size with a row per recommendation: user, item, rank (1 is the best) and score, which is null for the most
    popular items. Arguments as for `best_items`."""
    ids = model.ids()
    for user, item, rank, score, by_model in best_items(model, histories, k, rules, batch_size):
        named = {"user": as_column(histories.user_ids[user]), "item": as_column(ids[item]), "rank": rank}
        null = pl.Series(np.where(by_model, score, np.nan), nan_to_null=True, dtype=pl.Float32) if not by_model.all() else score
        yield pl.DataFrame(named | {"score": null})


@torch.inference_mode()
def best_items(
    model: Any, histories: Histories, k: int | np.ndarray, rules: Rules, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of recommendations: user and item by their places, rank (1 is the best), score, and whether it is the model's, not
    one of the most popular items'. The first batch is empty.

    Args:
        model: an `AWRSR`.
        histories: with items numbered as in it.
        k: for all users, or (U,) for each.
    """
    model = in_evaluation(model)
    ids, trained = model.ids(), model.trained
    columns = rules.columns(trained, len(ids))
    all_items = len(columns) == len(ids)
    table = model.network.item_table()
    table = table if all_items else table[torch.from_numpy(columns).to(table.device)]
    column = np.full(len(ids), -1)
    column[columns] = np.arange(len(columns))
    popular = popularity_order(trained, columns) if rules.fallback == "popular" else None
    users = np.flatnonzero(histories.lengths) if popular is None else np.arange(histories.num_users)
    step = max(1, min(batch_size, SCORE_BLOCK // max(len(columns), 1)))
    most = min(int(np.max(k, initial=0)), len(columns))

    nobody = np.empty(0, dtype=np.int64)
    yield nobody, nobody, nobody, table.new_empty(0).cpu().numpy(), nobody == 0
    for first in range(0, len(users), step):
        chosen = users[first : first + step]
        by_model = histories.lengths[chosen] > 0
        scores = torch.empty(len(chosen), len(columns), dtype=table.dtype, device=table.device)
        if by_model.all():
            scores = model.scores(histories, chosen, table)
        elif popular is not None:
            scores[torch.from_numpy(~by_model)] = popular.to(scores)
            if by_model.any():
                scores[torch.from_numpy(by_model)] = model.scores(histories, chosen[by_model], table)
        for left_out in (Lists(histories.items, histories.offsets) if rules.filter_seen else None, rules.exclude):
            if left_out is not None and left_out.offsets is not None:
                row, item = left_out.of(chosen)
                known = column[item] >= 0
                scores[torch.from_numpy(row[known]), torch.from_numpy(column[item[known]])] = -torch.inf
        if rules.candidates is not None and rules.candidates.offsets is not None:
            row, item = rules.candidates.of(chosen)
            known = column[item] >= 0
            others = torch.ones(scores.shape, dtype=torch.bool)
            others[torch.from_numpy(row[known]), torch.from_numpy(column[item[known]])] = False
            scores.masked_fill_(others.to(scores.device), -torch.inf)
        score, item = (x.cpu().numpy() for x in scores.topk(most))
        kept = score > -np.inf
        if isinstance(k, np.ndarray):
            kept &= np.arange(most) < k[chosen, None]
        row, place = np.nonzero(kept)
        yield chosen[row], columns[item[row, place]], place + 1, score[row, place], by_model[row]


def popularity_order(trained: np.ndarray | None, columns: np.ndarray) -> Tensor | None:
    """(C,) scores that put items in the order of their training events, the first of the catalogue first among equals; None if
    that is not known."""
    if trained is None or trained.dtype == bool:
        return None
    order = np.argsort(-trained[columns], kind="stable")
    scores = np.empty(len(columns))
    scores[order] = -np.arange(len(columns))
    return torch.from_numpy(scores)


def numbers_of(name: str, given: Any, users: np.ndarray) -> int | np.ndarray:
    """A number for all users, or (U,) one for each, from a number or from a mapping or a Series whose keys are the users.

    Raises:
        ValueError: a number is below 1, or a user has none. TypeError: one is not a whole number.
    """
    if not (callable(getattr(given, "keys", None)) and callable(getattr(given, "items", None))):
        return at_least_one(given)
    pairs = list(given.items())
    ids, place = number_ids(id_series("user", [user for user, _ in pairs]), lambda row: f"key {row} of {name}", "keep")
    numbers = np.zeros(len(users), dtype=np.int64)
    found = Index(users).find(ids)[place]
    numbers[found[found >= 0]] = np.array([at_least_one(value) for _, value in pairs])[found >= 0]
    if len(without := np.flatnonzero(numbers == 0)):
        raise ValueError(f"{name} holds no number for user {users[without].tolist()[0]!r}")
    return numbers


def at_least_one(k: int) -> int:
    """k. Raises TypeError unless it is a whole number, and ValueError if it is below 1."""
    try:
        number = operator.index(k)
    except TypeError:
        raise TypeError(f"k is {k!r}, must be a whole number") from None
    if number < 1:
        raise ValueError(f"k is {number}, must be at least 1")
    return number
