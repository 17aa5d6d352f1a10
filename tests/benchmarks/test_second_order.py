"""The second order: a plan written first, the same search for every contestant, and a verdict that the files decide."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awrsr.cli import option_names
from awrsr.data.headroom import PAYS
from awrsr.presets import DECIDES
from benchmarks.study import gains as study_gains
from benchmarks.study import run as study
from benchmarks.study import second_gains, second_order, second_tables
from benchmarks.study.plan import EPOCHS, HOLDOUT, SEEDS, Cell, plan
from benchmarks.study.run import Results, run_key
from benchmarks.study.second_gains import Second
from benchmarks.study.second_order import DATASETS, NAMES, PREDICTED, SETTINGS, USUAL

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_code_is_the_plan_as_written() -> None:
    page = (DOCS / "study-plan.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+): .+? \| (.+)$", page, re.MULTILINE))
    assert rows.keys() == set(DATASETS)
    for name, row in rows.items():
        holdout, epochs, headroom, _, predicted, lagged = row.split(" | ", 5)
        assert name not in HOLDOUT or (int(holdout), int(epochs)) == (HOLDOUT[name], EPOCHS[name]), name
        assert float(headroom.split()[0]) == second_gains.HEADROOM[name][0]
        assert ("**wins**" in predicted) == (name in PREDICTED) == (second_gains.HEADROOM[name][0] >= 5), name
        expected = second_gains.EXPECTED.get(name, ("", ""))
        assert expected[0] in predicted and lagged.startswith(expected[1]), name
    assert f"all {second_order.planned()} comparisons" in page.replace("\n", " ")
    measured = second_gains.BEFORE_TEST
    assert measured.keys() == set(DATASETS)
    assert all((measured[name] >= 100 * PAYS) == (second_order.by_default(name) == "lagged") for name in DATASETS)


def test_older_runs_stand_for_the_same_models() -> None:
    for dataset in second_order.OLDER:
        found = [second_order.cell(dataset, name) for name in ("plain", "two plain layers", "mean", "published")]
        assert [(c.refinement, c.layers) for c in found] == [("none", 1), ("none", 2), ("additive", 1), ("additive", 1)]
        assert all(c.tables == "position" and c.seeds == SEEDS for c in found), dataset


def test_no_run_leaves_its_model_to_the_data() -> None:
    for cell in (*second_order.cells(Made(USUAL)), *plan()):
        words = cell.arguments(0)
        chosen = "--preset" in words or not DECIDES.isdisjoint(option_names(words)) or cell.refinement != "additive"
        assert chosen or cell.dataset == "synthetic", cell.name  # synthetic histories have the options of the demonstration


class Made:
    """Results of runs that were not made: validation of a setting decides."""

    def __init__(self, best: str, lacks: str = "") -> None:
        self.best, self.lacks = best, lacks

    def of(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        setting = next((each for each in SETTINGS if cell.variant.endswith(each)), USUAL)
        return None if setting == self.lacks else {"validation": {"NDCG@10": 0.5 + (setting == self.best)}}


def test_the_setting_that_is_best_on_validation_gets_all_seeds_and_runs_after_the_search() -> None:
    cells = second_order.cells(Made("half the rate"))
    of = {cell.variant: cell for cell in cells if cell.dataset == "jazz"}
    assert of["lagged with half the rate"].seeds == SEEDS and of["lagged"].seeds == of["lagged with twice the dropout"].seeds == 1
    assert second_order.chosen("jazz", "lagged", Made("usual", lacks="twice the dropout")) is None
    assert second_order.chosen("redis", "lagged", Made("half the rate")) == USUAL  # no search there
    assert {cell.seeds for cell in cells if cell.dataset == "redis"} == {SEEDS}
    wanted = study.in_order([(cell, seed) for cell in cells for seed in range(cell.seeds)], list(second_order.GROUPS))
    first = [(cell.dataset, cell.variant) for cell, _ in wanted[: len(PREDICTED) * len(NAMES)]]
    assert first == [(dataset, name) for dataset in PREDICTED for name in NAMES]
    seeds = [seed for cell, seed in wanted if cell.dataset in PREDICTED]
    assert seeds == sorted(seeds) and wanted[len(seeds)][0].dataset == "redis"


def second(monkeypatch: pytest.MonkeyPatch, gain: dict[str, float], users: int = 300) -> Second:
    """Runs of every contestant, better than plain by `gain` of its name, on every set."""
    monkeypatch.setattr(study_gains, "RESAMPLES", 100)
    monkeypatch.setattr(second_gains, "FLIPS", 20000)
    rng = np.random.default_rng(0)
    base = rng.uniform(0.4, 0.6, size=(users, SEEDS))
    runs = {}
    for dataset in DATASETS:
        for name in second_order.names(dataset):
            values = base + gain.get(name, 0) + rng.normal(0, 0.01, size=base.shape)
            entries = [{"test": {"NDCG@10": float(x)}, "params": 9, "train_cpu_seconds": 2.0, "epochs": 2} for x in values.mean(0)]
            runs[dataset, name] = study_gains.Runs(second_order.cell(dataset, name), entries, values)
    settings: dict[tuple[str, str], str | None] = dict.fromkeys(runs, USUAL)
    pairs = [(dataset, *pair) for dataset in DATASETS for pair in second_order.compared(dataset)]
    gains = {(d, m, b): study_gains.contrast("second order", runs[d, m], runs[d, b]) for d, m, b in pairs}
    return Second(runs, settings, gains)


def test_criteria_are_met_failed_or_open(monkeypatch: pytest.MonkeyPatch) -> None:
    found = second(monkeypatch, {"refined": 0.05, "lagged": 0.05, "mean": 0.01})
    found = Second(found.runs, found.settings, found.corrected())
    assert [verdict for *_, verdict in second_gains.criteria(found)] == ["met"] * 7
    assert [verdict for *_, verdict in second_gains.predictions(found)][1:] == ["held", "failed", "failed"]
    page = second_tables.markdown(found, second_tables.short(found))
    assert "All runs of these tables have been made." in page and "184 have all their runs" in page
    assert "Five seeds." in second_tables.brief(found)
    worse = second(monkeypatch, {"refined": -0.05, "lagged": 0.02})
    worse = Second(worse.runs, worse.settings | {("jazz", "lagged"): None}, worse.gains)
    worse = Second(worse.runs, worse.settings, worse.corrected())
    verdicts = second_gains.criteria(worse)
    assert [verdict for *_, verdict in verdicts] == ["not met"] * 4 + ["open", "open", "met"]
    assert "runs are missing on jazz" in verdicts[2][1] and np.isnan(worse.gains["jazz", "lagged", "plain"].p)
    assert "| jazz | lagged | 5 of 5 seeds, search not finished |" in second_tables.short(worse)
    assert "300 of 300 runs have been made" in second_tables.brief(worse)


def test_a_user_counts_once_however_many_targets() -> None:
    values = np.array([[1.0, 0.0], [0.0, 0.0], [0.5, 1.0]])
    assert second_gains.by_user(values, [0, 0, 1]).tolist() == [[0.5, 0.0], [0.5, 1.0]]
    assert second_gains.by_user(values, None) is values


def test_only_the_part_between_the_marks_is_replaced() -> None:
    long, brief = second_tables.PARTS
    page = f"a\n<!-- {long}: begin -->\nold\n<!-- {long}: end -->\nb"
    assert second_tables.marked(page, {long: "new", brief: "short"}) == page.replace("\nold\n", "\n\nnew\n\n")
    assert second_tables.marked("no marks", {long: "new"}) == "no marks"


def test_the_committed_tables_follow_from_the_committed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but intervals and p, whose random draws take long."""
    monkeypatch.setattr(study_gains, "RESAMPLES", 2)
    monkeypatch.setattr(second_gains, "FLIPS", 2)
    results = Results(study.RESULTS)
    found = Second.of(results)
    tables = ["\n".join(second_tables.predicted(found)), "\n".join(second_tables.missing(found))]
    for path in (study.RESULTS / "second_order.md", DOCS / "study.md"):
        assert all(table in path.read_text(encoding="utf-8") for table in tables), path.name
    for runs in found.runs.values():
        assert runs.mean() == pytest.approx(runs.values.mean(), abs=2e-5), run_key(runs.entries[0])  # ranks and entries agree
