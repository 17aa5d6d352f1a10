"""Items that no training history holds are not recommended by default: what the model says of them is chance."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from awrsr import AWRSR
from awrsr.cli import main
from awrsr.data.histories import Histories
from awrsr.data.splits import split

from .runs import QUICK, SMALL, flags, histories

LATE = [f"late{i}" for i in range(30)]  # occur as the last event of a user only, which is held out for test
HISTORIES = {user: [*items, LATE[i]] if i < len(LATE) else items for i, (user, items) in enumerate(histories(60).items())}


@pytest.fixture(scope="module")
def fitted() -> AWRSR:
    """With binary cross-entropy, whose sampled negatives leave most embeddings of such items as they began."""
    return AWRSR(**SMALL).fit(HISTORIES, epochs=1, loss="bce", progress=False, **QUICK)


def items(table: pl.DataFrame, column: str = "item") -> set[str]:
    return set(table[column].to_list())


def test_recommend_and_similar_items_leave_them_out(fitted: AWRSR) -> None:
    assert fitted.untrained_items() == LATE
    known = set(fitted.ids().tolist()) - set(LATE)
    everything = dict(k=1000, filter_seen=False)
    assert items(fitted.recommend(HISTORIES, **everything)) == known
    assert items(fitted.recommend(HISTORIES, filter_untrained=False, **everything)) == known | set(LATE)
    assert items(fitted.recommend(HISTORIES, 10, filter_untrained=False)) & set(LATE), "the toy run would not have recommended any"
    assert items(fitted.similar_items(["i3"], 1000), "similar") == known - {"i3"}
    assert items(fitted.similar_items([LATE[0]], 3), "similar") <= known  # asked for by name, one of them is compared as before


def test_a_row_has_the_rank_that_it_would_have_without_them(fitted: AWRSR) -> None:
    table, whole = (fitted.recommend(HISTORIES, 1000, filter_untrained=x) for x in (True, False))
    rank = pl.col("score").rank("ordinal", descending=True).over("user")
    rest = whole.filter(~pl.col("item").is_in(LATE)).with_columns(rank=rank)
    assert table.drop("rank").equals(rest.drop("rank")) and table["rank"].to_list() == rest["rank"].to_list()


def test_a_saved_model_knows_them(fitted: AWRSR, tmp_path: Path) -> None:
    fitted.save(tmp_path / "run")
    loaded = AWRSR.load(tmp_path / "run")
    assert loaded.untrained_items() == LATE
    assert loaded.recommend(HISTORIES, 5).equals(fitted.recommend(HISTORIES, 5))


def test_training_further_on_them_makes_them_known(fitted: AWRSR, tmp_path: Path) -> None:
    fitted.save(tmp_path / "run")
    model = AWRSR.load(tmp_path / "run")
    again = {"new": ["i1", "i2", LATE[0], "i3", "i4"], "other": ["i1", "i2", "i5", "i3", "i4"]}
    model.fit(again, epochs=1, progress=False, **QUICK)
    assert model.untrained_items() == LATE[1:]


def test_nothing_is_left_out_where_all_is_trained(fitted: AWRSR) -> None:
    whole = AWRSR(**SMALL).fit(split(Histories.from_lists(HISTORIES), "none"), epochs=1, progress=False, **QUICK)
    assert whole.untrained_items() == [] and AWRSR(**SMALL, num_items=5).untrained_items() == []


def test_each_split_says_what_trains() -> None:
    found = Histories.from_events([1, 1, 1, 1, 2, 2, 2], ["a", "b", "c", "d", "a", "e", "b"], [1, 2, 3, 4, 1, 2, 9])

    def trained(how: str, **options: Any) -> list[str]:
        return found.item_ids[split(found, how, **options).trained_items() > 0].tolist()

    assert trained("leave-one-out") == ["a", "b"] and trained("none") == ["a", "b", "c", "d", "e"]
    assert trained("time", validation_from=2.5, test_from=3.5) == ["a", "b", "e"]


def test_the_command_counts_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data.txt", tmp_path / "run"
    data.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in HISTORIES.items()))
    assert main(["train", *flags(data=data, out=out, epochs=1, loss="bce", **SMALL, **QUICK)]) == 0
    assert "30 items occur in held-out events only, and are not recommended" in capsys.readouterr().out
    command = ["recommend", "--run", str(out), "-k", "5", "--output", str(tmp_path / "top.csv")]
    assert main(command) == 0
    error = capsys.readouterr().err
    assert "Left out 30 items that no training history holds; --no-filter-untrained ranks them, too." in error
    assert not items(pl.read_csv(tmp_path / "top.csv")) & set(LATE)
    assert main([*command, "--no-filter-untrained"]) == 0
    assert "Left out" not in capsys.readouterr().err and items(pl.read_csv(tmp_path / "top.csv")) & set(LATE)
