"""Fitting, recommending and similar items, with ids of any type, against brute force."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from awrsr import AWRSR, AWRSRConfig, recommending
from awrsr.config import TrainingOptions
from awrsr.data.histories import Histories
from awrsr.data.splits import Split, split
from awrsr.evaluation.ranking import evaluate

from .small import BACKBONES, ITEMS, WINDOW, as_numbered, make_lists, make_model, same_weights

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = AWRSRConfig(max_len=6, hidden=8, layers=1, rank=3)
BRIEF = TrainingOptions(epochs=1, accelerator="cpu", threads=1, logger="none", progress=False)
LISTS = make_lists(30, least=4, most=10, items=12)
IDS: dict[str, Callable[[int], Any]] = {
    "int": lambda n: 3 * n,
    "negative": lambda n: -n - 1,
    "text": lambda n: f"é{n} ,\"'",
    "beyond int64": lambda n: 2**63 + n,
    "beyond 64 bits": lambda n: 2**70 + n,
    "around int64's end": lambda n: 2**63 - 6 + n,
    "float": lambda n: n + 0.5,
    "text and numbers": lambda n: n if n % 2 else f"x{n}",
}


def known_as(ids: str) -> list[list[Any]]:
    return [[IDS[ids](item) for item in each] for each in LISTS]


@pytest.fixture(scope="module")
def fitted() -> AWRSR:
    """Fitted on a mapping with text as ids."""
    return AWRSR(SMALL).fit({f"user {user}": items for user, items in enumerate(known_as("text"))}, BRIEF)


# Fitting


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_any_type_come_back(kind: str) -> None:
    """As they were, or as text where int64 does not hold them."""
    lists = known_as(kind)
    model = AWRSR(SMALL).fit(lists, BRIEF)
    all_ids = {item for each in lists for item in each}
    as_text = kind in ("beyond int64", "beyond 64 bits", "around int64's end", "text and numbers")
    wanted = set(map(str, all_ids)) if as_text else all_ids
    assert model.config.num_items == len(all_ids) and set(model.ids().tolist()) == wanted
    table = model.recommend(lists[:3], 4)
    assert set(table["item"].to_list()) <= wanted and table["user"].unique().sort().to_list() == [0, 1, 2]


def test_fit_returns_the_model_ready_for_use() -> None:
    model = AWRSR(SMALL)
    assert model.fit(LISTS, BRIEF) is model and not model.training
    assert not any(module.training for module in model.modules())
    assert all(weight.device.type == "cpu" and weight.isfinite().all() for weight in model.parameters())


def test_lists_a_mapping_histories_and_a_split_are_alike() -> None:
    histories = Histories.from_lists(LISTS)
    given = [
        LISTS,
        dict(enumerate(LISTS)),
        (each for each in LISTS),
        [np.array(each) for each in LISTS],
        histories,
        split(histories),
    ]
    states = [AWRSR(SMALL).fit(each, BRIEF).state_dict() for each in given]
    for state in states[1:]:
        assert all(torch.equal(state[name], weight) for name, weight in states[0].items())


def test_fit_does_what_a_split_says() -> None:
    """Trained on two events a user, a model has not seen the rest."""
    histories = Histories.from_lists(LISTS)
    early = Split(histories, np.full(30, 2), histories.lengths - 1)
    assert not same_weights(AWRSR(SMALL).fit(early, BRIEF), AWRSR(SMALL).fit(LISTS, BRIEF))


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(5)
    one = AWRSR(SMALL).fit(LISTS, BRIEF, seed=3)
    torch.manual_seed(6)
    assert same_weights(one, AWRSR(SMALL).fit(LISTS, replace(BRIEF, seed=3)))
    assert not same_weights(one, AWRSR(SMALL).fit(LISTS, BRIEF, seed=4))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_fit_learns(backbone: str) -> None:
    """Items that always come in one order: the next one is the best recommendation."""
    lists = [[(start + step) % 12 for step in range(8)] for start in range(12)] * 4
    options = replace(BRIEF, epochs=40, learning_rate=1e-2, patience=0, filter_seen="no")
    config = replace(SMALL, hidden=32, hidden_dropout=0.1, backbone=backbone)
    model = AWRSR(config).fit(lists, options)
    table = model.recommend([[3, 4, 5], [9, 10, 11]], 1, filter_seen=False)
    assert table["item"].to_list() == [6, 0]


@pytest.mark.parametrize("again", [True, False])
def test_recommendations_leave_out_what_training_did(again: bool, tmp_path: Path) -> None:
    """Where users take items again, these are candidates for the model in memory, saved, and loaded, unless told otherwise."""
    lists = [[(3 * user + step) % (5 if again else 24) for step in range(8)] for user in range(24)]
    model = AWRSR(SMALL).fit(lists, BRIEF)
    model.save(tmp_path / "model")
    for each in (model, AWRSR.load(tmp_path / "model")):
        assert each.filter_seen is not again
        own, told = (each.recommend(lists, each.known_items(), filter_seen=how) for how in (None, not again))
        assert own.equals(told) and own.height == len(lists) * (5 if again else 24 - 8)
        assert not own.equals(each.recommend(lists, each.known_items(), filter_seen=again))
        parts = split(Histories.from_lists(lists))
        assert np.array_equal(evaluate(each, parts).ranks, evaluate(each, parts, filter_seen=not again).ranks)
    assert AWRSR(SMALL).fit(lists, BRIEF, filter_seen="yes").filter_seen


def test_a_second_fit_goes_on_and_drops_again() -> None:
    model = AWRSR(SMALL).fit(LISTS, BRIEF)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda block, _: seen.append(block.training))
    before = model.items.weight.clone()
    model.fit(LISTS[::-1], BRIEF)
    assert any(seen) and not model.training and not torch.equal(before, model.items.weight)


def test_a_second_fit_keeps_the_names_of_items() -> None:
    model = AWRSR(SMALL).fit(LISTS, BRIEF)
    ids = model.ids().copy()
    model.fit(LISTS[::-1], BRIEF, learning_rate=1e-12)  # users and so first appearances in another order
    assert np.array_equal(model.ids(), ids)
    with pytest.raises(ValueError, match="histories hold 3 events with items that this model was not fitted to"):
        model.fit([*LISTS, [97, 98, 99, *LISTS[0]]], BRIEF)


def test_a_run_goes_on_from_a_loaded_model(tmp_path: Path) -> None:
    runs = []
    for folder, stops in (("whole", [3]), ("parts", [1, 3])):
        for epochs in stops:
            model = AWRSR(SMALL)
            if (tmp_path / folder).exists():
                model = AWRSR.load(tmp_path / folder)
            model.fit(LISTS, BRIEF, epochs=epochs, patience=0, out=tmp_path / folder)
        runs.append(json.loads((tmp_path / folder / "metrics.json").read_text())["curve"])
    assert runs[0] == runs[1]
    with pytest.raises(ValueError, match="epochs is 2, must be at least the 3 of the run in"):
        model.fit(LISTS, BRIEF, epochs=2, patience=0, out=tmp_path / "whole")


def test_whole_floats_are_whole_numbers_and_tables_are_refused() -> None:
    assert Histories.from_lists([[7.0, 8], [8.0]]).item_ids.tolist() == [7, 8]
    assert len(Histories.from_lists([[2**53, 2**53 + 1, 0.5]]).item_ids) == 3
    with pytest.raises(TypeError, match=r"histories is of type DataFrame, must be a mapping or lists .*from_events"):
        Histories.from_lists(pl.DataFrame({"user": [1], "item": [2]}))


def test_more_options_are_named() -> None:
    with pytest.raises(TypeError, match="epoch"):
        AWRSR(SMALL).fit(LISTS, BRIEF, epoch=3)


def test_a_model_for_another_number_of_items_is_refused() -> None:
    with pytest.raises(ValueError, match="num_items is 5, must be 12, the number of items in the histories"):
        AWRSR(replace(SMALL, num_items=5)).fit(LISTS, BRIEF)


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        ([], "longest history has 0 events"),
        ([[]], "longest history has 0 events"),
        ([[1], [2]], "longest history has 1 events"),
        ([[1, 2, 3]], "no history has two events for training"),
    ],
)
def test_histories_too_short_to_train_on_are_refused(histories: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AWRSR(SMALL).fit(histories, BRIEF)


@pytest.mark.parametrize(
    ("histories", "error", "message"),
    [
        (["abc", "de"], TypeError, "history of user 0 is 'abc', must be a sequence"),
        ([1, 2], TypeError, "history of user 0 is 1, must be a sequence"),
        ({"a": None}, TypeError, "history of user 'a' is None, must be a sequence"),
        ([[(1, 2), (3, 4)]], TypeError, r"item id is \(1, 2\), must be"),
        ([[1, None]], ValueError, "item id is None, must be"),
        ([[1.0, float("nan")]], ValueError, "item id is nan, must be"),
        ({("a", 1): [1, 2]}, TypeError, r"user id is \('a', 1\), must be"),
    ],
)
def test_what_is_no_list_of_ids_is_refused(histories: Any, error: type[Exception], message: str, fitted: AWRSR) -> None:
    for call in (lambda: AWRSR(SMALL).fit(histories, BRIEF), lambda: fitted.recommend(histories)):
        with pytest.raises(error, match=message):
            call()


def test_a_catalogue_of_one_item() -> None:
    lists = [["a"] * 5] * 4
    model = AWRSR(SMALL).fit(lists, BRIEF)
    assert model.recommend([["a"]], 1)["item"].to_list() == ["a"]  # its users take items again
    assert model.recommend([["a"]], 1, filter_seen=True).height == 0
    with pytest.raises(ValueError, match="num_items is 1, must be 2 or more: loss 'bce'"):
        AWRSR(SMALL).fit(lists, BRIEF, loss="bce")


# Recommending


def by_hand(model: AWRSR, lists: list[list[int]], k: int, filter_seen: bool) -> list[tuple[int, int, int, float]]:
    """User, item, rank, score: one user at a time through the padded model, over python lists."""
    rows = []
    for user, history in enumerate(lists):
        window = history[-model.config.max_len :]
        if not window:
            continue
        scores = model.scores_padded(torch.tensor([window]), torch.tensor([len(window)]))[0].tolist()
        best = sorted((item for item in range(len(scores)) if not (filter_seen and item in history)), key=lambda i: -scores[i])[:k]
        rows += [(user, item, rank, scores[item]) for rank, item in enumerate(best, 1)]
    return rows


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("k", [1, 10, ITEMS])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_recommendations_are_those_of_a_loop_over_users(backbone: str, k: int, filter_seen: bool) -> None:
    """Histories longer than the window too: what lies before it is not looked at, yet seen."""
    model, lists = make_model(backbone=backbone).double(), [[], *make_lists(12, most=3 * WINDOW), []]
    table = model.recommend(as_numbered(lists), k, filter_seen=filter_seen)
    assert table.columns == ["user", "item", "rank", "score"]
    wanted = by_hand(model, lists, k, filter_seen)
    assert table.drop("score").rows() == [row[:3] for row in wanted]
    assert table["score"].to_list() == pytest.approx([row[3] for row in wanted], rel=1e-9)


def test_gaussians_are_recommended_by_distance() -> None:
    """Scores are the negative squared distances between the state and the items, the smallest first."""
    model, lists = make_model(backbone="stosa").double(), make_lists(4, most=WINDOW)
    table = model.recommend(lists, ITEMS, filter_seen=False)
    mean, cov = gaussians(model.items.weight)
    for user, history in enumerate(lists):
        state = model(torch.tensor(history), torch.tensor([0, len(history)]), len(history))[-1, :16]
        distance = ((mean - state[:8]) ** 2).sum(1) + ((cov.sqrt() - state[8:] - 1) ** 2).sum(1)
        rows = table.filter(user=user)
        assert rows["item"].to_list() == distance.argsort().tolist()
        assert rows["score"].to_list() == pytest.approx((-distance).sort(descending=True).values.tolist(), rel=1e-9)


def gaussians(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, a = x.detach().double().chunk(2, -1)
    return mean, torch.nn.functional.elu(a) + 1


@pytest.mark.parametrize("batch_size", [1, 2, 5, 1000])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_batches_do_not_matter(backbone: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, histories = make_model(backbone=backbone).double(), as_numbered([[], *make_lists(11)])
    whole = model.recommend(histories, 5)
    assert_alike(model.recommend(histories, 5, batch_size=batch_size), whole)
    monkeypatch.setattr(recommending, "SCORE_BLOCK", batch_size * ITEMS)
    assert_alike(model.recommend(histories, 5), whole)


def assert_alike(one: pl.DataFrame, other: pl.DataFrame) -> None:
    assert one.drop("score").equals(other.drop("score"))
    assert one["score"].to_list() == pytest.approx(other["score"].to_list(), rel=1e-9)


def test_users_and_items_go_by_the_ids_of_the_data(fitted: AWRSR) -> None:
    lists = known_as("text")
    table = fitted.recommend({"b": lists[0], "a": lists[1]}, 5, filter_seen=True)
    assert table["user"].unique(maintain_order=True).to_list() == ["b", "a"]  # in the order given
    for user, history in (("b", lists[0]), ("a", lists[1])):
        rows = table.filter(user=user)
        assert rows["rank"].to_list() == list(range(1, rows.height + 1)) and rows["score"].is_sorted(descending=True)
        assert not set(rows["item"]) & set(history) and rows["item"].is_unique().all()
        assert set(rows["item"]) <= set(fitted.ids().tolist())


def test_unknown_items_are_passed_over(fitted: AWRSR) -> None:
    known = known_as("text")[0]
    mixed = ["nobody knows", *known[:2], "nor this", *known[2:], "é99"]
    assert fitted.recommend([mixed], 5).equals(fitted.recommend([known], 5))


def test_a_user_with_nothing_known_may_get_no_row(fitted: AWRSR) -> None:
    known = known_as("text")[0]
    table = fitted.recommend({1: ["nobody knows"], 2: known, 3: []}, 3, fallback="none")
    assert table["user"].to_list() == [2, 2, 2]


@pytest.mark.parametrize("histories", [[], {}, [[]], [["nobody knows"]], {"a": []}])
def test_nothing_known_gives_an_empty_table(histories: Any, fitted: AWRSR) -> None:
    table = fitted.recommend(histories, 3, fallback="none")
    assert table.height == 0 and table.columns == ["user", "item", "rank", "score"]
    assert table.schema["item"] == pl.String and table.schema["rank"] == pl.Int64


def test_numbers_meet_their_text() -> None:
    model = AWRSR(SMALL).fit(LISTS, BRIEF)
    numbers, text = LISTS[0], [str(item) for item in LISTS[0]]
    assert model.recommend([numbers], 3).equals(model.recommend([text], 3))
    assert model.recommend([numbers], 3)["item"].dtype == pl.Int64
    assert model.similar_items(["0"], 2).equals(model.similar_items([0], 2))


def test_filtering_leaves_fewer_where_almost_all_is_seen() -> None:
    model = make_model()
    table = model.recommend([list(range(ITEMS - 2)), list(range(ITEMS)), [1]], 5)
    assert table["user"].value_counts().sort("user").rows() == [(0, 2), (2, 5)]
    assert set(table.filter(user=0)["item"].to_list()) == {ITEMS - 2, ITEMS - 1}
    assert table["score"].is_finite().all()
    kept = model.recommend([list(range(ITEMS))], ITEMS, filter_seen=False)
    assert sorted(kept["item"].to_list()) == list(range(ITEMS))


def test_k_beyond_the_catalogue_gives_what_there_is() -> None:
    model = make_model()
    assert len(model.recommend([[1], [2, 3]], ITEMS + 7, filter_seen=False)) == 2 * ITEMS
    assert len(model.similar_items([1], ITEMS)) == ITEMS - 1
    assert AWRSR(SMALL, num_items=1).similar_items([0], 5).is_empty()


@pytest.mark.parametrize("k", [0, -1, 2.5])
def test_k_that_counts_nothing_is_refused(k: int) -> None:
    error, said = (TypeError, "a whole number") if k == 2.5 else (ValueError, "at least 1")
    model = make_model()
    for ask in (lambda: model.recommend([[1]], k), lambda: model.similar_items([1], k)):
        with pytest.raises(error, match=f"k is {k}, must be {said}"):
            ask()


def test_a_model_that_was_not_fitted_says_so() -> None:
    with pytest.raises(ValueError, match="knows no items yet: fit or load it first"):
        AWRSR(SMALL).recommend([[1, 2]])
    with pytest.raises(ValueError, match="knows no items yet: fit or load it first"):
        AWRSR(SMALL).similar_items([1])


@pytest.mark.parametrize("training", [True, False])
def test_recommending_drops_nothing_and_leaves_the_mode_as_it_was(training: bool) -> None:
    model = make_model(hidden_dropout=0.9).train(training)
    one, other = (model.recommend([[1, 2, 3]], 5) for _ in range(2))
    assert one.equals(other) and model.training == training
    model.attention_maps([1, 2, 3])
    assert model.training == training


def test_what_was_given_stays_as_it_was(fitted: AWRSR) -> None:
    histories = as_numbered([[1, 2], [3]])
    before = histories.items.copy(), histories.offsets.copy()
    make_model().recommend(histories, 3)
    assert np.array_equal(histories.items, before[0]) and np.array_equal(histories.offsets, before[1])


# Similar items


def test_similar_items_have_the_largest_cosines() -> None:
    model, asked = make_model(), [4, 0, 4]
    table = model.similar_items(asked, 3)
    assert table.columns == ["item", "similar", "rank", "score"] and table.height == 9
    rows = model.items.weight.double().tolist()
    dot = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    for place, item in enumerate(asked):
        cosine = {other: dot[item][other] / (dot[item][item] * dot[other][other]) ** 0.5 for other in range(ITEMS) if other != item}
        best = sorted(cosine, key=lambda other: -cosine[other])[:3]
        part = table[3 * place : 3 * place + 3]
        assert part["item"].to_list() == [item] * 3 and part["similar"].to_list() == best and part["rank"].to_list() == [1, 2, 3]
        assert part["score"].to_list() == pytest.approx([cosine[other] for other in best], abs=1e-5)


def test_similar_gaussians_are_the_nearest() -> None:
    model, asked = make_model(backbone="stosa"), [4, 0, 4]
    table = model.similar_items(asked, 3)
    mean, cov = gaussians(model.items.weight)
    for place, item in enumerate(asked):
        distance = ((mean - mean[item]) ** 2 + (cov.sqrt() - cov[item].sqrt()) ** 2).sum(1)
        best = [other for other in distance.argsort().tolist() if other != item][:3]
        part = table[3 * place : 3 * place + 3]
        assert part["similar"].to_list() == best and part["score"].to_list() == pytest.approx((-distance[best]).tolist(), rel=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_similar_items_of_many_items_are_found_in_blocks(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make_model(backbone=backbone).double(), list(range(ITEMS))
    whole = model.similar_items(asked, 3)
    monkeypatch.setattr(recommending, "SCORE_BLOCK", 4 * ITEMS)
    assert_alike(model.similar_items(asked, 3), whole)


def test_similar_items_may_be_all_others(fitted: AWRSR) -> None:
    first = fitted.ids()[0]
    table = fitted.similar_items([first], 11)
    assert {*table["similar"].to_list(), first} == set(fitted.ids().tolist())


def test_an_unknown_item_is_named(fitted: AWRSR) -> None:
    with pytest.raises(ValueError, match="'nobody knows', which this model does not know"):
        fitted.similar_items([fitted.ids()[0], "nobody knows"], 3)
    with pytest.raises(ValueError, match="'nobody knows', which this model does not know"):
        fitted.attention_maps(["nobody knows"])
    with pytest.raises(ValueError, match="items is empty"):
        fitted.attention_maps([])


def test_attention_maps_are_of_the_last_events(fitted: AWRSR) -> None:
    history = known_as("text")[0] * 2
    maps, last = fitted.attention_maps(history), fitted.attention_maps(history[-6:])
    assert maps[0][0].shape == (2, 6, 6)
    assert all(torch.equal(a, b) for one, other in zip(maps, last, strict=True) for a, b in zip(one, other, strict=True))


def test_using_a_model_loads_no_lightning() -> None:
    code = (
        "import sys, torch; from awrsr import AWRSR, AWRSRConfig; m = AWRSR(AWRSRConfig(num_items=9));"
        "m.recommend([[1]], 2); m.similar_items([1], 2); assert not any(x.startswith('lightning') for x in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
