"""Histories as flat arrays: what users did, in time order.

U users, N items of the catalogue, T events of all users.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from .containers import UserLists, all_items, id_column, lists_of
from .ids import DataError, Index, many, number_ids, warn
from .ids import Subject as IdSubject
from .ids import number as number  # callers find it here
from .times import time_column, to_times

Subject = Callable[[str, int], str]  # what a message about a value begins with: role, row -> "ratings.csv:17: item"


@dataclass(frozen=True)
class Histories:
    """Events of all users, one user after another, without padding.

    Args:
        items: (T,) int64 in 0..N-1, each user's in time order.
        offsets: (U + 1,) int64, user u owns items[offsets[u] : offsets[u + 1]].
        item_ids: (N,) ids of the items in the data.
        user_ids: (U,) ids of the users.
        times: (T,) numbers, or None.
    """

    items: np.ndarray
    offsets: np.ndarray
    item_ids: np.ndarray
    user_ids: np.ndarray
    times: np.ndarray | None = None

    @property
    def num_users(self) -> int:
        """The number of users U."""
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """The number of items N."""
        return len(self.item_ids)

    @property
    def lengths(self) -> np.ndarray:
        """(U,) events of each user."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """(T,) number of the user of each event, 0..U-1."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    def of(self, user: int) -> np.ndarray:
        """(n,) items of user number `user`, in time order."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    @classmethod
    def from_events(
        cls, users: Any, items: Any, times: Any = None, *, missing_ids: str = "refuse", drop_duplicates: bool = False
    ) -> "Histories":
        """From parallel columns of T values: arrays, lists, or columns of a table with any index.

        Args:
            users, items: ids, as in `from_lists`; they are numbered in the order of their first appearance.
            times: numbers; or dates (datetime64, datetime objects, ISO 8601 text), which become seconds since 1970, in UTC unless
                they name a zone. Each user's events are sorted by time, and keep their order if times are equal or not given.
            missing_ids: as in `from_lists`.
            drop_duplicates: let events with the same user, item and time count once.

        Raises:
            TypeError: ids are neither numbers nor text, or times are neither numbers nor dates.
            ValueError: columns have different lengths, or a value is missing.
        """
        columns = {"user": id_column("user", users, missing_ids), "item": id_column("item", items, missing_ids)}
        if times is not None:
            columns["time"] = time_column(times)
        if len({len(column) for column in columns.values()}) > 1:
            got = ", ".join(f"{name}s has {len(column)}" for name, column in columns.items())
            raise DataError(f"columns must be equally long, with one value per event: {got}")
        return cls.from_columns(columns, lambda role, row: f"{role}s[{row}]", missing_ids, drop_duplicates)

    @classmethod
    def from_columns(
        cls, columns: dict[str, pl.Series], subject: Subject, missing_ids: str = "refuse", drop_duplicates: bool = False
    ) -> "Histories":
        """From one value per event in columns "user", "item" and, where there are times, "time". subject: as defined above."""
        user_ids, user = number_ids(columns["user"], partial(subject, "user"), missing_ids)
        item_ids, item = number_ids(columns["item"], partial(subject, "item"), missing_ids)
        rows = np.flatnonzero((user >= 0) & (item >= 0))
        if len(rows) < len(user):
            row = int(((user < 0) | (item < 0)).argmax())
            where = subject("user" if user[row] < 0 else "item", row)
            warn(f"left out {many(len(user) - len(rows), 'event')} without a user or an item; the first is {where}")
            user, item, columns = user[rows], item[rows], {role: column.gather(rows) for role, column in columns.items()}
        times = to_times(columns["time"], lambda row: subject("time", int(rows[row]))) if "time" in columns else None
        order = np.argsort(user, kind="stable") if times is None else np.lexsort((times, user))
        offsets = sums(np.bincount(user, minlength=len(user_ids)))
        found = cls(item[order], offsets, item_ids, user_ids, None if times is None else times[order])
        found = found.core() if missing_ids == "drop" else found
        if drop_duplicates and times is None:
            raise DataError("drop_duplicates needs times: without them a repeated event cannot be told from an item taken again")
        twice = found.duplicates()
        if not twice.any():
            return found
        if drop_duplicates:
            return found.keep(~twice)
        warn(
            f"{twice.sum():,} of {many(len(twice), 'event')} equal another in user, item and time, and count as items taken again; "
            "--drop-duplicates lets them count once (in Python drop_duplicates=True)"
        )
        return found

    @classmethod
    def from_lists(cls, histories: "Histories | UserLists", *, missing_ids: str = "refuse") -> "Histories":
        """From a sequence of item ids per user, in order of time.

        Args:
            histories: a mapping user id -> items; a pandas Series of lists, whose index is the users, or its groups
                (`df.groupby("user")["item"]`); or a list of lists, where users are 0, 1, ...
            missing_ids: a missing id, or text that programs write for one ("nan", "NULL", ...), is refused; with "drop", such
                events are left out; with "keep", such text is an id.

        A whole number is the same id however it is written: 17, 17.0 and "17". All other ids are text, without blanks around them.
        Ids are int64 if all of them are whole numbers that fit, and otherwise strings.

        Raises:
            TypeError: an entry is not a sequence of ids, or an id is neither a number nor text.
            ValueError: an id is missing (None or NaN); a user occurs twice.
        """
        if isinstance(histories, Histories):
            return histories
        users, lists = lists_of(histories, missing_ids)
        user_ids, user = number_ids(users, lambda _: "user id", missing_ids)
        if (row := first_again(user)) is not None:
            raise DataError(f"user {users[row]!r} occurs more than once; must have one history, in order of time")
        counts = np.array([len(items) for items in lists], dtype=np.int64)
        ends = np.cumsum(counts)

        def subject(event: int) -> str:
            return f"history of user {users[int(np.searchsorted(ends, event, side='right'))]!r}: item"

        return cls.from_flat(user_ids, user, counts, all_items(lists, missing_ids), subject, missing_ids)

    @classmethod
    def from_flat(
        cls, user_ids: np.ndarray, user: np.ndarray, counts: np.ndarray, items: pl.Series, subject: IdSubject, missing_ids: str
    ) -> "Histories":
        """From the items of all histories, one after another. user: whose each history is, -1 for one that is left out; each user
        has one, in order. counts: the number of items of each history. subject, missing_ids: as in `number_ids`."""
        item_ids, item = number_ids(items, subject, missing_ids)
        kept = (item >= 0) & np.repeat(user >= 0, counts)
        if not kept.all():
            gone = many(int(np.count_nonzero(~kept)), "event")
            warn(f"left out {gone} without a user or an item; the first is {subject(int(kept.argmin()))}")
            counts = np.bincount(np.repeat(user, counts)[kept], minlength=len(user_ids))
            item = item[kept]
        return cls(item, sums(counts), item_ids, user_ids)

    def keep(self, events: np.ndarray) -> "Histories":
        """Only the events that are True in the (T,) boolean `events`. Users and items without events are dropped."""
        users, counts = np.unique(self.owners[events], return_counts=True)
        items, item = np.unique(self.items[events], return_inverse=True)
        times = None if self.times is None else self.times[events]
        return Histories(item, sums(counts), self.item_ids[items], self.user_ids[users], times)

    def of_users(self, ids: Any) -> "Histories":
        """Only these users, in the order of their ids.

        Raises:
            ValueError: there is no such user; one is given twice.
        """
        wanted, place = number_ids(id_column("user", ids), lambda row: f"users[{row}]", "keep")
        found = Index(self.user_ids).find(wanted)
        if (found < 0).any():
            raise DataError(f"users hold {wanted.tolist()[int((found < 0).argmax())]!r}, of whom there is no history")
        if len(wanted) < len(place):
            raise DataError("users hold a user twice")
        events, offsets = spans(self.offsets[found], self.lengths[found])
        times = None if self.times is None else self.times[events]
        return replace(self, items=self.items[events], offsets=offsets, user_ids=self.user_ids[found], times=times)

    def __repr__(self) -> str:
        timed = "" if self.times is None else ", with times"
        return f"Histories({self.num_users:,} users, {self.num_items:,} items, {len(self.items):,} events{timed})"

    def core(self, min_user_events: int = 1, min_item_events: int = 1) -> "Histories":
        """The k-core: drops users and items with fewer events, and repeats that until nothing changes."""
        kept = self
        while True:
            item_events = np.bincount(kept.items, minlength=kept.num_items)
            few = np.repeat(kept.lengths < max(min_user_events, 1), kept.lengths) | (item_events < min_item_events)[kept.items]
            if not few.any() and kept.lengths.all() and item_events.all():
                return kept
            kept = kept.keep(~few)

    def duplicates(self) -> np.ndarray:
        """(T,) True for events that an earlier one equals in user, item and time; never without times."""
        again = np.zeros(len(self.items), dtype=bool)
        if self.times is None or len(again) < 2:
            return again
        moment = np.append(0, np.cumsum((np.diff(self.times) != 0) | (np.diff(self.owners) != 0)))  # of one user, at one time
        crowded = np.flatnonzero(np.bincount(moment)[moment] > 1)
        key = moment[crowded] * self.num_items + self.items[crowded]
        order = np.argsort(key, kind="stable")
        again[crowded[order[1:]][key[order[1:]] == key[order[:-1]]]] = True
        return again

    def collapsed(self) -> "Histories":
        """Of consecutive events of a user with the same item, only the first is kept."""
        first = np.ones(len(self.items), dtype=bool)
        first[1:] = self.items[1:] != self.items[:-1]
        first[self.offsets[:-1][self.lengths > 0]] = True
        return self.keep(first)

    def pairs(self) -> int:
        """Number of different pairs of user and item."""
        key = self.owners * max(self.num_items, 1) + self.items
        key.sort()  # np.unique hashes, which takes a hundred times as long for twenty million events
        return int(np.count_nonzero(key[1:] != key[:-1])) + min(len(key), 1)

    def repeat_share(self) -> float:
        """Share of the events whose item occurs earlier in the same history."""
        return 1 - self.pairs() / max(len(self.items), 1)

    def repeats(self) -> bool:
        """Whether users take items again, which means in more than 1 % of the events: a few repeated lines are no habit."""
        return self.repeat_share() > 0.01

    def numbered_as(self, item_ids: "np.ndarray | Index") -> tuple["Histories", int]:
        """These histories with items numbered as in `item_ids` (a model's catalogue), and the number of events that are dropped
        because their item is not in it. All users are kept, some perhaps with an empty history."""
        index = item_ids if isinstance(item_ids, Index) else Index(item_ids)
        renumbered = index.find(self.item_ids)
        item = renumbered[self.items] if len(renumbered) else self.items
        known = item >= 0
        times = None if self.times is None else self.times[known]
        numbered = replace(self, items=item[known], offsets=sums(known)[self.offsets], item_ids=index.ids, times=times)
        return numbered, int((~known).sum())


def first_again(numbers: np.ndarray) -> int | None:
    """The first place of a number that occurs before; numbers are 0, 1, ... in the order of their first appearance, or negative."""
    numbers = np.where(numbers < 0, np.arange(len(numbers)) + len(numbers), numbers)
    again = np.ones(len(numbers), dtype=bool)
    again[np.unique(numbers, return_index=True)[1]] = False
    return int(again.argmax()) if again.any() else None


def sums(counts: np.ndarray) -> np.ndarray:
    """(n + 1,) sums of the first 0..n counts: the start of each of n parts, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(counts)])


def spans(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions start .. start + length - 1 of every span, one span after another, and the spans' offsets: (T,), (B + 1,)."""
    cu_seqlens = sums(length)
    return np.arange(cu_seqlens[-1]) + np.repeat(start - cu_seqlens[:-1], length), cu_seqlens
