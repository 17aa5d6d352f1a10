"""The output of a benchmark: the description of the machine, tables for a terminal and for a page, results.json and .md."""

import contextlib
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from awrsr_kernels.tuned import replace_file

Row = dict[str, Any]
Column = tuple[str, int, Callable[[Row], str]]  # title, width (negative: to the left), what a row shows there
ROOT = Path(__file__).resolve().parents[2]

# Machine


def about(device: str, *packages: str) -> Row:
    """The description of the machine in a result file, which is also printed. packages: further packages whose versions matter."""
    name, packaged, measured = device_name(device), versions(*packages), commit()
    print(f"{name}; {' '.join(f'{k} {v}' for k, v in packaged.items())}; commit {measured[:18]}", flush=True)
    return {"device": name, "versions": packaged, "commit": measured}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(x.split(":", 1)[1].strip() for x in info if x.startswith("model name"))
    return f"CPU: {name}, {torch.get_num_threads()} thread(s)"


def is_gpu(device: str) -> bool:
    """Whether a result file's device is a GPU."""
    return not device.startswith("CPU")


def versions(*packages: str) -> dict[str, str]:
    installed = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for package in ("triton", "awrsr-kernels", *packages):
        with contextlib.suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def commit() -> str:
    """The commit that was measured, marked if files differ from it; what was measured before does not count."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def command_line(script: str, argv: Sequence[str] | None) -> str:
    """The command as stored in results.json."""
    return shlex.join(["python", f"benchmarks/{script}", *(sys.argv[1:] if argv is None else argv)])


def grid(columns: list[Column], rows: list[Row]) -> list[str]:
    """A line of titles, then one per row."""

    def line(cells: list[str]) -> str:
        return "  ".join(f"{x:<{-w}}" if w < 0 else f"{x:>{w}}" for x, (_, w, _) in zip(cells, columns, strict=True)).rstrip()

    return [line([name for name, _, _ in columns]), *(line([show(row) for _, _, show in columns]) for row in rows)]


def page_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table for a page."""
    return [f"| {' | '.join(head)} |", "|" + "--|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def spread(row: Row, digits: int = 3) -> str:
    return f"{row['p20_ms']:.{digits}f}..{row['p80_ms']:.{digits}f}"


def times(row: Row, name: str, digits: int = 2) -> str:
    """A ratio of a row, if it has one."""
    return f"{row[name]:.{digits}f}x" if name in row else "-"



def eager_ms(row: Row) -> float:
    """Time of a call without a graph: that of the device or, if it takes longer, that of the host, which the device waits for."""
    return max(float(row["median_ms"]), float(row.get("host_ms", 0.0)))


RATIOS = {  # measure: what its ratio to the fastest rival is called, and that rival
    "median_ms": ("ratio_to_best_rival", "best_rival"),
    "graph_ms": ("graph_ratio_to_best_rival", "best_rival_by_graph"),
}


def add_ratios(rows: list[Row], alike: Sequence[str]) -> None:
    """Time of the fastest rival over a row's time, among rows that agree in `alike`; each measure has a fastest rival of its own.

    Absent where no rival ran, or where the measure is missing.
    """
    for measure, (ratio, name) in RATIOS.items():
        best: dict[tuple[Any, ...], Row] = {}

        def time_of(row: Row, measure: str = measure) -> float:
            return eager_ms(row) if measure == "median_ms" else float(row[measure])

        for row in (row for row in rows if measure in row):
            key = tuple(row[k] for k in alike)
            if row["role"] == "rival" and (key not in best or time_of(row) < time_of(best[key])):
                best[key] = row
        for row in (row for row in rows if measure in row):
            rival = best.get(tuple(row[k] for k in alike))
            if rival is not None:
                row[ratio] = time_of(rival) / time_of(row)
                row[name] = rival["provider"] + ("" if rival["layout"] == "padded" else f" {rival['layout']}")


def versus(row: Row, ratio: str, name: str) -> str:
    """A ratio to the fastest rival and which that was, for a page."""
    return f"{times(row, ratio)} `{row[name]}`" if ratio in row else "-"


def unsteady(row: Row) -> bool:
    """Whether a median is unreliable because the samples scatter."""
    return bool(row.get("p80_ms", 0) > 2 * row.get("p20_ms", 0))


def device_ms(row: Row) -> float:
    """Time on the device: replayed from a CUDA graph if there is one, since the host then causes no delay."""
    return float(row["graph_ms"] if "graph_ms" in row else row["median_ms"])


def finish(results: Row, begin: float, out: Path | None, page: Callable[[Row], str]) -> None:
    """Write results.json and results.md if there is a folder for them, and print the last lines of a run that began at `begin`:
    whether its medians scatter, what it wrote, and how long it took."""
    written = {} if out is None else {out / "results.json": json.dumps(results, indent=1), out / "results.md": page(results)}
    for path, text in written.items():
        replace_file(path, text)
    if wide := sum(map(unsteady, results["rows"])):
        of_all = f"{wide} of {len(results['rows'])} medians are unsteady"
        print(f"{of_all}, p80 above twice p20: a busy machine? (--threads, --budget)")
    if written:
        print("wrote", ", ".join(map(str, written)))
    print(f"{time.perf_counter() - begin:.0f} s")
