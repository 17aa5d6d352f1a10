"""What a model must beat: ranks of the same targets by counts of training events, which take seconds and no training.

N items, M targets, n pairs of items that follow one another.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..data.histories import spans, sums
from ..data.splits import Split
from ..data.synthetic import recall_answer
from .ranking import METRICS, Evaluation, metrics

BASELINES = "baselines"  # in metrics.json: part -> baseline -> its metrics
POPULARITY, MARKOV, LAST_TIME = "popularity", "Markov chain", "last time"
EVENTS = 1 << 22  # seen events that are looked at together


class Counts:
    """How often items occur in training events, and how often they follow each other there.

    A Markov chain of first order ranks what followed the current item by how often it did, and everything else below; what is equal
    there, by how often it occurs. So the key of item i after item c is (times that i followed c, events of i).
    """

    def __init__(self, split: Split) -> None:
        h = split.histories
        self.size = size = h.num_items
        self.uses = split.trained_items()
        self.most = int(self.uses.max(initial=0)) + 1
        trains = np.arange(len(h.items)) - np.repeat(h.offsets[:-1], h.lengths) < np.repeat(split.train_end, h.lengths)
        follows = trains[1:] & trains[:-1] & (h.owners[1:] == h.owners[:-1])
        codes = (h.items[:-1] * size + h.items[1:])[follows]
        codes.sort()
        first = np.flatnonzero(np.diff(codes, prepend=-1))
        self.codes, self.counts = codes[first], np.diff(np.append(first, len(codes)))
        before, after = np.divmod(self.codes, max(size, 1))
        self.starts = sums(np.bincount(before, minlength=size))  # of the pairs of each first item
        key = self.counts * self.most + self.uses[after]
        self.levels, level = np.unique(key, return_inverse=True)
        self.rows_by_key = np.sort(before * len(self.levels) + level)
        self.rows_by_use = np.sort(before * self.most + self.uses[after])
        self.by_use = np.sort(self.uses)

    def keys(self, current: np.ndarray, items: np.ndarray) -> np.ndarray:
        """The keys of items after the current ones, as single numbers."""
        code = current * self.size + items
        at = np.searchsorted(self.codes, code).clip(max=max(len(self.codes) - 1, 0))
        count = np.where(self.codes[at] == code, self.counts[at], 0) if len(self.codes) else np.zeros(len(code), dtype=np.int64)
        return count * self.most + self.uses[items]

    def at_least_as_used(self, items: np.ndarray) -> np.ndarray:
        """How many items occur as often as each of these, or more often."""
        return self.size - np.searchsorted(self.by_use, self.uses[items])

    def at_least(self, current: np.ndarray, items: np.ndarray) -> np.ndarray:
        """How many items have a key as large as each of these, or larger."""
        key, end = self.keys(current, items), self.starts[current + 1]
        level = np.searchsorted(self.levels, key)
        among = end - np.searchsorted(self.rows_by_key, current * len(self.levels) + level)
        fewer = np.searchsorted(self.rows_by_use, current * self.most + self.uses[items]) - self.starts[current]
        return np.where(key >= self.most, among, self.at_least_as_used(items) + fewer)


    def best_after(self, current: int) -> np.ndarray:
        """The items that followed this one, by their keys, the best first; among equal ones the first of the catalogue."""
        pairs = slice(self.starts[current], self.starts[current + 1])
        after = self.codes[pairs] % self.size
        return after[np.lexsort((after, -self.uses[after], -self.counts[pairs]))]


class Asked(NamedTuple):
    """(M,) targets: the item, the one before it, and what followed that last time in the same history, -1 if nothing did."""

    items: np.ndarray
    current: np.ndarray
    answer: np.ndarray


def baselines(
    split: Split, ranked: Evaluation, filter_seen: bool, names: tuple[str, ...] = METRICS
) -> dict[str, dict[str, float]]:
    """The metrics of each baseline on the targets of an evaluation."""
    return {name: metrics(each, names) for name, each in baseline_ranks(split, ranked, filter_seen).items()}


def baseline_ranks(split: Split, ranked: Evaluation, filter_seen: bool) -> dict[str, np.ndarray]:
    """The ranks that each baseline gives to the targets of an evaluation. As there, ties count against it, and items of the history
    are left out with filter_seen; what followed last time is then one of them, and has no ranks of its own."""
    h, counts = split.histories, Counts(split)
    start = h.offsets[ranked.users]
    asked = Asked(ranked.items, h.items[start + ranked.places - 1], recall_answer(h, ranked.users, ranked.places))
    popular, chain = counts.at_least_as_used(asked.items), counts.at_least(asked.current, asked.items)
    if filter_seen:
        seen_popular, seen_chain, impossible = _seen_above(split, counts, asked, start, ranked.places)
        popular = np.where(impossible, counts.size, popular - seen_popular)
        chain = np.where(impossible, counts.size, chain - seen_chain)
        return {POPULARITY: popular, MARKOV: chain}
    answered = asked.answer >= 0
    its_key = counts.keys(asked.current, asked.answer.clip(min=0))
    moved_up = answered & (its_key < counts.keys(asked.current, asked.items))
    last_time = np.where(answered & (asked.answer == asked.items), 1, chain + moved_up)
    return {POPULARITY: popular, MARKOV: chain, LAST_TIME: last_time}


def _seen_above(
    split: Split, counts: Counts, asked: Asked, start: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(M,) how many items of the history are at least as good as the target by use and by key, and whether it is one of them."""
    h, size = split.histories, counts.size
    popular, chain, impossible = (np.zeros(len(places), dtype=np.int64) for _ in range(3))
    part = np.cumsum(places) // EVENTS
    for first, last in pairwise(np.flatnonzero(np.diff(part, prepend=-1, append=-1))):
        chosen = np.arange(first, last)
        events, _ = spans(start[chosen], places[chosen])
        code = np.repeat(chosen, places[chosen]) * size + h.items[events]
        code.sort()
        target, item = np.divmod(code[np.diff(code, prepend=-1) > 0], size)
        current, wanted = asked.current[target], asked.items[target]
        for total, above in (
            (popular, counts.uses[item] >= counts.uses[wanted]),
            (chain, counts.keys(current, item) >= counts.keys(current, wanted)),
            (impossible, item == wanted),
        ):
            total[first:last] = np.bincount(target[above] - first, minlength=last - first)
    return popular, chain, impossible > 0
