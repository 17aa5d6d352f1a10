"""Tools that watch the kernels on a GPU while `every_kernel.py` runs them: compute-sanitizer and ncu. Reads their output."""

import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..common.report import ROOT

STOPPED = 124  # exit status of what ran past its limit
GRACE = 5  # seconds that it then has to write what it found
SCRIPT = [sys.executable, "-m", "benchmarks.gpu.every_kernel"]
SMALL = [*SCRIPT, "--batch", "12", "--processors", "1"]  # so that sequences share tiles, and programs take several
RESIDENT = ["--backbone", "dot", "--windows", "100", "200", "--refinement", "simple", "additive", "--calls", "padded"]
RACES = [*SCRIPT, "--batch", "4", "--processors", "1", *RESIDENT]
LARGE = [*SCRIPT, "--backbone", "dot", "--batch", "256", "--windows", "50", "200", "512", "--dim", "64"]
SANITIZERS = {  # tool: its line that says how it went
    "memcheck": r"ERROR SUMMARY: .*",
    "racecheck": r"RACECHECK SUMMARY: .*",
}
METRICS = {  # counter of ncu, in its base unit: name in the summary, and what it is divided by
    "gpu__time_duration.sum": ("us", 1e3),
    "dram__bytes_read.sum": ("read_mb", 1e6),
    "dram__bytes_write.sum": ("written_mb", 1e6),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("warps_active_percent", 1),
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": ("busiest_unit_percent", 1),
    "launch__registers_per_thread": ("registers", 1),
}


def start(command: list[str], log: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """A process in a group of its own, so that what it starts can be stopped with it; its output goes to the log."""
    with open(log, "wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | environment
        )


def finish(process: "subprocess.Popen[bytes]", seconds: float) -> int:
    """Exit status; STOPPED if the group had to be ended: interrupted first, so that it can write what it has."""
    try:
        return process.wait(max(0.1, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return STOPPED


def run(command: list[str], log: Path, seconds: float, **environment: str) -> int:
    return finish(start(command, log, **environment), seconds)


def start_sanitizer(tool: str, folder: Path, script: list[str] = SMALL) -> "subprocess.Popen[bytes] | None":
    """None where compute-sanitizer is not installed. Without torch's allocator every tensor is an allocation with bounds."""
    path = shutil.which("compute-sanitizer")
    if path is None:
        return None
    command = [path, "--tool", tool, "--error-exitcode", "9", *script]
    return start(command, folder / f"{tool}.log", PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def sanitizer_status(tool: str, status: int | None, folder: Path) -> str:
    """The conclusion of the tool; "not run" and the reason if it is missing or was stopped."""
    if status is None:
        return "not run: compute-sanitizer is not installed"
    log = (folder / f"{tool}.log").read_text(encoding="utf-8", errors="replace")
    found = re.findall(SANITIZERS[tool], log)
    if status == STOPPED:
        return "not finished: ran past its limit" + (f", until then {found[-1]}" if found else "")
    return f"exit status {status}" + (f", {found[-1]}" if found else ", no summary in its log")


def profile_kernels(folder: Path, seconds: float, processes: int) -> tuple[str, list[dict[str, Any]]]:
    """The status, and a row per kernel: from ncu's counters if they can be read, otherwise from torch.profiler.

    The kernels are compiled beforehand, in several processes: what watches them should find them on disk.
    """
    end = time.monotonic() + seconds
    run([*LARGE, "--processes", str(processes)], folder / "profile_compile.log", seconds * 0.4)
    path = shutil.which("ncu")
    why = "ncu is not installed"
    if path is not None:
        log, table = folder / "ncu.log", folder / "ncu.csv"
        command = [path, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(table)]
        chosen = ["--kernel-name", "regex:^_.*_kernel$", "--metrics", ",".join(METRICS)]
        status = run([*command, *chosen, *LARGE], log, (end - time.monotonic()) * 0.7)
        rows = ncu_rows(table.read_text(encoding="utf-8", errors="replace")) if table.exists() else []
        if rows and status == 0:
            return "by ncu", rows
        why = f"ncu had no counters (exit status {status})"
    times = folder / "kernel_times.json"
    status = run([*LARGE, "--profile", str(times)], folder / "profile.log", end - time.monotonic())
    if status == 0 and times.exists():
        return f"by torch.profiler: {why}", json.loads(times.read_text(encoding="utf-8"))
    return f"exit status {status}: torch.profiler failed, and {why}", []


def ncu_rows(text: str) -> list[dict[str, Any]]:
    """A row per launch from ncu's raw page as CSV: names, then a line of units, then a line per launch."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    table = list(csv.DictReader(lines))
    if len(table) < 2 or "Kernel Name" not in table[0]:
        return []
    rows = []
    for line in table[1:]:
        row: dict[str, Any] = {"kernel": line["Kernel Name"], "grid": line.get("Grid Size", "")}
        for metric, (name, divisor) in METRICS.items():
            try:
                row[name] = float(line[metric].replace(",", "")) / divisor
            except (KeyError, ValueError):
                continue  # a counter that this GPU does not have
        rows.append(row)
    return rows
