"""Further training: on new events of known users and of new ones, with new items."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from awrsr import AWRSR, Histories
from awrsr.cli import main
from awrsr.training.more import company, with_more_items

from .runs import everything, histories, train, write
from .small import as_numbered, make_model

QUICK: dict[str, Any] = {"progress": False, "threads": 1, "accelerator": "cpu"}


def cycles(users: int, size: int, events: int, first: int = 0) -> dict[str, list[str]]:
    return {f"u{first + n}": [f"i{(n + at) % size}" for at in range(events)] for n in range(users)}


@pytest.fixture
def fitted() -> AWRSR:
    model = AWRSR(refinement="none", layers=1, hidden=16, max_len=8)
    return model.fit(cycles(40, 6, 9), epochs=30, learning_rate=0.01, batch_size=16, **QUICK)


def test_new_users_events_and_items_are_learned(fitted: AWRSR) -> None:
    """A new item "x" follows "i2", and "i3" follows it."""
    before, rows = fitted.item_vectors()[1].copy(), len(fitted.ids())
    new = {f"new{n}": ["i1", "i2", "x", "i3", "i4"] for n in range(20)} | {"u0": ["i3", "i4"]}
    fitted.fit_more(new, epochs=20, learning_rate=0.01, **QUICK)
    assert fitted.ids().tolist()[:rows] == [f"i{n}" for n in range(6)] and fitted.ids()[-1] == "x"
    assert fitted.trained is not None and fitted.trained.tolist()[-1] == 20  # exact: all events, old and new
    assert fitted.trained.sum() == 40 * 9 + 20 * 5 + 2
    best = fitted.recommend({"who": ["i1", "i2"]}, k=2, filter_seen=False)["item"].to_list()
    assert sorted(best) == ["i3", "x"]  # one followed before, the other one now
    after_x = fitted.recommend({"who": ["i1", "i2", "x"]}, k=2, filter_seen=False)["item"].to_list()
    assert sorted(after_x) == ["i3", "i4"]  # i4 stood there without x
    assert fitted.recommend({"who": ["i4", "i5"]}, k=1, filter_seen=False)["item"].to_list() == ["i0"]  # not forgotten
    assert before.shape == (6, 16) and fitted.item_vectors()[1].shape == (7, 16)
    assert fitted.fitted is not None and fitted.fitted.histories.num_users == 60
    history = fitted.fitted.histories
    assert history.item_ids[history.of(0)].tolist() == [*cycles(40, 6, 9)["u0"], "i3", "i4"]
    fitted.fit_more({"u0": ["x"]}, **QUICK)  # and once more
    assert fitted.trained.sum() == 40 * 9 + 20 * 5 + 3


def test_a_loaded_model_needs_what_came_before(fitted: AWRSR, tmp_path: Any) -> None:
    fitted.save(tmp_path)
    loaded = AWRSR.load(tmp_path)
    events = pl.DataFrame({"user": ["u0", "z"], "item": ["i0", "i9"]})
    with pytest.raises(ValueError, match="histories must be given: this model was loaded"):
        loaded.fit_more(events, **QUICK)
    loaded.fit_more(events, histories=cycles(40, 6, 9), **QUICK)
    assert loaded.trained is not None and loaded.trained.sum() == 40 * 9 + 2 and loaded.ids()[-1] == "i9"
    again = AWRSR.load(tmp_path).fit_more(events, histories=cycles(40, 6, 9), **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_run_is_continued_in_a_folder_of_its_own(tmp_path: Path, printed: Callable[..., str]) -> None:
    data = write(tmp_path / "data.txt")
    train(data, tmp_path / "run", epochs=1)
    before = everything(tmp_path / "run")
    (tmp_path / "new.csv").write_text("user,item\nu1,i3\nnewcomer,i4\nnewcomer,novel\nnewcomer,i5\n")
    line = ["train", "--continue", tmp_path / "run", "--data", tmp_path / "new.csv", "--no-progress"]
    assert "Trained further on 4 events of 2 users: 1 new user, 1 new item." in printed(*line)
    assert everything(tmp_path / "run") == before
    table = pl.read_csv(io.StringIO(printed("recommend", tmp_path / "run-more", "-k", 2)))
    assert table["user"].n_unique() == len(histories()) + 1 and "newcomer" in table["user"]
    events = pl.read_parquet(tmp_path / "run-more" / "events.parquet")
    assert events.filter(user="newcomer")["item"].to_list() == ["i4", "novel", "i5"]
    assert events.filter(user="u1")["item"].to_list() == [*histories()["u1"], "i3"]
    again = [*line[:2], tmp_path / "run-more", *line[3:], "--out", tmp_path / "third"]
    assert "0 new users, 0 new items" in printed(*again)
    assert main(["train", "--continue", str(tmp_path / "run")]) == 2
    assert main([str(each) for each in [*line, "--out", tmp_path / "run"]]) == 2


def test_a_new_item_begins_among_its_company() -> None:
    table = torch.arange(12.0).reshape(4, 3)
    histories = as_numbered([[0, 4, 1, 2], [5, 5], [3, 4]], items=6)
    found = company(table, histories)
    wanted = (table[0] + table[1] + table[2] / 2 + table[3]) / 3.5
    torch.testing.assert_close(found, torch.stack([wanted, table.mean(0)]))


@pytest.mark.parametrize("backbone", ["sasrec", "stosa"])
def test_known_items_keep_their_scores_in_a_larger_network(backbone: str) -> None:
    model = make_model(backbone=backbone)
    count = model.config.num_items
    larger = with_more_items(model.network, as_numbered([[0, count, 1]], items=count + 2)).eval()
    items, lengths = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    with torch.no_grad():
        torch.testing.assert_close(larger.scores_padded(items, lengths)[:, :count], model.scores_padded(items, lengths))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"replay": -1}, "replay is -1, must be 0 or more"), ({"epochs": 0}, "epochs is 0, must be at least 1")],
)
def test_options_out_of_range_are_refused(fitted: AWRSR, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted.fit_more({"u0": ["i1"]}, **options)
    with pytest.raises(TypeError, match="fit_more has no option epoch: did you mean epochs"):
        fitted.fit_more({"u0": ["i1"]}, epoch=2)


def test_numbers_and_text_may_meet() -> None:
    numbers = Histories.from_lists([[n % 5, (n + 1) % 5, (n + 2) % 5, (n + 3) % 5] for n in range(30)])
    model = AWRSR(refinement="none", layers=1, hidden=8, max_len=4).fit(numbers, epochs=1, **QUICK)
    assert model.fit_more({0: [7, "3"]}, **QUICK).ids().tolist() == [0, 1, 2, 3, 4, 7]
    assert model.fit_more({0: ["new", 2]}, **QUICK).ids().tolist() == ["0", "1", "2", "3", "4", "7", "new"]
    assert model.recommend({"a": [3, "7"]}, k=2).height == 2 and np.asarray(model.trained).sum() == 124
