"""Tables in, tables out: events in a table of any library, answers in the same one."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pandas
import polars as pl
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from awrsr import AWRSR, DataWarning, Histories, Split, split
from awrsr.data.tables import histories_of

from .small import make_model

EVENTS = {"customer_id": ["b", "a", "b", "a", "b"], "product_id": [1, 2, 2, 3, 3], "timestamp": [1, 5, 2, 4, 3]}
TABLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pandas": pandas.DataFrame,
    "pandas with an index": lambda columns: pandas.DataFrame(columns, index=list(range(9, 9 - len(columns["customer_id"]), -1))),
    "polars": pl.DataFrame,
    "polars, lazy": pl.LazyFrame,
}


@pytest.mark.parametrize("kind", TABLES)
def test_events_of_a_table_are_sorted_by_time(kind: str) -> None:
    table = TABLES[kind](EVENTS)
    found, names = histories_of(table)
    assert names is not None and names[:3] == ("customer_id", "product_id", "timestamp")
    lists = {str(user): found.item_ids[found.of(n)].tolist() for n, user in enumerate(found.user_ids)}
    assert lists == {"b": [1, 2, 3], "a": [3, 2]}
    unsorted, _ = histories_of(table, time="none")
    assert unsorted.item_ids[unsorted.of(1)].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (EVENTS, {"item": "thing"}, "the table of histories: has no column 'thing'; columns: 'customer_id'"),
        ({"user": ["a"], "thing": [1]}, {}, r"no column whose name suggests the item; .*\(in Python item=NAME\)"),
        ({"user": ["a"], "item": [1], "when": [3]}, {}, "column 'when' may be the time"),
        ({"user": ["a", None], "item": [1, 2]}, {}, r"user\[1\] is missing; --missing-ids drop"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(columns: dict[str, Any], options: dict[str, Any], message: str) -> None:
    for make in (pandas.DataFrame, pl.DataFrame):
        with pytest.raises(ValueError, match=message):
            histories_of(make(columns), **options)


def test_names_of_columns_need_a_table() -> None:
    with pytest.raises(TypeError, match="user is 'a', the name of a column, but histories is of type dict, must be a table"):
        histories_of({"a": [1]}, user="a")


@pytest.mark.parametrize(
    ("kind", "type_of_answer"),
    [("pandas", pandas.DataFrame), ("polars", pl.DataFrame), ("polars, lazy", pl.DataFrame)],
)
def test_answers_come_in_the_library_of_the_question(kind: str, type_of_answer: type) -> None:
    model, table = make_model(3), TABLES[kind](EVENTS | {"product_id": [0, 1, 1, 2, 2]})
    for each in (model.recommend(table, k=2), model.recommend(table, k=2, users=["a"], titles={0: "zero"})):
        assert type(each) is type_of_answer
        assert list(each.columns)[:2] == ["customer_id", "product_id"]
    wanted = model.recommend({"b": [0, 1, 2], "a": [2, 1]}, k=2)
    assert wanted["user"].to_list() == list(model.recommend(table, k=2)["customer_id"])
    series = pandas.Series({"a": [0, 1]})
    assert type(model.recommend(series, k=1)) is pandas.DataFrame


def test_fit_remembers_what_columns_are_called() -> None:
    days = [(f"u{n}", (n + i) % 5, i) for n in range(20) for i in range(6)]
    table = pandas.DataFrame(days, columns=["who", "what", "at"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = AWRSR(layers=1, refinement="none").fit(table, user="who", item="what", time="at", epochs=1, progress=False)
        again = model.recommend(table, k=1)
        assert list(again.columns) == ["who", "what", "rank", "score"] and len(again) == 20
        assert model.recommend(k=1).equals(again)  # of those that it was fitted to
        assert list(model.recommend(pandas.DataFrame({"who": ["new"], "what": [1]}), k=1)["who"]) == ["new"]
        assert model.history.columns == ["epoch", "loss", "NDCG@10"] and len(model.history) == 1
        assert model.evaluate().targets == model.evaluate(part="validation").targets == 20
    assert "5 items" in repr(model) and len(repr(model)) < 120


def test_validation_may_be_a_table_of_its_own() -> None:
    rows = [(f"u{n}", (n + i) % 5, i) for n in range(20) for i in range(6)]
    days = pl.DataFrame(rows, schema=["user", "item", "time"], orient="row")
    earlier, later = days.filter(pl.col("time") < 5), days.filter(pl.col("time") == 5)
    model = AWRSR(layers=1, refinement="none").fit(earlier, validation=later, epochs=1, progress=False)
    assert model.fitted is not None and len(model.fitted.targets("validation")[0]) == 20
    assert not len(model.fitted.targets("test")[0]) and model.fitted.train_end.sum() == len(earlier)
    with pytest.warns(DataWarning, match="1 events are left out"):
        found = model.evaluate(pl.DataFrame({"user": ["u0", "u1", "stranger"], "item": [1, 99, 1]}))
    assert found.targets == 1  # 99 is no item, and a stranger's first event follows nothing
    with pytest.raises(ValueError, match="validation must not be given with a Split"):
        model.fit(split(days), validation=later)


def test_parts_that_were_divided_before_are_joined() -> None:
    training = Histories.from_events(["a", "b", "a"], ["x", "y", "y"], [1, 1, 2])
    test = Histories.from_events(["a", "c", "a"], ["z", "x", "x"], [4, 5, 3])
    joined = Split.of_parts(training, None, test)
    h = joined.histories
    lists = {str(user): h.item_ids[h.of(n)].tolist() for n, user in enumerate(h.user_ids)}
    assert lists == {"a": ["x", "y", "x", "z"], "b": ["y"], "c": ["x"]}
    assert joined.train_end.tolist() == joined.validation_end.tolist() == [2, 1, 0] and h.times is not None
    assert joined.targets("test")[0].tolist() == [0, 0] and "2 for test" in repr(joined)
    with pytest.warns(DataWarning, match="1 user have events of validation or test that are older"):
        Split.of_parts(test, training)
    numbers = Split.of_parts(Histories.from_lists([[1, 2]]), Histories.from_lists({0: ["2", "x"]})).histories
    assert numbers.item_ids.tolist() == ["1", "2", "x"] and numbers.items.tolist() == [0, 1, 1, 2]


def test_callbacks_and_loggers_of_lightning_are_called(tmp_path: Path) -> None:
    class Epochs(L.Callback):
        seen = 0

        def on_train_epoch_end(self, trainer: L.Trainer, training: L.LightningModule) -> None:
            self.seen += 1

    histories = {f"u{n}": [(n + i) % 5 for i in range(6)] for n in range(20)}
    quick: dict[str, Any] = {"epochs": 2, "progress": False}
    for logger, pattern in ((CSVLogger(tmp_path / "a"), "a/**/metrics.csv"), (TensorBoardLogger(tmp_path / "b"), "b/**/events*")):
        model = AWRSR(layers=1, refinement="none").fit(histories, callbacks=[own := Epochs()], logger=logger, **quick)
        assert own.seen == 2 and list(tmp_path.glob(pattern))
        model.fit_more({"u0": [1]}, callbacks=[own], **quick)
        assert own.seen == 4
