"""Metrics of whole lists: what users were recommended, against all that they took afterwards, and what the lists are like.

U users, K places of a list, N items of the catalogue.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ACCURACY = ("HR", "Recall", "Precision", "MAP", "NDCG", "MRR")
BEYOND = ("Coverage", "Novelty", "Popularity", "Diversity")
NAMES = tuple(f"{name}@10" for name in (*ACCURACY, *BEYOND))
EMPTY = -1  # stands where a list is shorter
PAIRS = 1 << 22  # of items, whose distances are computed together


class Catalogue(NamedTuple):
    """What is known of items. uses: (N,) training events of each. users: (N,) users who have it in their history, of `num_users`.
    vectors: (N, S) of each, by whose cosines items are alike."""

    uses: np.ndarray
    users: np.ndarray
    num_users: int
    vectors: np.ndarray


class Lists(NamedTuple):
    """What was recommended and what was taken. items: (U, K) rows of the catalogue, the best first, EMPTY at the end of shorter
    lists. taken: all that was taken, user by user, without repeats, offsets: where each user's begin, (U + 1,)."""

    items: np.ndarray
    taken: np.ndarray
    offsets: np.ndarray

    def hits(self) -> np.ndarray:
        """(U, K) whether the user took this item."""
        size = int(max(self.items.max(initial=0), self.taken.max(initial=0))) + 1
        keys = np.repeat(np.arange(len(self.items)), np.diff(self.offsets)) * size + self.taken
        own = np.arange(len(self.items))[:, None] * size + self.items
        return np.isin(own, keys) & (self.items != EMPTY)


def list_metric(name: str, lists: Lists, catalogue: Catalogue | None = None) -> np.ndarray:
    """Values of a metric: (U,) one per user, NaN for users to whom it does not apply; (1,) of all lists together for Coverage.

    Args:
        name: with a cut-off k, such as "Recall@10". n is the number of items that the user took.

            * HR: 1 if one of the first k was taken.
            * Recall: those taken of the first k, over n. Precision: over k.
            * MAP: mean over the n taken items of the precision at their place, 0 for those beyond k.
            * NDCG: sum of 1 / log2(1 + place) of taken items, over that of the best list possible, whose first min(k, n) were.
            * MRR: 1 / place of the first taken item, 0 beyond k.
            * Coverage: share of the catalogue that somebody was recommended.
            * Novelty: mean of -log2(share of users who have the item in their history) over the list.
            * Popularity: mean number of training events of its items.
            * Diversity: mean of 1 - cosine over pairs of its items' vectors.
        catalogue: for the last four.

    Raises:
        ValueError: there is no such metric.
    """
    kind, _, cutoff = name.partition("@")
    if kind not in (*ACCURACY, *BEYOND) or not cutoff.isdecimal() or not int(cutoff):
        raise ValueError(f"metric is {name!r}, must be one of {', '.join((*ACCURACY, *BEYOND))} with a cut-off, such as Recall@10")
    k = int(cutoff)
    items = lists.items[:, :k]
    filled = items != EMPTY
    if kind in ACCURACY:
        return _accuracy(kind, k, lists.hits()[:, :k], np.diff(lists.offsets))
    assert catalogue is not None
    if kind == "Coverage":
        return np.array([len(np.unique(items[filled])) / max(len(catalogue.uses), 1)])
    if kind == "Diversity":
        return _diversity(items, catalogue.vectors)
    share = catalogue.users / max(catalogue.num_users, 1)
    values = catalogue.uses if kind == "Popularity" else -np.log2(np.maximum(share, 1 / max(catalogue.num_users, 1)))
    with np.errstate(invalid="ignore"):
        return np.where(filled, values[items], 0).sum(1) / filled.sum(1)


def _accuracy(kind: str, k: int, hits: np.ndarray, taken: np.ndarray) -> np.ndarray:
    place = np.arange(1, hits.shape[1] + 1)
    found = hits.sum(1)
    gain = 1 / np.log2(1.0 + np.arange(1, k + 1))
    best = np.append(0, np.cumsum(gain))
    first = np.where(hits.any(1), hits.argmax(1) + 1, np.inf)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = {
            "HR": lambda: (found > 0) * 1.0,
            "Recall": lambda: found / taken,
            "Precision": lambda: found / k,
            "MAP": lambda: (hits * np.cumsum(hits, 1) / place).sum(1) / taken,
            "NDCG": lambda: hits @ gain[: hits.shape[1]] / best[np.minimum(taken, k)],
            "MRR": lambda: 1 / first,
        }[kind]()
    return np.where(taken > 0, values, np.nan)


def _diversity(items: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """NaN for lists of fewer than two items."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms, norms, 1)
    found = np.full(len(items), np.nan)
    step = max(1, PAIRS // max(items.shape[1], 1) ** 2)
    for first in range(0, len(items), step):
        part = items[first : first + step]
        filled = part != EMPTY
        rows = unit[part] * filled[:, :, None]
        count = filled.sum(1)
        alike = (np.square(rows.sum(1)).sum(1) - np.square(rows).sum((1, 2))) / 2  # sum of the cosines of all pairs
        pairs = count * (count - 1) / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            found[first : first + step] = np.where(pairs > 0, 1 - alike / pairs, np.nan)
    return found


def list_metrics(names: Sequence[str], lists: Lists, catalogue: Catalogue) -> dict[str, float]:
    """Means over the users to whom a metric applies; 0 if it applies to none."""
    found = {name: list_metric(name, lists, catalogue) for name in names}
    return {name: float(np.nanmean(values)) if not np.isnan(values).all() else 0.0 for name, values in found.items()}
