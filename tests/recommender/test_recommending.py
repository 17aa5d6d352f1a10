"""Who gets what: candidates, items that are left out, numbers for each user, and users about whom nothing is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import polars as pl
import pytest

from awrsr import DataWarning, Histories
from awrsr.data.item_files import read_items, read_titles
from awrsr.data.tables import with_titles

from .small import ITEMS, make_lists, make_model

LISTS = dict(enumerate(make_lists(5, seed=4)))


def ranked(table: Any) -> dict[Any, list[Any]]:
    """User -> items, the best first."""
    found: dict[Any, list[Any]] = {}
    for user, item, rank in zip(table["user"], table["item"], table["rank"], strict=True):
        found.setdefault(user, []).append(item)
        assert rank == len(found[user])
    return found


@pytest.fixture(scope="module")
def everything() -> dict[Any, list[Any]]:
    """All items for each user, in their order."""
    return ranked(make_model(7).recommend(LISTS, k=ITEMS, filter_seen=False))


CANDIDATES: dict[str, Callable[[dict[int, list[int]]], Any]] = {  # for each user
    "mapping": lambda lists: lists,
    "series": pandas.Series,
    "table": lambda lists: pl.DataFrame({"user": list(lists), "item": list(lists.values())}).explode("item"),
    "histories": lambda lists: Histories.from_lists(lists),
    "numbers of users as text": lambda lists: {str(user): items for user, items in lists.items()},
}


@pytest.mark.parametrize("form", CANDIDATES)
@pytest.mark.parametrize("argument", ["candidates", "exclude"])
def test_items_for_each_user(form: str, argument: str, everything: dict[Any, list[Any]]) -> None:
    lists = {0: [3, 5, 8], 2: [1, 3], 9: [2]}  # of three users, one of whom does not ask
    found = ranked(make_model(7).recommend(LISTS, k=ITEMS, filter_seen=False, **{argument: CANDIDATES[form](lists)}))
    for user, order in everything.items():
        named = lists.get(user, [])
        assert found.get(user, []) == [item for item in order if (item in named) is (argument == "candidates")]


@pytest.mark.parametrize(
    "ids", [[3, 5, 8], (3, 5, 8), np.array([3, 5, 8]), pandas.Series(["3", "5", "8"]), pl.DataFrame({"item": [3, 5, 8]}), {3, 5, 8}]
)
def test_items_for_all_users(ids: Any, everything: dict[Any, list[Any]]) -> None:
    model = make_model(7)
    given = [{"candidates": ids}, {"exclude": ids}]
    chosen, others = (ranked(model.recommend(LISTS, k=ITEMS, filter_seen=False, **each)) for each in given)
    for user, order in everything.items():
        assert chosen[user] == [item for item in order if item in (3, 5, 8)]
        assert others[user] == [item for item in order if item not in (3, 5, 8)]


def test_rules_hold_together(everything: dict[Any, list[Any]]) -> None:
    model, trained = make_model(7), np.ones(ITEMS, dtype=np.int64)
    trained[5] = 0
    model.trained = trained
    rules: dict[str, Any] = {"candidates": range(4, 20), "exclude": {0: [7], 1: [4]}, "filter_seen": True}
    found = ranked(model.recommend(LISTS, k={user: user + 1 for user in LISTS}, batch_size=2, **rules))
    for user, order in everything.items():
        left_out = {5, *LISTS[user], *rules["exclude"].get(user, ())}
        assert found[user] == [item for item in order if item in range(4, 20) and item not in left_out][: user + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": [99, "x"]}, "candidates are 2 items, of which the model knows none"),
        ({"candidates": []}, "candidates are 0 items"),
        ({"candidates": {0: [99]}}, "candidates are 1 item, of which"),
        ({"k": {0: 1}}, "k holds no number for user 1"),
        ({"k": {user: 0 for user in LISTS}}, "k is 0, must be at least 1"),
        ({"fallback": "best"}, "fallback is 'best', must be one of popular, none"),
        ({"users": [0, 77]}, "users hold 77, of whom there is no history"),
        ({"users": [0, "0"]}, "users hold a user twice"),
        ({"titles": pl.DataFrame({"item": [1, 1], "name": ["a", "b"]})}, "titles hold item 1 more than once"),
        ({"titles": pl.DataFrame({"item": [1], "rank": ["a"]})}, "titles have a column 'rank', which is one of recommendations"),
    ],
)
def test_rules_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(7).recommend(LISTS, **options)


@pytest.mark.parametrize(("argument", "value"), [("candidates", "abc"), ("exclude", 7), ("titles", [1, 2])])
def test_arguments_of_other_types_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument} is"):
        make_model(7).recommend(LISTS, **{argument: value})


def test_unknown_candidates_are_counted() -> None:
    with pytest.warns(DataWarning, match="1 of 3 candidates are left out"):
        found = make_model(7).recommend(LISTS, candidates=[3, 99, 5], filter_seen=False)
    assert set(found["item"]) == {3, 5}


def test_who_has_no_known_item_gets_the_most_popular_without_a_score() -> None:
    model = make_model(7)
    model.trained = np.arange(ITEMS)[::-1].copy() // 2  # items 0 and 1 equally often, the last one never
    asks = {"a": [3, 4], "b": ["unheard of"], "c": []}
    with pytest.warns(DataWarning, match="1 of 3 users have no others and get the most popular items"):
        table = model.recommend(asks, k=3, exclude=[1], candidates={"a": [5, 6], "b": [0, 1, 2, 9], "c": [8]})
    assert ranked(table) == {"a": ranked(table)["a"], "b": [0, 2, 9], "c": [8]}
    assert table["score"].is_null().to_list() == [user != "a" for user in table["user"]]
    with pytest.warns(DataWarning, match="get no recommendation"):
        assert set(model.recommend(asks, k=3, fallback="none")["user"]) == {"a"}
    model.trained = model.trained > 0  # as an older file says it: without numbers
    with pytest.warns(DataWarning, match="get no recommendation"):
        assert set(model.recommend(asks, k=3)["user"]) == {"a"}


def test_vectors_multiply_to_scores() -> None:
    for backbone in ("sasrec", "stosa"):
        model = make_model(7, backbone=backbone)
        users, vectors = model.user_vectors({**LISTS, "new": []}, batch_size=2)
        items, table = model.item_vectors()
        assert users.tolist() == [*map(str, LISTS), "new"] and not vectors[-1].any()
        best = items[(vectors[:-1] @ table.T).argmax(1)]
        assert best.tolist() == model.recommend(LISTS, k=1, filter_seen=False)["item"].to_list()


def test_titles_are_joined_by_id() -> None:
    table = pl.DataFrame({"user": ["u", "u"], "item": [7, 8], "rank": [1, 2], "score": [0.5, 0.25]})
    by_table = with_titles(table, pandas.DataFrame({"price": [1.5, 2.5], "movieId": ["8", "9"], "name": ["eight", "nine"]}))
    assert by_table.columns == ["user", "item", "price", "name", "rank", "score"]
    assert by_table["name"].to_list() == [None, "eight"] and by_table["price"].to_list() == [None, 1.5]
    assert with_titles(table, pandas.Series({7: "seven"}))["title"].to_list() == ["seven", None]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [("a.txt", "4\n\n 8 \n", ["4", "8"]), ("a.csv", "item_id\n4\n", ["4"]), ("a.csv", "user,item\nu,4\nu,8\n", {"u": [4, 8]})],
)
def test_files_of_items(tmp_path: Path, name: str, content: str, wanted: Any) -> None:
    (tmp_path / name).write_text(content)
    found = read_items(tmp_path / name)
    if isinstance(found, Histories):
        found = {str(user): found.item_ids[found.of(n)].tolist() for n, user in enumerate(found.user_ids)}
    assert found == wanted


def test_files_of_titles(tmp_path: Path) -> None:
    rows = {"item": ["4", "8"], "title": ["four; 4", None]}
    table = pl.DataFrame(rows)
    table.write_csv(tmp_path / "a.csv")
    table.write_csv(tmp_path / "b.tsv", separator="\t")
    table.write_parquet(tmp_path / "c.parquet")
    table.write_ndjson(tmp_path / "d.jsonl")
    for path in sorted(tmp_path.iterdir()):
        assert read_titles(path).to_dict(as_series=False) == rows, path
    (tmp_path / "e.csv").write_text("item\n4\n")
    with pytest.raises(ValueError, match=r"e.csv: its first line, 'item', is one column; must be names of two or more"):
        read_titles(tmp_path / "e.csv")
    with pytest.raises(ValueError, match="there is no|No such file"):
        read_titles(tmp_path / "f.csv")
