"""How a command ends when the machine, the user or a damaged file stops it: one line, a status, and no half-written file."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from awrsr import AWRSR, cli
from awrsr.model_file import WEIGHTS

from .runs import as_older, as_stored, command, everything

ROOT = Path(__file__).parents[2]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of POSIX")

# Runs commands in a process whose files, or whose memory, may not become larger than so many bytes.
LIMITED = """
import json, resource, sys
from awrsr.__main__ import main
from awrsr.cli import main as command_line
which, size = sys.argv[1], int(sys.argv[2])
resource.setrlimit(getattr(resource, which), (size, size))
print([command_line(command) for command in json.loads(sys.argv[3])])
"""
INTERRUPTED = """
import importlib.abc, os, signal, sys
from awrsr.__main__ import main

_, awaited, *sys.argv[1:] = sys.argv

class CtrlC(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == awaited:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
sys.exit(main())
"""


def process(*arguments: Any, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120, **options)


@POSIX
def test_a_full_disk_is_one_line_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    """torch once aborted the process, when it closed the file that it could not write."""
    run, data = home / "run", home / "data.txt"
    commands = [
        ["export", "--run", run, "--output", tmp_path / "model.pt2"],
        ["recommend", "--run", run, "--output", tmp_path / "top.csv"],
        ["recommend", "--run", run, "--output", tmp_path / "top.parquet"],
        ["evaluate", "--run", run, "--ranks", tmp_path / "ranks.parquet"],
        ["data", "make", "--output", tmp_path / "made.txt"],
        [*command(data, tmp_path / "trained", epochs=1), "--no-progress"],
    ]
    text = json.dumps([[str(word) for word in words] for words in commands])
    done = process("-c", LIMITED, "RLIMIT_FSIZE", 600, text, stdout=subprocess.PIPE)
    assert done.stdout.endswith(f"{[1] * len(commands)}\n"), done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("awrsr ")]
    assert len(errors) == len(commands) and "Traceback" not in done.stderr, done.stderr
    for words, error in zip(commands[:5], errors, strict=False):
        assert "File too large" in error and str(words[-1]) in error, error
    assert not [path for path in everything(tmp_path) if path.is_file() and path.name not in ("config.json", "hparams.yaml")]


@POSIX
def test_a_disk_that_is_full_for_the_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = process("-m", "awrsr", "train", "--print-config", stdout=full)
    assert done.returncode == 1 and done.stderr == "awrsr: [Errno 28] No space left on device\n"


@POSIX
def test_too_little_memory_is_one_line(home: Path, tmp_path: Path) -> None:
    commands = [
        ["data", "make", "--users", "100000", "--length", "1000000", "--output", str(tmp_path / "made.txt")],
        [*command(home / "data.txt", tmp_path / "out", hidden=16384, heads=64, max_len=65536)],
    ]
    done = process("-c", LIMITED, "RLIMIT_AS", 5 << 30, json.dumps(commands), stdout=subprocess.PIPE)
    assert done.stdout.endswith("[1, 1]\n"), done.stdout + done.stderr
    assert [line.partition(" (")[0] for line in done.stderr.splitlines()] == [
        "awrsr data make: out of memory",
        "awrsr train: out of memory",
    ]


@POSIX
@pytest.mark.parametrize("while_importing, who", [("polars", "awrsr"), ("jsonargparse", "awrsr"), ("lightning", "awrsr train")])
def test_ctrl_c_during_imports_is_one_line(while_importing: str, who: str, home: Path, tmp_path: Path) -> None:
    words = command(home / "data.txt", tmp_path / "out")
    done = process("-c", INTERRUPTED, while_importing, *words, stdout=subprocess.DEVNULL)
    assert done.returncode == 130 and done.stderr == f"{who}: interrupted\n", done.stderr


def test_the_installed_command_begins_where_ctrl_c_is_caught() -> None:
    assert '"awrsr = awrsr.__main__:main"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    loaded = "import sys, awrsr, awrsr.__main__; print([name for name in sys.modules if name.startswith(('awrsr.', 'numpy'))])"
    assert process("-c", loaded, stdout=subprocess.PIPE).stdout == "['awrsr.__main__']\n"


@pytest.mark.parametrize(
    "section, value, message",
    [
        ("data", [], "data is [], must be options with their values in braces"),
        ("data", "beauty", "data is 'beauty', must be options"),
        ("data", None, "data is None, must be options"),
        ("model", [1], "model is [1], must be options"),
        ("training", 7, "training is 7, must be options"),
        (None, [], "the whole is [], must be options"),
        ("layers", 10**6, "layers is 1000000, must be at least 1 and at most 1000"),
        ("hidden", 10**9, "hidden is 1000000000, must be at least 1 and at most 16384"),
        ("max_len", 10**9, "max_len is 1000000000, must be at least 1 and at most 65536"),
        ("heads", 10**9, "heads is 1000000000, must be at least 1 and at most 1024"),
        ("feedforward", 10**9, "feedforward is 1000000000, must be at least 1 and at most 1000"),
        ("num_items", 10**12, "num_items is 1000000000000, must be at least 0 and below 2.14748e+09"),
        ("num_items", 10**9, "1000000000"),
        ("max_len", 60000, "60000"),
        ("feedforward", 900, "14400"),  # 900 times hidden
    ],
)
@pytest.mark.timeout(60)
def test_a_config_of_any_content_is_refused_at_once(
    section: str | None, value: Any, message: str, run: Path, refused: Callable[..., str]
) -> None:
    """Sizes that the options allow take no memory, and sections are what they must be, before the weights are compared."""

    def changed(config: dict[str, Any]) -> Any:
        if section is None:
            return value
        return config | ({section: value} if section in config else {"model": config["model"] | {section: value}})

    if section is not None:
        before = (run / WEIGHTS).read_bytes()
        as_stored(run, changed)
        error = refused("evaluate", "--run", run)
        assert str(run) in error and message in error, error
        (run / WEIGHTS).write_bytes(before)
    as_older(run)
    (run / "config.json").write_text(json.dumps(changed(json.loads((run / "config.json").read_text()))))
    error = refused("evaluate", "--run", run)
    assert str(run) in error and message in error, error


@pytest.mark.parametrize("column", ["user", "item", "time"])
def test_a_column_of_durations_is_one_line(column: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    columns: dict[str, Any] = {"user": ["a", "a"], "item": ["x", "y"], "time": [1, 2]}
    pl.DataFrame(columns | {column: [timedelta(days=1), timedelta(days=2)]}).write_parquet(tmp_path / "events.parquet")
    assert "Duration" in refused("data", "stats", tmp_path / "events.parquet")


def test_an_error_that_nobody_foresaw_is_one_line(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    def fail(_: Any) -> None:
        raise KeyError("first\nsecond")

    monkeypatch.delenv("AWRSR_DEBUG", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "data stats", cli.COMMANDS["data stats"]._replace(run=fail))
    assert "KeyError: 'first\\nsecond', which was not foreseen; with AWRSR_DEBUG=1" in refused("data", "stats", os.devnull)
    monkeypatch.setenv("AWRSR_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["data", "stats", os.devnull])


@pytest.mark.parametrize("threads", [-1, 10**6])
def test_threads_are_bounded_on_every_command(threads: int, home: Path, refused: Callable[..., str]) -> None:
    assert f"threads is {threads}, must be at least 0" in refused("recommend", "--run", home / "run", "--threads", threads)


def test_loading_a_model_draws_no_random_numbers(home: Path) -> None:
    import torch

    before = torch.random.get_rng_state()
    AWRSR.load(home / "run")
    assert torch.equal(torch.random.get_rng_state(), before)
