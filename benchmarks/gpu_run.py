"""Everything that needs a GPU in one go: the tests, then the benchmarks, within ten minutes and without a network.

    python benchmarks/gpu_run.py --out gpu-out        (or: make gpu)

Leaves tests.json, one JSON per benchmark, summary.json and logs.tar.gz (logs, CSV, plots) in the output folder: seven files.
Every stage has a time limit of its own, and what one of them does not finish costs the others nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = ("test_contract", "test_meaning", "test_agreement")
TEST_SECONDS = 270
BENCHMARKS = {  # name: (seconds, options of attn_bench.py); kernels are compiled in parallel before anything is timed
    "recsys": (110, ["--preset", "recsys", "--overhead"]),
    "long": (90, ["--preset", "long"]),
    "refinements": (50, ["--shapes", "512,4,50,64", "512,4,128,64", "--refinement", "all", "--dropout", "0.1"]),
    "compiled": (40, ["--shapes", "512,4,128,64", "--providers", "textbook+compile", "flex2", "sdpa2-split", "triton"]),
}


def run(command: list[str], log: Path, seconds: float) -> int:
    """Exit status; 124 if it had to be stopped. Output goes to the log."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return 124


def collect_tests() -> list[str]:
    paths = [f"tests/{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *paths]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    tests = [line for line in found.stdout.splitlines() if "::" in line]
    if not tests:
        raise SystemExit(f"pytest collects no tests:\n{found.stdout}{found.stderr}")
    return tests


def run_tests(folder: Path, processes: int) -> dict[str, Any]:
    """All GPU tests, dealt out to several processes: each compiles the kernels of its own tests."""
    tests = collect_tests()
    started = []
    for i in range(processes):
        log = open(folder / f"tests-{i}.log", "w", encoding="utf-8")  # noqa: SIM115
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={folder / f'tests-{i}.xml'}"]
        command = [sys.executable, "-m", "pytest", *options, *tests[i::processes]]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + TEST_SECONDS
    stopped = 0
    for process in started:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            stopped += 1
    result: dict[str, Any] = {"collected": len(tests), "passed": 0, "failed": {}, "skipped": {}, "stopped_processes": stopped}
    for path in folder.glob("tests-*.xml"):
        for case in ElementTree.parse(path).iter("testcase"):
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


def run_benchmark(name: str, folder: Path, processes: int) -> int:
    seconds, options = BENCHMARKS[name]
    script = [sys.executable, "benchmarks/attn_bench.py", "--device", "cuda", "--precompile", str(processes)]
    limits = ["--limit", str(seconds * 0.6), "--budget", "0.7", "--out", str(folder / name)]
    return run([*script, *options, *limits], folder / f"{name}.log", seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-out")), help="folder for the results")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1), help="to compile and test in")
    parser.add_argument("--skip-tests", action="store_true", help="benchmarks alone")
    given = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU, and torch finds none here; `make bench` compares the CPU paths")
    given.out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "seconds": {}, "status": {}}
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), time.monotonic()

        def finish(stage: str, status: Any) -> None:
            nonlocal begin
            summary["status"][stage], summary["seconds"][stage] = status, round(time.monotonic() - begin, 1)
            begin = time.monotonic()
            print(f"{stage}: {status} after {summary['seconds'][stage]} s", flush=True)
            (given.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")

        if not given.skip_tests:
            tests = run_tests(folder, given.processes)
            (given.out / "tests.json").write_text(json.dumps(tests, indent=1) + "\n")
            finish("tests", f"{tests['passed']} passed, {len(tests['failed'])} failed, {len(tests['skipped'])} skipped")
        for stage in BENCHMARKS:
            status = run_benchmark(stage, folder, given.processes)
            if (folder / stage / "results.json").exists():
                shutil.copy(folder / stage / "results.json", given.out / f"{stage}.json")
            finish(stage, f"exit status {status}")
        with tarfile.open(given.out / "logs.tar.gz", "w:gz") as archive:
            archive.add(folder, arcname="logs")
    failed = not given.skip_tests and (tests["failed"] or tests["stopped_processes"])
    return int(bool(failed) or any(s != "exit status 0" for k, s in summary["status"].items() if k != "tests"))


if __name__ == "__main__":
    sys.exit(main())
