"""Full ranking against python loops: ranks, metrics, evaluation, what is stored of it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from awrsr import AWRSR
from awrsr.data.histories import Histories
from awrsr.data.splits import Split, split
from awrsr.data.synthetic import make
from awrsr.evaluation import ranking
from awrsr.evaluation.ranking import (
    CUTOFFS,
    METRICS,
    Evaluation,
    Targets,
    evaluate,
    metric,
    metrics,
    rank_batch,
    ranks,
    recall,
    write_ranks,
)

from .small import BACKBONES, ITEMS, WINDOW, as_numbered, make_lists, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

rank_lists = st.lists(st.integers(1, 100), min_size=1, max_size=30)


def rank_by_hand(scores: list[float], target: int, seen: set[int]) -> int:
    """Place of the target in a sorted list of the candidates, after all that have its score; of no candidate, the last of all."""
    if target in seen:
        return len(scores)
    candidates = [item for item in range(len(scores)) if item not in seen]
    in_order = sorted(candidates, key=lambda item: (-scores[item], item == target))
    return in_order.index(target) + 1


def flat(seen: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows and items of what the histories hold."""
    rows = [row for row, items in enumerate(seen) for _ in items]
    return torch.tensor(rows, dtype=torch.int64), torch.tensor([item for items in seen for item in items], dtype=torch.int64)


def small_blocks(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    monkeypatch.setattr(ranking, "SCORE_BLOCK", scores)
    monkeypatch.setattr(ranking, "LEAST_ROWS", 1, raising=False)


# Ranks


@given(st.data())
def test_ranks_are_places_in_a_sorted_list(data: st.DataObject) -> None:
    """Scores are small whole numbers, so that many tie."""
    items, targets = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    table = torch.tensor(data.draw(st.lists(st.integers(-1, 1), min_size=2 * items, max_size=2 * items)), dtype=torch.float32)
    hidden = torch.tensor(data.draw(st.lists(st.integers(-1, 1), min_size=2 * targets, max_size=2 * targets)), dtype=torch.float32)
    table, hidden = table.view(items, 2), hidden.view(targets, 2)
    wanted = data.draw(st.lists(st.integers(0, items - 1), min_size=targets, max_size=targets))
    seen = data.draw(st.lists(st.lists(st.integers(0, items - 1), max_size=8), min_size=targets, max_size=targets))
    scores = (hidden @ table.T).tolist()
    kept = ranks(hidden, table, torch.tensor(wanted))
    removed = ranks(hidden, table, torch.tensor(wanted), *flat(seen))
    assert kept.tolist() == [rank_by_hand(scores[m], wanted[m], set()) for m in range(targets)]
    assert removed.tolist() == [rank_by_hand(scores[m], wanted[m], set(seen[m])) for m in range(targets)]


def test_a_tie_counts_against_the_target() -> None:
    table = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    assert ranks(torch.ones(4, 1), table, torch.arange(4)).tolist() == [3, 3, 3, 4]


def test_a_constant_model_ranks_last() -> None:
    assert ranks(torch.zeros(2, 3), torch.randn(9, 3), torch.tensor([0, 8])).tolist() == [9, 9]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_hidden_states_that_are_no_numbers_rank_worst(value: float) -> None:
    hidden = torch.tensor([[value, 1.0], [1.0, 0.0]])
    table = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])  # inf * 0 is no number either
    assert ranks(hidden, table, torch.tensor([0, 2])).tolist() == [3, 1]


def test_another_item_whose_score_is_no_number_counts_against_the_target() -> None:
    table = torch.tensor([[1.0], [math.nan], [3.0], [2.0]])
    assert ranks(torch.ones(2, 1), table, torch.tensor([2, 1])).tolist() == [2, 4]


def test_a_target_that_the_history_holds_could_not_be_recommended() -> None:
    """With seen items left out it is a miss, however few are left, rather than a candidate among the unseen alone."""
    table = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    assert ranks(torch.ones(1, 1), table, torch.tensor([2]), *flat([[0, 2, 2, 3]])).tolist() == [4]
    assert ranks(torch.ones(1, 1), table, torch.tensor([2]), *flat([[0, 1, 3]])).tolist() == [1]


def test_hits_are_what_would_be_recommended() -> None:
    lists = [[1, 2, 3, 1, 2], [4, 5, 4, 6, 4], [7, 8, 9, 1, 3], [2, 2, 5, 5, 6]]
    model = make_model()
    parts = split(as_numbered(lists))
    for filter_seen in (True, False):
        found = evaluate(model, parts, "test", filter_seen=filter_seen)
        known = model.recommend(as_numbered([items[:-1] for items in lists]), 5, filter_seen=filter_seen)
        for user, rank in zip(found.users.tolist(), found.ranks.tolist(), strict=True):
            listed = known.filter(pl.col("user") == user)["item"].to_list()
            assert (lists[user][-1] in listed) == (rank <= 5)


def test_nothing_to_rank_is_no_error() -> None:
    assert ranks(torch.ones(0, 2), torch.ones(3, 2), torch.tensor([], dtype=torch.int64), *flat([])).tolist() == []


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 20, 21, 100])
def test_block_size_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, table = torch.randn(20, 4).round(), torch.randn(13, 4).round()
    targets = torch.randint(13, (20,))
    seen = [each if place % 3 else [] for place, each in enumerate(make_lists(20, most=6, items=13))]
    whole = ranks(hidden, table, targets, *flat(seen))
    small_blocks(monkeypatch, rows * 13 + 5)
    assert torch.equal(ranks(hidden, table, targets, *flat(seen)), whole)
    small_blocks(monkeypatch, 1)  # fewer scores than a single row has
    assert torch.equal(ranks(hidden, table, targets, *flat(seen)), whole)


# Metrics


@given(rank_lists)
def test_metrics_are_those_of_a_loop(places: list[int]) -> None:
    found = metrics(np.array(places))
    wanted = {"MRR": sum(1 / place for place in places) / len(places)}
    for k in CUTOFFS:
        wanted[f"HR@{k}"] = sum(place <= k for place in places) / len(places)
        wanted[f"NDCG@{k}"] = sum(1 / math.log2(place + 1) for place in places if place <= k) / len(places)
    assert found == pytest.approx(wanted, rel=1e-12)
    assert tuple(found) == METRICS == ("HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR")


def test_metrics_by_hand() -> None:
    places = np.array([1, 3, 10, 11])
    assert metric("HR@10", places).tolist() == [1, 1, 1, 0]
    assert metric("NDCG@10", places).tolist() == pytest.approx([1, 0.5, 1 / math.log2(11), 0])
    assert metric("MRR", places).tolist() == pytest.approx([1, 1 / 3, 1 / 10, 1 / 11])
    assert metric("HR@1", places).tolist() == [1, 0, 0, 0] == metric("NDCG@1", places).tolist()


@pytest.mark.parametrize("name", ["", "HR", "HR@", "HR@0", "HR@-1", "HR@x", "HR@²", "HR@1.5", "hr@10", "MRR@", "MRR@10", "NDCG10"])
def test_a_metric_of_another_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="metric is .*, must be HR@k, NDCG@k or MRR"):
        metric(name, np.array([1]))


# Evaluation


def evaluate_by_hand(model: AWRSR, parts: Split, part: str, filter_seen: bool) -> list[tuple[int, int, int, int]]:
    """User, place, item and rank of every target: one history at a time, through the padded model."""
    found = []
    for user in range(parts.histories.num_users):
        history = parts.histories.of(user).tolist()
        ends = int(parts.train_end[user]), int(parts.validation_end[user]), len(history)
        begin, end = ends[:2] if part == "validation" else ends[1:]
        for place in range(begin, end):
            if not place:
                continue
            before = history[:place]
            window = before[-model.config.max_len :]
            scores = model.scores_padded(torch.tensor([window]), torch.tensor([len(window)]))[0].tolist()
            rank = rank_by_hand(scores, history[place], set(before) if filter_seen else set())
            found.append((user, place, history[place], rank))
    return found


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_evaluation_is_that_of_a_loop_over_users(
    backbone: str, n: int, part: str, filter_seen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histories shorter and longer than the window, of users with and without targets, with repeats."""
    small_blocks(monkeypatch, 3 * ITEMS)
    model, parts = make_model(backbone=backbone).double(), split(as_numbered(make_lists(40)), "last-n", n=n)
    wanted = evaluate_by_hand(model, parts, part, filter_seen)
    for batch_size in (1, 7, 1000):
        found = evaluate(model, parts, part, filter_seen=filter_seen, batch_size=batch_size)
        columns = (found.users, found.places, found.items, found.ranks)
        assert list(zip(*(each.tolist() for each in columns), strict=True)) == wanted
    assert found.metrics() == metrics(np.array([rank for *_, rank in wanted]))
    assert found.users_per_cpu_second > 0


def test_targets_without_an_event_before_are_none() -> None:
    histories = as_numbered([[1, 2, 3], [4]])
    parts = Split(histories, np.array([1, 0]), np.array([2, 0]))
    assert evaluate(make_model(), parts).users.tolist() == [0]


def test_evaluation_looks_at_nothing_from_the_target_on() -> None:
    model, lists = make_model(), make_lists(30, least=5)
    ranked = evaluate(model, split(as_numbered(lists)), "validation", filter_seen=True).ranks
    other = [[*each[:-1], (each[-1] + 1) % ITEMS] for each in lists]
    assert np.array_equal(evaluate(model, split(as_numbered(other)), "validation", filter_seen=True).ranks, ranked)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_targets(world: int) -> None:
    model, parts = make_model().double(), split(as_numbered(make_lists(25, least=3)))
    targets = Targets(parts, "test", WINDOW, True)
    found, times = np.zeros(len(targets), dtype=np.int64), np.zeros(len(targets), dtype=np.int64)
    for rank in range(world):
        share = targets.batches(4, rank, world)
        assert len(list(share)) == len(share)
        for chosen, batch in share:
            with torch.no_grad():
                found[chosen] = rank_batch(model, batch).numpy()
            times[chosen] += 1
    assert (times == 1).all() and np.array_equal(found, evaluate(model, parts).ranks)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_drops_nothing_and_leaves_the_mode_as_it_was(training: bool) -> None:
    model, parts = make_model(hidden_dropout=0.9).train(training), split(as_numbered(make_lists(25, least=3)))
    one, other = evaluate(model, parts).ranks, evaluate(model, parts).ranks
    assert np.array_equal(one, other) and model.training == training


def test_another_part_is_refused() -> None:
    with pytest.raises(ValueError, match="part is 'train', must be validation or test"):
        evaluate(make_model(), split(as_numbered([[1, 2, 3]])), "train")


# What is stored


@pytest.mark.parametrize("as_id", [str, lambda n: n * 10**15 - 7, lambda n: f"é,\n{n}"])
def test_ranks_are_stored_with_the_ids_of_the_data(as_id: Any, tmp_path: Path) -> None:
    numbered = as_numbered(make_lists(12, least=3))
    item_ids, user_ids = (np.array([as_id(n) for n in range(count)]) for count in (ITEMS, 12))
    parts = split(Histories(numbered.items, numbered.offsets, item_ids, user_ids))
    found = evaluate(make_model(), parts)
    write_ranks(found, parts, tmp_path / "ranks.parquet")
    table = pl.read_parquet(tmp_path / "ranks.parquet")
    assert table.columns == ["user", "item", "position", "rank"]
    for row, user in zip(table.iter_rows(named=True), found.users.tolist(), strict=True):
        history = numbered.of(user).tolist()
        assert row["user"] == as_id(user) and row["position"] == len(history) - 1 and row["item"] == as_id(history[-1])
    assert table["rank"].to_list() == found.ranks.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.parquet"]


# The recall task


def test_recall_is_measured_where_the_rule_speaks() -> None:
    """Users 0 and 1 have an answer, 7 and 9; user 2 has none. The first follows the rule, and only there the model is right."""
    parts = split(as_numbered([[5, 7, 6, 5, 7], [8, 9, 6, 8, 4], [1, 2, 3, 4, 5]]))
    users, places = parts.targets("test")
    items = parts.histories.items[parts.histories.offsets[users] + places]
    found = Evaluation(users, places, items, np.array([1, 2, 1]), 0.0)
    assert recall(found, parts) == {"targets": 2, "rule HR@1": 0.5, "HR@1": 0.5}


def test_without_an_answer_there_is_no_recall() -> None:
    parts = split(as_numbered([[1, 2, 3, 4, 5]]))
    assert recall(evaluate(make_model(), parts), parts) == {}


def test_the_rule_alone_reaches_what_noise_allows() -> None:
    parts = split(make(users=600, items=30, length=24, noise=0.2, seed=1))
    users, places = parts.targets("test")
    items = parts.histories.items[parts.histories.offsets[users] + places]
    known = recall(Evaluation(users, places, items, np.ones(len(users), dtype=np.int64), 0.0), parts)
    assert known["HR@1"] == 1 and 300 < known["targets"] < 600 and known["rule HR@1"] == pytest.approx(0.8, abs=0.06)
