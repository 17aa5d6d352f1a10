"""The command line: its fixed interface, configuration files, every command through `main`."""

import io
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from awrsr import AWRSR, AWRSRConfig, TrainingOptions, read
from awrsr.cli import COMMANDS, main, parser
from awrsr.data.prepare import DEMO

from .runs import ITEMS, QUICK, SMALL, STOSA, as_stored, command, everything, histories, results, timeless, train, weights

ROOT = Path(__file__).parents[2]
METRICS = {"HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR"}


def typed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


# Train.


def test_train_takes_the_fixed_flags_and_writes_the_fixed_keys(home: Path, tmp_path: Path) -> None:
    line = (
        f"train --data {home}/data.txt --backbone sasrec --refinement additive --loss sampled_softmax --max-len 50 "
        f"--epochs 1 --seed 3 --threads 1 --out {tmp_path}/run"
    )
    assert main(line.split()) == 0
    found = results(tmp_path / "run")
    assert set(found["validation"]) == set(found["test"]) == METRICS
    assert (found["epochs"], found["best_epoch"]) == (1, 1)
    for name in ("train_seconds", "train_cpu_seconds", "train_sequences_per_cpu_second", "eval_users_per_cpu_second"):
        assert isinstance(found[name], float) and found[name] > 0
    wanted = {"backbone": "sasrec", "refinement": "additive", "loss": "sampled_softmax", "max_len": 50, "seed": 3}
    assert found["config"] | wanted == found["config"]
    assert found["config"]["data"] == f"{home}/data.txt"


def test_a_run_of_gaussians_serves_every_command(home: Path, tmp_path: Path, printed: Callable[..., str]) -> None:
    run, options = tmp_path / "run", STOSA | {"loss": "bpr", "pvn_weight": 0.005, "epochs": 1}
    found = train(home / "data.txt", run, **options)
    assert found["config"] | options == found["config"]
    assert f"{found['test']['NDCG@10']:.4f}" in printed("evaluate", "--run", run)
    table = pl.read_csv(io.StringIO(printed("recommend", "--run", run, "-k", 3)))
    assert table.height == 3 * len(histories()) and (table["score"] < 0).all()
    assert "The last event" in printed("explain", "--run", run, "--output", tmp_path / "picture.png")
    assert printed("export", "--run", run) == f"Wrote {run / 'model.pt2'}; its scores are those of the model.\n"
    assert (run / "model.pt2").stat().st_size > 0
    assert results(run)["epochs"] == 1 and train(home / "data.txt", run, **(options | {"epochs": 2}))["epochs"] == 2


def test_a_run_folder_holds_all_that_is_promised(home: Path) -> None:
    run = home / "run"
    assert AWRSR.load(run).ids().tolist() == read(home / "data.txt").item_ids.tolist()
    for part in ("validation", "test"):
        ranks = pl.read_parquet(run / f"ranks_{part}.parquet")
        assert ranks.columns == ["user", "item", "position", "rank"]
        assert ranks["user"].to_list() == list(histories())
        held_out = [items[position] for items, position in zip(histories().values(), ranks["position"], strict=True)]
        assert ranks["item"].to_list() == held_out
        assert (1 / ranks["rank"]).mean() == pytest.approx(results(run)[part]["MRR"])
    assert sorted(path.name for path in run.iterdir() if path.suffix != ".parquet") == sorted(
        ["config.json", "last.ckpt", "logs", "metrics.json", "model.safetensors"]
    )


def test_the_table_has_a_row_per_model_and_the_next_command_works(home: Path, tmp_path: Path, printed: Callable[..., str]) -> None:
    out = printed(*command(home / "data.txt", tmp_path / "run", epochs=1), "--baseline")
    heading, *rows = [line.split() for line in out[out.index("\ntest ") :].splitlines()[1:4]]
    assert heading[1:8] == ["HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR"]
    for row, folder in zip(rows, (tmp_path / "run" / "plain", tmp_path / "run"), strict=True):
        assert [float(x) for x in row[1:8]] == pytest.approx(list(results(folder)["test"].values()), abs=6e-5)
    assert [row[0] for row in rows] == ["plain", "additive"]
    assert results(tmp_path / "run" / "plain")["config"]["refinement"] == "none"
    for line in out.splitlines():
        if line.startswith("  awrsr "):
            assert main(shlex.split(line, comments=True)[1:]) == 0


def test_without_data_options_suit_the_synthetic_ones_and_what_is_given_wins(
    monkeypatch: pytest.MonkeyPatch, printed: Callable[..., str]
) -> None:
    taken: list[Any] = []
    monkeypatch.setitem(COMMANDS, "train", COMMANDS["train"]._replace(run=taken.append))
    out = printed("train", "--layers", 3, "--baseline")
    assert {name: taken[0][name] for name in DEMO} == DEMO | {"layers": 3}
    assert "--refine-scale 2.8" in out and "--layers" not in out
    assert printed("train", "--data", "any.txt") == ""
    assert taken[1].layers == AWRSRConfig().layers and taken[1].learning_rate == TrainingOptions().learning_rate


def test_print_config_knows_whether_there_are_data(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, epochs in (([], DEMO["epochs"]), (["--data", "any.txt"], TrainingOptions().epochs)):
        with pytest.raises(SystemExit) as ended:
            main(["train", *flags, "--print-config"])
        assert ended.value.code == 0 and f"\nepochs: {epochs}\n" in capsys.readouterr().out


def test_flags_take_hyphens_or_underscores(home: Path, tmp_path: Path) -> None:
    options = {"data": home / "data.txt", "out": tmp_path / "run", "epochs": 2}
    underscored = [part for name, value in (SMALL | QUICK | options).items() for part in (f"--{name}", str(value))]
    assert "--max_len" in underscored
    assert main(["train", *underscored]) == 0
    assert weights(tmp_path / "run") == weights(home / "run")


# Configuration files.


def test_print_config_gives_a_file_that_repeats_the_run(
    home: Path, tmp_path: Path, stopped: Callable[..., tuple[int, str]]
) -> None:
    status, text = stopped(*command(home / "data.txt", tmp_path / "one", epochs=2, seed=5), "--print-config")
    assert status == 0 and not (tmp_path / "one").exists()
    (tmp_path / "run.yaml").write_text(text)
    train(home / "data.txt", tmp_path / "one", epochs=2, seed=5)
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "two")]) == 0
    assert timeless(results(tmp_path / "two")) == timeless(results(tmp_path / "one"))
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


def test_flags_after_a_configuration_override_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("hidden: 16\nmax_len: 8\nlearning_rate: 0.01\nper_head: false\n")
    given = parser().parse_args(["train", "--config", str(tmp_path / "run.yaml"), "--max-len", "5", "--per-head"]).train
    assert (given.hidden, given.max_len, given.learning_rate, given.per_head) == (16, 5, 0.01, True)


@pytest.mark.parametrize(
    "text, culprit",
    [("hidden: 16\nhiden: 8\n", "hiden"), ("hidden: wide\n", "hidden"), ("loss: hinge\n", "loss"), ("[1", "line 2")],
)
def test_a_mistake_in_a_configuration_is_named(
    text: str, culprit: str, tmp_path: Path, stopped: Callable[..., tuple[int, str]]
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    status, said = stopped("train", "--config", tmp_path / "run.yaml")
    assert status == 2 and culprit.lower() in said.lower() and "Traceback" not in said


def test_a_flag_that_does_not_exist_is_an_error(stopped: Callable[..., tuple[int, str]]) -> None:
    status, said = stopped("train", "--widht", "3")
    assert status == 2 and "--widht" in said


# Evaluate.


def test_evaluate_gives_the_metrics_of_training(home: Path, tmp_path: Path, printed: Callable[..., str]) -> None:
    for part in ("test", "validation"):
        for given in ([], ["--data", home / "data.txt"]):
            out = printed("evaluate", "--run", home / "run", "--part", part, "--json", tmp_path / "out.json", *given)
            found = json.loads((tmp_path / "out.json").read_text())
            assert found[part] == results(home / "run")[part]
            assert (found["targets"], found["filter_seen"]) == (61, False)
            names, own, *others = (line.split() for line in out.splitlines())
            assert dict(zip(names[1:], own[2:], strict=True)) == {k: f"{v:.4f}" for k, v in found[part].items()}
            assert found["baselines"][part] == results(home / "run")["baselines"][part] and len(others) == 3


def test_evaluate_divides_and_filters_as_the_run_did(home: Path, tmp_path: Path, printed: Callable[..., str]) -> None:
    options = {"split": "last-n", "holdout": 2, "min_user_events": 8, "filter_seen": "yes"}
    found = train(home / "data.txt", tmp_path / "run", epochs=1, **options)
    printed("evaluate", "--run", tmp_path / "run", "--json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["test"] == found["test"]


def test_use_of_a_run_says_that_its_data_have_changed_or_are_gone(
    home: Path, tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mine.txt"
    data.write_text((home / "data.txt").read_text())
    train(data, tmp_path / "run", epochs=1)
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0 and not capsys.readouterr().err
    data.write_text("\n".join(line.rsplit(" ", 1)[0] for line in data.read_text().splitlines()) + "\n")
    for name in (["evaluate", "--run"], ["analyse"]):
        assert main([*name, str(tmp_path / "run")]) == 0
        warning = "Warning: mine has changed since the run, so the model may have been trained on events held out here.\n"
        assert capsys.readouterr().err == warning

    def as_before(stored: dict[str, Any]) -> dict[str, Any]:
        """As an older run, without a fingerprint, and perhaps with options of another split."""
        return stored | {"data": {k: v for k, v in stored["data"].items() if k != "fingerprint"} | {"holdout": 2}}

    as_stored(tmp_path / "run", as_before)
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0 and not capsys.readouterr().err
    data.unlink()
    assert "the run's own data, does not exist; add --data FILE" in refused("evaluate", "--run", tmp_path / "run")


def test_evaluate_says_what_it_leaves_out(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text((home / "data.txt").read_text() + "late i1 new i2 i3 i4 newer\n")
    assert main(["evaluate", "--run", str(home / "run"), "--data", str(other)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "Warning: --data differs from the run's data, so the model may have been trained on events held out here.",
        "Left out 2 events whose items the model does not know, 1 of them held out.",
    ]


def test_an_unknown_item_held_out_is_no_target_and_none_takes_its_place(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    lines = (home / "data.txt").read_text().splitlines()
    other.write_text("".join(f"{line}{' what' if n % 2 else ''}\n" for n, line in enumerate(lines)))
    flags = ["--data", str(other), "--ranks", str(tmp_path / "ranks.parquet")]
    assert main(["evaluate", "--run", str(home / "run"), *flags]) == 0
    ranks = pl.read_parquet(tmp_path / "ranks.parquet")
    assert ranks["user"].to_list() == [line.split()[0] for line in lines[::2]]
    assert ranks["item"].to_list() == [line.split()[-1] for line in lines[::2]]


# Recommend.


def recommended(home: Path, k: int = 10, **options: Any) -> pl.DataFrame:
    return AWRSR.load(home / "run").recommend(histories(), k, **({"filter_seen": False} | options))


READERS: dict[str, Callable[[Path], pl.DataFrame]] = {".csv": pl.read_csv, ".jsonl": pl.read_ndjson, ".parquet": pl.read_parquet}


@pytest.mark.parametrize("suffix", READERS)
def test_recommend_writes_the_best_items_with_the_ids_of_the_data(suffix: str, home: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out{suffix}"
    assert main(["recommend", "--run", str(home / "run"), "--data", str(home / "data.txt"), "-k", "4", "--output", str(out)]) == 0
    found = READERS[suffix](out)
    assert found.columns == ["user", "item", "rank", "score"]
    assert_frame_equal(found, recommended(home, 4), check_dtypes=False)
    assert found["rank"].to_list() == [1, 2, 3, 4] * 61


def test_recommend_to_some_users(home: Path, printed: Callable[..., str]) -> None:
    def of(*users: str) -> list[str]:
        lines = printed("recommend", "--run", home / "run", "-k", 2, *users).splitlines()
        return [line.rsplit(",", 1)[0] for line in lines]  # the last digit of a score hangs on what shares its batch

    some = of("--user", "u7", "u3")
    assert some == [line for line in of() if line.split(",")[0] in ("user", "u3", "u7")] and len(some) == 5


def test_recommend_reads_standard_input_and_writes_standard_output(
    home: Path, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed((home / "data.txt").read_text(), monkeypatch)
    out = printed("recommend", "--run", home / "run", "--data", "-", "-k", 3)
    assert_frame_equal(pl.read_csv(io.StringIO(out)), recommended(home, 3), check_dtypes=False)


def test_recommend_takes_the_names_of_columns(home: Path, tmp_path: Path, printed: Callable[..., str]) -> None:
    events = [(user, item) for user, items in histories().items() for item in items]
    pl.DataFrame(events, schema=["who", "what"], orient="row").write_csv(tmp_path / "data.csv")
    names = ("--user-column", "who", "--item-column", "what")
    out = printed("recommend", "--run", home / "run", "--data", tmp_path / "data.csv", *names, "-k", 3)
    assert_frame_equal(pl.read_csv(io.StringIO(out)), recommended(home, 3), check_dtypes=False)


def test_recommend_uses_the_data_of_the_run_where_none_are_given(home: Path, printed: Callable[..., str]) -> None:
    out = printed("recommend", "--run", home / "run")
    assert_frame_equal(pl.read_csv(io.StringIO(out)), recommended(home), check_dtypes=False)


def test_recommend_filters_seen_items_when_told(home: Path, printed: Callable[..., str]) -> None:
    out = printed("recommend", "--run", home / "run", "--filter-seen", "yes", "-k", ITEMS)
    found = pl.read_csv(io.StringIO(out))
    for user, items in histories().items():
        rest = {f"i{n}" for n in range(ITEMS)} - set(items)
        assert set(found.filter(pl.col("user") == user)["item"]) == rest


def test_recommend_passes_over_unknown_ids_and_says_so(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed("old i1 i2\nnew what i1 i2\nnobody what ever\n", monkeypatch)
    assert main(["recommend", "--run", str(home / "run"), "--data", "-", "-k", "5"]) == 0
    out, error = capsys.readouterr()
    assert error == (
        "Left out 3 events whose items the model does not know; 1 user without any others get the most popular items.\n"
    )
    found = pl.read_csv(io.StringIO(out)).filter(pl.col("user") != "nobody")
    old, new = (found.filter(pl.col("user") == user).drop("user") for user in ("old", "new"))
    assert len(found) == 10 and old.equals(new)


def test_recommend_with_unknown_ids_alone_is_an_error(
    home: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed("nobody what ever\n", monkeypatch)
    assert "none of the 1 users has an item that the model knows" in refused(
        "recommend", "--run", home / "run", "--data", "-", "--fallback", "none"
    )


def test_recommend_wants_a_k_of_one_or_more(home: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    error = refused("recommend", "--run", home / "run", "-k", 0, "--output", tmp_path / "out.csv")
    assert "k is 0, must be at least 1" in error
    assert everything(tmp_path) == {}


def test_recommend_into_a_closed_pipe_ends_quietly(home: Path) -> None:
    line = f"{sys.executable} -m awrsr recommend --run {home}/run -k 24 | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.stdout.split() == ["user,item,rank,score", "141"]


# The other commands.


def test_compare_through_the_command_line(home: Path, tmp_path: Path, printed: Callable[..., str]) -> None:
    out = printed("compare", home / "plain", home / "run", "--metrics", "MRR", "--json", tmp_path / "out.json")
    assert "MRR" in out and "refinement" in out
    assert "MRR" in (tmp_path / "out.json").read_text()


def test_explain_through_the_command_line(home: Path, tmp_path: Path, printed: Callable[..., str]) -> None:
    out = printed("explain", "--run", home / "run", "--user", "u3", "--output", tmp_path / "a.png")
    assert histories()["u3"][-1] in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    out = printed("explain", "--run", home / "run", "--history", "i3", "i4", "--output", tmp_path / "b.svg")
    assert "i4" in out and "<svg" in (tmp_path / "b.svg").read_text()


def test_data_make_and_stats_through_the_command_line(tmp_path: Path, printed: Callable[..., str]) -> None:
    made = tmp_path / "made.txt"
    out = printed("data", "make", "--users", 50, "--output", made)
    assert f"awrsr data stats {made}" in out
    out = printed("data", "stats", made, "--json", tmp_path / "out.json")
    assert "50" in out
    assert "50" in (tmp_path / "out.json").read_text() and read(made).num_users == 50
