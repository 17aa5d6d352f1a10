"""`awrsr recommend` finds the run's data and the right people, wherever it is started and whatever ids and paths look like."""

import gzip
import io
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from awrsr.cli import main

from .runs import QUICK, SMALL, flags, histories

TINY = SMALL | QUICK | {"epochs": 1}


def events(found: dict[str, list[str]], separator: str = ",") -> str:
    """A table with names of columns that are not among the usual ones."""
    rows = [("visitor", "page"), *((user, item) for user, items in found.items() for item in items)]
    return "".join(separator.join(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a blank in its name, in which `my run` was trained on the relative path `my data.csv`; some users and items
    have few events, some ids begin with a dash or an equals sign."""
    folder = tmp_path_factory.mktemp("with blank") / "a home"
    folder.mkdir()
    found = histories(40) | {"-dash": ["i1", "i2", "i3", "i4", "i5"], "=1+1": ["i2", "i3", "i4", "i5", "i6"], "rare": ["i1", "i7"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("my data.csv").write_text(events(found | {"-dash": ["-9", "i1", "i2", "i3", "i4"]}))
        assert main(["train", *flags(data="my data.csv", out="my run", user_column="visitor", item_column="page"),
                     *flags(min_user_events=4, filter_seen="no", **TINY)]) == 0  # fmt: skip
    yield folder


def recommended(out: str) -> pl.DataFrame:
    return pl.read_csv(io.StringIO(out), schema_overrides={"user": pl.String, "item": pl.String})


def piped(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_the_next_command_can_be_pasted_although_paths_hold_blanks(
    tmp_path: Path, printed: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "a file.txt", tmp_path / "it's a run"
    lines = printed("data", "make", "--users", 40, "--output", data).splitlines()
    assert main(shlex.split(lines[-2])[1:]) == 0
    assert f"train --data {shlex.quote(str(data))} --baseline" in lines[-1]
    (next_line,) = [line for line in printed("train", *flags(data=data, out=out, **TINY)).splitlines() if "awrsr recommend" in line]
    assert main(shlex.split(next_line.partition("#")[0])[1:]) == 0


def test_recommend_finds_the_data_from_another_folder(
    runs: Path, tmp_path: Path, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where another file has the same name
    Path("my data.csv").write_text(events({"stranger": ["i1", "i2", "i3", "i4"]}))
    users = recommended(printed("recommend", "--run", runs / "my run", "-k", 1))["user"]
    assert "u3" in users.to_list() and "stranger" not in users.to_list()


def test_data_that_are_gone_are_not_replaced_in_silence(
    runs: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, away = runs / "my data.csv", runs / "elsewhere.csv"
    monkeypatch.chdir(tmp_path)
    data.rename(away)
    try:
        assert f"{data}, the run's own data, does not exist; add --data FILE" in refused("recommend", "--run", runs / "my run")
        Path("my data.csv").write_text(events({"stranger": ["i1", "i2", "i3", "i4"]}))
        assert main(["recommend", "--run", str(runs / "my run")]) == 0
        assert f"Warning: {data}, the run's own data, does not exist; reading my data.csv instead." in capsys.readouterr().err
    finally:
        away.rename(data)


@pytest.mark.parametrize("way", ["gzipped", "piped"])
def test_other_data_have_the_columns_of_the_run(
    way: str, runs: Path, tmp_path: Path, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = events({"someone": ["i1", "i2"]})
    data: Any = "-"
    if way == "gzipped":
        data = tmp_path / "new.csv.gz"
        data.write_bytes(gzip.compress(text.encode()))
    else:
        piped(text, monkeypatch)
    assert recommended(printed("recommend", "--run", runs / "my run", "--data", data, "-k", 2))["user"].to_list() == ["someone"] * 2
    piped("me i3 i4\n", monkeypatch)  # a format of its own has no columns
    arguments = ("recommend", "--run", runs / "my run", "--data", "-", "--format", "lines", "-k", 1)
    assert recommended(printed(*arguments))["user"].to_list() == ["me"]


def test_a_user_whom_training_left_out_is_known(runs: Path, printed: Callable[..., str], refused: Callable[..., str]) -> None:
    out = printed("recommend", "--run", runs / "my run", "--user", "rare", "-k", 3)
    assert recommended(out)["user"].to_list() == ["rare"] * 3
    assert "rare" not in recommended(printed("recommend", "--run", runs / "my run", "-k", 1))["user"].to_list()
    assert "i7" in printed("explain", "--run", runs / "my run", "--user", "rare", "--output", runs / "a.svg")
    assert "user is 'nobody', must be a user of the data" in refused("recommend", "--run", runs / "my run", "--user", "nobody")


def test_ids_may_begin_with_a_dash(runs: Path, printed: Callable[..., str], stopped: Callable[..., tuple[int, str]]) -> None:
    out = printed("recommend", "--run", runs / "my run", "--user", "-dash", "u3", "-k1", "--output", "-")
    assert recommended(out)["user"].to_list() == ["u3", "-dash"]
    assert "-9" in printed("explain", "--run", runs / "my run", "--history", "-9", "i1", "-9", "--output", runs / "a.svg")
    assert "-9" in printed("explain", "--run", runs / "my run", "--user", "-dash", "--output", runs / "a.svg")
    assert stopped("recommend", "--run", runs / "my run", "--usr", "-dash")[0] == 2  # elsewhere a dash means an option


def test_ids_that_a_spreadsheet_would_run_are_defused_on_request(runs: Path, printed: Callable[..., str]) -> None:
    arguments = ("recommend", "--run", runs / "my run", "--user", "=1+1", "-dash", "-k", 24)
    plain, safe = recommended(printed(*arguments)), recommended(printed(*arguments, "--csv-safe"))
    assert set(plain["user"]) == {"=1+1", "-dash"} and set(safe["user"]) == {"'=1+1", "'-dash"}
    assert "-9" in plain["item"].to_list() and "'-9" in safe["item"].to_list()
    assert plain.drop("user", "item").equals(safe.drop("user", "item"))


def test_more_items_than_there_are_is_no_error(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "--run", str(runs / "my run"), "--user", "u3", "-k", "500"]) == 0
    out, error = capsys.readouterr()
    assert f"The model knows {len(recommended(out))} items, which is fewer than k=500: ranking all." in error


def test_a_run_trained_on_standard_input_does_not_wait_for_it(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped("".join(f"{user} {' '.join(items)}\n" for user, items in histories(20).items()), monkeypatch)
    assert main(["train", *flags(data="-", out=tmp_path / "run", **TINY)]) == 0
    assert "was trained on standard input; add --data FILE, or --data -" in refused("recommend", "--run", tmp_path / "run")
