"""The guard: its verdicts, that a missing figure never passes for a good one, and that its parsers read what the tools print."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.guard.__main__ as guard
from awrsr.data.fetch import cached_file
from benchmarks.guard import call_time, parts
from benchmarks.guard.figures import QUALITY, RATIO, SIZE, TESTS, Kind, conclusion, judge, table
from benchmarks.guard.parts import CannotMeasure, Checkout, Part

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "kind,base,now,verdict",
    [
        (QUALITY, 0.05, 0.0486, "same"),
        (QUALITY, 0.05, 0.0484, "worse"),
        (QUALITY, 0.05, 0.0516, "better"),
        (RATIO, 2.0, 2.19, "same"),
        (RATIO, 2.0, 2.21, "worse"),
        (RATIO, 2.0, 1.79, "better"),
        (TESTS, 1000, 969, "worse"),
        (SIZE, 1000, 1031, "worse"),
        (SIZE, 0, 8, "worse"),  # spilled bytes where there were none
        (SIZE, 8, 0, "better"),
        (SIZE, 0, 0, "same"),
    ],
)
def test_verdicts(kind: Kind, base: float, now: float, verdict: str) -> None:
    (row,) = judge("part", kind, {"x": base}, {"x": now})
    assert row.verdict == verdict and row.name == "part: x"
    assert conclusion([row])[1] == (verdict == "worse")


def test_what_is_missing_is_not_fine() -> None:
    for base, now in (({"x": 1.0}, {}), ({"x": 1.0}, "no compiler"), ("no compiler", {"x": 1.0}), ("no data", "no data")):
        rows = judge("part", SIZE, base, now)
        assert [row.verdict.startswith("not measured") for row in rows] == [True], (base, now)
        assert conclusion(rows)[1] == 2 and "1 not measured" in conclusion(rows)[0]
    assert "no compiler" in table(judge("part", SIZE, {"x": 1.0}, "no compiler"))
    assert [row.verdict for row in judge("part", SIZE, {}, {"x": 1.0})] == ["new"]


def test_a_worse_figure_wants_a_reason() -> None:
    rows = [*judge("part", SIZE, {"x": 1.0}, {"x": 2.0}), *judge("other", SIZE, "no data", {"y": 1.0})]
    sentence, status = conclusion(rows)
    assert status == 1 and "1 worse" in sentence and "commit message" in sentence and "1 not measured" in sentence
    assert "+100.0%" in table(rows)


def test_the_report_of_compiled_kernels_is_read() -> None:
    row = {
        "target": "sm_90", "refinement": "simple", "dtype": "bfloat16", "dropout": True, "length": 64, "width": 64, "group": 1,
        "gaussian": True, "kernel": "short_bwd", "registers": 255, "spill_bytes": 88, "budget_ok": True,
    }  # fmt: skip
    figures = parts.read_report(json.dumps([row, row | {"kernel": "short_fwd", "registers": 96, "spill_bytes": 0}]))
    assert figures["registers, sum"] == 351 and figures["registers, worst"] == 255 and figures["spilled bytes, sum"] == 88
    assert figures["spilled bytes, sm_90 bfloat16 L64 simple W2 dropout short_bwd"] == 88 and len(figures) == 8
    counted = parts.read_report(json.dumps([row | {"issue_slots": 700.0}, row | {"kernel": "decode_step"}]))
    assert counted["issue slots, sum"] == 700 and len(counted) == 8 + 3
    with pytest.raises(CannotMeasure, match="fwd and bwd: out of registers"):
        parts.read_report(json.dumps([row | {"kernel": "fwd and bwd", "error": "out of registers"}]))


def test_pytests_reports_are_read(tmp_path: Path) -> None:
    (tmp_path / "test_few.py").write_text("import pytest\n@pytest.mark.parametrize('x', [1, 2])\ndef test_it(x): assert x == 1\n")

    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-v"}  # which take seconds to import
    checkout = Checkout(tmp_path, tmp_path / "suite", tmp_path, tmp_path, None, environment)
    assert parts.tests(checkout, 60) == {"collected": 2}
    with pytest.raises(CannotMeasure, match="no `make test` has finished at suite"):
        parts.suite(checkout, 60)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_few.py"]
    for options in (["-k", "1", "--junitxml=suite/1.xml"], ["-k", "1", "--junitxml=suite/2.xml"], ["--junitxml=bad.xml"]):
        subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True)
    assert 0 < parts.suite(checkout, 60)["seconds"] < 60
    (tmp_path / "bad.xml").rename(tmp_path / "suite/2.xml")
    with pytest.raises(CannotMeasure, match="1 tests failed"):
        parts.suite(checkout, 60)
    (tmp_path / "test_few.py").unlink()
    with pytest.raises(CannotMeasure, match="exit status 5"):
        parts.tests(checkout, 60)


def test_docstrings_are_not_counted() -> None:
    assert parts.count_lines('"""One\n\nthing."""\n\nx = 1\n\n\ndef f():\n    """It."""\n    return 1\n') == 6


def test_the_torch_backends_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_time, "SHAPES", ((3, 2, 10, 4),))
    monkeypatch.setattr(call_time, "SECONDS", 0.0)
    torch.use_deterministic_algorithms(False)
    found = call_time.torch_backend()
    assert set(found) == {f"{layout} (3, 2, 10, 4), {work}" for layout in ("padded", "packed") for work in ("fwd", "fwd+bwd")}
    assert all(len(ratios) >= 5 and min(ratios) > 0 for ratios in found.values())


def test_the_kernels_can_be_launched_without_a_gpu(tmp_path: Path) -> None:
    """The stub driver satisfies Triton, and the library still has the names that are replaced to reach it."""
    pytest.importorskip("triton", reason="needs Triton")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("needs a C compiler")
    code = f"from benchmarks.guard.call_time import *; install_stub(Path({str(tmp_path)!r})); pretend_gpu()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_beauty_is_found_where_it_is_fetched_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWRSR_CACHE", str(tmp_path))
    monkeypatch.setattr(guard, "ROOT", tmp_path / "project")
    assert guard.find_beauty(None) is None
    cached_file("beauty").write_text("1 2 3\n")
    assert guard.find_beauty(None) == tmp_path / "beauty.txt"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two commits, of which the guard measures the lines, a thing that takes long and a thing that fails."""
    root, runs = tmp_path / "project", tmp_path / "runs"
    root.mkdir()

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    for source in ("x = 1\n", "x = 1\ny = 2\n"):
        (root / "module.py").write_text(source)
        git("add", "."), git("commit", "-q", "-m", source)

    def slow(checkout: Checkout, seconds: float) -> dict[str, float]:
        with runs.open("a") as file:
            file.write(f"{checkout.root.name} ")
        return {"x": 1.0}

    def turns(checkout: Checkout, seconds: float) -> dict[str, list[float]]:
        return {"ratio": [1.0, 9.0, 1.0] if checkout.root == root else [2.0]}

    def fails(checkout: Checkout, seconds: float) -> dict[str, Any]:
        checkout.output("-c", "raise SystemExit('no compiler')", seconds=seconds)
        return {}

    def kernels(checkout: Checkout, seconds: float) -> dict[str, float]:
        return {"sum": 3, "a": 1, "b": 2 + (checkout.root == root)}

    measured = (
        Part("kernels", SIZE, 20, kernels, brief=True),
        Part("lines", SIZE, 20, parts.lines), Part("slow", SIZE, 20, slow, keep=True), Part("turns", RATIO, 20, turns, timed=True),
        Part("fails", SIZE, 20, fails),
    )  # fmt: skip
    for name, value in {"ROOT": root, "CACHE": root / ".guard", "PARTS": measured, "find_beauty": lambda _: None}.items():
        monkeypatch.setattr(guard, name, value)
    return root


def test_a_run_from_base_to_table(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--base", "HEAD^"]):  # without a name it is the commit before
        monkeypatch.setattr(sys, "argv", ["guard", *arguments])
        assert guard.main() == 1
        rows = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
        assert rows["lines: lines outside tests"][-4:] == ["1", "2", "+100.0%", "worse"]
        assert rows["turns: ratio"][-4:] == ["2.000", "1.000", "-50.0%", "better"]
        assert {"kernels: sum", "kernels: b"} <= rows.keys() and "kernels: a" not in rows  # in brief: totals and changes
        assert rows["slow: x"][-1] == "same" and " ".join(rows["fails"]).endswith("not measured: exit status 1: no compiler")
    assert sorted((project.parent / "runs").read_text().split()) == ["base", "project", "project"]  # the base once
    listed = subprocess.run(["git", "worktree", "list"], cwd=project, capture_output=True, text=True).stdout
    assert len(listed.splitlines()) == 1
    monkeypatch.setattr(sys, "argv", ["guard", "--base", "nowhere"])
    with pytest.raises(SystemExit, match="no commit nowhere"):
        guard.main()


def test_a_part_has_limited_time(project: Path) -> None:
    checkout = Checkout(project, project, project, project, None, {})
    with pytest.raises(CannotMeasure, match="more than 0 s"):
        checkout.output("-c", "import time; time.sleep(60)", seconds=0.2)
