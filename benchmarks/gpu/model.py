"""A PREDICTION of our kernels' times on an H200, on one page, from what is counted without a GPU. Not a measurement.

    python benchmarks/gpu_model.py                                    the recsys and long presets of attn_bench.py, bfloat16
    python -m awrsr_kernels.compile_report --target sm_90 --json report.json
    python benchmarks/gpu_model.py --compile-report report.json --out benchmarks/results     with real registers and shared memory
    python benchmarks/gpu_model.py --measured gpu-out/recsys.json     beside measurements: misses of more than 1.5x are flagged
    python benchmarks/gpu_model.py --explain 512,4,128,64             the times of every launch of one problem

A launch takes the longest of five times, each as if the others were free, and what a launch costs in any case:

    memory    bytes read and written / speed of a copy            every tensor once per launch, as if no launch found
                                                                  in the cache what the one before it left there
    cache     bytes that programs ask for / speed of the L2       W for every program, earlier keys for every row tile
    matmul    operations of whole tiles / (rate * EFFICIENCY)
    lanes     instructions beside the products / their rate       exponentials, masks, sums: per entry of a score tile; its
                                                                  gradient; dropout bits, per entry that draws one
    chain     products that wait for one another * STEP_US,       of the busiest program, or of all programs over how many
              and START_US per wave of programs and per tile      run at once (registers, shared memory, warps allow)
              that one of them begins

A pass is the sum of its launches. Bytes, operations, entries and chains are `launches.py`'s counts, held by a test to what the
interpreted kernels do; registers and shared memory are the compiler's. The constants below are data-sheet numbers or assumptions,
as marked, and the assumptions are the first thing to correct once there is a measurement.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from awrsr_kernels.checks import REFINEMENTS
from awrsr_kernels.launch_config import key_of
from benchmarks.attn_bench import sizes
from benchmarks.common import compare
from benchmarks.common.report import atomic, commit, device_ms
from benchmarks.operator.launches import Launch, task_launches
from benchmarks.operator.roofline import Rates, ideal_bytes
from benchmarks.operator.workloads import BACKBONES, PRESETS, Shape, Task

Row = dict[str, Any]
DTYPE = "bfloat16"
TARGET = "sm_90"
REQUIRED = ("kernel", "refinement", "dtype", "dropout", "target", "length", "width", "config", "registers", "shared_bytes")
MISS = 1.5  # a measurement further from its prediction than this is flagged


@dataclass(frozen=True)
class Gpu:
    """Rates per second and sizes of one multiprocessor."""

    name: str
    copy: float  # bytes read and written
    cache: float  # bytes from the L2
    matmul: float  # 16-bit operations, two per multiply-add
    lanes: float  # instructions, one per lane
    processors: int
    registers: int
    shared: int  # bytes
    warps: int
    programs: int


H200 = Gpu(
    name="NVIDIA H200",
    copy=4.3e12,  # of 4.8 TB/s in NVIDIA's H200 data sheet: 90 %, what large copies reach on such memory
    cache=5.5e12,  # ASSUMED: not in the data sheet; the order that public microbenchmarks of the H100's L2 report
    matmul=790e12,  # of 989 TFLOP/s dense in the data sheet: 80 %, what large matrix products reach
    lanes=132 * 128 * 1.7e9,  # 128 per multiprocessor (Hopper white paper); ASSUMED 1.7 GHz under load, of 1.98 at most
    processors=132,  # data sheet of the H100 SXM, whose chip this is
    registers=65536,  # Hopper tuning guide, as the next three
    shared=228 << 10,
    warps=64,
    programs=32,
)

# All of these are ASSUMED. Together they give plain attention at L 8192, D 64 about 210 causal TFLOP/s forward, within
# what FlashAttention 2 publishes for an H100 (180 to 299); a test holds them to that.
EFFICIENCY = 0.5  # of the matmul rate, in tiles this small
INSTRUCTIONS_PER_WEIGHT = 34  # scale, mask, maximum, exp2 (worth eight: a quarter of the units, twice), sum, convert; at 70 % issue
INSTRUCTIONS_PER_GRADIENT = 14  # subtract, two products, sum, convert; at 70 % issue
INSTRUCTIONS_PER_DROP = 32  # seven Philox rounds over eight weights, unpack, compare, multiply; at 70 % issue
STEP_US = 0.35  # a product with the softmax or conversion behind it, waited for
START_US = 1.5  # first loads from memory and last stores of a program; in the short regime, of each of its tiles
LAUNCH_US = 2.5  # between two kernels of a stream that the host has filled ahead
RESERVED = 1 << 10  # bytes of shared memory that every program costs beside its own (Hopper tuning guide)


class Resources(NamedTuple):
    """What a program takes of a multiprocessor; `known` says whether the compiler said so for this very kernel."""

    registers: int
    shared: int
    known: bool


UNKNOWN = Resources(255, 0, False)  # the most registers that a thread can have: few programs at a time


def find_resources(report: Sequence[Row], launch: Launch, task: Task) -> Resources:
    """The row of a compile report that fits a launch best: kernel, stage and refinement must agree, then the table's classes of
    length and width, the configuration, and dropout if they can. Of several that fit equally well the one with the most registers.
    """
    names = {launch.kernel, f"{launch.kernel}_stage{launch.stage}"}
    wanted = {"refinement": task.refinement, "dtype": task.dtype, "target": TARGET}
    key = key_of(launch.kernel, task.shape.L, task.features, task.itemsize)
    config = None if launch.tile is None else launch.tile._asdict()
    found: list[tuple[bool, bool, bool, int, int]] = []
    for row in report:
        if "error" in row or row["kernel"] not in names or any(row[name] != value for name, value in wanted.items()):
            continue
        classes = key is not None and (row["length"], row["width"]) == (key.length, key.width)
        fits = classes, row["config"] == config, row["dropout"] == (task.dropout_p > 0)
        found.append((*fits, row["registers"], row["shared_bytes"]))
    if not found:
        return UNKNOWN
    best = max(found)
    return Resources(best[3], best[4], known=all(best[:3]))


def at_once(warps: int, resources: Resources, gpu: Gpu) -> int:
    """Programs that one multiprocessor runs at a time, at least one."""
    by_registers = gpu.registers // (-(-resources.registers // 8) * 8 * 32 * warps)
    by_shared = gpu.shared // (resources.shared + RESERVED)
    return max(1, min(by_registers, by_shared, gpu.warps // warps, gpu.programs))


def times_us(launch: Launch, resources: Resources, gpu: Gpu) -> dict[str, float]:
    """The five times of a launch, and its cost."""
    concurrent = gpu.processors * at_once(4 if launch.tile is None else launch.tile.num_warps, resources, gpu)
    waves = -(-launch.programs // concurrent)
    instructions = launch.weights * INSTRUCTIONS_PER_WEIGHT + launch.gradients * INSTRUCTIONS_PER_GRADIENT
    instructions += launch.drops * INSTRUCTIONS_PER_DROP
    return {
        "memory": launch.bytes / gpu.copy * 1e6,
        "cache": launch.loaded / gpu.cache * 1e6,
        "matmul": launch.operations / (gpu.matmul * EFFICIENCY) * 1e6,
        "lanes": instructions / gpu.lanes * 1e6,
        "chain": max(launch.chain, launch.chains / concurrent) * STEP_US + waves * launch.starts * START_US,
        "launch": LAUNCH_US,
    }


def total_us(times: dict[str, float]) -> float:
    """The longest of what runs side by side, and the launch."""
    return max(t for name, t in times.items() if name != "launch") + times["launch"]


def predict(task: Task, report: Sequence[Row] = (), gpu: Gpu = H200) -> list[Row]:
    """A row per pass, with the keys of attn_bench.py's rows but `predicted_ms` in the place of `median_ms`."""
    s, rates = task.shape, Rates(gpu.copy, gpu.matmul)
    launches = task_launches(task, "padded", processors=gpu.processors)
    rows = []
    for p in ("fwd", "bwd", "fwd+bwd"):
        bounds: dict[str, float] = {}
        total, known, count = 0.0, True, 0
        for launch in (x for x in launches if x.pass_ in p.split("+")):
            resources = find_resources(report, launch, task)
            known &= resources.known or launch.tile is None
            times = times_us(launch, resources, gpu)
            longest = max((t, name) for name, t in times.items() if name != "launch")
            bounds[longest[1]] = bounds.get(longest[1], 0.0) + longest[0]
            bounds["launch"] = bounds.get("launch", 0.0) + LAUNCH_US
            total += total_us(times)
            count += 1
        floor = rates.floor_ms(ideal_bytes(task, "padded", p), task.flops(p))
        rows.append(
            {"provider": "triton", "backbone": task.backbone, "refinement": task.refinement, "layout": "padded"}
            | {"B": s.B, "H": s.H, "H_kv": s.H_kv, "L": s.L, "D": s.D, "D_v": s.D_v, "R": s.R}
            | {"dtype": task.dtype, "dropout_p": task.dropout_p, "pass": p, "source": "", "batch_size": s.B}
            | {"predicted_ms": total / 1e3, "floor_ms": floor, "to_floor": total / 1e3 / floor, "launches": count}
            | {"bound_by": max(bounds, key=lambda name: bounds[name]), "bounds_us": bounds, "compiled": known}
        )
    return rows


def explain(task: Task, report: Sequence[Row] = (), gpu: Gpu = H200) -> str:
    """Every launch of a problem with its five times in microseconds, the longest marked: what to work on."""
    names = ("memory", "cache", "matmul", "lanes", "chain")
    lines = [f"PREDICTION, not a measurement: {gpu.name}, {task.label}; microseconds, * is what the launch takes (+ {LAUNCH_US:g})"]
    lines.append(f"{'kernel':<20}{'programs':>9}{'at once':>9}" + "".join(f"{name:>9}" for name in names))
    for launch in task_launches(task, "padded", processors=gpu.processors):
        resources = find_resources(report, launch, task)
        times = times_us(launch, resources, gpu)
        longest = max(names, key=lambda name: times[name])
        together = gpu.processors * at_once(4 if launch.tile is None else launch.tile.num_warps, resources, gpu)
        cells = "".join(f"{f'{times[name]:.2f}' + '*' * (name == longest):>9}" for name in names)
        name = launch.kernel + (f" {launch.stage}" if launch.stage else "")
        guessed = "" if resources.known or launch.tile is None else "?"
        lines.append(f"{name:<20}{launch.programs:>9}{f'{together}{guessed}':>9}{cells}")
    return "\n".join(lines) + "\n"


def resources_used(chosen: Sequence[Task], report: Sequence[Row], gpu: Gpu = H200) -> list[Row]:
    """What the prediction took each of our kernels to need, and how many programs a multiprocessor then runs at a time."""
    found: dict[str, Row] = {}
    for task in chosen:
        for launch in task_launches(task, "padded", processors=gpu.processors):
            if launch.tile is not None:
                used = find_resources(report, launch, task)
                row = {"kernel": launch.kernel, "stage": launch.stage, "refinement": task.refinement, "tile": list(launch.tile)}
                row |= used._asdict() | {"at_once": at_once(launch.tile.num_warps, used, gpu)}
                found[json.dumps(row)] = row
    return list(found.values())


def add_measured(rows: list[Row], measured: dict[str, Any]) -> int:
    """Put measured times beside predicted ones; returns how many of our measured rows have no prediction."""
    ours = [r for r in measured["rows"] if r["provider"] == "triton"]
    replayed = any("graph_ms" in r for r in ours)  # other times may be the host's
    found = {compare.row_key(r): device_ms(r) for r in ours if "graph_ms" in r or not replayed}
    for row in rows:
        time = found.pop(compare.row_key(row), None)
        if time is not None:
            ratio = time / row["predicted_ms"]
            row |= {"measured_ms": time, "measured_over_predicted": ratio, "miss": not 1 / MISS <= ratio <= MISS}
    return len(found)


def tasks(presets: Sequence[str], refinements: Sequence[str], dropout_p: float) -> Iterator[Task]:
    for name in presets:
        preset = PRESETS[name]
        for refinement in refinements:
            for b, length in preset.sizes():
                shape = Shape(b, preset.heads, preset.heads, length, preset.dim, preset.dim, preset.dim)
                yield Task(shape, refinement, DTYPE, dropout_p, "cuda")


def markdown(prediction: dict[str, Any]) -> str:
    """The prediction as a table that says what it is."""
    measured = prediction.get("measured_on")
    lines = [f"**PREDICTION, not a measurement**: {prediction['device']}, commit {prediction['commit'][:12]}."]
    lines += ["Our kernels by the model of `benchmarks/gpu_model.py`; its assumptions stand there and in the JSON beside this.", ""]
    if measured:
        lines.insert(1, f"Beside it what was measured on {measured}; MISS: off by more than {MISS:g}x.")
    names = ["problem", "pass", "predicted ms", "floor ms", "/floor", "mostly", "kernels"]
    names += ["measured ms", "measured / predicted"] if measured else []
    lines += ["| " + " | ".join(names) + " |", "|--|--|" + "--|" * (len(names) - 2)]
    for row in prediction["rows"]:
        sizes = " ".join(f"{k} {row[k]}" for k in ("B", "L", "H", "D", "R"))
        drop = f" dropout {row['dropout_p']:g}" if row["dropout_p"] else ""
        cells = [f"{sizes} {row['dtype']} {row['refinement']}{drop}", row["pass"]]
        cells += [f"{row['predicted_ms']:.3g}" + ("" if row["compiled"] else "?"), f"{row['floor_ms']:.2g}"]
        cells += [f"{row['to_floor']:.1f}x", row["bound_by"], str(row["launches"])]
        if measured and "measured_ms" in row:
            cells += [f"{row['measured_ms']:.3g}", f"{'MISS ' if row['miss'] else ''}{row['measured_over_predicted']:.2f}x"]
        elif measured:
            cells += ["-", ""]
        lines.append("| " + " | ".join(cells) + " |")
    if not all(row["compiled"] for row in prediction["rows"]):
        lines += ["", "?: without the compiler's word on this very kernel; how many programs run at once is a guess."]
    return "\n".join(lines) + "\n"


def load_report(path: Path) -> list[Row]:
    """Rows of a compile report. ValueError with the file's name and the reason if it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path}: must hold a list of rows, as awrsr_kernels.compile_report --json writes it")
    for number, row in enumerate(found):
        required = REQUIRED[:1] if isinstance(row, dict) and "error" in row else REQUIRED
        missing = [name for name in required if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}: row {number} has no {', '.join(missing)}")
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", nargs="+", choices=PRESETS, default=list(PRESETS), help="default: all")
    add("--backbone", choices=BACKBONES, default="dot", help="dot; the stochastic one has no prediction yet")
    add("--refinement", nargs="+", choices=REFINEMENTS, default=["simple"], help="default simple")
    add("--dropout", type=float, default=0.0, metavar="P", help="default 0")
    add("--compile-report", type=Path, metavar="FILE", help="registers and shared memory (without it: guessed)")
    add("--measured", type=Path, metavar="FILE", help="results.json of attn_bench.py from a GPU, to stand beside the prediction")
    add("--explain", type=sizes, metavar="B,H,L,D[,R]", help="the launches of this problem instead of the presets, time by time")
    add("--out", type=Path, metavar="DIR", help="write prediction_h200.json and prediction_h200.md")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if not 0 <= options.dropout < 1:
        parser.error(f"argument --dropout: was {options.dropout}, must be in [0, 1)")
    if options.backbone != "dot":
        parser.error("argument --backbone: was stochastic, must be dot: what the kernels do between Gaussians is not counted yet")
    report: list[Row] = []
    measured: dict[str, Any] | None = None
    for name, path in (("compile-report", options.compile_report), ("measured", options.measured)):
        try:
            if path is not None and name == "measured":
                measured = compare.load(path)
            elif path is not None:
                report = load_report(path)
        except ValueError as error:
            parser.error(f"argument --{name}: {error}")
    if options.explain:
        b, h, length, d, *r = options.explain
        for refinement in options.refinement:
            task = Task(Shape(b, h, h, length, d, d, r[0] if r else d), refinement, DTYPE, options.dropout, "cuda")
            print(explain(task, report))
        return 0
    chosen = list(tasks(options.preset, options.refinement, options.dropout))
    rows = [row for task in chosen for row in predict(task, report)]
    command = shlex.join(["python", "benchmarks/gpu_model.py", *(sys.argv[1:] if argv is None else argv)])
    prediction: dict[str, Any] = {"kind": "prediction", "device": H200.name, "commit": commit(), "command": command}
    prediction["assumptions"] = asdict(H200) | {
        "efficiency": EFFICIENCY, "step_us": STEP_US, "start_us": START_US, "launch_us": LAUNCH_US,
        "instructions": {"weight": INSTRUCTIONS_PER_WEIGHT, "gradient": INSTRUCTIONS_PER_GRADIENT, "drop": INSTRUCTIONS_PER_DROP},
    }  # fmt: skip
    if measured is not None:
        left = add_measured(rows, measured)
        prediction["measured_on"] = measured["device"]
        print(f"{left} measured rows of our kernels have no prediction; {sum(r.get('miss', False) for r in rows)} are missed\n")
    prediction["rows"], prediction["resources"] = rows, resources_used(chosen, report)
    print(markdown(prediction), end="")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for kind, text in (("json", json.dumps(prediction, indent=1) + "\n"), ("md", markdown(prediction))):
            with atomic(options.out / f"prediction_h200.{kind}") as file:
                file.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
