"""The parts of the guard: for each, the command that measures a checkout, and how its output is read."""

import ast
import functools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .figures import QUALITY, RATIO, SECONDS, SIZE, TESTS, Kind

TURNS = 2  # of the base and of now

TRAIN = (
    "--refinement additive --layers 1 --epochs 4 --patience 0 --learning-rate 0.003 --seed 0 --threads 1 --no-baseline"
).split()  # about a minute on one core; the metrics reach two thirds of their final values


class CannotMeasure(Exception):
    """A part has no figures; the message says why."""


class Checkout(NamedTuple):
    """A commit's files, and what measuring them needs.

    suite: where its `make test` left reports. folder: for output. cache: for what is kept between runs. data: Beauty's file.
    """

    root: Path
    suite: Path
    folder: Path
    cache: Path
    data: Path | None
    environment: dict[str, str]

    def output(self, *arguments: str | Path, seconds: float, statuses: tuple[int, ...] = (0,)) -> str:
        """The output of Python on this checkout, with the same interpreter and libraries."""
        command, environment = [sys.executable, *map(str, arguments)], self.environment | {"PYTHONPATH": str(self.root)}
        environment.pop("PYTEST_ADDOPTS", None)  # it may change what pytest prints
        try:
            done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise CannotMeasure(f"took more than {seconds:.0f} s") from None
        if done.returncode not in statuses:
            message = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
            raise CannotMeasure(f"exit status {done.returncode}: {message}")
        return done.stdout


class Part(NamedTuple):
    """A group of figures of one kind.

    seconds: what measuring one side may take; of a timed part, all turns. measure: a number per figure; where timed a list, of
    which the median counts. timed: base and now take turns, with nothing else running. keep: a base is measured once, and its
    figures are kept. brief: besides sum and worst, only what changed is printed.
    """

    name: str
    kind: Kind
    seconds: float
    measure: Callable[[Checkout, float], dict[str, Any]]
    timed: bool = False
    keep: bool = False
    brief: bool = False


def quality(checkout: Checkout, seconds: float) -> dict[str, float]:
    if checkout.data is None:
        raise CannotMeasure("no beauty.txt (name its folder with DATA=..., or run: awrsr data fetch beauty)")
    out = checkout.folder / "beauty"
    checkout.output("-m", "awrsr", "train", "--data", checkout.data, "--out", out, *TRAIN, seconds=seconds)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return {f"{split} {name}": metrics[split][name] for split in ("validation", "test") for name in ("NDCG@10", "HR@10")}


def compiled(checkout: Checkout, seconds: float) -> dict[str, float]:
    report = checkout.folder / "compiled.json"
    checkout.folder.mkdir(exist_ok=True)
    command = "-m", "awrsr_kernels.compile_report", "--sample", "--jobs", "1", "--json", report
    checkout.output(*command, seconds=seconds, statuses=(0, 1))  # 1: a kernel is over its budget, which its figures show
    return read_report(report.read_text(encoding="utf-8"))


def read_report(text: str) -> dict[str, float]:
    """Sum and worst of registers, spilled bytes and issue slots per head, then all of them per kernel.

    Reports of commits that did not count slots have none.
    """
    figures: dict[str, float] = {}
    for row in json.loads(text):
        kind = row["refinement"] + " W2" * row["gaussian"] + " lagged" * row.get("lagged", False)
        case = [row["target"], row["dtype"], f"L{row['length']}", kind]
        name = " ".join([*case, *["dropout"] * row["dropout"], row["kernel"]])
        if "error" in row:
            raise CannotMeasure(f"{name}: {row['error']}")
        figures |= {f"registers, {name}": row["registers"], f"spilled bytes, {name}": row["spill_bytes"]}
        if row.get("issue_slots") is not None:
            figures[f"issue slots, {name}"] = row["issue_slots"]
    totals: dict[str, float] = {}
    for what in ("registers", "spilled bytes", "issue slots"):
        if values := [value for name, value in figures.items() if name.startswith(what)]:
            totals |= {f"{what}, sum": sum(values), f"{what}, worst": max(values)}
    return totals | figures


def tests(checkout: Checkout, seconds: float) -> dict[str, float]:
    printed = checkout.output("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", seconds=seconds)
    if not (count := re.search(r"^(\d+) tests collected", printed, re.MULTILINE)):
        raise CannotMeasure("pytest --collect-only printed no number of tests")
    return {"collected": int(count[1])}


def lines(checkout: Checkout, seconds: float) -> dict[str, float]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=checkout.root, capture_output=True, text=True, check=True, timeout=seconds).stdout.split()
    paths = [checkout.root / name for name in names if not name.startswith("tests/")]
    return {"lines outside tests": sum(count_lines(path.read_text(encoding="utf-8")) for path in paths if path.exists())}


def count_lines(source: str) -> int:
    """Number of lines of a Python file, without docstrings."""
    alone = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    docstrings = [node for node in alone if isinstance(node.value.value, str)]  # type: ignore[attr-defined]
    return len(source.splitlines()) - sum((node.end_lineno or 0) - node.lineno + 1 for node in docstrings)


def suite(checkout: Checkout, seconds: float) -> dict[str, float]:
    """The seconds of `make test`, from the reports of its two runs."""
    runs = [next(ElementTree.parse(path).iter("testsuite")) for path in checkout.suite.glob("*.xml")]
    if len(runs) < 2:
        raise CannotMeasure(f"no `make test` has finished at {checkout.suite.name[:7]}")
    if failed := sum(int(run.get(kind, 0)) for run in runs for kind in ("failures", "errors")):
        raise CannotMeasure(f"{failed} tests failed in the last `make test`")
    return {"seconds": sum(float(run.get("time", "nan")) for run in runs)}


def timed_calls(what: str, checkout: Checkout, seconds: float) -> dict[str, list[float]]:
    """The ratios that `call_time.py` prints."""
    script = Path(__file__).with_name("call_time.py")
    return json.loads(checkout.output(script, what, checkout.cache / "stub", seconds=seconds))


PARTS = (
    Part("Beauty, 4 epochs", QUALITY, 150, quality, keep=True),
    Part("compiled sample", SIZE, 240, compiled, keep=True, brief=True),
    Part("tests", TESTS, 60, tests, keep=True),
    Part("Python", SIZE, 20, lines),
    Part("make test", SECONDS, 10, suite),
    Part("torch backend / two stock calls", RATIO, 70, functools.partial(timed_calls, "torch"), timed=True),
    Part("host, kernel call / two stock calls", RATIO, 150, functools.partial(timed_calls, "host"), timed=True),
)
