"""What is in a run folder stays until something better replaces it: stale, foreign and damaged files."""

import os
import pickle
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from awrsr import AWRSR
from awrsr.cli import main
from awrsr.files import stale
from awrsr.run_folder import read_state
from awrsr.training import loop

from .runs import as_older, command, config, disturb, everything, results, state, train, weights, write

# What is not this package's.


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "metrics.json", "last.ckpt", "stale.txt"])
def test_files_of_other_software_are_not_overwritten(name: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    out = tmp_path / "llama"
    out.mkdir()
    safetensors.torch.save_file({"wte": torch.ones(2)}, out / "weights")
    torch.save({"epoch": 3, "state_dict": {}}, out / "state")
    content = {
        "config.json": b'{"model_type": "llama", "rope": {"theta": 1}}',
        "model.safetensors": (out / "weights").read_bytes(),
        "metrics.json": b'{"accuracy": 0.9}',
        "last.ckpt": (out / "state").read_bytes(),
        "stale.txt": b"bread",
    }[name]
    (out / name).write_bytes(content)
    before = everything(out)
    said = "is not a state of awrsr: choose another folder" if name == "last.ckpt" else "was not written by awrsr, or is damaged"
    assert f"{out / name} {said}" in refused(*command(write(tmp_path / "data.txt"), out, epochs=1))
    assert everything(out) == before
    if name in ("config.json", "model.safetensors"):
        with pytest.raises(ValueError, match="was not written by awrsr"):
            AWRSR(config(num_items=24)).save(out)
        assert everything(out) == before


# What became stale.


def test_results_stay_until_others_replace_them_and_are_marked_when_stale(
    home: Path, run: Path, monkeypatch: pytest.MonkeyPatch, listening: None, printed: Callable[..., str]
) -> None:
    found, before = results(run)["epochs"], everything(run)
    kept = ["metrics.json", "ranks_test.parquet", "ranks_validation.parquet"]
    made = ["analysis.html", "model.pt2"]
    printed("analyse", run, "--users", 8)
    printed("export", "--run", run)
    monkeypatch.setattr(loop, "metrics", lambda ranks: {"NDCG@10": 0.9})  # better than before: the model is replaced
    disturb(monkeypatch, found + 2, lambda: signal.raise_signal(signal.SIGINT))
    assert main(command(home / "data.txt", run, epochs=found + 2)) == 130
    assert {name: (run / name).read_bytes() for name in kept} == {name: before[run / name] for name in kept}
    assert sorted(stale(run)) == sorted(["analysis.html", "model.pt2", *kept])
    monkeypatch.undo()
    assert train(home / "data.txt", run, epochs=found + 2)["epochs"] == found + 2
    assert sorted(stale(run)) == made and results(run)["epochs"] == found + 2
    printed("export", "--run", run)
    assert stale(run) == ["analysis.html"]
    printed("analyse", run, "--users", 8)
    assert not (run / "stale.txt").exists()


def test_what_does_not_change_the_model_makes_nothing_stale(home: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "metrics", lambda ranks: {"NDCG@10": 0.0})
    (run / "model.onnx").write_bytes(b"exported")
    assert train(home / "data.txt", run, epochs=4)["best_epoch"] <= 2
    assert not (run / "stale.txt").exists()


# A state that cannot be trusted.


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def damage_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(marker)))


def damage_checkpoint_with_code(path: Path, marker: Path) -> None:
    torch.save(state(path.parent) | {"more": Evil(marker)}, path)


def damage_cut(path: Path, marker: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def damage_empty(path: Path, marker: Path) -> None:
    path.write_bytes(b"")


def damage_foreign(path: Path, marker: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, path)


def damage_tensor(path: Path, marker: Path) -> None:
    torch.save(torch.zeros(3), path)


def damage_other_shapes(path: Path, marker: Path) -> None:
    found = state(path.parent)
    found["state_dict"]["model.norm.weight"] = torch.zeros(3)
    torch.save(found, path)


@pytest.mark.parametrize(
    "damage",
    [
        damage_pickle,
        damage_checkpoint_with_code,
        damage_cut,
        damage_empty,
        damage_foreign,
        damage_tensor,
        damage_other_shapes,
    ],
)
def test_a_state_that_is_damaged_or_holds_code_is_refused_and_never_run(
    damage: Callable[[Path, Path], None], home: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, before = tmp_path / "executed", weights(run)
    damage(run / "last.ckpt", marker)
    assert main(command(home / "data.txt", run, epochs=3)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"awrsr train: {run / 'last.ckpt'} ") and "remove it to start again" in error
    assert error.count("\n") == 1
    assert not marker.exists() and weights(run) == before


def test_the_malicious_pickle_of_these_tests_does_run_where_it_is_let(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_one_flipped_bit_in_a_state_is_noticed_or_changes_nothing(run: Path, tmp_path: Path) -> None:
    """torch reads tensors whose checksum does not fit without a word. All bits of the archive's directory are tried, to which such
    checksums do not extend."""
    path, found = run / "last.ckpt", flat(state(run))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    with zipfile.ZipFile(path) as parts:
        directory = range(8 * parts.start_dir, 8 * len(whole), 7)
    noticed = 0
    for bit in [*rng.integers(8 * len(whole), size=300).tolist(), *directory]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert flat(read_state(path)) == found
        except ValueError as error:
            assert str(path) in str(error)
            noticed += 1
    assert noticed >= 300 + len(directory) - 8 * 71  # all but those in the checksum itself, without which the rest is as it was


def flat(value: Any) -> Any:
    """A state in which tensors are bytes, so that two can be compared."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: flat(each) for name, each in value.items()}
    return [flat(each) for each in value] if isinstance(value, list | tuple) else value


def test_a_run_is_not_resumed_to_a_model_that_is_damaged_missing_or_of_another_epoch(
    home: Path, run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    """Found before training, not after it."""
    going_on = command(home / "data.txt", run, epochs=3)
    model = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(model[:-1] + bytes([model[-1] ^ 1]))
    assert "model.safetensors is damaged: its checksum does not fit" in refused(*going_on)
    (run / "model.safetensors").unlink()
    assert "model.safetensors is missing, but last.ckpt belongs to it: restore it, or remove last.ckpt" in refused(*going_on)
    train(home / "data.txt", tmp_path / "other", epochs=1)
    (run / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    best = state(run)["awrsr"]["record"]["best_epoch"]
    if best != 1:
        assert f"holds epoch 1, but the best one of the state in last.ckpt is {best}" in refused(*going_on)
    AWRSR(config(num_items=24)).save(run)
    assert f"{run} holds a model of another run than its state: data." in refused(*going_on)
    train(home / "data.txt", tmp_path / "seed", epochs=2, seed=1)
    (run / "model.safetensors").write_bytes((tmp_path / "seed" / "model.safetensors").read_bytes())
    assert f"{run} holds a model of another run than its state: training.seed was 1 and is 0" in refused(*going_on)


def test_a_model_ahead_of_its_state_is_not_taken_for_the_best_of_fewer_epochs(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """A kill between the two files of an epoch: more epochs repeat it, and the same number would report another epoch's model."""
    out, told = tmp_path / "run", iter([0.1, 0.2, 0.3])
    monkeypatch.setattr(loop, "metrics", lambda ranks: {"NDCG@10": next(told)})
    train(home / "data.txt", out, epochs=2)
    before = (out / "last.ckpt").read_bytes()
    train(home / "data.txt", out, epochs=3)
    (out / "last.ckpt").write_bytes(before)
    message = "holds epoch 3, but the best one of the state in last.ckpt is 2: rerun with at least 3 epochs"
    assert message in refused(*command(home / "data.txt", out, epochs=2))
    told = iter([0.3])
    assert train(home / "data.txt", out, epochs=3)["best_epoch"] == 3


def test_a_state_whose_configuration_is_lost_is_not_overwritten(home: Path, run: Path, refused: Callable[..., str]) -> None:
    """An older version kept it in config.json alone."""
    (as_older(run) / "config.json").unlink()
    before = everything(run)
    assert "last.ckpt is the state of a run whose config.json is missing" in refused(*command(home / "data.txt", run, epochs=3))
    assert everything(run) == before
