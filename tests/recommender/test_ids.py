"""One rule for ids in files, tables and Python; users of every container; missing and unknown ids; memory and time of ids."""

import collections
import decimal
import io
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awrsr import AWRSR, DataError, DataWarning, Histories, read
from awrsr.data.ids import Index, as_texts, id_text, number_ids
from awrsr.data.synthetic import write

pandas = pytest.importorskip("pandas")
values = st.one_of(st.integers(-(2**70), 2**70), st.integers(-99, 99).map(float), st.text("0179.-+ eax", min_size=1, max_size=5))


def as_lists(histories: Histories) -> dict[Any, list[Any]]:
    return {user: histories.item_ids[histories.of(n)].tolist() for n, user in enumerate(histories.user_ids.tolist())}


@pytest.fixture(scope="module")
def model() -> AWRSR:
    weeks = {f"user {n}": [(n + i) % 7 for i in range(10)] for n in range(20)}
    return AWRSR(layers=1, hidden=8).fit(weeks, epochs=1, progress=False)


# The rule


def test_a_whole_number_is_one_id_in_every_reader_and_in_python(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user,item\nu,17\nu,17.0\nu, 17\nu,17.\n")
    (tmp_path / "a.jsonl").write_text(
        '{"user":"u","item":17}\n{"user":"u","item":17.0}\n{"user":"u","item":"17.0"}\n{"user":"u","item":"17"}\n'
    )
    (tmp_path / "lines.txt").write_text("u 17 17.0 17.00 17\n")
    (tmp_path / "pairs.txt").write_text("u 17\nu 17.0\nu 17.00\nu 17\n")
    pl.DataFrame({"user": ["u"] * 4, "item": [17.0] * 4}).write_parquet(tmp_path / "a.parquet")
    found = [read(path, format="lines" if path.stem == "lines" else "auto") for path in sorted(tmp_path.iterdir())]
    found += [
        Histories.from_lists({"u": [17, 17.0, "17", " 17.0"]}),
        Histories.from_lists({"u": [np.int8(17), np.float32(17), np.str_("17"), 17]}),
    ]
    found += [
        Histories.from_events(["u"] * 4, column)
        for column in (pandas.Series([17, 17.0, 17, 17]), pandas.Series(["17", "17.0", "17", "17"]))
    ]
    assert all(as_lists(each) == {"u": [17, 17, 17, 17]} and each.item_ids.dtype == np.int64 for each in found)


def test_whole_numbers_among_text_are_one_id_and_leading_zeros_another() -> None:
    found = read(io.StringIO("user,item\na,17.0\na,17\na,007\na,7\na,1.50\na,+7\n"))
    assert as_lists(found) == {"a": ["17", "17", "007", "7", "1.50", "+7"]}
    assert as_lists(Histories.from_lists({"a": [17.0, 17, "007", 7.0, "1.50", "+7"]})) == as_lists(found)


@given(st.lists(values, min_size=1, max_size=8))
def test_a_column_and_a_single_value_follow_the_same_rule(ids: list[Any]) -> None:
    if any(isinstance(value, str) and not value.strip(" ") for value in ids):
        return
    found = Histories.from_lists({"u": ids})
    assert as_texts(found.item_ids[found.items]) == list(map(id_text, ids))
    text = pl.Series([str(value) for value in ids])
    distinct, place = number_ids(text, str)
    assert as_texts(distinct[place]) == list(map(id_text, ids))
    for catalogue in (distinct, found.item_ids, distinct[::-1]):
        index = Index(catalogue)
        assert as_texts(catalogue[index.find(found.item_ids)]) == as_texts(found.item_ids)
    assert (Index(distinct).find(np.array(["not there"], dtype=object)) == -1).all()


def test_catalogues_of_older_models_are_found_by_the_rule() -> None:
    index = Index(np.array(["17.0", "b", "18"]))
    assert index.find(np.array([18, 17, 5])).tolist() == [2, 0, -1] and index.find(np.array(["b"], dtype=object)).tolist() == [1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "item id is True, must be a number or text"),
        (b"x", "item id is b'x', must be a number or text"),
        (object(), "item id is <object"),
        (pandas.NA, "item id is <NA>, must be"),
        (pandas.NaT, "item id is NaT, must be"),
        (float("inf"), "item is inf, not finite"),
        (2.0**53 + 2, "item is 9007199254740994.0, a float beyond"),
        ("1.23457E+17", "item is '1.23457E.17', a number whose last digits are lost"),
        ("nan", "item is 'nan', which programs write for a missing value; .* keep takes the text as an id"),
        ("<NA>", "item is '<NA>', which programs write"),
        (" ", "item is missing"),
    ],
)
def test_what_cannot_be_an_id_is_refused(value: Any, message: str) -> None:
    with pytest.raises((TypeError, DataError), match=message):
        Histories.from_lists({"u": [value], "v": ["a"]} if isinstance(value, str) else {"u": [value]})


@pytest.mark.parametrize("mark", ["nan", "NULL", "None", "NA", "\\N", "<NA>", ""])
@pytest.mark.parametrize("ids", [["a", "b"], ["1.5", "2.5"]])
def test_missing_ids_are_never_one_big_user(mark: str, ids: list[str]) -> None:
    text = f"user,item\n{ids[0]},x\n{mark},y\n{mark},x\n{ids[1]},z\n"
    with pytest.raises(DataError, match=r"standard input:3: user is .*--missing-ids drop leaves such events out"):
        read(io.StringIO(text))
    with pytest.warns(DataWarning, match=r"left out 2 events without a user or an item; the first is standard input:3: user"):
        assert as_lists(read(io.StringIO(text), missing_ids="drop")) == {ids[0]: ["x"], ids[1]: ["z"]}
    if mark:
        assert as_lists(read(io.StringIO(text), missing_ids="keep"))[mark] == ["y", "x"]


def test_missing_ids_may_be_dropped_in_python_and_in_lines() -> None:
    with pytest.warns(DataWarning, match=r"left out 1 event without .* is items\[1\]|users\[0\]"):
        assert as_lists(Histories.from_events(["u", "u"], pandas.Series([1, None]), missing_ids="drop")) == {"u": [1]}
        assert as_lists(Histories.from_events(pandas.Series([pandas.NA, 5], dtype="Int64"), [1, 2], missing_ids="drop")) == {5: [2]}
    with pytest.warns(DataWarning, match="history of user 'u': item"):
        assert as_lists(Histories.from_lists({"u": ["a", None], "v": ["nan", "b"]}, missing_ids="drop")) == {"u": ["a"], "v": ["b"]}
    with pytest.warns(DataWarning, match="left out 3 events"):
        assert as_lists(read(io.StringIO("a x NULL\nNULL x\nb NULL\n"), missing_ids="drop")) == {"a": ["x"]}


# Users


TABLE = pandas.DataFrame({"user": ["b", "b", "a"], "item": [1, 2, 3]})
GROUPED = TABLE.groupby("user")["item"]


@pytest.mark.parametrize(
    "histories",
    [
        GROUPED.agg(list),
        GROUPED.agg(tuple),
        GROUPED.apply(np.array),
        GROUPED,
        TABLE.groupby(["user"])["item"],
        GROUPED.agg(list).to_dict(),
        collections.OrderedDict(a=[3], b=[1, 2]),
        {"a": pandas.Series([3], index=[9]), "b": pl.Series([1, 2])}.items(),
    ],
    ids=["lists", "tuples", "arrays", "groups", "groups by a list", "dict", "mapping", "items"],
)
def test_whatever_has_keys_names_its_users(histories: Any, model: AWRSR) -> None:
    assert as_lists(Histories.from_lists(histories)) == {"a": [3], "b": [1, 2]}
    if not hasattr(histories, "__next__"):
        table = model.recommend(histories, k=2)
        wanted = model.recommend({"a": [3], "b": [1, 2]}, k=2)
        assert [table[name].to_list() for name in table.columns] == [wanted[name].to_list() for name in wanted.columns]


def test_a_plain_list_stays_positional() -> None:
    for histories in ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]]), pl.Series([[1, 2], [3, 4]]), iter([[1, 2], [3, 4]])):
        assert as_lists(Histories.from_lists(histories)) == {0: [1, 2], 1: [3, 4]}


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        (pandas.Series([[1], [2]], index=["x", "x"]), "user 'x' occurs more than once"),
        ({17: [1], "17.0": [2]}, "user '17.0' occurs more than once"),
        (pandas.Series([1, 2]), "history of user 0 is 1, must be a sequence"),
        (TABLE, r"histories is of type DataFrame.*df.groupby\('user'\)"),
        (TABLE.groupby("user"), "history of user 'a' is of type DataFrame, must be a sequence of item ids$"),
        (GROUPED.agg(set), "history of user 'a' is a set, must be a sequence of item ids in order of time"),
        ({"a": {1: 5.0}}, "history of user 'a' is a dict"),
        (zip("ab", [[1], [2]], strict=True), r"item id is \[1\], must be a number or text"),
        (pandas.Series([[1]], index=pandas.MultiIndex.from_tuples([("a", 1)])), r"user id is \('a', 1\), must be"),
        ({1, 2}, "histories is of type set"),
    ],
)
def test_containers_that_name_no_histories_are_refused(histories: Any, message: str) -> None:
    with pytest.raises((TypeError, DataError), match=message):
        Histories.from_lists(histories)


# A model's items


def test_items_that_the_model_does_not_know_are_counted(model: AWRSR) -> None:
    with pytest.warns(DataWarning, match=r"3 of 5 events are left out, since .* \('x', 'y'\); 1 of 2 users have no others"):
        table = model.recommend({"a": [1, 2.0, "x"], "b": ["x", "y"]}, k=1)
    assert table["user"].to_list() == ["a", "b"] and table["score"].is_null().to_list() == [False, True]


def test_items_are_found_however_they_are_written(model: AWRSR) -> None:
    tables = [
        model.recommend({"a": items}, k=3) for items in ([1, 2], [1.0, 2.0], ["1", "2.0"], [decimal.Decimal("1.0"), np.int32(2)])
    ]
    assert all(table.equals(tables[0]) for table in tables)
    assert model.similar_items([2.0]).equals(model.similar_items(["2"])) and model.similar_items(pandas.Series([2])).height
    with pytest.raises(ValueError, match="items hold 'x', which this model does not know"):
        model.similar_items([1, "x"])


def test_the_index_of_a_model_is_built_once(model: AWRSR, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(Index, "__init__", lambda self, ids, init=Index.__init__: (built.append(1), init(self, ids))[1])
    model.item_ids = model.ids().copy()
    for _ in range(3):
        model.recommend({"a": [1, 2]}, k=1)
        model.similar_items([1])
        model.attention_maps([1, 2])
    assert len(built) == 1
    assert AWRSR(num_items=5).index().find(np.array([4, 5])).tolist() == [4, -1]


def test_a_recommendation_among_a_million_items_does_not_number_them_again() -> None:
    items = np.array([f"item {n}" for n in range(1_000_000)], dtype=object)
    index, histories = Index(items), Histories.from_lists({"a": ["item 5", "item 999999", "x"]})
    start = time.process_time()
    for _ in range(20):
        known, unknown = histories.numbered_as(index)
    assert time.process_time() - start < 0.5 and known.items.tolist() == [5, 999999] and unknown == 1


def test_text_ids_are_saved_loaded_and_written(tmp_path: Path) -> None:
    weeks = {f"user {n}": [f"{(n + i) % 7}é" for i in range(10)] for n in range(20)}
    model = AWRSR(layers=1, hidden=8).fit(weeks, epochs=1, progress=False, out=tmp_path / "run")
    same = AWRSR.load(tmp_path / "run")
    assert same.ids().tolist() == model.ids().tolist() and same.recommend(weeks, 3).equals(model.recommend(weeks, 3))
    assert same.recommend({"x": []}, 3).schema == model.recommend(weeks, 3).schema
    assert pl.read_parquet(tmp_path / "run" / "ranks_test.parquet").schema["user"] == pl.String
    lines = Histories.from_lists({n: items for n, items in enumerate(weeks.values())})
    assert as_lists(read(write(lines, tmp_path / "a.txt"))) == as_lists(lines)


# Memory


def test_memory_follows_the_sum_of_the_lengths_not_the_longest(tmp_path: Path) -> None:
    """100,000 short ids and one of 2,000 characters; text of one width would take 800 MB for items alone."""
    rows = "".join(f"u{n},i{n}\n" for n in range(100_000))
    (tmp_path / "a.csv").write_text(f"user,item\n{rows}{'u' * 2000},{'i' * 2000}\n")
    code = (
        "import resource, sys; from awrsr import Histories, read\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "h = read(sys.argv[1]); lists = {str(u): [str(i)] for u, i in zip(h.user_ids, h.item_ids)}\n"
        "again = Histories.from_lists(lists); known, unknown = again.numbered_as(h.item_ids)\n"
        "assert not unknown and max(map(len, again.item_ids)) == 2000 and h.num_items == 100_001\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.csv")], capture_output=True, text=True, timeout=120)
    assert not done.returncode and int(done.stdout) < 400, done.stdout + done.stderr
