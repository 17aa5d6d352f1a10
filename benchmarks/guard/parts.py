"""What is measured: for each part the command that measures a checkout, and how its output is read."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .figures import QUALITY, RATIO, SECONDS, SIZE, TESTS, Figures, Kind, Row

HERE = Path(__file__).resolve().parent
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
TURNS = 2  # of the base and of now

TRAIN = (
    "--refinement additive --layers 1 --epochs 4 --patience 0 --learning-rate 0.003 --seed 0 --threads 1 --no-baseline"
).split()  # about a minute on one core; the metrics are then two thirds of what they end at


class CannotMeasure(Exception):
    """Why a part has no figures."""


@dataclass(frozen=True)
class Checkout:
    """A commit's files, and what measuring them needs.

    suites: commits whose `make test` counts as that of these files, the best one first. folder: for output. cache: for what is kept
    between runs. data: Beauty's file.
    """

    root: Path
    suites: tuple[str, ...]
    folder: Path
    cache: Path
    data: Path | None
    environment: dict[str, str]

    def output(self, *arguments: str | Path, seconds: float, statuses: tuple[int, ...] = (0,)) -> str:
        """What Python prints, run on this checkout with the same interpreter and libraries."""
        environment = self.environment | {"PYTHONPATH": str(self.root)}
        command = [sys.executable, *map(str, arguments)]
        with subprocess.Popen(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                printed, errors = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                raise CannotMeasure(f"took more than {seconds:.0f} s") from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # what it started, too
        if process.returncode not in statuses:
            message = (errors.strip() or printed.strip() or "no output").splitlines()[-1]
            raise CannotMeasure(f"exit status {process.returncode}: {message}")
        return printed


@dataclass(frozen=True)
class Part:
    """A group of figures of one kind.

    seconds: what measuring one side may take; of a timed part, all turns of both. measure: a number per figure; where timed a list,
    of which the median counts. timed: base and now take turns, with nothing else running. keep: a base is measured once, and its
    figures are kept. brief: besides sum and worst, only what changed is printed.
    """

    name: str
    kind: Kind
    seconds: float
    measure: Callable[[Checkout, float], dict[str, Any]]
    timed: bool = False
    keep: bool = False
    brief: bool = False

    def shown(self, rows: list[Row]) -> list[Row]:
        changed = [row for row in rows if not self.brief or row.base != row.now or row.name.endswith(("sum", "worst"))]
        return changed or rows


def quality(checkout: Checkout, seconds: float) -> dict[str, float]:
    if checkout.data is None:
        raise CannotMeasure("no beauty.txt (name its folder with DATA=..., or run: awrsr data fetch beauty)")
    out = checkout.folder / "beauty"
    checkout.output("-m", "awrsr", "train", "--data", checkout.data, "--out", out, *TRAIN, seconds=seconds)
    return read_metrics((out / "metrics.json").read_text(encoding="utf-8"))


def read_metrics(text: str) -> dict[str, float]:
    metrics = json.loads(text)
    return {f"{split} {name}": metrics[split][name] for split in ("validation", "test") for name in ("NDCG@10", "HR@10")}


def compiled(checkout: Checkout, seconds: float) -> dict[str, float]:
    report = checkout.folder / "compiled.json"
    statuses = 0, 1  # 1: a kernel is over its budget, which its figures show
    checkout.output(
        "-m", "awrsr_kernels.compile_report", "--sample", "--jobs", "1", "--json", report, seconds=seconds, statuses=statuses
    )  # fmt: skip
    return read_report(report.read_text(encoding="utf-8"))


def read_report(text: str) -> dict[str, float]:
    """Sum and worst of registers and spilled bytes, then both per kernel."""
    figures: dict[str, float] = {}
    for row in json.loads(text):
        case = [row["target"], row["dtype"], f"L{row['length']}", row["refinement"] + " W2" * row["gaussian"]]
        name = " ".join([*case, *["dropout"] * row["dropout"], row["kernel"]])
        if "error" in row:
            raise CannotMeasure(f"{name}: {row['error']}")
        figures |= {f"registers, {name}": row["registers"], f"spilled bytes, {name}": row["spill_bytes"]}
    totals: dict[str, float] = {}
    for what in ("registers", "spilled bytes"):
        values = [value for name, value in figures.items() if name.startswith(what)]
        totals |= {f"{what}, sum": sum(values), f"{what}, worst": max(values)}
    return totals | figures


def tests(checkout: Checkout, seconds: float) -> dict[str, float]:
    printed = checkout.output("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", seconds=seconds)
    return {"collected": read_collection(printed)}


def read_collection(printed: str) -> int:
    if not (found := re.search(r"^(\d+) tests collected", printed, re.MULTILINE)):
        raise CannotMeasure("pytest --collect-only printed no number of tests")
    return int(found[1])


def lines(checkout: Checkout, seconds: float) -> dict[str, float]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    names = subprocess.run(command, cwd=checkout.root, capture_output=True, text=True, check=True, timeout=seconds).stdout.split()
    paths = [checkout.root / name for name in names if not name.startswith("tests/")]
    return {"lines outside tests": sum(count_lines(path.read_text(encoding="utf-8")) for path in paths if path.exists())}


def count_lines(source: str) -> int:
    """Of a Python file, without those of docstrings."""
    count = len(source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Documented) and ast.get_docstring(node) is not None:
            count -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return count


def suite(checkout: Checkout, seconds: float) -> dict[str, float]:
    """What the last `make test` took, by the reports that its two runs leave behind."""
    for commit in checkout.suites:
        reports = list((checkout.cache / "suite" / commit).glob("*.xml"))
        if len(reports) == 2:
            if commit != checkout.suites[0]:
                print(f"make test: its last run was at {commit}")
            return {"seconds": sum(read_junit(path.read_text(encoding="utf-8")) for path in reports)}
    raise CannotMeasure(f"no `make test` has come to its end at {checkout.suites[0][:7]}")


def read_junit(text: str) -> float:
    """Seconds that a run of the tests took, by its report."""
    run = next(ElementTree.fromstring(text).iter("testsuite"))
    if failed := int(run.get("failures", 0)) + int(run.get("errors", 0)):
        raise CannotMeasure(f"in the last `make test` {failed} tests failed")
    return float(run.get("time", "nan"))


def timed_calls(what: str) -> Callable[[Checkout, float], dict[str, list[float]]]:
    """The ratios that `call_time.py` prints."""

    def measure(checkout: Checkout, seconds: float) -> dict[str, list[float]]:
        script, folder = HERE / "call_time.py", checkout.cache / "stub"
        return json.loads(checkout.output(script, what, "--folder", folder, seconds=seconds))

    return measure


def medians(turns: list[dict[str, list[float]]]) -> Figures:
    """Of the ratios of all turns."""
    return {name: median([ratio for turn in turns for ratio in turn[name]]) for name in turns[0]}


PARTS = (
    Part("Beauty, 4 epochs", QUALITY, 150, quality, keep=True),
    Part("compiled sample", SIZE, 240, compiled, keep=True, brief=True),
    Part("tests", TESTS, 60, tests, keep=True),
    Part("Python", SIZE, 20, lines),
    Part("make test", SECONDS, 10, suite),
    Part("torch backend / two stock calls", RATIO, 70, timed_calls("torch"), timed=True),
    Part("host, kernel call / two stock calls", RATIO, 110, timed_calls("host"), timed=True),
)
