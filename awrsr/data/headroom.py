"""Headroom: how much better the next item is predicted by whoever knows what followed the current item earlier in the same history.

Attention over attention can find that; one plain layer cannot. Mixtures of simple predictors stand for what models with and without
it can learn. Their weights are fitted by expectation maximisation on validation events and judged on test events, in seconds.

    unigram     how often an item is taken, by all users
    bigram      what follows the current item, for all users; blended with the unigram
    trigram     what follows the last two items, for all users; blended with the bigram
    frequency   the user's last WINDOW events, equally
    recency     the same; of two events, the earlier one counts for 0.85 of the later
    successors  what followed the current item in the window: equally, and each earlier time for half
    pairs       what followed the last two items in the window, each earlier time for half

The first five together are "first order". Where the current item did not occur before in the window, successors are the bigram;
where the last two did not, pairs are the successors.

E sampled events, W positions of the window, N items, K predictors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..progress import bar
from .histories import Histories, spans
from .splits import split

WINDOW = 50  # the usual longest input of a model
EVENTS = 6000  # sampled for validation, and as many for test
ENOUGH = 50  # test events; of fewer, no sentence is ventured
PAYS = 0.02  # gain from which lagged refinement is expected to pay: on the study's data it is below 1 % or above 3 %
CUT = 10  # of NDCG
MIXTURES = {"first order": 5, "successors": 7, "pairs": 8}  # how many of the predictors, which are in the order above
MOST = 1000  # followers of a context that are ranked one by one; the rest count by their unigram alone
AT_A_TIME = 1 << 20  # followers ranked together: bounds memory
ITERATIONS = 40


def headroom(histories: Histories, *, holdout: int = 0, progress: bool = False) -> dict[str, Any]:
    """How much the successors in a user's own history add to the prediction of the next item, as plain numbers.

    Args:
        histories: of all users; the last `holdout` events of each are for test, as many before them for validation.
        holdout: by default a tenth of the median length, from 1 to 8.
        progress: show a bar on standard error if it is a terminal and this takes longer than five seconds.

    Returns:
        holdout, window; events: test events, at most EVENTS, sampled with a fixed seed. seen_share: share of them whose current
        item occurs earlier in the window. ndcg, log_loss: a value for each of MIXTURES; all N items are ranked, and ties count
        against. headroom: what successors add to the NDCG@10 of first order, relative to it, and headroom_error, its standard
        error, paired over events; pairs_headroom and pairs_error: the same for pairs. gain, gain_error: those of the larger one.
        pays: whether gain is at least PAYS. What cannot be said, because there are too few events or first order predicts none
        of them, is None.
    """
    holdout = holdout or (int(np.clip(np.median(histories.lengths) // 10, 1, 8)) if histories.num_users else 1)
    result: dict[str, Any] = {"holdout": holdout, "window": WINDOW, "events": 0}
    result |= dict.fromkeys(("seen_share", "headroom", "headroom_error", "pairs_headroom", "pairs_error"))
    result |= dict.fromkeys(("gain", "gain_error", "pays"))
    result |= {"ndcg": dict.fromkeys(MIXTURES), "log_loss": dict.fromkeys(MIXTURES)}
    try:
        parts = split(histories, "last-n", n=holdout)
    except ValueError:  # nothing is left for one of the parts
        return result
    if not histories.num_users:
        return result
    rng = np.random.default_rng(0)
    chosen = [_some(rng, *parts.targets(part)) for part in ("validation", "test")]
    test = np.repeat([False, True], [len(users) for users, _ in chosen])
    users, places = (np.concatenate(each) for each in zip(*chosen, strict=True))
    sample = _Sample(histories, parts.train_end, users, places)
    chances = sample.predictors()
    weights = {name: _weights(chances, ~test, sample.seen, count) for name, count in MIXTURES.items()}
    gains = sample.gains(weights, np.flatnonzero(test), progress)
    first = float(gains["first order"].mean())
    result |= {"events": int(np.count_nonzero(test)), "seen_share": float(sample.seen[test].mean())}
    result["ndcg"] = {name: float(gain.mean()) for name, gain in gains.items()}
    result["log_loss"] = {name: float(-np.log((chances * each).sum(axis=1)[test]).mean()) for name, each in weights.items()}
    if result["events"] >= ENOUGH and first > 0:
        for name, key, error in (("successors", "headroom", "headroom_error"), ("pairs", "pairs_headroom", "pairs_error")):
            more = (gains[name] - gains["first order"]) / first
            result |= {key: float(more.mean()), error: float(more.std() / np.sqrt(len(more)))}
        larger = max(("headroom", "headroom_error"), ("pairs_headroom", "pairs_error"), key=lambda names: result[names[0]])
        result |= {"gain": result[larger[0]], "gain_error": result[larger[1]]}
        result["pays"] = result["gain"] >= PAYS
    return result


def _some(rng: np.random.Generator, users: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most EVENTS of the targets, drawn with equal chances."""
    chosen = np.sort(rng.permutation(len(users))[:EVENTS])
    return users[chosen], places[chosen]


def _weights(chances: np.ndarray, known: np.ndarray, seen: np.ndarray, count: int) -> np.ndarray:
    """(E, K) weights of a mixture of the first `count` predictors, fitted on the events that are `known`, apart for those whose
    current item was seen before and for the others. To the latter successors add nothing: they are first order."""
    weights = np.zeros(chances.shape)
    for which, used in ((seen, count), (~seen, MIXTURES["first order"])):
        enough = np.count_nonzero(known & which) > 5
        weights[which, :used] = _fit(chances[known & which if enough else known, :used])
    return weights


def rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The result of `headroom` as labels and texts."""
    ndcg = {name: "-" if value is None else f"{value:.4f}" for name, value in values["ndcg"].items()}
    seen = "-" if values["seen_share"] is None else f"{100 * values['seen_share']:.1f} %"
    return [
        (f"last {values['holdout']} of each user: events predicted", f"{values['events']:,}"),
        (f"  whose current item is in the {values['window']} before", seen),
        ("  NDCG@10 of first order", ndcg["first order"]),
        ("  with what followed the current item", ndcg["successors"]),
        ("  with what followed the last two items", ndcg["pairs"]),
        ("headroom, and its standard error", _change(values["headroom"], values["headroom_error"])),
        ("  of the last two items", _change(values["pairs_headroom"], values["pairs_error"])),
    ]


def _change(value: float | None, error: float | None) -> str:
    return "-" if value is None or error is None else f"{100 * value:+.1f} %, {100 * error:.1f} %"


def sentence(values: dict[str, Any]) -> str:
    """What the result of `headroom` says about refinement, in plain words."""
    if values["gain"] is None:
        return "Whether refinement pays cannot be said: too few histories are long enough, or nothing in them can be predicted."
    knowing = "knowing what followed the last one or two items earlier in the user's own history"
    gain = f"{knowing} adds {100 * values['gain']:.1f} % to NDCG@10 (standard error {100 * values['gain_error']:.1f} %)"
    if values["pays"]:
        return f"Refinement can be expected to pay: {gain}."
    return f"Refinement cannot be expected to pay: {gain}, less than {100 * PAYS:g} %."


def _fit(chances: np.ndarray) -> np.ndarray:
    """(K,) weights of a mixture of predictors under which the events, whose (E, K) probabilities are given, are most likely."""
    weights = np.full(chances.shape[1], 1 / chances.shape[1])
    for _ in range(ITERATIONS if len(chances) else 0):
        shares = chances * weights
        weights = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    return weights


@dataclass(frozen=True)
class _Followers:
    """How often each item follows each of some contexts: counts sorted by context and item, and the same by context and count."""

    keys: np.ndarray  # context * num_items + item, sorted
    counts: np.ndarray
    starts: np.ndarray  # (contexts + 1,) where the followers of a context begin
    totals: np.ndarray  # (contexts,)
    items: np.ndarray  # of each context, the most frequent first
    uses: np.ndarray
    num_items: int

    @classmethod
    def of(cls, contexts: np.ndarray, before: np.ndarray, items: np.ndarray, num_items: int) -> "_Followers":
        """contexts: sorted numbers, without repeats. before, items: for each event, the number of its context, and its item."""
        place = np.searchsorted(contexts, before)
        wanted = contexts[np.minimum(place, len(contexts) - 1)] == before
        key = np.sort(place[wanted] * num_items + items[wanted])
        first = np.flatnonzero(np.append(True, key[1:] != key[:-1])[: len(key)])
        keys, counts = key[first], np.diff(np.append(first, len(key)))
        context = keys // num_items
        starts = np.searchsorted(context, np.arange(len(contexts) + 1))
        totals = np.bincount(context, counts, minlength=len(contexts))
        order = np.lexsort((-counts, context))
        return cls(keys, counts, starts, totals, keys[order] % num_items, counts[order], num_items)

    def count(self, contexts: np.ndarray, items: np.ndarray) -> np.ndarray:
        """How often each item follows the context next to it."""
        key = contexts * self.num_items + items
        place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        return np.where(self.keys[place] == key, self.counts[place], 0) if len(self.keys) else np.zeros(len(key))

    def sizes(self, contexts: np.ndarray) -> np.ndarray:
        """How many followers of each context are ranked."""
        return np.minimum(self.starts[contexts + 1] - self.starts[contexts], MOST)

    def most(self, contexts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The followers of each context, at most MOST: the position of the context, items, counts."""
        sizes = self.sizes(contexts)
        at, _ = spans(self.starts[contexts], sizes)
        return np.repeat(np.arange(len(contexts)), sizes), self.items[at], self.uses[at]


class _Sample:
    """Sampled events: the windows before them, and what all users' training events say about them."""

    def __init__(self, histories: Histories, train_end: np.ndarray, users: np.ndarray, places: np.ndarray) -> None:
        items, offsets, size = histories.items, histories.offsets, histories.num_items
        at = (offsets[users] + places)[:, None] + np.arange(-WINDOW, 0)
        inside = at >= offsets[users][:, None]
        self.window = np.where(inside, items[np.maximum(at, 0)], -1)  # (E, W), the latest last, -1 before the first
        self.target = items[offsets[users] + places]
        self.size = size
        self.ages = np.where(inside, 0.85 ** np.arange(WINDOW - 1, -1, -1), 0)
        position = np.arange(len(items)) - np.repeat(offsets[:-1], histories.lengths)
        trained = position < np.repeat(train_end, histories.lengths)
        uses = np.bincount(items[trained], minlength=size) + 0.1
        self.unigram = uses / uses.sum()
        self.ladder = np.sort(self.unigram)
        current, last_two = self.window[:, -1], self.window[:, -2] * size + self.window[:, -1]
        singles, self.single = np.unique(current, return_inverse=True)
        doubles, self.double = np.unique(last_two, return_inverse=True)
        second, third = (np.flatnonzero(trained & (position >= back)) for back in (1, 2))
        self.after_one = _Followers.of(singles, items[second - 1], items[second], size)
        self.after_two = _Followers.of(doubles, items[third - 2] * size + items[third - 1], items[third], size)

    @cached_property
    def successors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(E, W) each: 1 where an event of the window follows the current item, and 0.5 ** (times that it does so later); and the
        latter for events that follow the last two items."""
        window = self.window
        one = np.zeros(window.shape, dtype=bool)
        two = one.copy()
        one[:, 1:] = window[:, :-1] == window[:, -1:]
        two[:, 2:] = one[:, 2:] & (window[:, :-2] == window[:, -2:-1])
        later = [each[:, ::-1].cumsum(axis=1)[:, ::-1] - each for each in (one, two)]
        return one.astype(float), one * 0.5 ** later[0], two * 0.5 ** later[1]

    @cached_property
    def seen(self) -> np.ndarray:
        """(E,) whether the current item occurs earlier in the window."""
        return self.successors[0].sum(axis=1) > 0

    @cached_property
    def paired(self) -> np.ndarray:
        """(E,) whether the last two items occur earlier in the window, in this order."""
        return self.successors[2].sum(axis=1) > 0

    def predictors(self) -> np.ndarray:
        """(E, K) probability of the target under each predictor."""
        unigram = self.unigram[self.target]
        bigram = (self.after_one.count(self.single, self.target) + 5 * unigram) / (self.after_one.totals[self.single] + 5)
        trigram = (self.after_two.count(self.double, self.target) + 3 * bigram) / (self.after_two.totals[self.double] + 3)
        hit = self.window == self.target[:, None]
        own = [(hit * each).sum(axis=1) for each in self.own]
        equal, halved = (np.where(self.seen, each, bigram) for each in own[2:4])
        return np.stack([unigram, bigram, trigram, *own[:2], equal, halved, np.where(self.paired, own[4], halved)], axis=1)

    @cached_property
    def own(self) -> list[np.ndarray]:
        """(E, W) shares of the positions of the window: equal, by recency, and three as in `successors`; 0 if there is none."""
        each = [(self.ages > 0) * 1.0, self.ages, *self.successors]
        return [share / np.maximum(share.sum(axis=1, keepdims=True), 1e-9) for share in each]

    def gains(self, weights: dict[str, np.ndarray], events: np.ndarray, progress: bool) -> dict[str, np.ndarray]:
        """NDCG of each of `events` under mixtures with (E, K) weights: 1 / log2(1 + rank) up to rank CUT, otherwise 0."""
        gains = {name: np.zeros(len(events)) for name in weights}
        sizes = self.after_one.sizes(self.single[events]) + self.after_two.sizes(self.double[events]) + WINDOW + 1
        parts = np.cumsum(sizes) // AT_A_TIME
        for part in bar(np.unique(parts), desc="headroom", delay=5, shown=progress, leave=False):
            inside = np.flatnonzero(parts == part)
            for name, rank in self._ranks(weights, events[inside]):
                gains[name][inside] = np.where(rank <= CUT, 1 / np.log2(1 + rank), 0)
        return gains

    def _ranks(self, weights: dict[str, np.ndarray], events: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """The rank of the target of each event. The score of an item is `base` times its unigram, plus what `found` has for it."""
        single, double, window = self.single[events], self.double[events], self.window[events]
        one_at, one_items, one_uses = self.after_one.most(single)
        two_at, two_items, two_uses = self.after_two.most(double)
        own_at, own_place = np.nonzero(window >= 0)
        everyone = np.arange(len(events))
        at = np.concatenate([one_at, two_at, own_at, everyone])
        item = np.concatenate([one_items, two_items, window[own_at, own_place], self.target[events]])
        key, entry = np.unique(at * self.size + item, return_inverse=True)
        at, popular = key // self.size, self.unigram[key % self.size]
        target = entry[-len(events) :]
        ones, twos = self.after_one.totals[single] + 5, self.after_two.totals[double] + 3
        seen, paired = self.seen[events], self.paired[events]
        own = [each[events] for each in self.own]
        for name, all_weights in weights.items():
            w = all_weights[events].T  # (K, E)
            bigram = w[1] + 3 / twos * w[2] + np.where(seen, 0, w[5] + w[6] + w[7])
            of_own = [w[3], w[4], w[5], w[6] + np.where(paired, 0, w[7]), w[7]]
            mine = sum(share[:, None] * each for share, each in zip(of_own, own, strict=True))
            found = [
                (bigram / ones)[one_at] * one_uses,
                (w[2] / twos)[two_at] * two_uses,
                mine[own_at, own_place],
                np.zeros(len(events)),
            ]
            base = w[0] + bigram * 5 / ones
            score = np.bincount(entry, np.concatenate(found), minlength=len(key)) + base[at] * popular
            enough = score[target] * (1 - 1e-9)  # equal sums may differ in their last digits
            rank = np.bincount(at[score >= enough[at]], minlength=len(events))
            bar = enough / np.maximum(base, 1e-300)  # of the unigram, for items that have nothing else
            others = self.size - np.searchsorted(self.ladder, bar) - np.bincount(at[popular >= bar[at]], minlength=len(events))
            yield name, rank + others
