"""A run and its folder: exact resume, seeds, early stopping, refusals; whatever stops a run leaves the last whole epoch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from awrsr import AWRSR, TrainingOptions, files
from awrsr.cli import main
from awrsr.data.histories import Histories
from awrsr.data.splits import split
from awrsr.run_folder import state_to_resume
from awrsr.training import loop, trainer
from awrsr.training import run as training

from .runs import (
    QUICK,
    STOSA,
    as_older,
    command,
    config,
    disturb,
    everything,
    histories,
    results,
    state,
    timeless,
    train,
    weights,
    write,
)

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from awrsr.cli import main
from awrsr.training.loop import TrainingLoop

step = TrainingLoop.training_step

def killed(self, batch, nth):
    if (self.trainer.current_epoch, nth) == (2, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, nth)

TrainingLoop.training_step = killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.txt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.txt and run/, two epochs of it; for copying."""
    folder = tmp_path_factory.mktemp("finished")
    train(write(folder / "data.txt"), folder / "run", epochs=2)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def never_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*_: object) -> None:
        raise AssertionError("a finished run was trained")

    monkeypatch.setattr(loop.TrainingLoop, "training_step", step)


# Going on.


@pytest.mark.parametrize("options", [{"schedule": "cosine", "average": 0.9}, STOSA], ids=str)
def test_a_run_goes_on_after_a_kill_to_the_numbers_of_one_never_stopped(
    options: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)

    out, whole = tmp_path / "killed", tmp_path / "whole"
    options = options | {"epochs": 4}
    done = start("-c", KILLED, *command(data, out, **options))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert state(out)["awrsr"]["record"]["epochs"] == 2 and not (out / "metrics.json").exists()
    done = start("-m", "awrsr", *command(data, out, **options))
    assert done.returncode == 0, done.stderr
    assert "epoch 3/4" in done.stdout and "epoch 2/4" not in done.stdout
    assert timeless(results(out)) == timeless(train(data, whole, **options))
    assert weights(out) == weights(whole)
    assert [p.name for p in out.glob(".*")] == []


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_run_says_how_to_go_on_and_does(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = signal.Signals[name]
    handler = signal.getsignal(number)
    disturb(monkeypatch, 2, lambda: signal.raise_signal(number))
    assert main(command(data, tmp_path / "run", epochs=3)) == 130
    error = capsys.readouterr().err
    assert f"Rerun the same command to resume from the last completed epoch in {tmp_path / 'run'}." in error
    assert "Traceback" not in error
    assert signal.getsignal(number) is handler
    assert state(tmp_path / "run")["awrsr"]["record"]["epochs"] == 1
    monkeypatch.undo()
    assert timeless(train(data, tmp_path / "run", epochs=3)) == timeless(train(data, tmp_path / "whole", epochs=3))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.usefixtures("listening")
def test_an_interrupted_fit_raises_keyboard_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = signal.getsignal(signal.SIGINT)
    disturb(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        AWRSR(config()).fit(histories(), **QUICK)
    assert signal.getsignal(signal.SIGINT) is handler


def test_more_epochs_go_on_where_the_run_ended(finished: Path, run: Path, tmp_path: Path) -> None:
    longer = train(finished / "data.txt", run, epochs=4)
    assert timeless(longer) == timeless(train(finished / "data.txt", tmp_path / "whole", epochs=4))
    assert [each["epoch"] for each in longer["curve"]] == [1, 2, 3, 4]
    assert state(finished / "run")["awrsr"]["record"]["epochs"] == 2  # the folder that this one was copied from
    assert weights(run) == weights(tmp_path / "whole")


def test_a_run_whose_epochs_are_done_is_not_trained_again(finished: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never_trains(monkeypatch)
    before = weights(run), (run / "last.ckpt").read_bytes()
    assert timeless(train(finished / "data.txt", run, epochs=2)) == timeless(results(finished / "run"))
    assert (weights(run), (run / "last.ckpt").read_bytes()) == before


def test_a_run_of_an_older_version_goes_on(finished: Path, run: Path) -> None:
    """Options that it did not have are at their defaults; another value is another run."""
    stored = json.loads((as_older(run) / "config.json").read_text())
    del stored["model"]["mean_branch"], stored["training"]["pvn_weight"]
    (run / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"training.loss was .*; training.pvn_weight was 0.0 and is 0.5"):
        state_to_resume(run, stored | {"training": stored["training"] | {"loss": "bpr", "pvn_weight": 0.5}})
    without = stored | {"training": {name: value for name, value in stored["training"].items() if name != "average"}}
    (run / "config.json").write_text(json.dumps(without))
    with pytest.raises(ValueError, match=r"training.average was 0 and is 0.998"):  # the weights themselves, then
        state_to_resume(run, stored)
    (run / "config.json").write_text(json.dumps(stored))
    assert train(finished / "data.txt", run, epochs=3)["epochs"] == 3
    assert not (run / "items.parquet").exists()  # the model is one file now
    (run / "last.ckpt").unlink()
    assert AWRSR.load(run).ids().tolist() == AWRSR.load(finished / "run").ids().tolist()


@pytest.mark.parametrize("logger", ["csv", "none"])
def test_training_warns_of_nothing(logger: str, data: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        train(data, tmp_path / "run", epochs=1, logger=logger)
        older = state(tmp_path / "run") | {"callbacks": {"ModelCheckpoint{'monitor': None}": {"dirpath": "run"}}}
        torch.save(older, tmp_path / "run" / "last.ckpt")  # as runs had it that used Lightning's own checkpoint callback
        train(data, tmp_path / "run", epochs=2, logger=logger)
    assert not [str(each.message) for each in shown]


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_run_goes_on_with_the_same_data_at_another_place(epochs: int, finished: Path, run: Path, tmp_path: Path) -> None:
    moved = shutil.copy(finished / "data.txt", tmp_path / "moved.txt")
    assert train(Path(moved), run, epochs=epochs)["epochs"] == epochs
    assert AWRSR.load(run).sections["data"]["data"] == str(moved)  # where evaluate looks for them


def test_a_run_goes_on_with_another_backend(finished: Path, run: Path, tmp_path: Path) -> None:
    found = train(finished / "data.txt", run, epochs=3, backend="reference")["curve"]
    whole = train(finished / "data.txt", tmp_path / "whole", epochs=3)["curve"]
    assert [each["loss"] for each in found] == pytest.approx([each["loss"] for each in whole], rel=1e-4)
    assert AWRSR.load(run).config.backend == "reference"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": 1}, "training.seed was 0 and is 1"),
        ({"hidden_dropout": 0.25}, "model.hidden_dropout was 0.5 and is 0.25"),
        ({"loss": "bce"}, "training.loss was 'sampled_softmax' and is 'bce'"),
        ({"split": "last-n", "holdout": 2}, "data.fingerprint was"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(
    options: dict[str, Any], message: str, finished: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert main(command(finished / "data.txt", run, epochs=4, **options)) == 1
    error = capsys.readouterr().err
    assert f"{run} holds another run: " in error and message in error and "Choose another folder" in error
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_other_data_in_the_same_folder_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{user} {' '.join(items)} \n" for user, items in histories(seed=1).items()))
    assert main(command(other, run, epochs=4)) == 1
    assert "data.fingerprint was" in capsys.readouterr().err


def test_data_that_differ_in_ids_alone_are_other_data(tmp_path: Path) -> None:
    parts = [
        split(Histories.from_lists({user: [prefix + i for i in items] for user, items in histories().items()})) for prefix in "ab"
    ]
    options = TrainingOptions(epochs=1, **QUICK)
    training.train(AWRSR(config(num_items=24)), parts[0], options, tmp_path)
    with pytest.raises(ValueError, match="holds another run: data.fingerprint was"):
        training.train(AWRSR(config(num_items=24)), parts[1], options, tmp_path)


def test_a_model_without_its_state_keeps_its_configuration(finished: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Others' options beside its weights would give other results; and what Python saved is not to be lost."""
    (run / "last.ckpt").unlink()
    before = everything(run)
    assert main(command(finished / "data.txt", run, epochs=2, gate=4.0)) == 1
    assert f"{run} holds the model of another run: model.gate was 2.0 and is 4.0" in capsys.readouterr().err
    assert everything(run) == before


def test_results_stay_where_training_cannot_start(
    finished: Path, run: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("no such logger here")

    monkeypatch.setattr(training, "make_trainer", missing)
    before = everything(run)
    assert "no such logger here" in refused(*command(finished / "data.txt", run, epochs=9))
    assert everything(run) == before


def test_a_full_disk_is_called_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(trainer.torch, "save", full)
    assert main(command(data, tmp_path / "run", epochs=1)) == 1
    error = capsys.readouterr().err
    assert "last.ckpt could not be written (" in error and "MiB are free there; rerun the same command to resume" in error


def test_without_its_state_a_run_begins_anew(finished: Path, run: Path) -> None:
    (run / "last.ckpt").unlink()
    assert timeless(train(finished / "data.txt", run, epochs=2)) == timeless(results(finished / "run"))


# Seeds and early stopping.


def test_seeds_decide_a_run(finished: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        train(finished / "data.txt", tmp_path / name, epochs=2, seed=seed)
    assert weights(tmp_path / "same") == weights(finished / "run")
    assert weights(tmp_path / "other") != weights(finished / "run")
    assert timeless(results(tmp_path / "same")) == timeless(results(finished / "run"))


def scripted(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Validation says these, epoch by epoch."""
    told = iter(values)
    monkeypatch.setattr(loop, "metrics", lambda ranks: {"NDCG@10": next(told)})


def test_early_stopping_keeps_the_best_epoch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [0.1, 0.3, 0.3, 0.2]
    scripted(monkeypatch, *told, 0.9)
    found = train(data, tmp_path / "run", epochs=9, patience=2)
    assert (found["epochs"], found["best_epoch"]) == (4, 2)
    assert [each["NDCG@10"] for each in found["curve"]] == told
    monkeypatch.undo()
    scripted(monkeypatch, 0.1, 0.3)
    train(data, tmp_path / "two", epochs=2)
    assert weights(tmp_path / "run") == weights(tmp_path / "two")
    assert found["test"] == results(tmp_path / "two")["test"]


def test_a_run_that_stopped_early_is_not_trained_again_unless_patience_grows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 0.3, 0.1, 0.1, 0.1, 0.1)
    assert train(data, tmp_path / "run", epochs=9, patience=2)["epochs"] == 3
    with monkeypatch.context() as patch:
        never_trains(patch)
        assert train(data, tmp_path / "run", epochs=9, patience=2)["epochs"] == 3
    assert train(data, tmp_path / "run", epochs=9, patience=4)["epochs"] == 5


def test_patience_0_never_stops_early(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 0.3, *[0.1] * 5)
    assert train(data, tmp_path / "run", epochs=6, patience=0)["epochs"] == 6


# What goes wrong in the middle, and what is left behind.


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, out = loop.LOSSES["bce"], tmp_path / "run"
    bad = [False]
    disturb(monkeypatch, 3, lambda: bad.append(True))
    monkeypatch.setitem(loop.LOSSES, "bce", lambda *a, **k: real(*a, **k) * (float("nan") if bad[-1] else 1.0))
    assert main(command(data, out, epochs=4, loss="bce")) == 1
    assert capsys.readouterr().err == "awrsr train: the loss is nan in epoch 3; lower learning_rate or set clip\n"
    kept = state(out)
    assert kept["awrsr"]["record"]["epochs"] == 2
    assert all(x.isfinite().all() for x in [*kept["state_dict"].values(), *load_file(out / "model.safetensors").values()])
    assert not (out / "metrics.json").exists()
    monkeypatch.undo()
    assert timeless(train(data, out, epochs=4, loss="bce")) == timeless(train(data, tmp_path / "whole", epochs=4, loss="bce"))


@pytest.mark.parametrize("what", ["json", "model", "checkpoint"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    what: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AWRSR.load(run)
    write_it: dict[str, Callable[[], None]] = {
        "json": lambda: files.write_json(run / "metrics.json", {}),
        "model": lambda: model.save(run),
        "checkpoint": lambda: trainer.AtomicCheckpoints().save_checkpoint({}, run / "last.ckpt"),
    }
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        write_it[what]()
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
