"""Several machines that share no disk: the first process decides for all, and nobody waits for ever."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from awrsr.training import nodes

from .runs import QUICK, SMALL, flags, results, train, write

ROOT = Path(__file__).parents[2]

# One process of two: trains an epoch, resumes with another one, then is given other options than its fellow.
PROCESS = """
import os, sys
from awrsr.cli import main
arguments = sys.argv[1:]
print([main([*arguments, "--epochs", "1"]), main([*arguments, "--epochs", "2"])])
print([main([*arguments, "--epochs", "3", "--learning-rate", "0.01" + os.environ["RANK"]])])
"""


def start(folder: Path, rank: int, port: int, program: list[str], **options: Any) -> "subprocess.Popen[str]":
    """A process as torchrun starts it, in a folder of its own."""
    folder.mkdir(exist_ok=True)
    launched = {"RANK": rank, "GROUP_RANK": rank, "NODE_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "LOCAL_RANK": 0}
    launched |= {"LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": 1}
    environment = os.environ | {name: str(value) for name, value in launched.items()} | {"PYTHONPATH": str(ROOT)}
    words = ["train", *flags(**(SMALL | QUICK | {"nodes": 2, "hidden_dropout": 0, "attention_dropout": 0} | options))]
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *program, *words], cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_machines_without_a_shared_disk_resume_together(tmp_path: Path) -> None:
    """Without the first one's state, the other began anew, and both waited for each other for ever. Each has its own copy of the
    data, in a place of its own."""
    port = free_port()
    for name in "ab":
        (tmp_path / name).mkdir()
        data = write(tmp_path / name / "data.txt")
    both = [start(tmp_path / name, rank, port, ["-c", PROCESS], data="data.txt", out="run") for rank, name in enumerate("ab")]
    outputs = [process.communicate(timeout=150) for process in both]
    for printed, errors in outputs:
        assert "[0, 0]\n" in printed and "[1]\n" in printed, printed + errors
        assert errors.count("awrsr train: ") == 1 and "training.learning_rate 0.011, but the first has 0.01" in errors, errors
    assert not list((tmp_path / "b" / "run").glob("*.ckpt")) and not list((tmp_path / "b" / "run").glob("*.safetensors"))
    one = train(data, tmp_path / "alone", epochs=2, hidden_dropout=0, attention_dropout=0)
    two = results(tmp_path / "a" / "run")
    assert [each["loss"] for each in two["curve"]] == pytest.approx([each["loss"] for each in one["curve"]], rel=1e-5)


def test_a_process_that_waits_for_another_machine_ends_at_sigterm(tmp_path: Path) -> None:
    waits = "from awrsr.training.nodes import join; print(1, flush=True); join()"
    alone = start(tmp_path / "a", 0, free_port(), ["-c", waits])
    assert alone.stdout is not None and alone.stdout.readline() == "1\n"
    time.sleep(0.5)
    alone.send_signal(signal.SIGTERM)
    assert alone.wait(timeout=10) == -signal.SIGTERM


@pytest.mark.parametrize(
    "variables, options, message",
    [
        ({}, {"nodes": 2}, "nodes is 2, but no launcher started this process; run on each machine: torchrun --nnodes 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, "so 1 processes must train together, but the launcher started WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, {"nodes": 3}, "so 3 processes must train together"),
    ],
)
def test_processes_that_a_launcher_did_not_start_as_the_options_say_are_refused(
    variables: dict[str, str],
    options: dict[str, int],
    message: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = flags(data=home / "data.txt", out=tmp_path / "out", **SMALL, **QUICK, **options)
    assert message in refused("train", *words)


def test_a_process_whose_fellows_do_not_come_says_so_after_a_stated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(nodes, "PATIENCE", timedelta(seconds=1))
    with pytest.raises(ConnectionError, match="process 1 of 2 did not meet the others at 127.0.0.1:[0-9]+ within 1 s"):
        nodes.join()
