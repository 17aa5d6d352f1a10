"""Parts of the data in files of their own, rows that a condition chooses, and the options of `awrsr recommend` that take files."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from awrsr import AWRSR, DataWarning, read
from awrsr.cli import main

from .runs import QUICK, SMALL, flags, histories, results, train, write


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.csv, b.csv and c.csv: all events but the last two of each user, the last but one, and the last; and a run on them, run/."""
    folder = tmp_path_factory.mktemp("parts")
    for name, part in (("a", slice(-2)), ("b", slice(-2, -1)), ("c", slice(-1, None))):
        rows = [(user, item) for user, items in histories().items() for item in items[part]]
        pl.DataFrame(rows, schema=["user", "item"], orient="row").write_csv(folder / f"{name}.csv")
    assert main(["train", *given(folder), "--out", f"{folder}/run", *flags(**(SMALL | QUICK | {"epochs": 2}))]) == 0
    return folder


def given(folder: Path) -> list[str]:
    return flags(train_data=folder / "a.csv", validation_data=folder / "b.csv", test_data=folder / "c.csv")


def table(text: str) -> dict[str, list[str]]:
    """First word of each line of a table -> the others."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_given_parts_are_what_leave_one_out_makes(
    parts: Path, tmp_path: Path, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = train(write(tmp_path / "data.txt"), tmp_path / "run", epochs=2)
    found = results(parts / "run")
    assert found["baselines"] == other["baselines"]  # items have other numbers, so the models begin with other weights
    monkeypatch.chdir(tmp_path)
    own = printed("evaluate", parts / "run")
    assert own == printed("evaluate", "--run", parts / "run", *given(parts))
    before = ["--data", parts / "a.csv", "--validation-data", parts / "b.csv", "--test-data", parts / "c.csv"]
    assert printed("evaluate", tmp_path / "run") == printed("evaluate", tmp_path / "run", *before)
    assert len(printed("recommend", parts / "run", "-k", 2).splitlines()) == 1 + 2 * len(histories())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --train-data {0}/a.csv --data {0}/b.csv", "train_data is given, so data must not be, nor a split"),
        ("train --train-data {0}/a.csv --split last-n", "train_data is given, so data must not be, nor a split"),
        ("train --split given --data {0}/a.csv", "split is given, which needs train_data and no data"),
        ("train --data {0}/a.csv --test-data {0}/b.csv", "validation_data and test_data need train_data, the events before them"),
        ("train --train-data {0}/a.csv --collapse", "collapse is True, which does not apply to parts in files of their own"),
        ("evaluate {0}/run --data {0}/a.csv", "--data cannot be divided as in the run, whose parts had files of their own"),
        ("evaluate {0}/run --train-data {0}/a.csv", "--train-data and --validation-data need --test-data; see awrsr"),
        ("evaluate {0}/run --test-data {0}/c.csv --part validation", "with --test-data, name what came before by --data or"),
        ("recommend {0}/run --run {0}/run", "are two run folders; name one; see awrsr recommend --help"),
        ("recommend {0}/run --history i1 --user u1", "--history must not be given with --user or --data"),
        ("recommend", "RUN is missing, the folder of a run; see awrsr recommend --help"),
        ("similar {0}/run --item zz", "items hold 'zz', which this model does not know"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    line: str, message: str, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(parts) for word in line.split()]) in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"awrsr {line.split()[0]}: ") and message in error


RATED = """user,item,rating,kind,time
1,a,5,buy,1
1,b,3,view,2
2,a,,buy,3
2,b,4,"buy",4
"""
JSON = '{"user":1,"item":"a","ok":true,"stars":5}\n{"user":1,"item":"b","ok":false}\n{"user":2,"item":"b","ok":true}\n'


@pytest.mark.parametrize(
    ("text", "where", "wanted"),
    [
        (RATED, "rating >= 4", ["a", "b"]),
        (RATED, "kind == 'buy' AND rating IS NOT NULL", ["a", "b"]),
        (RATED, "item = 'b'", ["b", "b"]),
        (RATED, 'Rating BETWEEN 3 AND 4 OR "user" > 5', ["b", "b"]),
        (JSON, "ok", ["a", "b"]),
        (JSON, "stars > 1.5", ["a"]),
    ],
)
def test_a_condition_chooses_rows_and_the_others_are_counted(text: str, where: str, wanted: list[str]) -> None:
    with pytest.warns(DataWarning, match=f"left out {len(text.strip().splitlines()) - (text is RATED) - len(wanted)} of"):
        found = read(io.StringIO(text), where=where)
    assert found.item_ids[found.items].tolist() == wanted


def test_a_condition_applies_to_parquet_and_keeps_the_places_of_rows(tmp_path: Path) -> None:
    rows: dict[str, Any] = {"user": [1, 1, None, 2], "item": [1, 2, 3, 4], "stars": [1, 2, 3, 4]}
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    with pytest.warns(DataWarning), pytest.raises(ValueError, match="row 3: user is missing"):
        read(tmp_path / "a.parquet", where="stars > 1")
    with pytest.warns(DataWarning, match="left out 3 of 4 events"):
        assert read(tmp_path / "a.parquet", where="stars > 3").item_ids.tolist() == [4]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("rating >", "where is 'rating >', must be a condition on the columns, such as \"rating >= 4\".*unable to parse"),
        ("1 = 1", "where is '1 = 1', which names no column"),
        ("stars > 3", "has no column 'stars'; columns: 'user', 'item'"),
        ("kind > 3", r"where 'kind > 3' cannot be decided \(kind holds text\)"),
        ("rating + 1", "where is 'rating \\+ 1', whose values are of type"),
        ("rating > 9", "where 'rating > 9' leaves none of 4 events"),
    ],
)
def test_a_condition_that_makes_no_sense_is_refused(where: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(io.StringIO(RATED), where=where)
    with pytest.raises(ValueError, match="where needs columns, and lines of ids have none"):
        read(io.StringIO("1 2 3\n2 3 4 5\n"), where="rating > 3")


def test_recommend_takes_files_of_items(parts: Path, tmp_path: Path, printed: Callable[..., str]) -> None:
    run = parts / "run"
    (tmp_path / "all.txt").write_text("i1\ni2\ni3\n")
    (tmp_path / "each.csv").write_text("user,item\nhistory,i1\nu1,i2\n")
    (tmp_path / "items.csv").write_text("item,name\ni2,two\ni3,three\n")
    line = ["recommend", run, "--history", "i4", "i7", "--filter-seen", "no", "--candidates", tmp_path / "all.txt"]
    found = pl.read_csv(io.StringIO(printed(*line, "--exclude", tmp_path / "each.csv", "--titles", tmp_path / "items.csv")))
    model = AWRSR.load(run)
    wanted = model.recommend({"history": ["i4", "i7"]}, candidates=["i2", "i3"], filter_seen=False)
    assert found.columns == ["user", "item", "name", "rank", "score"] and found["item"].to_list() == wanted["item"].to_list()
    assert found["name"].to_list() == [{"i2": "two", "i3": "three"}[item] for item in found["item"]]
    cold = pl.read_csv(io.StringIO(printed("recommend", run, "--history", "unheard-of", "-k", 3)))
    assert cold["score"].null_count() == 3 and model.trained is not None
    counts = dict(zip(model.ids().tolist(), model.trained.tolist(), strict=True))
    assert [counts[item] for item in cold["item"]] == sorted(counts.values(), reverse=True)[:3]
    similar = pl.read_csv(io.StringIO(printed("similar", run, "--item", "i1", "-k", 2, "--titles", tmp_path / "items.csv")))
    assert similar.columns == ["item", "similar", "name", "rank", "score"]
    assert similar["similar"].to_list() == model.similar_items(["i1"], k=2)["similar"].to_list()


def test_pictures_and_reports_show_titles(
    home: Path, tmp_path: Path, printed: Callable[..., str]
) -> None:
    titles = tmp_path / "items.csv"
    pl.DataFrame({"item": [f"i{n}" for n in range(1, 24)], "name": [f"title {n}" for n in range(1, 24)]}).write_csv(titles)
    line = ["explain", home / "run", "--history", "i0", "i3", "i7", "--titles", titles, "--output", tmp_path / "a.svg"]
    said = printed(*line)
    assert "title 3" in said and "i3" not in said and "i0" in said
    report = tmp_path / "a.html"
    printed("analyse", home / "run", "--users", 20, "--titles", titles, "--output", report)
    text = report.read_text()
    assert ">title 3<" in text and ">i3<" not in text
