"""Metrics of lists, against those of RecTools and RePlay."""

from typing import Any

import numpy as np
import pytest

rectools = pytest.importorskip("rectools", reason="needs RecTools and RePlay: make test-metrics")
replay = pytest.importorskip("replay", reason="needs RecTools and RePlay: make test-metrics")

import pandas as pd  # noqa: E402
from rectools import metrics as theirs  # noqa: E402
from replay import metrics as replays  # noqa: E402

from awrsr.evaluation.lists import EMPTY, Catalogue, Lists, list_metric  # noqa: E402

USERS, ITEMS, PLACES = 40, 25, 8
pytestmark = pytest.mark.filterwarnings("ignore")


class Problem:
    """Random lists, some of them short, and random events before and after."""

    def __init__(self, seed: int, most: int = 12) -> None:
        draw = np.random.default_rng(seed)
        rows = [draw.permutation(ITEMS)[:PLACES] for _ in range(USERS)]
        self.items = np.stack(rows)
        self.items[:5, 4:] = EMPTY
        taken = [np.sort(draw.permutation(ITEMS)[: draw.integers(1, most)]) for _ in range(USERS)]
        self.lists = Lists(self.items, np.concatenate(taken), np.cumsum([0, *map(len, taken)]))
        self.before = pd.DataFrame({"user_id": draw.integers(USERS, size=600), "item_id": draw.permutation(np.arange(600) % ITEMS)})
        pairs = self.before.drop_duplicates()
        self.vectors = draw.normal(size=(ITEMS, 6))
        self.catalogue = Catalogue(
            np.bincount(self.before["item_id"], minlength=ITEMS), np.bincount(pairs["item_id"], minlength=ITEMS),
            pairs["user_id"].nunique(), self.vectors,
        )  # fmt: skip
        user, place = np.nonzero(self.items != EMPTY)
        self.reco = pd.DataFrame({"user_id": user, "item_id": self.items[user, place], "rank": place + 1, "score": -place * 1.0})
        self.after = pd.DataFrame({"user_id": np.repeat(np.arange(USERS), list(map(len, taken))), "item_id": np.concatenate(taken)})

    def ours(self, name: str, k: int) -> np.ndarray:
        return list_metric(f"{name}@{k}", self.lists, self.catalogue)


class Cosine:
    """RecTools' distance of pairs of items."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def __getitem__(self, pairs: Any) -> np.ndarray:
        first, second = pairs
        return 1 - (self.unit[np.asarray(first)] * self.unit[np.asarray(second)]).sum(1)


@pytest.mark.parametrize("k", [1, 3, PLACES])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_rectools(seed: int, k: int) -> None:
    problem = Problem(seed)
    accuracy = {
        "HR": theirs.HitRate(k), "Recall": theirs.Recall(k), "Precision": theirs.Precision(k), "MAP": theirs.MAP(k),
        "NDCG": theirs.NDCG(k, divide_by_achievable=True), "MRR": theirs.MRR(k),
    }  # fmt: skip
    for name, metric in accuracy.items():
        wanted = metric.calc_per_user(problem.reco, problem.after).sort_index().to_numpy()
        np.testing.assert_allclose(problem.ours(name, k), wanted, rtol=0, atol=1e-9, err_msg=name)
    beyond = {
        "Novelty": theirs.MeanInvUserFreq(k).calc_per_user(problem.reco, problem.before),
        "Popularity": theirs.AvgRecPopularity(k).calc_per_user(problem.reco, problem.before),
    }
    for name, wanted in beyond.items():
        np.testing.assert_allclose(problem.ours(name, k), wanted.sort_index(), rtol=0, atol=1e-9, err_msg=name)
    coverage = theirs.CatalogCoverage(k, normalize=True).calc(problem.reco, catalog=list(range(ITEMS)))
    assert abs(problem.ours("Coverage", k)[0] - coverage) < 1e-9
    if k > 1:
        diversity = theirs.IntraListDiversity(k, Cosine(problem.vectors)).calc_per_user(problem.reco).sort_index()
        np.testing.assert_allclose(problem.ours("Diversity", k), diversity, rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3, PLACES])
def test_metrics_are_those_of_replay(k: int) -> None:
    problem = Problem(7)
    names = {"user_id": "query_id", "score": "rating"}
    reco, after, before = (each.rename(columns=names) for each in (problem.reco, problem.after, problem.before))
    of = {"HR": "HitRate", "Recall": "Recall", "Precision": "Precision", "MAP": "MAP", "NDCG": "NDCG", "MRR": "MRR"}
    for name, their_name in of.items():
        found = getattr(replays, their_name)(k, mode=replays.PerUser())(reco, after)[f"{their_name}-PerUser@{k}"]
        ours = problem.ours(name, k)
        if name == "MAP":  # RePlay divides by k if more than k items were taken
            taken = np.diff(problem.lists.offsets)
            ours = ours * taken / np.minimum(taken, k)
        np.testing.assert_allclose(ours, [found[user] for user in range(USERS)], rtol=0, atol=1e-9, err_msg=name)
    coverage = replays.Coverage(k)(reco, before)[f"Coverage@{k}"]
    assert abs(problem.ours("Coverage", k)[0] - coverage) < 1e-9
