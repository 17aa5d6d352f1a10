"""Predict the time of a call on an H200 from the issue slots of its kernels, without a GPU. A PREDICTION, not a measurement.

    python -m benchmarks.operator.predict
    python -m benchmarks.operator.predict --out benchmarks/results/gpu/predictions.json

The compile report counts the slots that each kernel takes per head and scheduler (`awrsr_kernels/issue_slots.py`). A pass takes

    max(heads * slots / (processors * instructions per cycle * clock), least bytes / bandwidth) + launches * seconds per launch

The rates are those of the former tiled kernels, fitted to the `graph_ms` of `triton` at L 100 and 200 in
`results/gpu/2026-11-28_h200.json`: with their 18,311 and 50,122 slots per head the formula gives all six times of forward and
backward within 7 %. Only the product of instructions per cycle and clock can be fitted: 0.57 and 0.41 instructions per cycle need
the H200's highest clock, 1.98 GHz; at 1.755 GHz they would be 0.64 and 0.46. The present kernels may reach other rates. Problems
with a star have too few heads to fill the processors as the fitted runs did, so that they probably take longer than predicted.

The counted kernels take lengths, which costs them about 1 % more slots than those that a benchmark without padding runs.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from awrsr_kernels.compile_report import CompileCase, compile_cases
from awrsr_kernels.launch_config import LENGTHS, RESIDENT
from awrsr_kernels.tuned import cache_folder, replace_file

from ..common.report import Row, commit, grid, versions
from .roofline import ideal_bytes
from .workloads import PRESETS, Shape, Task

PROCESSORS, CLOCK = 132, 1.98e9
PER_CYCLE = {"fwd": 0.57, "bwd": 0.41}  # instructions of a scheduler
BANDWIDTH = 4.3e12  # bytes a second
LAUNCH = 2e-6  # seconds
FEW_HEADS = 3  # per processor; below it, programs of a whole head leave processors with fewer warps than the fitted runs had
TABLE_LAUNCHES = 3  # of torch, in a backward: the sum over partial gradients of both tables, and a copy of each
WIDTHS = (32, 64)
NOTE = "PREDICTION, not a measurement: device time on an H200, from the issue slots of the compiled kernels"


def length_class(length: int) -> int:
    return next(size for size in (*LENGTHS, RESIDENT) if length <= size)


def slots_of(row: Row, length: int) -> float:
    """Issue slots per head of a kernel, counted at `length` or, in the short classes, for a whole tile, which holds one head."""
    slots = row["issue_slots_100" if row["regime"] == "resident" and length == 100 else "issue_slots"]
    if slots is None:
        raise ValueError(f"the loops of {row['kernel']} were not recognised, so its issue slots are unknown")
    return float(slots)


def seconds(slots: float, heads: int, moved: float, launches: int, pass_: str) -> float:
    issued = heads * slots / (PROCESSORS * PER_CYCLE[pass_] * CLOCK)
    return max(issued, moved / BANDWIDTH) + launches * LAUNCH


def predict(task: Task, kernels: list[Row]) -> Row:
    """The prediction for a problem. kernels: rows of the compile report for its class, forward and backward."""
    s, row = task.shape, {"task": task.label, "B": task.shape.B, "H": task.shape.H, "L": task.shape.L, "D": task.shape.D}
    total = 0.0
    for pass_ in ("fwd", "bwd"):
        chosen = [kernel for kernel in kernels if f"_{pass_}" in kernel["kernel"]]
        slots, moved = sum(slots_of(kernel, s.L) for kernel in chosen), ideal_bytes(task, "padded", pass_)
        launches = len(chosen) + (TABLE_LAUNCHES if pass_ == "bwd" else 0)
        total += seconds(slots, s.B * s.H, moved, launches, pass_)
        row |= {f"{pass_}_slots": slots, f"{pass_}_bytes": moved, f"{pass_}_launches": launches}
        row |= {"predicted_fwd_ms" if pass_ == "fwd" else "predicted_ms": total * 1e3}
    return row | {"few_heads": s.B * s.H < FEW_HEADS * PROCESSORS}


def tasks() -> list[Task]:
    """The recsys preset, at its width and at 64."""
    preset = PRESETS["recsys"]
    shapes = [Shape(b, preset.heads, preset.heads, length, d, d, d) for d in WIDTHS for b, length in preset.sizes()]
    return [Task(shape, "simple", "bfloat16", 0.0, "cuda") for shape in shapes]


COLUMNS: list[tuple[str, int, Any]] = [
    ("problem", -47, lambda r: r["task"]),
    ("fwd slots", 9, lambda r: f"{r['fwd_slots']:,.0f}"),
    ("bwd slots", 9, lambda r: f"{r['bwd_slots']:,.0f}"),
    ("fwd ms", 7, lambda r: f"{r['predicted_fwd_ms']:.4f}"),
    ("fwd+bwd ms", 11, lambda r: f"{r['predicted_ms']:.4f}{'*' if r['few_heads'] else ' '}"),
]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.operator.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write the predictions to")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes that compile (default %(default)s)")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "compiled", help="folder that caches compiled rows")
    options = parser.parse_args(arguments)
    cases = {(length_class(t.shape.L), t.shape.D): None for t in tasks()}
    wanted = [CompileCase("sm_90", "simple", "bfloat16", False, *key) for key in cases]
    compiled = dict(zip(cases, compile_cases(wanted, options.jobs, options.cache), strict=True))
    for row in (row for rows in compiled.values() for row in rows if "error" in row):
        parser.error(f"a kernel does not compile: {row['error']}")
    rows = [predict(task, compiled[length_class(task.shape.L), task.shape.D]) for task in tasks()]
    print(NOTE, *grid(COLUMNS, rows), sep="\n")
    if options.out:
        constants = {"processors": PROCESSORS, "clock_hz": CLOCK, "instructions_per_cycle": PER_CYCLE}
        constants |= {"bytes_per_s": BANDWIDTH, "launch_s": LAUNCH, "fitted_to": "2026-11-28_h200.json, former tiled kernels"}
        about = {"kind": "prediction", "note": NOTE, "device": "NVIDIA H200 (not run)", "commit": commit(), "versions": versions()}
        replace_file(options.out, json.dumps(about | {"constants": constants, "predicted": rows}, indent=1) + "\n")
        print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
