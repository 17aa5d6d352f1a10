"""A small file of histories that can be learned in seconds, and what it takes to train on it."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from awrsr import AWRSR, AWRSRConfig, TrainingOptions
from awrsr.cli import main
from awrsr.data.splits import Split
from awrsr.files import UNSEALED, sealed
from awrsr.model_file import CONFIG, METADATA, WEIGHTS, read_model, stored_sections, tensors_of
from awrsr.run_folder import STATE
from awrsr.training import loop
from awrsr.training import run as training

ITEMS = 24
STEP = loop.TrainingLoop.training_step
SMALL = {"hidden": 16, "layers": 1, "rank": 4, "max_len": 8}
QUICK = {"batch_size": 16, "threads": 1, "accelerator": "cpu"}
STOSA = {"backbone": "stosa", "refinement": "stochastic"}
SPEEDS = ("train_sequences_per_cpu_second", "eval_users_per_cpu_second")
TIMES = ("train_seconds", "train_cpu_seconds", *SPEEDS, "peak_mib", "checksum")


def histories(users: int = 61, seed: int = 0) -> dict[str, list[str]]:
    """User -> items: mostly each item has its own successor."""
    rng = np.random.default_rng(seed)
    found = {}
    for user in range(users):
        items = [int(rng.integers(ITEMS))]
        for _ in range(int(rng.integers(5, 14))):
            items.append((items[-1] * 5 + 1) % ITEMS if rng.random() < 0.8 else int(rng.integers(ITEMS)))
        found[f"u{user}"] = [f"i{item}" for item in items]
    return found


def write(path: Path, **options: int) -> Path:
    path.write_text("".join(f"{user} {' '.join(items)}\n" for user, items in histories(**options).items()))
    return path


def flags(**options: Any) -> list[str]:
    """dict(max_len=8) -> ["--max-len", "8"]"""
    return [part for name, value in options.items() for part in ("--" + name.replace("_", "-"), str(value))]


def command(data: Path, out: Path, **options: Any) -> list[str]:
    return ["train", *flags(data=data, out=out, **(SMALL | QUICK | options))]


def train(data: Path, out: Path, **options: Any) -> dict[str, Any]:
    """metrics.json of a run through the command line."""
    assert main(command(data, out, **options)) == 0
    return results(out)


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same options have in common."""
    return {name: value for name, value in found.items() if name not in TIMES} | {"config": found["config"] | {"out": ""}}


def weights(out: Path) -> bytes:
    """Weights and ids of a saved model, without its configuration."""
    return tensors_of((out / WEIGHTS).read_bytes())


def as_older(folder: Path) -> Path:
    """Rewrite a run as older versions wrote it: a model of three files, and a state without a configuration."""
    saved = read_model(folder)
    data = saved.sections.get("data", {}) | {"seen": not saved.filter_seen}
    sections = {name: value for name, value in saved.sections.items() if name != "epoch"} | {"data": data}
    (folder / CONFIG).write_text(json.dumps({"model": asdict(saved.network.config)} | sections))
    pl.DataFrame({"item": saved.item_ids}).write_parquet(folder / "items.parquet")
    save_file(dict(saved.network.state_dict()), folder / WEIGHTS)
    if (folder / STATE).exists():
        state = torch.load(folder / STATE, weights_only=True)
        state["awrsr"].pop("config", None)
        torch.save(state, folder / STATE)
    return folder


def as_stored(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the configuration in a model's file, and its checksum with it."""
    path = folder / WEIGHTS
    about, _ = stored_sections(folder)
    metadata = {METADATA: json.dumps(change(about | {"checksum": UNSEALED}))}
    path.write_bytes(sealed(save(load_file(path), metadata)))


def config(**options: Any) -> AWRSRConfig:
    return AWRSRConfig(**(SMALL | options))


def state(out: Path) -> dict[str, Any]:
    return torch.load(out / "last.ckpt", weights_only=True)


def disturb(monkeypatch: pytest.MonkeyPatch, epoch: int, what: Callable[[], object]) -> None:
    """Something happens in the middle of an epoch, counted from 1."""

    def step(self: loop.TrainingLoop, batch: Any, nth: int) -> torch.Tensor:
        if (self.trainer.current_epoch + 1, nth) == (epoch, 2):
            what()
        return STEP(self, batch, nth)

    monkeypatch.setattr(loop.TrainingLoop, "training_step", step)


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a command that succeeds leaves on standard output."""
    capsys.readouterr()
    assert main([str(each) for each in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that a command which fails leaves on standard error."""
    capsys.readouterr()
    assert main([str(each) for each in arguments]) == 1
    error = capsys.readouterr().err
    name = " ".join(arguments[: 2 if arguments[0] == "data" else 1])
    assert error.startswith(f"awrsr {name}: ") and error.endswith("\n") and error.count("\n") == 1, error
    return error


def stopped(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """Exit status and output of a command that the parser ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        main([str(each) for each in arguments])
    return int(status.value.code or 0), "".join(capsys.readouterr())


def fit(parts: Split, model: dict[str, Any] | None = None, **options: Any) -> tuple[AWRSR, dict[str, Any]]:
    """A model trained in memory, and its record."""
    torch.manual_seed(0)
    trained = AWRSR(config(num_items=ITEMS, **(model or {})))
    return trained, training.train(trained, parts, TrainingOptions(**(QUICK | options)))
