"""Predict the time of each kernel launch on an H200 from counts and the compile report, to judge a design before it runs.

    python -m awrsr_kernels.compile_report --target sm_90 --dtype bfloat16 --json report.json
    python -m benchmarks.gpu.predict 512,4,128,64 --refinement simple additive --compile-report report.json

The time of a launch is the longest of five times, each computed as if the others were zero, and at least LAUNCH_US:

    memory    bytes read and written / speed of a copy            every tensor once per launch, as if the cache kept
                                                                  nothing from the launch before
    cache     bytes that programs load / speed of the L2          W for every program, earlier keys for every row tile
    matmul    operations of whole tiles / (rate * EFFICIENCY)
    lanes     instructions other than products / their rate       exponentials, masks, sums: per entry of a score tile; its
                                                                  gradient; dropout bits, per entry that draws one
    chain     products that wait for each other * STEP_US,        of the busiest program, or of all programs divided by how
              and START_US per wave of programs and per tile      many run at once (by the registers, shared memory and
              that one of them begins                             warps in the compile report)

Bytes, operations, entries and chains are counted by `launches.py`; a test compares these counts with what the interpreted kernels
do. Constants are from data sheets or marked as ASSUMED. Of 24 times measured in bfloat16 at recommender sizes, 21 were within a
factor of 1.5 of the prediction, the rest within 1.6. Stochastic attention is not counted yet.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awrsr_kernels.checks import REFINEMENTS
from awrsr_kernels.launch_config import key_of
from awrsr_kernels.tuning.arguments import number, sizes

from ..common.arguments import make_parser
from ..common.report import Column, Row, grid
from ..operator.launches import PROCESSORS, Launch, task_launches
from ..operator.roofline import Rates, ideal_bytes
from ..operator.workloads import Shape, Task

TARGET, DTYPE = "sm_90", "bfloat16"
COPY = 4.3e12  # bytes read and written: 90 % of the 4.8 TB/s in NVIDIA's H200 data sheet, what large copies reach on such memory
CACHE = 5.5e12  # bytes from the L2, ASSUMED: the order that public microbenchmarks of the H100's L2 report
MATMUL = 790e12  # 16-bit operations: 80 % of the 989 TFLOP/s dense in the data sheet, what large matrix products reach
LANES = PROCESSORS * 128 * 1.7e9  # instructions: 128 per multiprocessor (Hopper white paper); ASSUMED 1.7 GHz under load
# These are ASSUMED. Together they give plain attention at L 8192, D 64 about 210 causal TFLOP/s forward, within what
# FlashAttention 2 publishes for an H100 (180 to 299); a test holds them to that.
EFFICIENCY = 0.5  # of the matmul rate, in tiles this small
INSTRUCTIONS_PER_WEIGHT = 34  # scale, mask, maximum, exp2 (worth eight: a quarter of the units, twice), sum, convert; at 70 % issue
INSTRUCTIONS_PER_GRADIENT = 14  # subtract, two products, sum, convert; at 70 % issue
INSTRUCTIONS_PER_DROP = 32  # seven Philox rounds over eight weights, unpack, compare, multiply; at 70 % issue
STEP_US = 0.35  # a product with the softmax or conversion behind it, waited for
START_US = 1.5  # first loads from memory and last stores of a program; in the short regime, of each of its tiles
LAUNCH_US = 2.5  # between two kernels of a stream that the host has filled ahead


UNKNOWN = (2, False)  # of four warps whose threads have the most registers that there are


def occupancy(report: Sequence[Row], launch: Launch, task: Task) -> tuple[int, bool]:
    """Programs that a multiprocessor runs at a time, and whether the compiler said so for this very kernel.

    From the row of a compile report that fits a launch best.

    Kernel, stage and refinement must agree, then the table's classes of length and width, the configuration, and dropout if they
    can. Of several that fit equally well the one with most registers.
    """
    names = {launch.kernel, f"{launch.kernel}_stage{launch.stage}"}
    wanted = {"refinement": task.refinement, "dtype": task.dtype, "target": TARGET}
    key = key_of(launch.kernel, task.shape.L, task.features, task.itemsize)
    config = None if launch.tile is None else launch.tile._asdict()
    fits: list[tuple[bool, bool, bool, int, int]] = []
    for row in report:
        if "error" in row or row["kernel"] not in names or any(row[name] != value for name, value in wanted.items()):
            continue
        classes = key is not None and (row["length"], row["width"]) == (key.length, key.width)
        agree = classes, row["config"] == config, row["dropout"] == (task.dropout_p > 0)
        fits.append((*agree, row["registers"], max(1, row["programs_per_processor"])))
    return (max(fits)[4], all(max(fits)[:3])) if fits else UNKNOWN


def times_us(launch: Launch, programs: int) -> dict[str, float]:
    """The five times of a launch, if a multiprocessor runs this many programs at once."""
    concurrent = PROCESSORS * programs
    waves = -(-launch.programs // concurrent)
    instructions = launch.weights * INSTRUCTIONS_PER_WEIGHT + launch.gradients * INSTRUCTIONS_PER_GRADIENT
    instructions += launch.drops * INSTRUCTIONS_PER_DROP
    return {
        "memory": launch.bytes / COPY * 1e6,
        "cache": launch.loaded / CACHE * 1e6,
        "matmul": launch.operations / (MATMUL * EFFICIENCY) * 1e6,
        "lanes": instructions / LANES * 1e6,
        "chain": max(launch.chain, launch.chains / concurrent) * STEP_US + waves * launch.starts * START_US,
    }


def predict(task: Task, report: Sequence[Row] = ()) -> list[Row]:
    """A row per launch: its size, what limits it, and its times in microseconds."""
    rows = []
    for launch in task_launches(task, "padded", processors=PROCESSORS):
        programs, known = UNKNOWN if launch.tile is None else occupancy(report, launch, task)
        times = times_us(launch, programs)
        longest = max(times, key=lambda name: times[name])
        row = {"kernel": launch.name, "pass": launch.pass_, "programs": launch.programs, "at_once": PROCESSORS * programs}
        row |= {"known": known or launch.tile is None, "bytes": launch.bytes, "operations": launch.operations}
        rows.append(row | times | {"waits_for": longest, "predicted_us": times[longest] + LAUNCH_US})
    return rows


COLUMNS: list[Column] = [
    ("kernel", -20, lambda r: r["kernel"]),
    ("programs", 8, lambda r: str(r["programs"])),
    ("at once", 8, lambda r: f"{r['at_once']}{'' if r['known'] else '?'}"),
    ("MB", 8, lambda r: f"{r['bytes'] / 1e6:.3g}"),
    ("GFLOP", 8, lambda r: f"{r['operations'] / 1e9:.3g}"),
    *((name, 8, lambda r, name=name: f"{r[name]:.2f}") for name in ("memory", "cache", "matmul", "lanes", "chain")),  # type: ignore[misc]
    ("waits for", -9, lambda r: r["waits_for"]),
]


def text(task: Task, rows: list[Row]) -> str:
    """The launches of a problem, then both passes and their floors."""
    head = f"PREDICTION, not a measurement: NVIDIA H200, {task.label}; microseconds, and {LAUNCH_US:g} more for each launch"
    lines = [head, *grid(COLUMNS, rows)]
    for p in ("fwd", "bwd"):
        total = sum(row["predicted_us"] for row in rows if row["pass"] == p)
        floor = Rates(COPY, MATMUL).floor_ms(ideal_bytes(task, "padded", p), task.flops(p)) * 1e3
        lines.append(f"{p}: {total:.1f} us, {total / floor:.1f} times its floor")
    return "\n".join([*lines, *["?: without the compiler's word on this very kernel, a guess"] * any(not r["known"] for r in rows)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.usage = None
    add: Any = parser.add_argument
    add("problem", nargs="+", type=sizes, metavar="B,H,L,D[,R]", help="sizes of a call; R is D if left out")
    add("--refinement", nargs="+", choices=REFINEMENTS, default=["simple"], help="refinements to predict (default simple)")
    add("--dropout", type=number(0, 1, "in [0, 1)"), default=0.0, metavar="P", help="dropout rate (default 0)")
    add(
        "--compile-report",
        type=Path,
        metavar="FILE",
        help="JSON file of compile_report, which says how many programs run at once (default: a guess)",
    )
    options = parser.parse_args(argv)
    try:
        report = json.loads(options.compile_report.read_text(encoding="utf-8")) if options.compile_report else []
    except (OSError, ValueError) as error:
        parser.error(f"argument --compile-report: {options.compile_report}: {error}")
    for b, h, length, d, *r in options.problem:
        for refinement in options.refinement:
            task = Task(Shape(b, h, h, length, d, d, r[0] if r else d), refinement, DTYPE, options.dropout, "cuda")
            print(text(task, predict(task, report)), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
