"""Metrics of lists, and what `evaluate` says per user. tests/integrations/test_metrics.py compares them with other libraries."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awrsr import AWRSR, DataWarning, split
from awrsr.evaluation.lists import EMPTY, NAMES, Catalogue, Lists, list_metric
from awrsr.evaluation.ranking import evaluate
from awrsr.evaluation.report import simple_lists

from .small import ITEMS, make_lists, make_model

LISTS = Lists(np.array([[4, 1, 3], [2, 0, EMPTY]]), np.array([1, 3, 7, 9, 0]), np.array([0, 4, 5]))
CATALOGUE = Catalogue(np.arange(10), np.array([1, 2, 4, 8, 8, 1, 1, 1, 1, 1]), 8, np.eye(10)[:, :4])
WANTED = {
    "HR@1": [0, 0], "HR@2": [1, 1], "Recall@3": [0.5, 1], "Precision@3": [2 / 3, 1 / 3], "MAP@3": [(1 / 2 + 2 / 3) / 4, 0.5],
    "NDCG@2": [(1 / np.log2(3)) / (1 + 1 / np.log2(3)), 1 / np.log2(3)], "MRR@3": [0.5, 0.5], "MRR@1": [0, 0],
    "Coverage@2": [0.4], "Novelty@2": [(0 + 2) / 2, (1 + 3) / 2], "Popularity@3": [8 / 3, 1], "Diversity@3": [1, 1],
}  # fmt: skip


@pytest.mark.parametrize("name", WANTED)
def test_metrics_by_hand(name: str) -> None:
    np.testing.assert_allclose(list_metric(name, LISTS, CATALOGUE), WANTED[name], rtol=1e-12)


@pytest.mark.parametrize("name", ["Recall", "Recall@0", "F1@3", "@3", "MAP@x"])
def test_a_metric_that_there_is_not_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"metric is '{name}', must be one of HR, Recall, Precision"):
        list_metric(name, LISTS, CATALOGUE)


@pytest.mark.parametrize("filter_seen", [True, False])
def test_evaluation_per_user_is_that_of_recommendations(filter_seen: bool) -> None:
    model, lists = make_model(5), make_lists(30, seed=2, least=4)
    parts = split(lists, "last-n", n=3)
    model.item_ids = parts.histories.item_ids
    names = ("Recall@4", "MAP@4", "NDCG@4", "Coverage@4")
    found = model.evaluate(parts, per="user", metrics=names, filter_seen=filter_seen)
    chosen = [user for user, items in enumerate(lists) if len(items) > 6]
    table = model.recommend({user: lists[user][:-3] for user in chosen}, k=4, filter_seen=filter_seen)
    gains, recalls = [], []
    for user in chosen:
        best, taken = table.filter(user=user)["item"].to_list(), set(lists[user][-3:])
        gains.append(sum(1 / np.log2(at + 2) for at, item in enumerate(best) if item in taken))
        gains[-1] /= sum(1 / np.log2(at + 2) for at in range(min(4, len(taken))))
        recalls.append(len(taken & set(best)) / len(taken))
    assert found["NDCG@4"] == pytest.approx(np.mean(gains)) and found["Recall@4"] == pytest.approx(np.mean(recalls))
    assert found["Coverage@4"] == table["item"].n_unique() / ITEMS and found.targets == len(chosen)
    assert set(found.baselines) == {"popularity", "Markov chain"} and found.noun == "user"
    assert set(model.evaluate(parts, per="user")) == set(NAMES)


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("chain", [True, False])
def test_lists_of_baselines_are_those_of_counts(chain: bool, filter_seen: bool) -> None:
    parts = split(make_lists(20, seed=3, least=4, items=9), "last-n", n=1)
    h, uses, follows = parts.histories, Counter[int](), Counter[tuple[int, int]]()
    for user in range(h.num_users):
        trains = h.of(user)[: parts.train_end[user]].tolist()
        uses.update(trains)
        follows.update(zip(trains, trains[1:], strict=False))
    found = simple_lists(parts, h, 4, filter_seen, chain)
    for user in range(h.num_users):
        own = h.of(user).tolist()
        left = [item for item in range(h.num_items) if not (filter_seen and item in own)]
        wanted = sorted(left, key=lambda item: (-follows[own[-1], item] * chain, -uses[item], item))[:4]
        assert found[user].tolist() == wanted + [EMPTY] * (4 - len(wanted))


def test_sampled_metrics_say_what_they_are() -> None:
    model, parts = make_model(5), split(make_lists(200, seed=2, least=3))
    model.item_ids = parts.histories.item_ids
    with pytest.warns(DataWarning, match="sampled metrics rank each event among 2 random items.*Krichene"):
        found = model.evaluate(parts, sampled_negatives=2, metrics=["HR@1", "HR@3"])
    assert found["sampled HR@3"] == 1 and not found.baselines
    ranks = evaluate(model, parts, filter_seen=False).ranks
    expected = np.mean(((ITEMS - ranks) / (ITEMS - 1)) ** 2)  # both draws are ranked below
    assert found["sampled HR@1"] == pytest.approx(expected, abs=0.06)
    with pytest.raises(ValueError, match="per is 'user', must be event or"):
        model.evaluate(parts, sampled_negatives=2, per="user")


def test_cut_offs_are_chosen(home: Path, printed: Callable[..., str]) -> None:
    def table(*options: Any) -> list[str]:
        return [line.split()[0] if n else line for n, line in enumerate(printed("evaluate", home / "run", *options).splitlines())]

    assert table("--metrics", "HR@1", "NDCG@50")[0].split() == ["test", "HR@1", "NDCG@50"]
    rows = table("--per", "user", "--metrics", "Recall@3", "Diversity@3")
    assert rows[0].split() == ["test", "Recall@3", "Diversity@3"] and rows[1:] == ["this", "popularity", "Markov"]
    model = AWRSR.load(home / "run")
    assert model.item_ids is not None
