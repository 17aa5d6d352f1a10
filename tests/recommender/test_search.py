"""The search: equal budgets, no look at test events, and going on after a stop."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from awrsr import AWRSRConfig, Histories, TrainingOptions, split
from awrsr import search as module
from awrsr.cli import main
from awrsr.search import Search

from .runs import QUICK, SMALL, flags, histories

FAST = TrainingOptions(epochs=2, progress=False, **QUICK)
FIXED = ("hidden", "batch_size", "loss")


def make(folder: Path, models: tuple[str, ...] = ("plain", "refined"), **changes: Any) -> Search:
    options = {"split": split(histories()), "config": AWRSRConfig(**SMALL), "training": FAST, "fixed": FIXED} | changes
    return Search(folder, models=models, **options)


def test_models_take_turns_and_a_stopped_search_goes_on(tmp_path: Path) -> None:
    search = make(tmp_path)
    for wanted in ("plain", "refined", "plain"):
        model = search.next_model(2)
        assert model == wanted and search.run_trial(wanted) is not None
    search.studies["refined"].ask()  # a trial during which the search is killed
    again = make(tmp_path)
    assert again.done("plain") == 2 and again.done("refined") == 1 and again.next_model(2) == "refined"
    again.run_trial("refined")
    assert again.next_model(2) is None
    found = {each.model: each for each in again.found()}
    assert found["plain"].trials == found["refined"].trials == 2 and set(found["plain"].options) == set(module.SPACE) - set(FIXED)
    best = max(float(trial.value or 0) for trial in again.studies["plain"].get_trials() if trial.value is not None)
    assert found["plain"].validation == best
    with pytest.raises(ValueError, match="holds a search on other data or for other options"):
        make(tmp_path, fixed=("hidden",))


def test_without_a_number_of_trials_time_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = make(tmp_path)
    spent = {"plain": 10.0, "refined": 9.0}
    monkeypatch.setattr(search, "seconds", spent.get)
    assert search.next_model(0) == "refined"


def test_what_comes_of_test_events_does_not_matter(tmp_path: Path) -> None:
    """The same search on histories whose last items are others finds the same."""
    own = Histories.from_lists(histories())
    items = own.items.copy()
    items[own.offsets[1:] - 1] = 0
    training, results = replace(FAST, filter_seen="no"), []
    for nth, given in enumerate((own, replace(own, items=items))):
        results.append(make(tmp_path / str(nth), ("plain",), split=split(given), training=training).run_trial("plain"))
    assert results[0] == results[1]


def test_trials_that_fall_behind_end_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = make(tmp_path, ("plain",))
    monkeypatch.setattr(module.optuna.Trial, "should_prune", lambda self: True)
    assert search.run_trial("plain") is None and search.done("plain") == 1 and search.found() == []


def test_the_command_prints_commands_that_run(
    tmp_path: Path, printed: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.txt").write_text("".join(f"{user} {' '.join(items)}\n" for user, items in histories().items()))
    own = flags(data=tmp_path / "data.txt", **(SMALL | QUICK | {"epochs": 1}))
    text = printed("search", *own, "--no-progress", "--out", tmp_path / "found", "--trials", 1, "--models", "plain", "mean")
    lines = [line.strip() for line in text.splitlines() if line.startswith("  awrsr train")]
    assert len(lines) == 2 and len(json.loads((tmp_path / "found" / "search.json").read_text())) == 2
    assert main([*lines[0].split()[1:], "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    for line, message in (
        (["--trials", "1"], "--data is missing"),
        (["--data", f"{tmp_path}/data.txt"], "--minutes or --trials is missing"),
    ):
        assert main(["search", "--out", f"{tmp_path}/x", *line]) == 2 and message in capsys.readouterr().err
