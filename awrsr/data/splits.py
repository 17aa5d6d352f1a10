"""Which events of histories are for training, validation and test.

U users, N items of the catalogue, M targets.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from .histories import Histories, spans, sums
from .ids import Index, as_column, as_texts, many, number, warn
from .tables import Names, histories_of
from .times import moment

SPLITS = ("leave-one-out", "last-n", "time", "none")


@dataclass(frozen=True)
class Split:
    """Histories divided into training, validation and test, by (U,) positions within each history.

    The first `train_end` events of a user train the model. The events from there to `validation_end` are validation targets, and
    those after it are test targets. A target is predicted from all events before it. names: of the columns of a table, if they came
    in one.
    """

    histories: Histories
    train_end: np.ndarray
    validation_end: np.ndarray
    names: Names | None = None

    @classmethod
    def of_parts(cls, training: Histories, validation: Histories | None = None, test: Histories | None = None) -> "Split":
        """From parts that were divided before. A user's events are those of training, then those of validation, then those of test;
        ids mean the same in all parts. Warns if times say otherwise."""
        parts = [part for part in (training, validation, test) if part is not None]
        (user_ids, users), (item_ids, items) = (_joined([getattr(p, f"{role}_ids") for p in parts]) for role in ("user", "item"))
        user = np.concatenate([place[part.owners] for place, part in zip(users, parts, strict=True)])
        item = np.concatenate([place[part.items] for place, part in zip(items, parts, strict=True)])
        order = np.argsort(user, kind="stable")
        times = np.concatenate([part.times for part in parts])[order] if all(p.times is not None for p in parts) else None  # type: ignore[misc]
        ends = [np.bincount(place[part.owners], minlength=len(user_ids)) for place, part in zip(users, parts, strict=True)]
        train_end, validating = ends[0], ends[1] if validation is not None else 0
        joined = Histories(item[order], sums(np.bincount(user, minlength=len(user_ids))), item_ids, user_ids, times)
        if times is not None and (back := int(((np.diff(times) < 0) & (np.diff(joined.owners) == 0)).sum())):
            warn(f"{many(back, 'user')} have events of validation or test that are older than events of an earlier part")
        return cls(joined, train_end, train_end + validating)

    def __repr__(self) -> str:
        validation, test = (len(self.targets(part)[0]) for part in ("validation", "test"))
        parts = f"{self.train_end.sum():,} for training, {validation:,} for validation, {test:,} for test"
        return f"Split({self.histories!r}: {parts})"

    def fingerprint(self) -> str:
        """A digest; equal splits of equal histories have the same."""
        h = self.histories
        digest = hashlib.sha256()
        for part in (h.items, h.offsets, self.train_end, self.validation_end):
            digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        for ids in (h.item_ids, h.user_ids):
            digest.update("\n".join(map(str, ids.tolist())).encode())
        return digest.hexdigest()[:16]

    def numbered_as(self, item_ids: "np.ndarray | Index") -> tuple["Split", int]:
        """Like `Histories.numbered_as`. A dropped event is no longer a target, and no other event replaces it."""
        h, index = self.histories, item_ids if isinstance(item_ids, Index) else Index(item_ids)
        numbered, unknown = h.numbered_as(index)
        if not unknown:
            return replace(self, histories=numbered), 0
        known = sums((index.find(h.item_ids) >= 0)[h.items])  # known events before each one
        ends = [known[h.offsets[:-1] + end] - known[h.offsets[:-1]] for end in (self.train_end, self.validation_end)]
        return Split(numbered, ends[0], ends[1], self.names), unknown

    def before_test(self) -> Histories:
        """The histories without test events, and without users and items that have no others."""
        h = self.histories
        position = np.arange(len(h.items)) - np.repeat(h.offsets[:-1], h.lengths)
        return h.keep(position < np.repeat(self.validation_end, h.lengths))

    def trained_items(self) -> np.ndarray:
        """(N,) int64: events of each item among those that train the model."""
        h = self.histories
        position = np.arange(len(h.items)) - np.repeat(h.offsets[:-1], h.lengths)
        return np.bincount(h.items[position < np.repeat(self.train_end, h.lengths)], minlength=h.num_items)

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
    histories: Any,
    how: str = "leave-one-out",
    *,
    n: int = 1,
    validation_from: Any = None,
    test_from: Any = None,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
) -> Split:
    """Divide histories into training, validation and test.

    Args:
        histories: of all users, in any form that `AWRSR.fit` takes.
        how: "leave-one-out": the last event is the test target, the one before it the validation target (Kang and McAuley, SASRec,
            2018). "last-n": the same with n events each. If this would leave no event of a user for training, all are used for
            training. "time": events of all users from `validation_from` on are for validation, those from `test_from` on for test.
            "none": all events are for training, for a model that is to be used rather than evaluated.
        n: events of each user for validation, and as many for test, with "last-n".
        validation_from, test_from: two moments, with "time": numbers in the unit of the histories' times, or dates (objects or ISO
            8601 text). Without validation_from, as many events before test_from are for validation as there are for test.
        user, item, time: names of a table's columns, as for `AWRSR.fit`.

    Raises:
        ValueError: `how` is unknown; "time" without times, without test_from, or with moments that do not increase or are dates
            where times are not; n is below 1; nothing is left for one of the parts.
    """
    if how not in SPLITS:
        raise ValueError(f"split is {how!r}, must be one of {', '.join(SPLITS)}")
    histories, names = histories_of(histories, user=user, item=item, time=time)
    lengths = histories.lengths
    if how == "none":
        return Split(histories, lengths, lengths, names)
    if how == "time":
        if histories.times is None:
            raise ValueError('split is "time", which needs a file with a time column; this one has no times')
        test_from = moment("test_from", test_from, histories.times)
        validation_from = moment("validation_from", validation_from, histories.times)
        if validation_from is None and test_from is not None:
            validation_from = _as_many_before(test_from, histories.times)
            if validation_from is None:
                run = f"{histories.times.min():.15g} to {histories.times.max():.15g}"
                raise ValueError(f"test_from is {test_from:.15g}, but times run from {run}; it must lie between them")
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
    parts = Split(histories, train_end.astype(np.int64), validation_end.astype(np.int64), names)
    for part in ("training", "validation", "test"):
        if not (train_end.any() or not len(lengths) if part == "training" else len(parts.targets(part)[0])):
            span = "" if how != "time" else f", and times run from {histories.times.min():.15g} to {histories.times.max():.15g}"  # type: ignore[union-attr]
            longest = f"the longest history has {lengths.max(initial=0)} events"
            raise ValueError(f"split {how!r} leaves nothing for {part}: {longest}{span}")
    return parts


def time_folds(
    histories: Any,
    n: int = 3,
    *,
    length: float | None = None,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
) -> list[Split]:
    """Splits whose tests follow one another in time, each trained on all that came before: cross-validation for data that change.

    Args:
        histories: of all users, in any form that `AWRSR.fit` takes, with times.
        n: number of splits, the earliest first.
        length: of each test, in the unit of times (seconds, if they were dates). By default the tests together take the last half
            of the time. Validation has as many events before each test as there are in it.
        user, item, time: names of a table's columns, as for `AWRSR.fit`.

    Raises:
        ValueError: there are no times; n is below 1; the tests are longer than the time; a part has no events.
    """
    events, names = histories_of(histories, user=user, item=item, time=time)
    if events.times is None:
        raise ValueError("time_folds needs times; these histories have none")
    if n < 1:
        raise ValueError(f"n is {n}, must be 1 or more splits")
    first, last = float(events.times.min()), float(events.times.max())
    length = (last - first) / (2 * n) if length is None else length
    if not 0 < n * length < last - first:
        run = f"{first:.15g} to {last:.15g}"
        raise ValueError(f"{many(n, 'test')} of length {length:.15g} must be shorter than the time from {run}")
    folds = []
    for back in range(n, 0, -1):
        begin, end = last - back * length, last - (back - 1) * length
        known = events.keep(events.times <= end)
        folds.append(replace(split(known, "time", test_from=np.nextafter(begin, np.inf)), names=names))
    return folds


def _as_many_before(test_from: float, times: np.ndarray) -> float | None:
    """The moment from which on there are as many events before `test_from` as from it on; if there are fewer, half of them."""
    before = np.sort(times[times < test_from])
    count = min(len(times) - len(before), len(before) // 2)
    return float(before[-count]) if count else None


def _joined(ids: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The distinct ids of several parts, in the order of their first appearance, and the place of each part's ids among them."""
    whole = all(each.dtype.kind == "i" for each in ids)
    columns = [as_column(each) if whole else pl.Series(as_texts(each), dtype=pl.String) for each in ids]
    distinct, places = number(pl.concat([column.alias("id") for column in columns]))
    return distinct, np.split(places, np.cumsum([len(each) for each in ids])[:-1])
