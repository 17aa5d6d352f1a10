"""The recall task: histories with planted dependencies of higher order, and the answers.

What followed the last earlier occurrence of the current item follows again, unless noise breaks the rule. To see it a model must
compose two steps: from the current item to where it occurred before, and from there to its successor.

U users, T events, M targets; L length of a history, N items of the catalogue.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic
from ..options import check, option
from .histories import Histories

BLOCK = 1 << 15  # users drawn at a time; another size would draw other histories from the same seed


@dataclass(frozen=True)
class RecallTask:
    """Options of the recall task. By default there are few items, all equally likely, that come back often, and little noise. A
    model with one refined layer then learns the rule in a minute on a CPU, and nothing else predicts the next item.

    1 - noise is the best possible HR@1 on planted answers. With a small gap, histories can fall into short cycles, in which "the
    item k steps back" predicts the next item without any recall.
    """

    users: int = option(4000, "Number of users.", least=1)
    items: int = option(24, "Number of items in the catalogue.", least=1)
    length: int = option(40, "Number of events of each user.", least=1)
    noise: float = option(0.1, "Probability that an event breaks the rule.", least=0, most=1)
    popularity: float = option(0.0, "Exponent of the popularity law (Zipf); 0 makes all items equally popular.", least=0, most=10)
    gap: int = option(
        4, "Number of a user's latest events whose items are never drawn at random. The rule may still repeat these items.", least=1
    )
    seed: int = option(0, "Random seed.", least=0)

    def __post_init__(self) -> None:
        check(self)
        if self.items < self.gap + 2:
            least = f"{self.gap + 2} or more: gap {self.gap} rules out that many recent items, and the answer"
            raise ValueError(f"items is {self.items}, must be {least}")


def make(**options: Any) -> Histories:
    """Make histories of the recall task. Options are the fields of `RecallTask`; equal options give equal histories, bit for bit.

    Ids of users are 1..U and those of items 1..N; the catalogue of the result has only items that occur. If nothing is recalled, an
    item is drawn by Zipf's law, but not one of the last `gap` events.

    Raises:
        ValueError: a number out of range, with the range.
    """
    task = RecallTask(**options)
    rng = np.random.default_rng(task.seed)
    chances = np.cumsum(np.arange(1, task.items + 1, dtype=np.float64) ** -task.popularity)
    blocks = [_block(rng, min(BLOCK, task.users - start), chances / chances[-1], task) for start in range(0, task.users, BLOCK)]
    events = np.concatenate(blocks).ravel()
    return Histories.from_events(np.repeat(np.arange(1, task.users + 1), task.length), events + 1)


def _block(rng: np.random.Generator, users: int, chances: np.ndarray, task: RecallTask) -> np.ndarray:
    """(users, L) items, drawn position by position for all users at once."""
    drawn = np.empty((users, task.length), dtype=np.int64)
    for position in range(task.length):
        answer = _followers(drawn, position)
        recalled = (answer >= 0) & (rng.random(users) >= task.noise)
        drawn[:, position] = np.where(recalled, answer, _fresh(rng, users, chances))
        while True:
            recent = (drawn[:, max(position - task.gap, 0) : position] == drawn[:, position, None]).any(axis=1)
            again = np.flatnonzero(~recalled & (recent | (drawn[:, position] == answer)))
            if not len(again):
                break
            drawn[again, position] = _fresh(rng, len(again), chances)
    return drawn


def _fresh(rng: np.random.Generator, count: int, chances: np.ndarray) -> np.ndarray:
    return np.searchsorted(chances, rng.random(count), side="right").clip(max=len(chances) - 1)


def _followers(rows: np.ndarray, position: int) -> np.ndarray:
    """(U,) what followed the last earlier occurrence of rows[:, position - 1], -1 where there is none. rows: (U, L)."""
    if position < 2:
        return np.full(len(rows), -1, dtype=np.int64)
    earlier = rows[:, : position - 1] == rows[:, position - 1, None]
    last = position - 2 - earlier[:, ::-1].argmax(axis=1)
    return np.where(earlier.any(axis=1), rows[np.arange(len(rows)), last + 1], -1)


def recall_answer(histories: Histories, users: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(M,) items that the rule predicts at positions `places` in the histories of `users`: what followed the last earlier
    occurrence of the item before; -1 if there is none. These are the planted answers of `make`, and predictions for any histories
    with repeats.

    Raises:
        ValueError: a position is beyond the history. The position after the last event is allowed, and stands for the next event.
    """
    users, places = np.asarray(users, dtype=np.int64), np.asarray(places, dtype=np.int64)
    beyond = (places < 0) | (places > histories.lengths[users])
    if beyond.any():
        m = int(beyond.argmax())
        raise ValueError(f"places[{m}] is {places[m]}, must be from 0 to {histories.lengths[users[m]]}, the length of that history")
    key = histories.owners * max(histories.num_items, 1) + histories.items
    order = np.argsort(key, kind="stable")
    repeated = key[order[1:]] == key[order[:-1]]
    earlier = np.full(len(key), -1, dtype=np.int64)  # (T,) the previous event with the same user and item
    earlier[order[1:][repeated]] = order[:-1][repeated]
    answer = np.full(len(users), -1, dtype=np.int64)
    inside = np.flatnonzero(places > 0)
    before = earlier[histories.offsets[users[inside]] + places[inside] - 1]
    answer[inside[before >= 0]] = histories.items[before[before >= 0] + 1]
    return answer


def write(histories: Histories, path: str | os.PathLike[str]) -> Path:
    """Write a file in the format "lines". It appears only when it is complete.

    Raises:
        ValueError: an id that is empty or contains blanks; a user without events.
    """
    path = Path(path)
    for role, ids in (("user", histories.user_ids), ("item", histories.item_ids)):
        bad = next((key for key in ids.tolist() if not re.fullmatch(r"[^\s\x00-\x1f\x7f]+", str(key))), None)
        if bad is not None:
            raise ValueError(f"{role} id is {bad!r}; a file of lines cannot hold an id that is empty or has blanks")
    if (histories.lengths == 0).any():
        user = histories.user_ids[int((histories.lengths == 0).argmax())]
        raise ValueError(f"user {user} has no events; a file of lines cannot hold such a user")
    words = np.array(list(map(str, histories.item_ids.tolist())), dtype=object)
    with atomic(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        for user, key in enumerate(histories.user_ids.tolist()):
            file.write(f"{key} {' '.join(words[histories.of(user)].tolist())}\n")
    return path
