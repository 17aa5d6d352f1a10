"""What comes out: the table, results.json and results.csv, and the line that says on what machine; pictures in `plots`."""

import contextlib
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch

from awrsr_kernels.launch_config import shared_memory

from ..operator.launches import PROCESSORS, task_launches
from ..operator.measure import PASSES, Entrant, quantiles
from ..operator.plots import QUESTIONS, plot
from ..operator.providers import side_by_side
from ..operator.roofline import Rates, shares
from ..operator.workloads import Task

Row = dict[str, Any]
COUNTS = ("programs", "loaded", "read", "written", "operations", "weights", "gradients", "drops")


def make_rows(task: Task, entrants: list[Entrant], passes: list[str], rates: Rates | None = None) -> list[Row]:
    """One row per entrant and pass. `ratio_to_best_rival` > 1: faster than the fastest rival of the task, in any layout.

    With `rates` a row says how far from the possible it is (`roofline.shares`).
    """
    s, rows = task.shape, []
    for entrant in entrants:
        for p in passes:
            median, p20, p80 = quantiles(entrant.samples[p])
            view = task if entrant.provider.role != "floor" else task.plain
            rows.append(
                {"provider": entrant.provider.name, "role": entrant.provider.role, "backbone": task.backbone}
                | {"refinement": task.refinement, "layout": entrant.layout}
                | {"B": s.B, "H": s.H, "H_kv": s.H_kv, "L": s.L, "D": s.D, "D_v": s.D_v, "R": s.R}
                | {"dtype": task.dtype, "dropout_p": task.dropout_p, "pass": p}
                | {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(entrant.samples[p])}
                | {"peak_mib": entrant.peak_mib[p], "first_call_ms": entrant.first_ms[p]}
                | {"seq_per_s": s.B / median * 1e3, "tflops": view.flops(p) / median / 1e9}
                | ({"host_ms": quantiles(entrant.host_samples[p])[0]} if task.device == "cuda" else {})
                | ({"graph_ms": entrant.graph_ms[p]} if p in entrant.graph_ms else {})
                | ({"graph_reason": entrant.graph_reason[p]} if p in entrant.graph_reason else {})
                | ({} if rates is None else shares(view, entrant.layout, p, median, rates))
                | {"source": task.source, "batch_size": task.batch_size or s.B, "task": task.label}
            )
    add_ratios(rows)
    return rows


def launch_rows(task: Task, entrants: list[Entrant], rates: Rates) -> list[Row]:
    """What each kernel of ours moves and multiplies by design, a row per kernel, where our kernels were measured.

    None between Gaussians: what the kernels do there is not counted yet.
    """
    rows: list[Row] = []
    if task.gaussian:
        return rows
    for entrant in entrants:
        if entrant.provider.name != "triton":
            continue
        device = torch.device(task.device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS
        sums: dict[tuple[str, int, str], Row] = {}
        for launch in task_launches(task, entrant.layout, shared_memory(device), processors):
            key = launch.kernel, launch.stage, launch.pass_
            row = sums.setdefault(key, dict.fromkeys(("launches", *COUNTS), 0))
            row["launches"] += 1
            for name in COUNTS:
                row[name] += getattr(launch, name)
        for (kernel, stage, p), row in sums.items():
            named = {"task": task.label, "layout": entrant.layout, "pass": p, "kernel": kernel, "stage": stage}
            rows.append(named | row | {"floor_ms": rates.floor_ms(row["read"] + row["written"], row["operations"])})
    return rows


def add_ratios(rows: list[Row]) -> None:
    """Time of the fastest rival over a row's time, within each task and pass; absent where no rival ran."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["task"], row["pass"]
        if row["role"] == "rival" and (key not in best or row["median_ms"] < best[key]["median_ms"]):
            best[key] = row
    for row in rows:
        rival = best.get((row["task"], row["pass"]))
        if rival is not None:
            row["ratio_to_best_rival"] = rival["median_ms"] / row["median_ms"]
            row["best_rival"] = rival["provider"] + ("" if rival["layout"] == "padded" else f" {rival['layout']}")


def graph_reasons(rows: list[Row]) -> list[tuple[str, str]]:
    """(provider, reason), each once, where a forward, alone or with its backward, has no CUDA-graph time."""
    return list(dict.fromkeys((r["provider"], r["graph_reason"]) for r in rows if "graph_reason" in r and r["pass"] != "bwd"))


def unsteady(rows: list[Row]) -> int:
    """How many medians mean little, because the samples scatter."""
    return sum(map(scattered, rows))


def scattered(row: Row) -> bool:
    return bool(row["p80_ms"] > 2 * row["p20_ms"])


def percent(row: Row, name: str) -> str:
    return f"{row[name]:.1%}" if name in row else "-"


Column = tuple[str, int, Callable[[Row], str]]  # title, width (negative: to the left), what a row shows there

COLUMNS: list[Column] = [
    ("provider", -17, lambda r: r["provider"]),
    ("layout", -8, lambda r: r["layout"]),
    ("pass", -7, lambda r: r["pass"]),
    ("median ms", 10, lambda r: f"{r['median_ms']:.3f}"),
    ("p20..p80", 19, lambda r: f"{r['p20_ms']:.3f}..{r['p80_ms']:.3f}"),
    ("host ms", 8, lambda r: f"{r['host_ms']:.3f}" if "host_ms" in r else "-"),
    ("graph ms", 8, lambda r: f"{r['graph_ms']:.3f}" if "graph_ms" in r else "-"),
    ("peak MiB", 9, lambda r: f"{r['peak_mib']:.1f}"),
    ("seq/s", 10, lambda r: f"{r['seq_per_s']:.4g}" if r["seq_per_s"] < 1000 else f"{r['seq_per_s']:.0f}"),
    ("TFLOP/s", 8, lambda r: f"{r['tflops']:.3g}"),
    ("copy", 6, lambda r: percent(r, "copy_share")),
    ("matmul", 6, lambda r: percent(r, "matmul_share")),
    ("/floor", 7, lambda r: f"{r['to_floor']:.{1 if r['to_floor'] < 100 else 0}f}x" if "to_floor" in r else "-"),
    ("vs rival", 8, lambda r: f"{r['ratio_to_best_rival']:.2f}x" if "ratio_to_best_rival" in r else "-"),
    ("first ms", 9, lambda r: f"{r['first_call_ms']:.0f}"),
]


def grid(columns: list[Column], rows: list[Row]) -> list[str]:
    """A line of titles, then one per row."""

    def line(cells: list[str]) -> str:
        return "  ".join(f"{x:<{-w}}" if w < 0 else f"{x:>{w}}" for x, (_, w, _) in zip(cells, columns, strict=True)).rstrip()

    return [line([name for name, _, _ in columns]), *(line([show(row) for _, _, show in columns]) for row in rows)]


def table(rows: list[Row], wrong: list[Row]) -> str:
    """One task: a block per pass, the fastest first."""
    empty = set() if any(r["layout"] != "padded" for r in rows) else {"layout"}
    for name in ("host ms", "graph ms"):
        empty |= set() if any(name.replace(" ", "_") in r for r in rows) else {name}
    columns = [c for c in COLUMNS if c[0] not in empty]

    ordered = [row for p in PASSES for row in sorted((r for r in rows if r["pass"] == p), key=lambda r: r["median_ms"])]
    lines = [rows[0]["task"] if rows else wrong[0]["task"], *grid(columns, ordered)] if rows or wrong else []
    lines += [f"{w['provider']:<17}  WRONG, not timed ({w['layout']}): {w['reason']}" for w in wrong]
    return "\n".join(lines) + "\n"


def device_ms(row: Row) -> float:
    """What the device takes: replayed from a CUDA graph, where the host holds nothing up, if there is one."""
    return float(row["graph_ms"] if "graph_ms" in row else row["median_ms"])


def markdown(results: dict[str, Any]) -> str:
    """Forward and backward as a table for a page: time relative to ours in the same run, and peak MiB; on a GPU also the host's."""
    rows = [r for r in results["rows"] if r["pass"] == "fwd+bwd"]
    names = [p.name for p in side_by_side() if any(r["provider"] == p.name for r in rows)]
    ours = next((name for name in ("triton", "torch") if name in names), None)
    if ours is None:
        return ""
    versions = f"torch {results['versions']['torch']}, commit {results['commit'][:12]}"
    lines = [f"Forward and backward, {results['device']}, {versions}."]
    if any("host_ms" in row for row in rows):
        lines += [f"Time on the device, replayed from a CUDA graph, relative to `{ours}` (below 1 is faster); peak MiB above the"]
        lines += ["inputs; and the milliseconds of the host per call without a graph.", ""]
    else:
        lines += [f"Time relative to `{ours}` (below 1 is faster), and peak MiB above the inputs.", ""]
    names = [ours, *(name for name in names if name != ours)]
    lines += ["| problem | layout | " + " | ".join(f"`{name}`" for name in names) + " |", "|--|--|" + "--|" * len(names)]
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["layout"]), {})[row["provider"]] = row
    for (task, layout), found in cells.items():
        if ours in found:
            base = device_ms(found[ours])
            lines.append(f"| {task} | {layout} | " + " | ".join(_cell(found[n], base) if n in found else "-" for n in names) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row, base: float) -> str:
    host = f", {row['host_ms']:.2f}" if "host_ms" in row else ""
    return f"{device_ms(row) / base:.2f}, {row['peak_mib']:.3g}{host}"


# Machine


def about(device: str, *packages: str) -> Row:
    """What a result file says of where it was measured; packages: whose versions matter beside torch's."""
    return {"device": device_name(device), "versions": versions(*packages), "commit": commit()}


def about_line(about: Row) -> str:
    return f"{about['device']}; {' '.join(f'{k} {v}' for k, v in about['versions'].items())}; commit {about['commit'][:18]}"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(x.split(":", 1)[1].strip() for x in info if x.startswith("model name"))
    return f"CPU: {name}, {torch.get_num_threads()} thread(s)"


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    for package in ("triton", "awrsr-kernels", *packages):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str:
    """The commit that was measured, marked if files differ from it; what was measured before does not count."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# Files


@contextlib.contextmanager
def atomic(path: Path, mode: str = "w") -> Iterator[Any]:
    """A file that appears under its name only once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_data(directory: Path, results: dict[str, Any], page: str) -> list[str]:
    """results.json, results.csv with its rows, and a table for a page as results.md; returns the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    with atomic(directory / "results.json") as file:
        json.dump(results, file, indent=1)
    names = list(dict.fromkeys(name for row in results["rows"] for name in row))
    with atomic(directory / "results.csv") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(results["rows"])
    with atomic(directory / "results.md") as file:
        file.write(page)
    return [str(directory / f"results.{kind}") for kind in ("json", "csv", "md")]


def write_files(directory: Path, results: dict[str, Any]) -> list[str]:
    """Write everything that can be written; returns lines to print."""
    notes = [f"wrote {', '.join(write_data(directory, results, markdown(results)))}"]
    if not results["rows"]:
        return notes
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        return [*notes, "no plots: matplotlib is not installed (pip install matplotlib)"]
    for name, column, axis in QUESTIONS:
        if any(column in row for row in results["rows"]):
            with atomic(directory / f"{name}.png", "wb") as file:
                file.write(plot(results["rows"], column, axis, results["device"]))
            notes[0] += f", {directory / (name + '.png')}"
    return notes


class Progress:
    """tqdm's bar if it is installed and a terminal is there; otherwise silent, as the tables come out one by one."""

    def __init__(self, total: int, stream: TextIO = sys.stderr) -> None:
        self.bar = None
        if not stream.isatty():
            return
        try:
            from tqdm import tqdm

            self.bar = tqdm(total=total, file=stream, leave=False, unit="step")
        except ImportError:
            print("no progress bar: tqdm is not installed (pip install tqdm)", file=stream)

    def step(self, what: str) -> None:
        if self.bar is not None:
            self.bar.set_description(what[:60])
            self.bar.update()

    def write(self, text: str) -> None:
        """To stdout, clear of the bar."""
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
