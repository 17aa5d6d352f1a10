"""Run everything that needs a GPU, within ten minutes and without a network: tests, benchmarks, a profile and the tuner.

    python benchmarks/gpu_run.py --out gpu-out        (the same as make gpu)
    python benchmarks/gpu_run.py --only sanitizers    every kernel under the sanitizers, which takes ten minutes by itself
    python benchmarks/gpu_run.py --only rivals        every rival at every recommender size, which takes ten minutes, too
    python benchmarks/gpu_run.py --only tests tuner   some stages now, the others in another run

The stages, in this order:

tests        those that failed or had no outcome in the newest benchmarks/results/gpu/*_tests.json, then all others
agreement    the resident kernels in bfloat16 compared with the definition, and the tests of plans and launchers
racecheck    resident kernels under compute-sanitizer's racecheck, at two lengths
recsys       the twelve problems of the recommender preset, then D = 64, both eagerly and as CUDA graphs; rivals include torch's
             attention restricted to one kernel at a time
profile      the time of each kernel
variant      the resident kernels with tiles of 16 rows and one warp; compare variant.json with recsys.json
tuner        for its own seconds and those that the stages before it did not use
long, refinements, compiled, stochastic    further benchmarks

The output folder holds summary.json (status and seconds of every stage, and a profile of each kernel), tests.json, agreement.json,
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from awrsr_kernels.launch_config import RESIDENT, Config, Key
from awrsr_kernels.tuned import machine, replace_file, write_entries

from ..common.arguments import make_parser
from ..operator.workloads import PRESETS
from . import selection
from .checks import (
    RACES,
    SANITIZERS,
    SMALL,
    STOPPED,
    finish,
    profile_kernels,
    run,
    sanitizer_status,
    start,
    start_sanitizer,
)

TOTAL = 580  # seconds for everything; each stage gets what is left of it at most
STAGES = {  # name: seconds, in the order in which they run
    "tests": 105,
    "agreement": 45,
    "racecheck": 60,
    "recsys": 140,
    "profile": 45,
    "variant": 25,
    "tuner": 40,
    "long": 35,
    "refinements": 30,
    "compiled": 25,
    "stochastic": 30,
}
ALL = tuple(STAGES)
STAGES |= {"sanitizers": TOTAL, "rivals": TOTAL}  # by --only
EAGER = ["textbook", "sdpa2", "sdpa2-split", "sdpa", "torch", "triton"]  # what compiles takes half a minute for each shape
PINNED = ["sdpa2-flash", "sdpa2-efficient", "sdpa2-cudnn", "sdpa2-split-cudnn"]  # stock attention by one kernel alone
TWELVE = [f"{batch},{PRESETS['recsys'].heads},{length},{PRESETS['recsys'].dim}" for batch, length in PRESETS["recsys"].sizes()]
WIDE = [f"512,2,{length},64" for length in (50, 100, 200)]
BENCHMARKS = {  # name: options of attn_bench.py; kernels are compiled in parallel before anything is timed
    "recsys": ["--shapes", *TWELVE, *WIDE, "--providers", *EAGER, *PINNED],
    "variant": ["--shapes", *(shape for shape in TWELVE if int(shape.split(",")[2]) > 64), "--providers", "triton"],
    "long": ["--preset", "long", "--providers", *EAGER],
    "refinements": ["--shapes", "512,4,50,64", "512,4,128,64", "--refinement", "all", "lagged", "--dropout", "0.1"],
    "compiled": ["--shapes", "512,4,128,64", "--providers", "textbook+compile", "flex2", "sdpa2-split", "triton"],
    "stochastic": ["--backbone", "stochastic", "--shapes", "128,4,100,16", "512,2,50,32", "--refinement", "simple", "stochastic"],
    "rivals": ["--preset", "recsys"],  # every provider, also those that compile for each shape
}
VARIANT = {  # instead of what the launch table has
    Key("resident_fwd", RESIDENT, 32, 2): Config(16, 16, 1, 1),
    Key("resident_bwd", RESIDENT, 32, 2): Config(16, 16, 1, 1, programs=8),
}
TUNER, TUNED = "awrsr_kernels.tuning", ["--shapes", "512,2,50,32", "512,2,100,32", "512,2,200,32", "32,4,512,64"]


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
        end = time.monotonic() + seconds
        return self.run_tests("tests", selection.in_order(selection.collect_tests(), selection.earlier_run()), end)

    def agreement(self, seconds: float) -> str:
        end, patterns = time.monotonic() + seconds, [f"kernels/{name}.py" for name in selection.AGREEMENT]
        return self.run_tests("agreement", selection.of_agreement(selection.collect_tests(patterns)), end)

    def run_tests(self, stage: str, tests: list[str], end: float) -> str:
        """Dealt out to several processes, so that the first ones start first: each compiles the kernels of its own."""
        started = []
        for i in range(min(self.processes, len(tests))):
            options = ["-q", "-p", "no:cacheprovider", f"--junitxml={self.folder / f'{stage}-{i}.xml'}"]
            command = [sys.executable, "-m", "pytest", *options, *tests[i :: self.processes]]
            started.append(start(command, self.folder / f"{stage}-{i}.log"))
        return self.finish_tests(stage, tests, started, end)

    def racecheck(self, seconds: float) -> dict[str, str]:
        return self.watch(["racecheck"], RACES, seconds)

    def sanitizers(self, seconds: float) -> dict[str, str]:
        return self.watch(list(SANITIZERS), SMALL, seconds)

    def watch(self, tools: list[str], script: list[str], seconds: float) -> dict[str, str]:
        """Run a script under the named sanitizers, all at once: none is timed. Its kernels are compiled beforehand."""
        end = time.monotonic() + seconds
        run([*script, "--processes", str(self.processes)], self.folder / "checks_compile.log", seconds / 2)
        started = {tool: start_sanitizer(tool, self.folder, script) for tool in tools}
        codes = {tool: None if process is None else finish(process, end - time.monotonic()) for tool, process in started.items()}
        return {tool: sanitizer_status(tool, code, self.folder) for tool, code in codes.items()}

    def finish_tests(self, stage: str, tests: list[str], started: list["subprocess.Popen[bytes]"], end: float) -> str:
        with ThreadPoolExecutor(max(1, len(started))) as pool:  # all at once: each that runs late has its grace
            stopped = list(pool.map(lambda process: finish(process, end - time.monotonic()), started)).count(STOPPED)
        found = selection.outcomes(self.folder, stage)
        seen = found.pop("seen")
        lost = [test for test in tests if selection.short_name(test) not in seen]  # their process died or was stopped
        self.write(f"{stage}.json", found | {"collected": len(tests), "without_outcome": lost, "stopped_processes": stopped})
        text = f"{found['passed']} passed, {len(found['failed'])} failed, {len(found['skipped'])} skipped"
        text += f", {len(lost)} without outcome ({stopped} of {len(started)} processes stopped)" if lost else ""
        return ("failed: " if found["failed"] or lost else "") + text

    def tuner(self, seconds: float) -> str:
        if importlib.util.find_spec(TUNER) is None:
            return f"not run: this version has no {TUNER}"
        made = self.folder / "tuned.json"
        command = [sys.executable, "-m", TUNER, "--out", str(made), "--seconds", f"{0.8 * seconds:.0f}", *TUNED]
        status = run(command, self.folder / "tuner.log", seconds)
        if made.exists():
            shutil.copy(made, self.out / "tuned.json")
        return f"exit status {status}" + ("" if made.exists() else ", and it wrote no file")

    def benchmark(self, name: str, seconds: float, tuned: Path | None = None) -> str:
        """tuned: entries to measure with, by default those that the tuner found before."""
        script = [sys.executable, "benchmarks/attn_bench.py", "--device", "cuda", "--precompile", str(self.processes)]
        limits = ["--limit", str(seconds * 0.6), "--budget", "0.7", "--out", str(self.folder / name)]
        tuned = tuned or self.out / "tuned.json"
        environment = {"AWRSR_KERNELS_TUNED": str(tuned.resolve())} if tuned.exists() else {}
        status = run([*script, *BENCHMARKS[name], *limits], self.folder / f"{name}.log", seconds, **environment)
        if (self.folder / name / "results.json").exists():
            shutil.copy(self.folder / name / "results.json", self.out / f"{name}.json")
        return f"exit status {status}"

    def variant(self, seconds: float) -> str:
        gpu, triton = machine(torch.device("cuda"))
        of_it = {"gpu": gpu, "triton": triton, "source": "not tuned: a variant to measure"}
        path = self.folder / "variant_tuned.json"
        write_entries(path, [of_it | {"key": list(key), "config": list(config)} for key, config in VARIANT.items()])
        return self.benchmark("variant", seconds, path)

    def profile(self, seconds: float) -> str:
        status, self.summary["kernels"] = profile_kernels(self.folder, seconds, self.processes)
        return status

    def run_all(self, only: Sequence[str] = ()) -> None:
        """Run the named stages in order; without names, ALL. What stages leave of their seconds is the tuner's."""
        work: dict[str, Callable[[float], dict[str, str] | str]] = {"tests": self.tests, "agreement": self.agreement}
        work |= {name: functools.partial(self.benchmark, name) for name in BENCHMARKS}
        work |= {"racecheck": self.racecheck, "profile": self.profile, "variant": self.variant, "tuner": self.tuner}
        work |= {"sanitizers": self.sanitizers}
        planned = 0.0  # seconds until the stage should end
        for name in (stage for stage in STAGES if stage in (only or ALL)):
            planned += STAGES[name]
            left = planned - (time.monotonic() - self.begin)
            self.stage(name, max(left, STAGES[name]) if name == "tuner" else STAGES[name], work[name])
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            archive.add(self.folder, arcname="logs")

    def all_went_well(self) -> bool:
        """Whether everything that ran succeeded. A missing tool is not a failure."""
        fine, status = ("not run", "exit status 0", "by "), dict(self.summary["status"])
        tests = [status.pop(stage, "") for stage in ("tests", "agreement")]
        return all(s.startswith(fine) for s in status.values()) and not any(s.startswith("failed") for s in tests)


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
