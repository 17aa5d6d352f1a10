"""The study: every run once, kept with its ranks; tables that follow from the files."""

import json
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from filelock import FileLock

from awrsr.data.synthetic import make, write
from benchmarks.study import gains as study_gains
from benchmarks.study import plan as study_plan
from benchmarks.study import report as study_report
from benchmarks.study import run as study
from benchmarks.study import second_order
from benchmarks.study import tables as study_tables
from benchmarks.study.plan import Cell
from benchmarks.study.run import Results

USERS = 200


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    found = [Cell("core", "lastfm", kind, layers, seeds=5) for layers in (1, 2) for kind in ("none", "additive")]
    for module in (study, study_gains, study_tables):
        monkeypatch.setattr(module, "plan", lambda: found)
    monkeypatch.setattr(second_order, "cells", lambda results: [])
    monkeypatch.setattr(study_gains, "RESAMPLES", 200)
    monkeypatch.setattr(study_gains, "FLIPS", 5000)
    return found


def metrics(ranks: np.ndarray) -> dict[str, Any]:
    from awrsr.evaluation.ranking import metrics

    test = metrics(ranks)
    found = {"test": test, "validation": test, "epochs": 4, "best_epoch": 3, "train_cpu_seconds": 2.0, "train_seconds": 1.0}
    return found | {"parameters": 10, "curve": [{"NDCG@10": 0.1}]}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """Commands that were run instead of trained: additive ranks every target one better, where it can."""
    commands: list[list[str]] = []

    def train(command: list[str], _: Path) -> int:
        commands.append(command)
        option = dict(zip(command, command[1:], strict=False))
        rng = np.random.default_rng(int(option["--seed"]))
        ranks = rng.integers(2, 40, size=USERS) - (option["--refinement"] == "additive" and option["--layers"] == "1")
        out = Path(option["--out"])
        users = [str(user) for user in range(1, USERS + 1)]
        table = {"user": users, "item": ["1"] * USERS, "position": [9] * USERS, "rank": ranks}
        pl.DataFrame(table).write_parquet(out / "ranks_test.parquet")
        (out / "metrics.json").write_text(json.dumps(metrics(ranks)), encoding="utf-8")
        return 0

    monkeypatch.setattr(study, "train_apart", train)
    write(make(users=USERS, length=10, items=24), tmp_path / "lastfm.txt")
    return commands


def arguments(tmp_path: Path, *more: str) -> list[str]:
    return ["--folder", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *more]


@pytest.fixture(autouse=True)
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def test_every_run_is_trained_once(
    cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(arguments(tmp_path, "--seeds", "2")) == 0 and len(trained) == 8
    assert "8 of 8 runs are done" in capsys.readouterr().out
    assert study.main(arguments(tmp_path)) == 0 and len(trained) == 20
    assert study.main(arguments(tmp_path, "--jobs", "2")) == 0 and len(trained) == 20
    entries = json.loads((out / study.ENTRIES).read_text(encoding="utf-8"))
    wanted = {"dataset", "backbone", "variant", "refinement", "tables", "layers", "loss", "seed", "epochs", "params"}
    wanted |= {"train_seconds", "validation", "test", "command", "commit"}
    assert len(entries) == 20 and all(wanted <= entry.keys() and "NDCG@10" in entry["test"] for entry in entries)
    assert not any(str(tmp_path) in json.dumps(entry) for entry in entries)
    ranks = pl.read_parquet(out / study.RANKS)
    assert ranks.height == 20 and set(ranks["ranks"].list.len()) == {USERS} and ranks["ranks"].list.max().max() == study.DEEPEST


def test_a_run_is_a_training_in_a_process_of_its_own(tmp_path: Path) -> None:
    data, out = write(make(users=50, length=10), tmp_path / "small.txt"), tmp_path / "run"
    model = ["--refinement", "none", "--hidden", "8", "--heads", "1", "--no-baseline", "--epochs", "1"]
    assert study.trained(model, data, out)["epochs"] == 1
    with pytest.raises(RuntimeError, match=r"awrsr train .*--heads 0 .* ended with status 1; see .*output.txt"):
        study.trained([*model, "--heads", "0"], data, out)
    printed = (out / "output.txt").read_text(encoding="utf-8")
    assert str(out) in printed and "heads" in printed
    runpy.run_path(str(study.RESULTS.parents[1] / "study.py"), run_name="__mp_main__")  # as that process imports the command


def test_other_options_are_another_run(cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path) -> None:
    """An entry made with other options than the plan has now is made anew and takes the old one's place."""
    study.main(arguments(tmp_path, "--seeds", "1"))
    cells[0] = cells[0]._replace(options="--rank 8")
    study.main(arguments(tmp_path, "--seeds", "1"))
    assert len(trained) == 5 and "--rank" in trained[-1]
    assert len(json.loads((out / study.ENTRIES).read_text(encoding="utf-8"))) == 4


def test_cells_from_before_defaults_changed_name_the_old_ones() -> None:
    cell = next(cell for cell in study_plan.plan() if cell.dataset == "beauty")
    assert cell.arguments(0)[:2] == ["--rank", "32"] and "--no-learned-gate" in cell.arguments(0)
    now, then = cell.commands(0)
    assert now == cell.command(0) and study_plan.EARLIER in now
    assert then.startswith("awrsr train --data data/beauty.txt --epochs")
    assert all(study_plan.EARLIER not in cell.command(0) for cell in study_plan.plan() if cell.dataset == "synthetic")


def test_a_default_that_changed_stops_the_study(
    cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Commands name what differs from the defaults, so runs of the same command could otherwise be of different models."""
    was = study.defaults()
    assert was["data"]["rank"] == 64 and was["data"]["gate"] != was["no data"]["gate"]
    study.main(arguments(tmp_path, "--seeds", "1"))
    kept = (out / study.DEFAULTS).read_text(encoding="utf-8")
    assert json.loads(kept) == was
    monkeypatch.setattr(study, "defaults", lambda: was | {"data": was["data"] | {"rank": 16}})
    with pytest.raises(SystemExit):
        study.main(arguments(tmp_path))
    assert "rank is 16 with data, was 64" in capsys.readouterr().err
    assert len(trained) == 4 and (out / study.DEFAULTS).read_text(encoding="utf-8") == kept
    (out / study.DEFAULTS).write_text(json.dumps(was | {"data": was["data"] | {"table_rate": 7}}), encoding="utf-8")
    monkeypatch.setattr(study, "defaults", lambda: was | {"data": was["data"] | {"new": False}})
    assert study.main(arguments(tmp_path)) == 0  # one option was removed, another one added
    kept = json.loads((out / study.DEFAULTS).read_text(encoding="utf-8"))["data"]
    assert kept["new"] is False and "table_rate" in kept


def test_the_committed_runs_had_the_defaults_of_today(tmp_path: Path) -> None:
    """A new option joins them when the study next runs; leaving it out must mean what it meant before."""
    kept = shutil.copy(study.RESULTS / study.DEFAULTS, tmp_path)
    assert study.keep_defaults(tmp_path) == []
    assert json.loads(Path(kept).read_text("utf-8")) == json.loads((study.RESULTS / study.DEFAULTS).read_text("utf-8"))


def test_runs_with_removed_options_stay_and_are_not_repeated(
    cells: list[Cell], trained: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.main(arguments(tmp_path, "--seeds", "1"))
    cells += [cells[1]._replace(variant=option, options=f"--{option}") for option in ("table-rate 3", "no-correlation-norm")]
    trained.clear()
    assert study.main(arguments(tmp_path, "--seeds", "2")) == 0 and len(trained) == 4
    printed = capsys.readouterr().out
    assert "4 runs with the removed options correlation_norm or table_rate are missing" in printed
    assert "they can be run at the tag study-1" in printed and printed.endswith("8 of 12 runs are done\n")


def test_the_targets_are_described(cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path) -> None:
    study.main(arguments(tmp_path, "--seeds", "1", "--cells", "additive"))
    (row,) = pl.read_parquet(out / study.TARGETS).iter_rows(named=True)
    lines = [line.split()[1:-2] for line in (tmp_path / "lastfm.txt").read_text().splitlines()]
    assert row["history"] == [9] * USERS and row["popularity"] == [sum(line.count("1") for line in lines)] * USERS


def test_a_budget_that_is_spent_begins_nothing(
    cells: list[Cell], trained: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(arguments(tmp_path, "--budget", "1e-9")) == 0 and not trained
    assert "0 of 20 runs are done, rerun the same command to continue" in capsys.readouterr().out


def test_two_studies_do_not_write_the_same_results(
    cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FileLock(out / ".study.lock"), pytest.raises(SystemExit):
        study.main(arguments(tmp_path))
    assert "another study.py is running" in capsys.readouterr().err and not trained
    assert study.main(arguments(tmp_path, "--seeds", "1")) == 0 and trained


def test_a_run_that_fails_does_not_stop_the_others(cells: list[Cell], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(arguments(tmp_path, "--seeds", "1", "--cells", "lastfm_none_1")) == 1  # there is no lastfm.txt
    printed = capsys.readouterr().out
    assert "lastfm_none_1 seed 0: awrsr train" in printed and "output.txt" in printed and "0 of 1 runs" in printed


def test_the_list_says_what_is_missing(
    cells: list[Cell], trained: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.main(arguments(tmp_path, "--seeds", "2", "--cells", "additive_1"))
    assert study.main(arguments(tmp_path, "--list")) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("core")]
    assert [row[2] for row in rows] == ["0", "2", "0", "0"]


def test_names_of_cells_are_names_of_folders_and_differ() -> None:
    found = [*study_plan.plan(), *second_order.cells(Results(study.RESULTS))]
    assert len({cell.name for cell in found}) == len(found) == len({cell.key() for cell in found})
    assert not any(set(cell.name) & set(" ,/") for cell in found) and {cell.group for cell in found} <= {
        *study_plan.GROUPS,
        *second_order.GROUPS,
    }


def test_every_cell_is_a_command_that_training_takes() -> None:
    from awrsr.cli import parser

    takes = parser()
    planned = [*study_plan.plan(), *second_order.cells(Results(study.RESULTS))]
    for cell in (cell for cell in planned if not cell.removed):
        parsed = takes.parse_args(["train", *cell.arguments(3)])
        assert parsed.train.refinement == cell.refinement and parsed.train.seed == 3


def test_gains_are_paired_and_corrected_together(cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path) -> None:
    study.main(arguments(tmp_path))
    found = study_gains.gather(Results(out))
    one, deep, two = study_gains.gains(found)
    assert (deep.question, deep.model.cell.layers, deep.base.cell.layers) == ("depth", 1, 2) and deep.verdict == "better"
    assert one.verdict == "better" and one.low > 0 and one.p < 0.01
    assert two.difference == 0 and two.p == 1 and two.verdict == "not shown"
    by_hand = [np.mean(entry["test"]["NDCG@10"]) for entry in one.model.entries]
    assert one.model.mean() == pytest.approx(np.mean(by_hand)) == pytest.approx(one.base.mean() + one.difference)
    assert one.p == pytest.approx(3 / (study_gains.FLIPS + 1))  # the least that three comparisons can have


def test_searches_are_held_to_each_other_and_to_their_ablations_and_learning_to_its_control(
    cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path
) -> None:
    chosen = [Cell("searched", "lastfm", *each, variant="searched") for each in (("none", 2), ("value", 1))]
    control = Cell("why", "lastfm", "additive", 1, study_plan.EQUAL, "--table-std 0")
    ablation = chosen[1]._replace(group="ablation", variant="searched without cosines", options="--temperature 0")
    wide = [Cell("recipe", "lastfm", kind, 1, "wide", "--hidden 128") for kind in ("none", "additive")]
    cells += [*chosen, control, ablation, *wide, study_plan.control(wide[1]._replace(group="why"))]
    study.main(arguments(tmp_path, "--seeds", "2"))
    found = study_gains.gains(study_gains.gather(Results(out)))
    held = [(gain.model.cell, gain.base.cell) for gain in found if gain.question == "searched"]
    assert held == [(chosen[1], base) for base in (chosen[0], cells[0], cells[2])]
    assert [(gain.model.cell, gain.base.cell) for gain in found if gain.question == "ablation"] == [(chosen[1], ablation)]
    assert not any(gain.model.cell == ablation for gain in found)
    held = [(gain.model.cell, gain.base.cell) for gain in found if gain.question in ("control", "why")]
    assert sorted(held) == sorted([(cells[1], control), (wide[1], cells[-1]), (control, cells[0]), (cells[-1], wide[0])])
    short = [line.split(" | ")[1:3] for line in study_tables.summary(found)[2:]]
    assert sorted(short) == [["usual", "1"], ["wide", "1"]]
    additive = ablation._replace(refinement="additive", variant="searched", options="")
    plain = Cell("searched", "lastfm", "none", 1, study_plan.AS_REFINED)
    cells += [additive, study_plan.control(additive), plain]
    study.main(arguments(tmp_path, "--seeds", "2"))
    found = study_gains.gains(study_gains.gather(Results(out)))
    held = [(gain.model.cell, gain.base.cell) for gain in found if gain.question == "ablation" and gain.model.cell != chosen[1]]
    assert held == [(additive, plain), (additive, study_plan.control(additive)), (study_plan.control(additive), plain)]


def test_equal_time_counts_the_epochs_that_fit() -> None:
    entry = {"epochs": 4, "train_cpu_seconds": 8.0, "curve": [0.1, 0.4, 0.3, 0.5]}
    found = study_gains.Runs(Cell("core", "lastfm", "none", 1), [entry, entry | {"train_cpu_seconds": 80.0}], np.ones((1, 2)))
    assert [found.after(seconds) for seconds in (80, 8, 7.9, 2, 0.1)] == pytest.approx([0.5, 0.3, 0.25, 0.1, 0.1])


def test_few_seeds_support_no_claim(cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path) -> None:
    study.main(arguments(tmp_path, "--seeds", "4"))
    assert {gain.verdict for gain in study_gains.gains(study_gains.gather(Results(out)))} == {"no claim"}


def test_comparisons_that_lack_runs_are_corrected_for(
    cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path
) -> None:
    """What is planned decides, not what has been run so far: runs to come cannot take back what was shown."""
    study.main(arguments(tmp_path, "--cells", "_1"))
    study.main(arguments(tmp_path, "--seeds", "1"))
    early = study_gains.gains(study_gains.gather(Results(out)))
    assert [gain.verdict for gain in early] == ["better", "no claim", "no claim"]
    assert early[0].p == pytest.approx(3 / (study_gains.FLIPS + 1)) and np.isnan([gain.p for gain in early[1:]]).all()
    study.main(arguments(tmp_path))
    assert study_gains.gains(study_gains.gather(Results(out)))[0].p <= early[0].p


def test_cells_that_only_show_where_to_look_have_no_p_and_correct_nobodys(
    cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path
) -> None:
    cells.append(cells[1]._replace(group="why", variant="rank 8", options="--rank 8", seeds=3))
    study.main(arguments(tmp_path))
    found = study_gains.gains(study_gains.gather(Results(out)))
    looks = [gain for gain in found if gain.question == "why"]
    assert [gain.verdict for gain in looks] == ["no claim"] and np.isnan(looks[0].p) and study_tables.p_text(looks[0].p) == ""
    assert min(gain.p for gain in found if gain.complete) == pytest.approx(3 / (study_gains.FLIPS + 1))
    page = study_tables.markdown(Results(out), study_gains.gather(Results(out)), found)
    assert "Of 3 planned comparisons, 3 have been run; p-values are Holm-corrected for all 3." in page


def test_page_and_pictures_follow_from_the_files(cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path) -> None:
    study.main(arguments(tmp_path))
    assert study_report.main(["--out", str(out)]) == 0
    page = (out / "study.md").read_text(encoding="utf-8")
    assert "| lastfm | additive, 1 layer | plain, 2 layers | " in page
    assert "| lastfm | additive | 1 | 5 |" in page and "better" in page
    assert "Every cell of the plan has been run with all its seeds." in page
    assert "| lastfm | 1 | history | " in page and "20 runs" in page and (out / "study_core.png").stat().st_size > 10_000
    runs = study_gains.gather(Results(out))
    assert study_tables.markdown(Results(out), runs, study_gains.gains(runs)) == page  # the same each time


def test_the_committed_page_follows_from_the_committed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but intervals, p and verdicts, whose random draws take minutes; the interval of one row stands for them."""

    def certain(page: str) -> str:
        page = re.sub(r"[-+][0-9.]+ \.\. [-+][0-9.]+", "interval", page)
        return re.sub(r"( \| ([0-9.]+|< 0.001)? \| |, )(better|worse|not shown|no claim)( \(p [^)]+\))?", "verdict", page)

    committed, results = (study.RESULTS / "study.md").read_text(encoding="utf-8"), Results(study.RESULTS)
    runs = study_gains.gather(results)
    gain = study_gains.contrast("core", runs[3], runs[0])
    shown = f"| plain {gain.base.mean():.4f} | {gain.relative:+.1%} | {gain.low:+.4f} .. {gain.high:+.4f} |"
    assert gain.model.cell == Cell("core", "wikipedia", "additive", 1) and shown in committed
    for module, name in ((study_gains, "RESAMPLES"), (study_gains, "FLIPS"), (study_tables, "RESAMPLES")):
        monkeypatch.setattr(module, name, 2)
    page = study_tables.markdown(results, runs, study_gains.gains(runs))
    assert certain(page) == certain(committed) and "can be rerun at the tag study-1." in page


def test_missing_cells_are_shown_as_missing(cells: list[Cell], trained: list[list[str]], tmp_path: Path, out: Path) -> None:
    study.main(arguments(tmp_path, "--seeds", "3", "--cells", "_1"))
    results = Results(out)
    page = study_tables.markdown(results, study_gains.gather(results), [])
    lacking = "plain, 1 layer (3 of 5); additive, 1 layer (3 of 5); plain, 2 layers (0 of 5); additive, 2 layers (0 of 5)"
    assert f"| core | lastfm | {lacking} |" in page


def test_a_report_of_nothing_is_refused(cells: list[Cell], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study_report.main(["--out", str(out)])
    assert "contains no runs of the plan" in capsys.readouterr().err
