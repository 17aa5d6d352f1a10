"""Histories as flat arrays: what users did, in time order, and which events are for training, validation and test.

U users, N items of the catalogue, T events of all users.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Integral, Real
from typing import Any

import numpy as np
import polars as pl

from ..processes import forked

SPLITS = ("leave-one-out", "last-n", "time", "none")


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
    def from_events(cls, users: Any, items: Any, times: Any = None) -> "Histories":
        """From parallel columns of T values: arrays, lists, or columns of a table with any index.

        Args:
            users, items: ids, as in `from_lists`; they are numbered in the order of their first appearance.
            times: numbers or datetime64, which become seconds since 1970. Each user's events are sorted by time, and keep their
                order if times are equal or not given.

        Raises:
            TypeError: ids are neither numbers nor text, or times are neither numbers nor datetime64.
            ValueError: columns have different lengths, or a value is missing.
        """
        users, items = _column("user", users), _column("item", items)
        times = None if times is None else _moments(times)
        lengths = {"users": len(users), "items": len(items)} | ({} if times is None else {"times": len(times)})
        if len(set(lengths.values())) > 1:
            got = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise ValueError(f"columns must be equally long, with one value per event: {got}")
        user_ids, user = number(users)
        item_ids, item = number(items)
        order = np.argsort(user, kind="stable") if times is None else np.lexsort((times, user))
        offsets = sums(np.bincount(user, minlength=len(user_ids)))
        return cls(item[order], offsets, item_ids, user_ids, None if times is None else times[order])

    @classmethod
    def from_lists(cls, histories: "Histories | Mapping[Any, Sequence[Any]] | Iterable[Sequence[Any]]") -> "Histories":
        """From a sequence of item ids per user: a mapping user id -> items, or a list of lists (users are then 0, 1, ...).

        Ids may be of any type. Whole numbers that fit int64 stay numbers (7.0 becomes 7), and so do floats. All other ids, and ids
        of several types, become text.

        Raises:
            TypeError: an entry is not a sequence of ids.
            ValueError: an id is missing (None or NaN).
        """
        if isinstance(histories, Histories):
            return histories
        if isinstance(histories, str) or hasattr(histories, "columns"):
            raise TypeError(
                f"histories is of type {type(histories).__name__}, must be a mapping or lists of item ids; "
                "awrsr.read(path) reads a file, Histories.from_events(users, items, times) takes columns"
            )
        pairs = histories if isinstance(histories, Mapping) else dict(enumerate(histories))
        for user, items in pairs.items():
            if isinstance(items, str | bytes) or not isinstance(items, Iterable):
                raise TypeError(f"history of user {user!r} is {items!r}, must be a sequence of item ids")
        lists = [items.tolist() if isinstance(items, np.ndarray) else list(items) for items in pairs.values()]
        item_ids, item = number(_one_type("item", list(chain.from_iterable(lists))))
        return cls(item, sums(np.array([len(items) for items in lists], dtype=np.int64)), item_ids, _one_type("user", list(pairs)))

    def keep(self, events: np.ndarray) -> "Histories":
        """Only the events that are True in the (T,) boolean `events`. Users and items without events are dropped."""
        users, counts = np.unique(self.owners[events], return_counts=True)
        items, item = np.unique(self.items[events], return_inverse=True)
        times = None if self.times is None else self.times[events]
        return Histories(item, sums(counts), self.item_ids[items], self.user_ids[users], times)

    def core(self, min_user_events: int = 1, min_item_events: int = 1) -> "Histories":
        """The k-core: drops users and items with fewer events, and repeats that until nothing changes."""
        kept = self
        while True:
            item_events = np.bincount(kept.items, minlength=kept.num_items)
            few = np.repeat(kept.lengths < max(min_user_events, 1), kept.lengths) | (item_events < min_item_events)[kept.items]
            if not few.any() and kept.lengths.all() and item_events.all():
                return kept
            kept = kept.keep(~few)

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

    def numbered_as(self, item_ids: np.ndarray) -> tuple["Histories", int]:
        """These histories with items numbered as in `item_ids` (a model's catalogue), and the number of events that are dropped
        because their item is not in it. All users are kept, some perhaps with an empty history."""
        index = {key: i for i, key in enumerate(item_ids.astype(str).tolist())}  # so that the number 7 equals the text "7"
        renumbered = np.array([index.get(key, -1) for key in self.item_ids.astype(str).tolist()], dtype=np.int64)
        item = renumbered[self.items] if len(renumbered) else self.items
        known = item >= 0
        times = None if self.times is None else self.times[known]
        numbered = replace(self, items=item[known], offsets=sums(known)[self.offsets], item_ids=item_ids, times=times)
        return numbered, int((~known).sum())


def sums(counts: np.ndarray) -> np.ndarray:
    """(n + 1,) sums of the first 0..n counts: the start of each of n parts, and the end of the last one."""
    return np.concatenate([[0], np.cumsum(counts)])


def number(ids: np.ndarray | pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids in the order of their first appearance, and the index of each entry's id among them."""
    column = pl.Series("id", ids)
    unique = column.unique(maintain_order=True)
    distinct = np.array(unique.to_list(), dtype=np.str_) if unique.dtype == pl.String else unique.to_numpy()
    if len(ids) and distinct.dtype == np.int64:
        low, span = int(distinct.min()), int(distinct.max()) - int(distinct.min()) + 1
        if span < 2 * len(ids) + 1000:  # a table is several times as fast as a join
            table = np.empty(span, dtype=np.int64)
            table[distinct - low] = np.arange(len(distinct))
            return distinct, table[column.to_numpy() - low]
    if forked():
        place = {key: i for i, key in enumerate(unique.to_list())}
        return distinct, np.array([place[key] for key in column.to_list()], dtype=np.int64)
    index = pl.DataFrame(column).join(pl.DataFrame(unique).with_row_index(), on="id", how="left", maintain_order="left")["index"]
    return distinct, index.to_numpy().astype(np.int64)


def _column(role: str, ids: Any) -> np.ndarray | pl.Series:
    """(T,) ids of one type, from any container, in its order; a table's index is ignored."""
    if isinstance(ids, pl.Series) and ids.dtype == pl.String and not ids.null_count():
        return ids
    if isinstance(ids, list | tuple):
        return _one_type(role, list(ids))  # numpy would turn 2**53 + 1 and 0.5 into floats
    values = np.asarray(ids)
    if values.ndim != 1:
        raise ValueError(f"{role}s are of shape {values.shape}, must be (T,), one id per event")
    return values if values.dtype == np.int64 or values.dtype.kind == "U" else _one_type(role, values.tolist())


def _moments(times: Any) -> np.ndarray:
    """(T,) times as numbers; dates become seconds since 1970."""
    values = np.asarray(times)
    if values.ndim != 1:
        raise ValueError(f"times are of shape {values.shape}, must be (T,), one time per event")
    if values.dtype.kind == "M":
        missing, values = np.isnat(values), values.astype("datetime64[us]").astype(np.int64) / 1e6
    elif values.dtype.kind in "iuf":
        missing = np.isnan(values)
    else:
        raise TypeError(f"times are of type {values.dtype}, must be numbers or datetime64 without a time zone")
    if missing.any():
        raise ValueError(f"times[{int(missing.argmax())}] is missing, must be a number or a date")
    return values


def _one_type(role: str, ids: list[Any]) -> np.ndarray:
    """Ids as an array of int64, float64 or text."""
    kinds = set(map(type, ids))
    for kind in kinds:
        if kind is not str and issubclass(kind, Collection) and not issubclass(kind, str | bytes):
            raise TypeError(f"{role} id is {next(x for x in ids if type(x) is kind)!r}, must be a number or text")
    missing = [x for x in ids if x is None or x != x] if any(not issubclass(kind, str | int) for kind in kinds) else []
    if missing:
        raise ValueError(f"{role} id is {missing[0]!r}, must be a number or text")
    if all(issubclass(kind, Integral) for kind in kinds):
        try:
            return np.array(ids if kinds <= {int} else [int(x) for x in ids], dtype=np.int64)
        except OverflowError:  # beyond int64; numpy would use floats, which cannot tell neighbours apart
            pass
    elif all(issubclass(kind, Real) for kind in kinds):
        if all(isinstance(x, Integral) or float(x).is_integer() for x in ids):
            return _one_type(role, [int(x) for x in ids])  # tables with gaps write 7 as 7.0
        if all(issubclass(kind, float) for kind in kinds):
            return np.array(ids, dtype=np.float64)
    return np.array([str(x) for x in ids], dtype=np.str_)


@dataclass(frozen=True)
class Split:
    """Histories divided into training, validation and test, by (U,) positions within each history.

    The first `train_end` events of a user train the model. The events from there to `validation_end` are validation targets, and
    those after it are test targets. A target is predicted from all events before it.
    """

    histories: Histories
    train_end: np.ndarray
    validation_end: np.ndarray

    def fingerprint(self) -> str:
        """A digest; equal splits of equal histories have the same."""
        h = self.histories
        digest = hashlib.sha256()
        for part in (h.items, h.offsets, self.train_end, self.validation_end):
            digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        for ids in (h.item_ids, h.user_ids):
            digest.update("\n".join(map(str, ids.tolist())).encode())
        return digest.hexdigest()[:16]

    def numbered_as(self, item_ids: np.ndarray) -> tuple["Split", int]:
        """Like `Histories.numbered_as`. A dropped event is no longer a target, and no other event replaces it."""
        h = self.histories
        numbered, unknown = h.numbered_as(item_ids)
        if not unknown:
            return replace(self, histories=numbered), 0
        known = sums(np.isin(h.item_ids.astype(str), item_ids.astype(str))[h.items])  # known events before each one
        ends = (known[h.offsets[:-1] + end] - known[h.offsets[:-1]] for end in (self.train_end, self.validation_end))
        return Split(numbered, *ends), unknown

    def trained_items(self) -> np.ndarray:
        """(N,) bool: items with an event among those that train the model."""
        h = self.histories
        position = np.arange(len(h.items)) - np.repeat(h.offsets[:-1], h.lengths)
        return np.bincount(h.items[position < np.repeat(self.train_end, h.lengths)], minlength=h.num_items) > 0

    def targets(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """(M,) users and (M,) positions of the targets of "validation" or "test" that have an event before them."""
        parts = {"validation": (self.train_end, self.validation_end), "test": (self.validation_end, self.histories.lengths)}
        if part not in parts:
            raise ValueError(f"part is {part!r}, must be validation or test")
        starts, ends = parts[part]
        counts = ends - starts
        users = np.repeat(np.arange(len(counts)), counts)
        places, _ = spans(starts, counts)
        return users[places > 0], places[places > 0]


def split(
    histories: Histories,
    how: str = "leave-one-out",
    *,
    n: int = 1,
    validation_from: float | None = None,
    test_from: float | None = None,
) -> Split:
    """Divide histories into training, validation and test.

    Args:
        histories: of all users.
        how: "leave-one-out": the last event is the test target, the one before it the validation target (Kang and McAuley, SASRec,
            2018). "last-n": the same with n events each. If this would leave no event of a user for training, all are used for
            training. "time": events of all users from `validation_from` on are for validation, those from `test_from` on for test.
            "none": all events are for training, for a model that is to be used rather than evaluated.
        n: events of each user for validation, and as many for test, with "last-n".
        validation_from, test_from: two moments in the unit of the histories' times, with "time".

    Raises:
        ValueError: `how` is unknown; "time" without times, or without two increasing times; n is below 1; no target is left.
    """
    if how not in SPLITS:
        raise ValueError(f"split is {how!r}, must be one of {', '.join(SPLITS)}")
    lengths = histories.lengths
    if how == "none":
        return Split(histories, lengths, lengths)
    if how == "time":
        if histories.times is None:
            raise ValueError('split is "time", which needs a file with a time column; this one has no times')
        if validation_from is None or test_from is None or not validation_from < test_from:
            raise ValueError(
                f"split by time needs validation_from < test_from, got validation_from={validation_from}, test_from={test_from}"
            )
        owners = histories.owners
        train_end = np.bincount(owners[histories.times < validation_from], minlength=len(lengths))
        validation_end = np.bincount(owners[histories.times < test_from], minlength=len(lengths))
    else:
        n = 1 if how == "leave-one-out" else n
        if n < 1:
            raise ValueError(f"n is {n}, must be 1 or more events per user")
        enough = lengths > 2 * n
        train_end = np.where(enough, lengths - 2 * n, lengths)
        validation_end = np.where(enough, lengths - n, lengths)
    parts = Split(histories, train_end.astype(np.int64), validation_end.astype(np.int64))
    for part in ("validation", "test"):
        if not len(parts.targets(part)[0]):
            span = "" if how != "time" else f", and times run from {histories.times.min():.12g} to {histories.times.max():.12g}"  # type: ignore[union-attr]
            longest = f"the longest history has {lengths.max(initial=0)} events"
            raise ValueError(f"split {how!r} leaves nothing for {part}: {longest}{span}")
    return parts


def spans(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions start .. start + length - 1 of every span, one span after another, and the spans' offsets: (T,), (B + 1,)."""
    cu_seqlens = sums(length)
    return np.arange(cu_seqlens[-1]) + np.repeat(start - cu_seqlens[:-1], length), cu_seqlens
