"""What refinement costs, from committed results alone: operator, training, decoding, and each kernel under the roof of its device.

    python benchmarks/cost_report.py          # benchmarks/results/operator/cost.md, cost.json, cost_{operator,roofline,quality}.png

The roof of a device is what it copies and what it multiplies at best: a kernel that does I operations per byte of device memory
gets no further than min(I * copy, matmul) operations a second, so below the ridge, matmul / copy, memory is what limits it and
above it arithmetic. Points are measured by whole calls: bytes and operations are those of the problem (`roofline.py`), rates those
of the very run. On a GPU there are PREDICTIONS, too, kernel by kernel: bytes and operations as `launches.py` counts them, times by
`gpu_model.py`. A GPU's calls are timed as a CUDA graph replays them, where the host holds nothing up.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __package__ is None:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from awrsr.files import atomic  # noqa: E402
from awrsr_kernels.checks import REFINEMENTS  # noqa: E402
from benchmarks.common import report
from benchmarks.gpu import model as gpu_model
from benchmarks.operator import cost_plots, decode_bench
from benchmarks.operator.launches import Launch, step_launch, step_operations, task_launches  # noqa: E402
from benchmarks.operator.roofline import Rates  # noqa: E402
from benchmarks.operator.workloads import STOCHASTIC, Shape, Task  # noqa: E402
from benchmarks.training import report as train_report  # noqa: E402

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parents[1] / "results"
PREDICTION = "PREDICTION"
NOT_YET = "not measured yet"
SIZES = ((512, 2, 50, 32), (512, 2, 200, 32), (8, 4, 2048, 64))  # B, H, L, D = R: recommenders, longer histories, long sequences
STEP = (64, 4, 1024, 64)  # the same of a decoding step, L with the new item
OURS, LAYOUTS = ("torch", "triton"), ("padded", "packed")  # what stands under the roof


class Point(NamedTuple):
    """A kernel, or a pass of a call, under the roof of its device."""

    device: str
    group: str  # what a picture gives a colour
    problem: str
    call: str
    part: str  # fwd, bwd, step, or a kernel and its stage
    moved: float  # bytes
    operations: float
    ms: float
    rates: Rates
    measured: bool
    waits_for: str = ""  # what a prediction says takes longest
    known: bool = True  # the compiler said what the kernel takes of a processor

    @property
    def intensity(self) -> float:
        return self.operations / self.moved

    @property
    def ridge(self) -> float:
        return self.rates.matmul / self.rates.copy

    @property
    def side(self) -> str:
        """Which of the two limits is the nearer: the side of the ridge."""
        return "memory" if self.intensity < self.ridge else "arithmetic"

    @property
    def share(self) -> float:
        """Of what the roof allows."""
        return self.rates.floor_ms(self.moved, self.operations) / self.ms

    def row(self) -> Row:
        found = {name: getattr(self, name) for name in ("device", "problem", "call", "part", "operations", "intensity", "ridge")}
        found |= {"bytes": self.moved, "side": self.side, "share_of_roof": self.share}
        if self.measured:
            return found | {"median_ms": self.ms}
        return found | {"kind": "prediction", "predicted_ms": self.ms, "waits_for": self.waits_for, "compiled": self.known}


def is_gpu(device: str) -> bool:
    return not device.startswith("CPU")


# Measured: whole calls


def rates_of(results: Row) -> Rates:
    return Rates(results["rates"]["copy_gb_per_s"] * 1e9, results["rates"]["matmul_tflops"] * 1e12)


def measured(files: list[Row]) -> list[Point]:
    """Our calls in every file of attn_bench.py, then steps of decode_bench.py, on whatever device."""
    operators = [results for results in files if results.get("rates")]
    found = [p for results in operators for p in passes(results)]
    for results in (x for x in files if x.get("kind") == decode_bench.KIND):
        beside = [x for x in operators if (x["device"], x["commit"]) == (results["device"], results["commit"])]
        if beside:  # a file of steps has no rates of its own: those of the same device and commit
            found += steps(results, rates_of(beside[0]))
    return found


def passes(results: Row) -> Iterator[Point]:
    for row in results["rows"]:
        alone = "graph_ms" in row if is_gpu(results["device"]) else row["pass"] != "fwd+bwd"  # a backward alone has no graph
        chosen = row["provider"] in OURS and row["layout"] in LAYOUTS and alone
        if not chosen or row["dtype"] != results["rates"]["matmul_dtype"] or "bytes" not in row:
            continue
        gaussian = row["backbone"] == STOCHASTIC
        group = ("between Gaussians" if gaussian else "between vectors") + (", real histories" if row["source"] else "")
        group = f"{row['provider']}, {group}" if is_gpu(results["device"]) else group  # on a CPU there is one of ours
        where = f"{row['source']}, {row['layout']}, {row['B']} users" if row["source"] else f"B {row['B']}"
        problem = f"{where} H {row['H']} L {row['L']} D {row['D']} R {row['R']}"
        call = f"`{row['provider']}`, {row['refinement']}{' between Gaussians' * gaussian}"
        counts, rates = (float(row["bytes"]), float(row["operations"])), rates_of(results)
        yield Point(results["device"], group, problem, call, row["pass"], *counts, report.device_ms(row), rates, measured=True)


def steps(results: Row, rates: Rates) -> Iterator[Point]:
    for row in (x for x in results["rows"] if x["provider"] == "step"):
        s = Shape(row["B"], row["H"], row["H"], row["L"], row["D"], row["D_v"], row["R"])
        operations = step_operations(Task(s, row["refinement"], row["dtype"], 0.0, ""))
        tables = "" if row["refinement"] == "none" else f", {row['tables']} tables"
        problem, call = f"B {s.B} H {s.H} L {s.L} D {s.D} R {s.R}", f"`step`, {row['refinement']}{tables}"
        counts = float(row["bytes"]), float(operations)
        yield Point(results["device"], "decoding steps", problem, call, "step", *counts, row["median_ms"], rates, measured=True)


# Counted, and predicted from the counts: kernel by kernel


def task_of(size: tuple[int, int, int, int], refinement: str) -> Task:
    b, h, length, d = size
    return Task(Shape(b, h, h, length, d, d, d), refinement, gpu_model.DTYPE, 0.0, "cuda")


def counted(refinement: str) -> Iterator[tuple[str, Launch, int]]:
    """(problem, launch, its operations) of each of our kernels; torch's own sums after a backward are left out."""
    for size in SIZES:
        for launch in task_launches(task_of(size, refinement), "padded", processors=gpu_model.H200.processors):
            if launch.tile is not None:
                yield "B {} H {} L {} D {}".format(*size), launch, launch.operations
    task = task_of(STEP, refinement)
    yield "B {} H {} L {} D {}, step".format(*STEP), step_launch(task, content=False), step_operations(task)


def kernel_name(launch: Launch) -> str:
    return launch.kernel + (f" {launch.stage}" if launch.stage else "")


def predicted(resources: list[Row], refinement: str = "simple") -> list[Point]:
    """Every kernel as predicted of an H200. resources: registers and shared memory by kernel, as the prediction's file has them."""
    gpu = gpu_model.H200
    used = {(r["kernel"], r["stage"], *r["tile"]): r for r in resources if r["refinement"] == refinement}
    found = []
    for problem, launch, operations in counted(refinement):
        row = used.get((launch.kernel, launch.stage, *(launch.tile or ())))
        takes = gpu_model.UNKNOWN if row is None else gpu_model.Resources(row["registers"], row["shared"], row["known"])
        times = gpu_model.times_us(launch, takes, gpu)
        longest = max((t, name) for name, t in times.items() if name != "launch")[1]
        counts, rates = (float(launch.bytes), float(operations)), Rates(gpu.copy, gpu.matmul)
        named = gpu.name, problem, problem, refinement, kernel_name(launch)
        found.append(Point(*named, *counts, gpu_model.total_us(times) / 1e3, rates, False, longest, takes.known))
    return found


# The page


def lines_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|--" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def measured_table(points: list[Point]) -> list[str]:
    """A row per call, its passes in each cell."""
    calls: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        calls.setdefault((p.problem, p.call), []).append(p)
    shown: list[Callable[[Point], str]] = [
        lambda p: p.part, lambda p: f"{p.moved / 1e6:.3g}", lambda p: f"{p.intensity:.3g}", lambda p: p.side,
        lambda p: f"{p.ms:.3g}", lambda p: f"{p.share:.0%}",
    ]  # fmt: skip
    rows = [[*key, *(", ".join(map(show, of)) for show in shown)] for key, of in calls.items()]
    return lines_of(["problem", "call", "pass", "MB", "operations per byte", "side", "ms", "share of the roof"], rows)


def predicted_table(points: list[Point], mark: str) -> list[str]:
    rows = []
    for p in points:
        cells = [p.problem, f"`{p.part}`", f"{p.moved / 1e6:.3g}", f"{p.intensity:.3g}", p.side]
        rows.append([*cells, f"{p.ms:.3g}{'' if p.known else '?'}", f"{p.share:.0%}", p.waits_for, mark])
    return lines_of(["problem", "kernel", "MB", "operations per byte", "side", "ms", "share of the roof", "waits for", ""], rows)


def counted_table() -> list[str]:
    """What each refinement makes the kernels move and multiply."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for refinement in REFINEMENTS:
        for problem, launch, operations in counted(refinement):
            of = cells.setdefault((problem, kernel_name(launch)), {})
            of[refinement] = f"{launch.bytes / 1e6:.3g}, {operations / launch.bytes:.3g}"
    order = sorted(cells, key=lambda key: [problem for problem, _ in cells].index(key[0]))
    rows = [[problem, f"`{name}`", *(cells[problem, name].get(x, "-") for x in REFINEMENTS)] for problem, name in order]
    return lines_of(["problem", "kernel", *REFINEMENTS], rows)


def roof(points: list[Point]) -> list[str]:
    """Every device's table, what is predicted apart from what is measured."""
    lines: list[str] = []
    real = dict.fromkeys(p.device for p in points if p.measured)
    for device, kind in dict.fromkeys((p.device, p.measured) for p in points):
        of = [p for p in points if (p.device, p.measured) == (device, kind)]
        ridges = [f"{x:.3g}" for x in sorted({p.ridge for p in of})]
        ridge = " to ".join(dict.fromkeys((ridges[0], ridges[-1])))
        word = "measured" if kind else f"{PREDICTION}, not a measurement, refinement {of[0].call}, {gpu_model.DTYPE}"
        mark = PREDICTION if device in real else f"{PREDICTION}, {NOT_YET}"
        lines += ["", f"**{device}**: {word}; the ridge is at {ridge} operations per byte.", ""]
        lines += measured_table(of) if kind else predicted_table(of, mark)
        if not all(p.known for p in of):
            lines += ["", "?: without the compiler's word on this very kernel; how many programs run at once is a guess."]
    return lines


def markdown(files: list[Row], points: list[Point]) -> str:
    """The page's tables: those of every benchmark, as it writes them, then the roofs."""
    pages = ("Operator", None, report), ("Training", train_report.KIND, train_report), ("Decoding", decode_bench.KIND, decode_bench)
    lines: list[str] = []
    for title, kind, page in pages:
        of = [results for results in files if results.get("kind") == kind]
        lines += ["", f"## {title}"]
        for results in of:
            lines += ["", page.markdown(results).strip()]
        if not any(is_gpu(results["device"]) for results in of):
            lines += ["", f"On a GPU: {NOT_YET}."]
    lines += ["", "## Under the roof", *roof(points), ""]
    lines += [f"What each refinement makes a kernel move and multiply in {gpu_model.DTYPE}: MB, operations per byte; counted, not"]
    lines += ["timed. Between Gaussians the kernels are not counted yet.", "", *counted_table()]
    return "\n".join(lines).strip() + "\n"


def load(folder: Path) -> list[Row]:
    """Result files with rows, in the order of their names."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"), key=lambda path: path.name)]
    return [results for results in found if isinstance(results, dict) and results.get("rows")]


def points_of(files: list[Row]) -> list[Point]:
    resources = [row for results in files if results.get("kind") == "prediction" for row in results["resources"]]
    return [*measured(files), *predicted(resources)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of results, where the report goes, too; default %(default)s"
    )
    folder = parser.parse_args(arguments).results
    files, study = load(folder), folder / "study/study.json"
    points = points_of(files)
    texts = {"cost.md": markdown(files, points), "cost.json": json.dumps([p.row() for p in points], indent=1) + "\n"}
    for name, text in texts.items():
        with atomic(folder / "operator" / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    entries = json.loads(study.read_text(encoding="utf-8")) if study.exists() else []
    pictures = {
        "cost_operator.png": cost_plots.operator([x for x in files if x.get("kind") is None]),
        "cost_roofline.png": cost_plots.roofline(points),
        "cost_quality.png": cost_plots.quality(entries),
    }
    for name, figure in pictures.items():
        if figure is not None:
            with atomic(folder / "operator" / name) as temporary:
                figure.savefig(temporary, format="png", dpi=130)
    print(f"wrote {', '.join([*texts, *(name for name, figure in pictures.items() if figure is not None)])} to {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
