"""Which tests run on a GPU, in which order, and their outcomes."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.report import ROOT

RESULTS = ROOT / "benchmarks/results/gpu"  # its *_tests.json, named by date, are earlier runs
TESTS = ("kernels/**/test_*.py", "benchmarks/**/test_roofline.py", "integrations/**/test_packed.py") + tuple(
    f"recommender/**/test_{name}.py" for name in ("model", "train", "recommender")
)
LEFT_OUT = ("test_compile*", "test_cost*", "test_distributed*", "test_track*", "test_tun*")  # which need no GPU, or time calls
AGREEMENT = "test_agreement", "test_plans", "test_launchers"  # modules; of the first, the resident regime in bfloat16 only


def test_files(pattern: str) -> list[Path]:
    return sorted(path for path in (ROOT / "tests").glob(pattern) if not any(path.match(name) for name in LEFT_OUT))


def collect_tests(patterns: Sequence[str] = TESTS) -> list[str]:
    paths = [str(path.relative_to(ROOT)) for pattern in patterns for path in test_files(pattern)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *paths]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    tests = [line for line in found.stdout.splitlines() if "::" in line]
    if not tests:
        raise RuntimeError(f"pytest collects no tests: {(found.stdout + found.stderr)[-500:]}")
    return tests


def short_name(test: str) -> str:
    """test_module::test, both of a test as pytest collects it, tests/a/test_module.py::test, and as its reports have it."""
    module, _, name = test.partition("::")
    return f"{module.removesuffix('.py').replace('/', '.').rpartition('.')[2]}::{name}"


def earlier_run(folder: Path = RESULTS) -> dict[str, Any]:
    """The newest *_tests.json; empty if there is none."""
    files = sorted(folder.glob("*_tests.json"))
    found: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8")) if files else {}
    return found


def in_order(tests: Sequence[str], earlier: dict[str, Any]) -> list[str]:
    """First the tests that failed in an earlier run, then those without an outcome, where it names them, then all others."""
    failed = {short_name(test) for test in earlier.get("failed", ())}
    missing = earlier.get("without_outcome")
    lost = {short_name(test) for test in missing} if isinstance(missing, list) else set()  # older files only count them

    def place(test: str) -> int:
        return 0 if short_name(test) in failed else 1 if short_name(test) in lost else 2

    return sorted(tests, key=place)


def of_agreement(tests: Sequence[str]) -> list[str]:
    """Of collected tests those of the new paths: the resident regime in bfloat16, then plans and launchers."""
    named = [(short_name(test).partition("::")[0], test) for test in tests]
    resident = [test for module, test in named if module == AGREEMENT[0] and "resident" in test and "bfloat16" in test]
    return resident + [test for module, test in named if module in AGREEMENT[1:]]


def outcomes(folder: Path, stage: str) -> dict[str, Any]:
    """Passed, failed and skipped tests of all processes of a stage, from what pytest wrote; `seen`: short names of all of them."""
    result: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}, "seen": set()}
    for path in folder.glob(f"{stage}-*.xml"):
        try:
            cases = ElementTree.parse(path).iter("testcase")
        except ElementTree.ParseError:
            continue  # its process died while it wrote; its tests have no outcome
        for case in cases:
            name, children = f"{case.get('classname')}::{case.get('name')}", list(case)
            kinds = {child.tag: child.get("message", "") for child in children}
            bad = kinds.get("failure", kinds.get("error"))
            if bad is not None:
                result["failed"][name] = bad[:500]
            elif "skipped" in kinds:
                result["skipped"][name] = kinds["skipped"]
            else:
                result["passed"] += 1
            result["seen"].add(short_name(name))
    return result
