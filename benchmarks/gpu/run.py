"""Run everything that needs a GPU, within ten minutes and without a network: tests, tuner, benchmarks and a profile.

    python benchmarks/gpu_run.py --out gpu-out        (the same as make gpu)
    python benchmarks/gpu_run.py --only sanitizers    the sanitizers, which take ten minutes by themselves
    python benchmarks/gpu_run.py --only rivals        every rival at every recommender size, which takes ten minutes, too
    python benchmarks/gpu_run.py --only tests tuner   some stages now, the others in another run

The output folder then holds nine files: summary.json (status and seconds of every stage, and a profile of each kernel), tests.json,
tuned.json (the tuner's results), one JSON per benchmark, and logs.tar.gz (logs and CSV files). Every stage has its own time limit.
A stage that fails or does not finish does not stop the others.
"""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from awrsr_kernels.tuned import replace_file

from ..common.arguments import make_parser
from ..common.report import ROOT
from .checks import SANITIZERS, SMALL, STOPPED, finish, profile_kernels, run, sanitizer_status, start, start_sanitizer

TOTAL = 580  # seconds for everything; each stage gets what is left of it at most
TESTS = ("kernels/**/test_*.py", "benchmarks/**/test_roofline.py", "integrations/**/test_packed.py") + tuple(
    f"recommender/**/test_{name}.py" for name in ("model", "train", "recommender")
)
LEFT_OUT = ("test_compile*", "test_cost*", "test_distributed*", "test_track*", "test_tun*")  # which need no GPU, or time calls
EAGER = ["textbook", "sdpa2", "sdpa2-split", "sdpa", "torch", "triton"]  # what compiles takes half a minute for each shape
BENCHMARKS = {  # name: (seconds, options of attn_bench.py); kernels are compiled in parallel before anything is timed
    "recsys": (75, ["--preset", "recsys", "--providers", *EAGER]),
    "long": (40, ["--preset", "long", "--providers", *EAGER]),
    "refinements": (30, ["--shapes", "512,4,50,64", "512,4,128,64", "--refinement", "all", "--dropout", "0.1"]),
    "compiled": (25, ["--shapes", "512,4,128,64", "--providers", "textbook+compile", "flex2", "sdpa2-split", "triton"]),
    "stochastic": (
        30,
        ["--backbone", "stochastic", "--shapes", "128,4,100,16", "512,2,50,32", "--refinement", "simple", "stochastic"],
    ),
}
STAGES = {"tests": 260, "tuner": 60} | {name: seconds for name, (seconds, _) in BENCHMARKS.items()} | {"profile": 60}  # seconds
ALL = tuple(STAGES)
STAGES["sanitizers"] = TOTAL
BENCHMARKS["rivals"] = (TOTAL, ["--preset", "recsys"])  # every provider, also those that compile for each shape
STAGES["rivals"] = TOTAL
TUNER, TUNED = "awrsr_kernels.tuning", ["--shapes", "512,2,50,32", "512,2,100,32", "512,2,200,32", "32,4,512,64"]


def test_files(pattern: str) -> list[Path]:
    return sorted(path for path in (ROOT / "tests").glob(pattern) if not any(path.match(name) for name in LEFT_OUT))


def collect_tests() -> list[str]:
    paths = [str(path.relative_to(ROOT)) for pattern in TESTS for path in test_files(pattern)]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *paths]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    tests = [line for line in found.stdout.splitlines() if "::" in line]
    if not tests:
        raise RuntimeError(f"pytest collects no tests: {(found.stdout + found.stderr)[-500:]}")
    return tests


def outcomes(folder: Path) -> dict[str, Any]:
    """Passed, failed and skipped tests of all processes, from what pytest wrote."""
    result: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for path in folder.glob("tests-*.xml"):
        try:
            cases = ElementTree.parse(path).iter("testcase")
        except ElementTree.ParseError:
            continue  # its process died while it wrote; its tests are missed in `finish_tests`
        for case in cases:
            name, outcome = f"{case.get('classname')}::{case.get('name')}", list(case)
            kinds = {child.tag: child.get("message", "") for child in outcome}
            bad = kinds.get("failure", kinds.get("error"))
            if bad is not None:
                result["failed"][name] = bad[:500]
            elif "skipped" in kinds:
                result["skipped"][name] = kinds["skipped"]
            else:
                result["passed"] += 1
    return result


class Run:
    """The stages of one run, their results, and the output folder."""

    def __init__(self, out: Path, folder: Path, processes: int, about: dict[str, Any]) -> None:
        self.out, self.folder, self.processes = out, folder, processes
        self.summary: dict[str, Any] = about | {"seconds": {}, "status": {}}
        self.begin = time.monotonic()

    def write(self, name: str, content: Any) -> None:
        replace_file(self.out / name, json.dumps(content, indent=1) + "\n")

    def stage(self, name: str, limit: float, work: Callable[[float], dict[str, str] | str]) -> None:
        """Run a stage within its own time limit and that of the run. An exception becomes its status."""
        start = time.monotonic()
        seconds = min(limit, TOTAL - (start - self.begin))
        try:
            found = work(seconds) if seconds >= 5 else "not run: no time left"
        except Exception as error:
            found = f"failed: {type(error).__name__}: {error}"
        self.summary["seconds"][name] = round(time.monotonic() - start, 1)
        for part, status in (found if isinstance(found, dict) else {name: found}).items():
            self.summary["status"][part] = status
            print(f"{part}: {status} after {self.summary['seconds'][name]} s", flush=True)
        self.write("summary.json", self.summary)

    def tests(self, seconds: float) -> str:
        """Dealt out to several processes: each compiles the kernels of its own."""
        end, tests, started = time.monotonic() + seconds, collect_tests(), []
        for i in range(min(self.processes, len(tests))):
            options = ["-q", "-p", "no:cacheprovider", f"--junitxml={self.folder / f'tests-{i}.xml'}"]
            command = [sys.executable, "-m", "pytest", *options, *tests[i :: self.processes]]
            started.append(start(command, self.folder / f"tests-{i}.log"))
        return self.finish_tests(tests, started, end)

    def sanitizers(self, seconds: float) -> dict[str, str]:
        """Both at once: neither is timed."""
        end = time.monotonic() + seconds
        run([*SMALL, "--processes", str(self.processes)], self.folder / "checks_compile.log", seconds / 2)
        tools = {tool: start_sanitizer(tool, self.folder) for tool in SANITIZERS}
        codes = {tool: None if process is None else finish(process, end - time.monotonic()) for tool, process in tools.items()}
        return {tool: sanitizer_status(tool, code, self.folder) for tool, code in codes.items()}

    def finish_tests(self, tests: list[str], started: list["subprocess.Popen[bytes]"], end: float) -> str:
        with ThreadPoolExecutor(max(1, len(started))) as pool:  # all at once: each that runs late has its grace
            stopped = list(pool.map(lambda process: finish(process, end - time.monotonic()), started)).count(STOPPED)
        found = outcomes(self.folder)
        lost = len(tests) - found["passed"] - len(found["failed"]) - len(found["skipped"])  # their process died or was stopped
        self.write("tests.json", found | {"collected": len(tests), "without_outcome": lost, "stopped_processes": stopped})
        text = f"{found['passed']} passed, {len(found['failed'])} failed, {len(found['skipped'])} skipped"
        text += f", {lost} without outcome ({stopped} of {len(started)} processes stopped)" if lost > 0 else ""
        return ("failed: " if found["failed"] or lost > 0 else "") + text

    def tuner(self, seconds: float) -> str:
        if importlib.util.find_spec(TUNER) is None:
            return f"not run: this version has no {TUNER}"
        made = self.folder / "tuned.json"
        command = [sys.executable, "-m", TUNER, "--out", str(made), "--seconds", f"{0.8 * seconds:.0f}", *TUNED]
        status = run(command, self.folder / "tuner.log", seconds)
        if made.exists():
            shutil.copy(made, self.out / "tuned.json")
        return f"exit status {status}" + ("" if made.exists() else ", and it wrote no file")

    def benchmark(self, name: str, seconds: float) -> str:
        script = [sys.executable, "benchmarks/attn_bench.py", "--device", "cuda", "--precompile", str(self.processes)]
        limits = ["--limit", str(seconds * 0.6), "--budget", "0.7", "--out", str(self.folder / name)]
        tuned = self.out / "tuned.json"  # what was found before is measured
        environment = {"AWRSR_KERNELS_TUNED": str(tuned.resolve())} if tuned.exists() else {}
        status = run([*script, *BENCHMARKS[name][1], *limits], self.folder / f"{name}.log", seconds, **environment)
        if (self.folder / name / "results.json").exists():
            shutil.copy(self.folder / name / "results.json", self.out / f"{name}.json")
        return f"exit status {status}"

    def profile(self, seconds: float) -> str:
        status, self.summary["kernels"] = profile_kernels(self.folder, seconds, self.processes)
        return status

    def run_all(self, only: Sequence[str] = ()) -> None:
        """Run the named stages in order; without names, ALL."""
        work: dict[str, Callable[[float], dict[str, str] | str]] = {"tests": self.tests, "tuner": self.tuner}
        work |= {name: functools.partial(self.benchmark, name) for name in BENCHMARKS}
        work |= {"profile": self.profile, "sanitizers": self.sanitizers}
        for name in STAGES:
            if name in (only or ALL):
                self.stage(name, STAGES[name], work[name])
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            archive.add(self.folder, arcname="logs")

    def all_went_well(self) -> bool:
        """Whether everything that ran succeeded. A missing tool is not a failure."""
        fine = ("not run", "exit status 0", "by ")
        return all(s.startswith(fine) for name, s in self.summary["status"].items() if name != "tests") and not (
            self.summary["status"].get("tests", "").startswith("failed")
        )


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", "gpu-out")),
        help="folder for the results (default $OUT, or else gpu-out)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=min(16, os.cpu_count() or 1),
        help="number of processes that compile and test (default %(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STAGES,
        default=[],
        help="stages to run, in this order (default: all except sanitizers and rivals)",
    )
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU, and torch finds none here; `make bench` measures on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        stages = Run(options.out, Path(name), options.processes, about)
        stages.run_all(options.only)
    return int(not stages.all_went_well())


if __name__ == "__main__":
    sys.exit(main())
