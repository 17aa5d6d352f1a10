"""The run on a GPU, as far as it goes without one: stages that fail alone, limits that hold, tools whose output is understood."""

import itertools
import json
import os
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from awrsr_kernels.launch_config import TABLE, Config, is_resident, is_short
from awrsr_kernels.tuned import misfit, read_entries
from benchmarks import attn_bench
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import every_kernel, selection
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.checks import STOPPED, ncu_rows, profile_kernels, run, sanitizer_status, start_sanitizer

NCU = """==PROF== Connected to process 7
"ID","Kernel Name","Grid Size","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread"
"","","","nsecond","byte","register/thread"
"0","_short_fwd_kernel","(1024, 1, 1)","12,500","3,000,000","168"
"1","_short_bwd_kernel","(264, 1, 1)","40000","5000000","n/a"
"""


def stages(tmp_path: Path) -> gpu_run.Run:
    for name in ("out", "folder"):
        (tmp_path / name).mkdir()
    return gpu_run.Run(tmp_path / "out", tmp_path / "folder", 2, {"device": "none"})


def tool(tmp_path: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name, found first."""
    path = tmp_path / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_all_stages_fit_in_ten_minutes() -> None:
    assert sum(gpu_run.STAGES[name] for name in gpu_run.ALL) <= gpu_run.TOTAL < 600
    assert gpu_run.ALL[:7] == ("tests", "agreement", "racecheck", "recsys", "profile", "variant", "tuner")
    assert set(gpu_run.ALL[7:]) == {"long", "refinements", "compiled", "stochastic"} and gpu_run.STAGES["racecheck"] == 60


def test_the_options_of_its_benchmarks_are_valid() -> None:
    for options in gpu_run.BENCHMARKS.values():
        attn_bench.options_parser().parse_args(options)
    batches = [int(shape.split(",")[0]) for shape in gpu_run.TWELVE]
    assert len(batches) == 12 and set(batches) == {128, 512, 2048} and len(gpu_run.WIDE) == 3
    variant = gpu_run.BENCHMARKS["variant"]
    assert [shape.split(",")[2] for shape in variant[1 : variant.index("--providers")]] == ["100", "200"] * 3
    assert all(misfit(key, config) is None and key in TABLE for key, config in gpu_run.VARIANT.items())


def test_every_pattern_of_its_tests_finds_some() -> None:
    found = {pattern: [path.name for path in selection.test_files(pattern)] for pattern in selection.TESTS}
    assert all(found.values()) and {"test_agreement.py", "test_meaning.py"} <= set(found[selection.TESTS[0]])
    assert "test_compile.py" not in found[selection.TESTS[0]]
    assert all([f"{name}.py"] == [p.name for p in selection.test_files(f"kernels/{name}.py")] for name in selection.AGREEMENT)


def test_what_failed_or_had_no_outcome_runs_first(tmp_path: Path) -> None:
    tests = [f"tests/kernels/test_a.py::test_{name}" for name in ("fine", "lost[a/b.py::c]", "fails[x]", "new", "also_fails")]
    fine, lost, fails, new, also_fails = tests
    assert selection.in_order(tests, selection.earlier_run(tmp_path)) == tests
    earlier: dict[str, Any] = {"failed": {"test_a::test_fails[x]": "", "test_a::test_gone": ""}, "not_reached": 2}
    (tmp_path / "2026-01-02_gpu_tests.json").write_text(json.dumps(earlier))
    (tmp_path / "2026-01-01_gpu_tests.json").write_text(json.dumps({"failed": {"test_a::test_new": ""}}))
    assert selection.in_order(tests, selection.earlier_run(tmp_path)) == [fails, fine, lost, new, also_fails]
    earlier = {"failed": {f"tests.kernels.test_a::{also_fails.split('::')[1]}": ""}, "without_outcome": [lost, "tests/gone.py::a"]}
    (tmp_path / "2026-01-03_gpu_tests.json").write_text(json.dumps(earlier))
    assert selection.in_order(tests, selection.earlier_run(tmp_path)) == [also_fails, lost, fine, fails, new]


def test_committed_results_name_their_failed_tests() -> None:
    assert all(name == selection.short_name(name) for name in selection.earlier_run()["failed"])


def test_agreement_is_of_the_new_paths() -> None:
    tests = [
        "tests/kernels/test_plans.py::test_a",
        "tests/kernels/test_agreement.py::test_agrees[resident-simple-bfloat16]",
        "tests/kernels/test_agreement.py::test_agrees[resident-simple-float16]",
        "tests/kernels/test_agreement.py::test_agrees[tiled-simple-bfloat16]",
        "tests/kernels/test_launchers.py::test_b",
        "tests/kernels/test_meaning.py::test_c[resident-bfloat16]",
    ]
    assert selection.of_agreement(tests) == [tests[1], tests[0], tests[4]]


def test_the_tuner_has_what_the_stages_before_it_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seconds = stages(tmp_path), {}

    def note(name: str, limit: float, work: object) -> None:
        seconds[name] = limit

    monkeypatch.setattr(made, "stage", note)
    made.run_all()
    assert list(seconds) == list(gpu_run.ALL)
    until = sum(gpu_run.STAGES[name] for name in gpu_run.ALL[:7])
    assert until - 30 < seconds.pop("tuner") <= until
    assert all(limit == gpu_run.STAGES[name] for name, limit in seconds.items())


def test_a_failing_stage_costs_the_others_nothing(tmp_path: Path) -> None:
    made = stages(tmp_path)
    made.stage("first", 10, lambda seconds: 1 / 0)  # type: ignore[arg-type, return-value]
    made.stage("second", 10, lambda seconds: {"a": "exit status 0", "b": f"had {seconds:.0f} s"})
    made.begin -= gpu_run.TOTAL
    made.stage("third", 10, lambda seconds: "exit status 0")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["status"] == {
        "first": "failed: ZeroDivisionError: division by zero",
        "a": "exit status 0",
        "b": "had 10 s",
        "third": "not run: no time left",
    }
    assert set(summary["seconds"]) == {"first", "second", "third"} and not made.all_went_well()


def test_what_is_not_installed_is_no_failure_and_what_fails_is(tmp_path: Path) -> None:
    made = stages(tmp_path)
    made.summary["status"] = {"tests": "9 passed, 0 failed, 1 skipped", "tuner": "not run: no tuner", "recsys": "exit status 0"}
    assert made.all_went_well()
    for name, status in (
        ("tests", "failed: 1 failed"),
        ("agreement", "failed: 1 failed"),
        ("memcheck", "exit status 9"),
        ("long", "not finished"),
    ):
        before = dict(made.summary["status"])
        made.summary["status"][name] = status
        assert not made.all_went_well(), name
        made.summary["status"] = before


def test_a_test_process_that_dies_is_missed(tmp_path: Path) -> None:
    """A crash of the driver takes a process with it before it has written what its tests came to."""
    made = stages(tmp_path)
    (tmp_path / "folder/tests-0.xml").write_text('<testsuite><testcase classname="a" name="b"/></testsuite>')
    (tmp_path / "folder/tests-1.xml").write_text("<testsuite><testca")
    status = made.finish_tests("tests", ["a.py::b", "a.py::c"], [], 0)
    assert status.startswith("failed: 1 passed, 0 failed, 0 skipped, 1 without outcome")
    assert json.loads((tmp_path / "out/tests.json").read_text())["without_outcome"] == ["a.py::c"]


def test_a_stopped_process_leaves_no_child(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    assert run([sys.executable, "-c", child], tmp_path / "log", 6) == STOPPED
    pid = int((tmp_path / "log").read_text().splitlines()[0])
    for _ in range(50):  # until whoever inherits it has buried it
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] if Path(f"/proc/{pid}").exists() else "gone"
        if state in ("gone", "Z"):
            break
        time.sleep(0.1)
    assert state in ("gone", "Z")


def test_a_whole_run_leaves_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage in turn, two tests for real; what needs a GPU is played by what it would write."""

    def played(command: list[str], log: Path, seconds: float, **environment: str) -> int:
        if "--out" not in command:
            return 0
        made = Path(command[command.index("--out") + 1])
        if made.name == "variant":
            entries = read_entries(Path(environment["AWRSR_KERNELS_TUNED"]))
            assert {tuple(entry["key"]): entry["config"][:3] for entry in entries} == {key: [16, 16, 1] for key in gpu_run.VARIANT}
        if "benchmarks/attn_bench.py" in command:
            made.mkdir()
            made = made / "results.json"
        made.write_text("{}")
        return 0

    names = "ideal_bytes_by_hand", "padding_is_written_but_not_read"
    tests = [f"tests/benchmarks/test_roofline.py::test_{name}" for name in names]
    monkeypatch.setattr(gpu_run, "run", played)
    monkeypatch.setattr(gpu_run, "machine", lambda device: ("some GPU", "3.6.0"))
    monkeypatch.setattr(gpu_run, "start_sanitizer", lambda *_: None)
    monkeypatch.setattr(selection, "collect_tests", lambda *_: tests)
    monkeypatch.setattr(selection, "of_agreement", lambda tests: tests[:1])
    monkeypatch.setattr(gpu_run, "TUNER", "json.tool")
    monkeypatch.setattr(gpu_run, "profile_kernels", lambda *_: ("by ncu", [{"kernel": "_x_kernel"}]))
    made = stages(tmp_path)
    made.run_all()
    measured = [f"{name}.json" for name in gpu_run.BENCHMARKS if name in gpu_run.ALL]
    left = {"summary.json", "tests.json", "agreement.json", "tuned.json", "logs.tar.gz", *measured}
    assert {path.name for path in (tmp_path / "out").iterdir()} == left and len(measured) == 6
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["status"]["tests"] == "2 passed, 0 failed, 0 skipped" and made.all_went_well()
    assert summary["status"]["agreement"] == "1 passed, 0 failed, 0 skipped"
    assert set(summary["seconds"]) == set(gpu_run.ALL)
    made.run_all(["sanitizers"])
    assert made.summary["status"]["memcheck"] == "not run: compute-sanitizer is not installed"
    assert summary["kernels"] == [{"kernel": "_x_kernel"}]
    with tarfile.open(tmp_path / "out/logs.tar.gz") as archive:
        assert "logs/tests-0.log" in archive.getnames()


@pytest.mark.parametrize("module,status", [("no_such_tuner", "not run: this version has no"), ("a_tuner", "exit status 0")])
def test_the_tuner_may_be_absent(module: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_tuner.py").write_text("import sys; assert sys.argv[1] == '--out'; open(sys.argv[2], 'w').write('{}')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_run, "TUNER", module)
    assert stages(tmp_path).tuner(60).startswith(status)
    assert (tmp_path / "out/tuned.json").exists() == (module == "a_tuner")


def test_sanitizers_run_where_they_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert start_sanitizer("memcheck", tmp_path) is None
    assert sanitizer_status("memcheck", None, tmp_path) == "not run: compute-sanitizer is not installed"
    monkeypatch.undo()
    tool(tmp_path, "compute-sanitizer", "print('========= ERROR SUMMARY: 2 errors', sys.argv[7]); sys.exit(9)", monkeypatch)
    process = start_sanitizer("memcheck", tmp_path)
    assert process is not None
    status = sanitizer_status("memcheck", gpu_checks.finish(process, 60), tmp_path)
    assert status == "exit status 9, ERROR SUMMARY: 2 errors benchmarks.gpu.every_kernel"


def test_a_sanitizer_that_is_stopped_says_so(tmp_path: Path) -> None:
    (tmp_path / "racecheck.log").write_text("nothing yet")
    assert sanitizer_status("racecheck", STOPPED, tmp_path) == "not finished: ran past its limit"
    assert sanitizer_status("racecheck", 1, tmp_path) == "exit status 1, no summary in its log"


def test_counters_are_read() -> None:
    rows = ncu_rows(NCU)
    assert rows[0] == {"kernel": "_short_fwd_kernel", "grid": "(1024, 1, 1)", "us": 12.5, "read_mb": 3.0, "registers": 168}
    assert rows[1] == {"kernel": "_short_bwd_kernel", "grid": "(264, 1, 1)", "us": 40.0, "read_mb": 5.0}
    assert ncu_rows("==ERROR== ERR_NVGPUCTRPERM - no permission\n") == []


def test_a_profile_by_counters_or_else_by_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; '--profile' in sys.argv and open(sys.argv[-1], 'w').write('[1]')"
    monkeypatch.setattr(gpu_checks, "LARGE", [sys.executable, "-c", script])
    written = f"open(sys.argv[sys.argv.index('--log-file') + 1], 'w').write({NCU!r})"
    tool(tmp_path, "ncu", written, monkeypatch)
    assert profile_kernels(tmp_path, 60, 2) == ("by ncu", ncu_rows(NCU))
    (tmp_path / "ncu.csv").unlink()
    tool(tmp_path, "ncu", "print('ERR_NVGPUCTRPERM'); sys.exit(1)", monkeypatch)
    assert profile_kernels(tmp_path, 60, 2) == ("by torch.profiler: ncu had no counters (exit status 1)", [1])


def test_kernel_times_are_ours_alone() -> None:
    def event(key: str, count: int, total: float) -> SimpleNamespace:
        return SimpleNamespace(key=key, count=count, device_time_total=total)

    events = [event("_short_fwd_kernel", 2, 10.0), event("vectorized_elementwise_kernel", 9, 99.0), event("_b_kernel", 4, 80.0)]
    rows = every_kernel.kernel_times(SimpleNamespace(key_averages=lambda: events))
    assert [(r["kernel"], r["launches"], r["mean_us"]) for r in rows] == [("_b_kernel", 4, 20.0), ("_short_fwd_kernel", 2, 5.0)]


def test_every_kernel_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("shapes for the interpreter; on a GPU the script itself runs")
    pytest.importorskip("triton", reason="needs Triton")
    from awrsr_kernels._triton import decode, lags, problem, reduce, resident, resident_bwd, short, tiled, tiled_bwd, tiled_tables

    reached, there = set(), set()
    for module in (decode, lags, reduce, resident, resident_bwd, short, tiled, tiled_bwd, tiled_tables):
        there |= {name for name in vars(module) if name.startswith("_") and name.endswith("_kernel")}

        def watch(kernel: Any, *rest: Any, launch: Any = module.launch, **arguments: Any) -> None:
            reached.add(kernel.__name__)
            launch(kernel, *rest, **arguments)

        monkeypatch.setattr(module, "launch", watch)
    # Small windows: the interpreter is slow
    monkeypatch.setattr(problem, "is_short", lambda max_len, *_: max_len <= 16)
    monkeypatch.setattr(problem, "is_resident", lambda max_len, *_: max_len <= 24)
    monkeypatch.setattr(problem, "choose", lambda *_: Config(16, 16, 4, 1, programs=1))
    problems = every_kernel.problems(2, (4, 20, 30), 1, 16, "float32", "cpu")
    for each in problems:
        every_kernel.run(each)
    every_kernel.lagged(2, (4, 30), 2, 16, "float32", "cpu")
    every_kernel.decode(2, 2, 16, "float32", "cpu")
    assert len(problems) == 3 * (4 + 1) + 1 and all(task.dropout_p > 0 for task, _ in problems)
    assert reached == there and len(there) == 13


def test_each_window_is_of_a_regime() -> None:
    """By the launch table, on the GPU that this project measures on."""
    features, itemsize, shared = (32, 32, 32), 2, 232448

    def regime(window: int, stochastic: bool) -> str:
        if is_short(window, features, itemsize, shared, stochastic):
            return "short"
        return "resident" if is_resident(window, True, features, itemsize, shared, stochastic) else "tiled"

    assert [regime(n, False) for n in every_kernel.WINDOWS["dot-product"]] == ["short", "resident", "tiled"]
    assert [regime(n, True) for n in every_kernel.WINDOWS["stochastic"]] == ["short", "tiled"]
    at = gpu_checks.LARGE.index("--windows")
    assert [regime(int(n), False) for n in gpu_checks.LARGE[at + 1 : at + 4]] == ["short", "resident", "tiled"]
    at = gpu_checks.RACES.index("--windows")
    assert [regime(int(n), False) for n in gpu_checks.RACES[at + 1 : at + 3]] == ["resident", "resident"]


def test_kernels_are_reached_between_gaussians_too() -> None:
    if torch.cuda.is_available():
        pytest.skip("shapes for the interpreter; on a GPU the script itself runs")
    pytest.importorskip("triton", reason="needs Triton")
    problems = every_kernel.problems(2, (4,), 1, 16, "float32", "cpu", "stochastic")
    for problem in problems:
        every_kernel.run(problem)
    assert [task.refinement for task, _ in problems] == ["none", "simple", "value", "additive", "stochastic"]


def test_sequences_share_tiles_where_sanitizers_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program takes several tiles of each kernel, and some tiles hold several sequences."""
    pytest.importorskip("triton", reason="needs Triton")
    from awrsr_kernels._triton import short
    from awrsr_kernels._triton.problem import Problem

    monkeypatch.setattr(Problem, "processors", lambda self: 132)
    options = dict(zip(gpu_checks.SMALL[3::2], gpu_checks.SMALL[4::2], strict=True))
    every_kernel.pretend(None)
    assert Problem.processors(None) == 132
    every_kernel.pretend(int(options["--processors"]))
    launched: list[dict[str, Any]] = []

    def watch(*rest: Any, launch: Any = short.launch, **arguments: Any) -> None:
        launched.append(arguments)
        launch(*rest, **arguments)

    monkeypatch.setattr(short, "launch", watch)
    windows = every_kernel.WINDOWS["dot-product"]
    task, arguments = every_kernel.problems(int(options["--batch"]), windows, 2, 32, "float32", "cpu")[0]
    every_kernel.run((task, arguments))
    assert len(launched) == 2
    for launch in launched:
        lengths, height = task.users[: launch["run"]], launch["BLOCK_L"]
        assert sum(lengths) > height and any(a + b <= height for a, b in itertools.pairwise(lengths))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="needs a GPU.*make bench"):
        gpu_run.main()
