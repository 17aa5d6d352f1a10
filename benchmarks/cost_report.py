"""What refinement costs, from committed results alone: where each kernel stands under the roof, and quality against training time.

    python benchmarks/cost_report.py            # benchmarks/results/cost.md, cost_roofline.png and cost_quality.png

The roof of a device is what it copies and what it multiplies at best: a kernel that does I operations per byte of device memory
gets no further than min(I * copy, matmul) operations a second, so below the ridge, matmul / copy, memory bounds it and above it
arithmetic. On a CPU points are measured, by whole calls of the operator (`attn_bench.py`, its bytes and operations those of the
problem, its rates those of that very run). On a GPU they are PREDICTIONS, kernel by kernel, until a file of results names a GPU:
bytes and operations as `launches.py` counts them, times by `gpu_model.py`.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __package__ is None:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from awrsr.files import atomic  # noqa: E402
from benchmarks import gpu_model  # noqa: E402
from benchmarks.launches import Launch, step_launch, task_launches  # noqa: E402
from benchmarks.roofline import Rates  # noqa: E402
from benchmarks.workloads import Shape, Task  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
RESULTS = Path(__file__).resolve().parent / "results"
PREDICTION = "PREDICTION"
SIZES = ((512, 2, 50, 32), (512, 2, 200, 32), (8, 4, 2048, 64))  # B, H, L, D = R: recommenders, longer histories, long sequences
FEWEST = 4  # points that are worth a panel
STEP = (64, 4, 1024, 64)


class Point(NamedTuple):
    """A kernel or a call under the roof of its device."""

    device: str
    problem: str
    name: str
    moved: float  # bytes
    operations: float
    ms: float
    rates: Rates
    measured: bool
    limit: str = ""  # what a prediction says it waits for

    @property
    def intensity(self) -> float:
        return self.operations / self.moved

    @property
    def bound(self) -> str:
        return "memory" if self.intensity < self.rates.matmul / self.rates.copy else "arithmetic"

    @property
    def share(self) -> float:
        """Of what the roof allows."""
        return self.rates.floor_ms(self.moved, self.operations) / self.ms


def predicted(resources: list[Row], refinement: str = "simple") -> list[Point]:
    """Every kernel of three problems and a decoding step on an H200, as predicted. resources: registers and shared memory of the
    kernels, as the prediction's file has them from the compiler."""
    gpu = gpu_model.H200
    used = {(r["kernel"], r["stage"], *r["tile"]): r for r in resources if r["refinement"] == refinement}

    def point(launch: Launch, problem: str) -> Point:
        row = used.get((launch.kernel, launch.stage, *(launch.tile or ())))
        known = gpu_model.UNKNOWN if row is None else gpu_model.Resources(row["registers"], row["shared"], True)
        times = gpu_model.times_us(launch, known, gpu)
        longest = max((t, name) for name, t in times.items() if name != "launch")[1]
        name = launch.kernel + (f" {launch.stage}" if launch.stage else "")
        counts = float(launch.bytes), float(launch.operations)
        rates = Rates(gpu.copy, gpu.matmul)
        return Point(gpu.name, problem, name, *counts, gpu_model.total_us(times) / 1e3, rates, measured=False, limit=longest)

    found = []
    for b, h, length, d in SIZES:
        task = Task(Shape(b, h, h, length, d, d, d), refinement, gpu_model.DTYPE, 0.0, "cuda")
        launches = (launch for launch in task_launches(task, "padded", processors=gpu.processors) if launch.tile is not None)
        found += [point(launch, f"B {b} H {h} L {length} D {d}") for launch in launches]
    b, h, length, d = STEP
    task = Task(Shape(b, h, h, length, d, d, d), refinement, gpu_model.DTYPE, 0.0, "cuda")
    dots = 2 * b * h * length * 5 * d  # scores of P, two tables, scores of R, values
    return [*found, point(step_launch(task, content=False)._replace(operations=dots), f"B {b} H {h} D {d}, {length} in the cache")]


def measured(files: list[Row]) -> list[Point]:
    """Our calls in every file of attn_bench.py, on whatever device."""
    found = []
    for results in files:
        rates = results.get("rates")
        if not rates:  # of another benchmark
            continue
        best = Rates(rates["copy_gb_per_s"] * 1e9, rates["matmul_tflops"] * 1e12)
        for row in results["rows"]:
            if (
                row["role"] != "ours"
                or row["layout"] != "padded"
                or row["pass"] == "fwd+bwd"
                or row["dtype"] != rates["matmul_dtype"]
                or not row.get("bytes")
            ):
                continue
            refinement = row["refinement"] + (" between Gaussians" if row["backbone"] != "dot-product" else "")
            problem = f"B {row['B']} H {row['H']} L {row['L']} D {row['D']}"
            name = f"{row['provider']} {row['pass']}, {refinement}"
            moved, operations = float(row["bytes"]), float(row["operations"])
            found.append(Point(results["device"], problem, name, moved, operations, row["median_ms"], best, measured=True))
    return found


def table(points: list[Point]) -> list[str]:
    lines = ["| problem | kernel or call | MB | operations per byte | bound by | ms | share of the roof | |", "|--" * 8 + "|"]
    for p in points:
        mark = "" if p.measured else f"{PREDICTION}, waits for {p.limit}"
        cells = [
            p.problem,
            f"`{p.name}`",
            f"{p.moved / 1e6:.3g}",
            f"{p.intensity:.1f}",
            p.bound,
            f"{p.ms:.3g}",
            f"{p.share:.0%}",
            mark,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(points: list[Point]) -> str:
    """The page's tables, a part per device."""
    lines: list[str] = []
    for device in dict.fromkeys(p.device for p in points):
        of = [p for p in points if p.device == device]
        for kind in (True, False):
            some = [p for p in of if p.measured == kind]
            if some:
                ridges = sorted({round(p.rates.matmul / p.rates.copy, 1) for p in some})
                ridge = " to ".join(f"{x:g}" for x in dict.fromkeys((ridges[0], ridges[-1])))
                word = "measured" if kind else f"{PREDICTION}, not a measurement"
                lines += ["", f"**{device}**: {word}; the ridge is at {ridge} operations per byte.", "", *table(some)]
    if all(p.measured is False or p.device.startswith("CPU") for p in points):
        lines += ["", "On a GPU: not measured yet."]
    return "\n".join(lines).strip() + "\n"


def roofline(points: list[Point]) -> "Figure":
    """A panel per device and kind: operations a second against operations per byte, under the roof."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, bool], list[Point]] = {}
    for p in points:
        panels.setdefault((p.device, p.measured), []).append(p)
    panels = {key: some for key, some in panels.items() if len(some) >= FEWEST}
    figure = Figure(figsize=(5.6 * len(panels), 4.4), layout="constrained")
    for axis, ((device, real), some) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        rates = some[0].rates
        low, high = min(p.intensity for p in some) / 2, max(max(p.intensity for p in some), rates.matmul / rates.copy) * 3
        ridge = rates.matmul / rates.copy
        axis.plot(
            [low, ridge, high], [low * rates.copy / 1e9, rates.matmul / 1e9, rates.matmul / 1e9], color="#333333", linewidth=1
        )
        groups = list(dict.fromkeys(p.problem for p in some))
        for i, problem in enumerate(groups):
            of = [p for p in some if p.problem == problem]
            style: dict[str, Any] = {"color": f"C{i % 10}"} if real else {"color": "none", "edgecolor": f"C{i % 10}"}
            axis.scatter([p.intensity for p in of], [p.operations / p.ms / 1e6 for p in of], s=26, label=problem, **style)
        axis.set(xscale="log", yscale="log", xlabel="operations per byte of device memory", ylabel="1e9 operations a second")
        axis.set_title(f"{device}\n{'measured, whole calls' if real else PREDICTION + ', a point per kernel'}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=6, frameon=False, ncols=2 if len(groups) > 8 else 1)
    return figure


def quality(entries: list[Row]) -> "Figure | None":
    """Test NDCG@10 against seconds of training, a panel per data set, from study.json."""
    from matplotlib.figure import Figure

    cells: dict[tuple[str, str, int], list[Row]] = {}
    for entry in entries:
        if entry.get("group", "core") in ("core", "depth"):
            cells.setdefault((entry["dataset"], entry["refinement"], entry["layers"]), []).append(entry)
    datasets = list(dict.fromkeys(name for name, _, _ in cells))
    if not datasets:
        return None
    figure = Figure(figsize=(4.2 * len(datasets), 3.9), layout="constrained")
    colors = {"none": "#777777", "simple": "#6c8ebf", "value": "#e8a33d", "additive": "#0b7a75", "stochastic": "#d1495b"}
    for axis, dataset in zip(figure.subplots(1, len(datasets), squeeze=False)[0], datasets, strict=True):
        for (name, refinement, layers), runs in cells.items():
            if name == dataset:
                seconds = [float(run["train_cpu_seconds"]) for run in runs]
                reached = [float(run["test"]["NDCG@10"]) for run in runs]
                spread = statistics.stdev(reached) if len(reached) > 1 else 0.0
                x, y = statistics.fmean(seconds), statistics.fmean(reached)
                axis.errorbar(x, y, spread, fmt="o^sD"[(layers - 1) % 4], color=colors[refinement], markersize=6, capsize=2)
                axis.annotate(
                    f"{'plain' if refinement == 'none' else refinement} {layers}",
                    (x, y),
                    (5, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
        axis.set_title(dataset, fontsize=9, loc="left")
        axis.set_xlabel("CPU seconds of training", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.margins(0.15)
    figure.supylabel("test NDCG@10, mean and deviation over seeds", fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of results, where the report goes, too; default %(default)s"
    )
    folder = parser.parse_args(arguments).results
    files = load(folder)
    resources = [row for results in files if results.get("kind") == "prediction" for row in results["resources"]]
    points = [*measured(files), *predicted(resources)]
    page = markdown(points)
    with atomic(folder / "cost.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    study = folder / "study.json"
    pictures = {"cost_roofline.png": roofline(points)}
    drawn = quality(json.loads(study.read_text(encoding="utf-8"))) if study.exists() else None
    if drawn is not None:
        pictures["cost_quality.png"] = drawn
    for name, figure in pictures.items():
        with atomic(folder / name) as temporary:
            figure.savefig(temporary, format="png", dpi=130)
    print(page)
    return 0


def load(folder: Path) -> list[Row]:
    """Result files with rows, in the order of their names."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [results for results in found if isinstance(results, dict) and "rows" in results]


if __name__ == "__main__":
    sys.exit(main())
