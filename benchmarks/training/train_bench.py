"""Speed and memory of training and full-ranking evaluation, compared between layouts, refinements and backends.

examples, from the repository root:
  python benchmarks/train_bench.py --quick                  synthetic histories; under a minute
  python benchmarks/train_bench.py --data beauty.txt --threads 1 --out bench-out/train
  python benchmarks/train_bench.py --data beauty.txt --threads 1 --backends torch --layouts packed --refinements none additive
                                                            only what refinement costs
  python benchmarks/train_bench.py --data beauty.txt --backbone stosa --layers 1 --heads 4 --max-len 100 --backends torch stosa
                                                            our stochastic attention and STOSA's code, in the same model
  python benchmarks/train_bench.py --data beauty.txt --threads 1 --backends torch sdpa2 sdpa2-split --attention-dropout 0
                                                            our attention and stock attention's, in the same model
  python benchmarks/attn_bench.py --compare before/results.json after/results.json

A training step makes its batch, runs the forward pass, computes the loss on real events only, runs the backward pass and updates
the parameters (AdamW). An evaluation step ranks the whole catalogue for the last events of a batch of users, and leaves seen items
out unless histories repeat items. Layouts: packed is the model's own; bucketed sorts histories by length and pads each batch to
its longest; padded pads all histories to --max-len. All layouts use the same parameters, sequences and negatives. A sample is
--steps steps, and contestants take turns. A row shows the median of its samples, and peak memory on top of parameters and optimizer
state.

Backends torch, reference and triton are ours. The others are rivals that replace the call of attention in the same model. stosa
is STOSA's own formulation. sdpa2 makes two stock attention calls with concatenated values, sdpa2-split one per value block; torch
chooses their kernel, and results.json names it. sdpa2-flash and sdpa2-split-cudnn (as sdpa2-split), sdpa2-efficient, sdpa2-cudnn
and sdpa2-math (as sdpa2) allow one kernel only; if that cannot run, they are left out, with torch's reason. Stock calls pad
histories on the right; in layout packed only attention pads. They cannot drop weights of refinement additive, which needs one
mask for both calls: set --attention-dropout 0. "vs rival" is the time of the fastest rival with this refinement, in any layout,
divided by the time of the row.

Before anything is timed, every contestant must follow the loss curve of the definition (backend reference, padded, float64) over
30 steps without dropout, in float32 and, if the backend supports it, in float64. It must also give the same ranks, except where
scores are equal up to rounding. If one does not, the benchmark stops with exit status 1 and writes nothing.

"to plain" is the time of a step divided by that of refinement none in the same layout and backend. The column CPU next to it is the
same ratio of processor time, which is more reliable on a busy machine.
"""

import argparse
import itertools
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from awrsr.config import EARLIER, AWRSRConfig
from awrsr.data.readers import read
from awrsr.data.splits import split
from awrsr.data.synthetic import make
from awrsr.training.batches import Windows
from awrsr.training.losses import LOSSES
from awrsr_kernels.checks import STOCHASTIC_ATTENTION_REFINEMENTS
from awrsr_kernels.tuning.arguments import number, whole

from ..common import report
from ..common.arguments import add_flag, make_parser, settle_machine
from ..common.clock import WrongResult
from ..common.pages import LAYOUTS, TRAINING, markdown
from ..common.stock import FORMS
from .contestants import (
    GATE_STEPS,
    PASSES,
    RIVALS,
    TOLERANCE,
    TrainingTask,
    Work,
    cannot_run,
    check,
    contestant,
    measure_memory,
    name_kernels,
    race,
    yardstick,
)
from .report import make_rows, table

BACKENDS = ("torch", "reference", "triton", *RIVALS)


def options_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("problem").add_argument
    add("--data", type=Path, metavar="FILE", help="file of histories in any format that awrsr reads (default: synthetic histories)")
    add("--backbone", choices=("sasrec", "stosa"), default="sasrec", help="kind of model (default sasrec)")
    add("--loss", nargs="+", choices=LOSSES, help="training losses, with one negative (default bce; for stosa, bpr)")
    add("--batch-size", type=whole(1), default=256, metavar="B", help="number of sequences per step (default 256)")
    add("--max-len", type=whole(1), default=50, metavar="L", help="number of events that the model reads (default 50)")
    add("--hidden", type=whole(1), default=64, metavar="E", help="width of the model (default 64)")
    add("--layers", type=whole(1), default=2, metavar="N", help="number of blocks (default 2)")
    add("--heads", type=whole(1), default=2, metavar="H", help="number of attention heads (default 2)")
    add("--rank", type=whole(1, 256), default=32, metavar="R", help="number of columns of W_q and W_k (default 32)")
    add(
        "--attention-dropout",
        type=number(0, 1, "in [0, 1)"),
        metavar="P",
        help=f"dropout rate of attention weights (default {AWRSRConfig(num_items=1).attention_dropout})",
    )
    add = parser.add_argument_group("contestants").add_argument
    add(
        "--refinements",
        nargs="+",
        choices=STOCHASTIC_ATTENTION_REFINEMENTS,
        default=["none", "additive"],
        help="refinements to measure (default none additive)",
    )
    add("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="layouts to measure (default all three)")
    add(
        "--backends",
        nargs="+",
        choices=BACKENDS,
        help="backends to measure, see above (default torch reference, on a GPU also triton)",
    )
    add = parser.add_argument_group("measurement").add_argument
    add("--steps", type=whole(1), metavar="N", help="number of training steps per sample (default 16)")
    add("--eval-users", type=whole(1), default=4096, metavar="N", help="number of users ranked per sample (default 4096)")
    add("--quick", action="store_true", help="use batches of at most 64, 2 steps, 128 users and 3 samples")
    for name in ("--reps", "--device", "--out"):
        add_flag(add, name)
    add_flag(add, "--budget", default=60.0, help="seconds of timing per pass and loss (default 60)")
    add_flag(add, "--threads", help="number of CPU threads; with 1, CPU seconds are comparable")
    add_flag(add, "--seed", help="random seed of parameters, order, negatives and the sample of users (default 0)")
    return parser


def settle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in defaults that depend on the machine or on other options, and refuse options that contradict each other."""
    settle_machine(parser, options)
    options.backends = list(dict.fromkeys(options.backends or BACKENDS[: 3 if options.device == "cuda" else 2]))
    options.loss = options.loss or ["bce" if options.backbone == "sasrec" else "bpr"]
    if options.backbone == "sasrec" and (wrong := {"stochastic", "stosa"} & {*options.refinements, *options.backends}):
        parser.error(f"argument --backbone: was sasrec, must be stosa for {wrong.pop()}")
    if options.backbone == "stosa" and (wrong := {"bce", "gbce"} & {*options.loss}):
        parser.error(f"argument --loss: was {wrong.pop()}, which does not work with distances as scores; use bpr")
    if options.layouts == ["packed"] and options.backends == ["stosa"]:
        parser.error("argument --layouts: was packed, which STOSA's formulation does not support; use padded")
    stock = [name for name in options.backends if name in FORMS]
    if stock and options.backbone == "stosa":
        parser.error(f"argument --backends: was {stock[0]}, which is for --backbone sasrec; use stosa")
    if stock and "additive" in options.refinements and options.attention_dropout != 0:
        parser.error(f"argument --backends: was {stock[0]}, which cannot drop weights of additive; set --attention-dropout 0")
    for name in options.backends if options.device == "cpu" else ():
        if name == "triton" or (name in FORMS and not FORMS[name].on_cpu):
            parser.error(f"argument --backends: was {name}, which needs a GPU; use torch or reference")
    if options.hidden % options.heads:
        parser.error(f"argument --heads: was {options.heads}, must divide --hidden, {options.hidden}")
    options.refinements, options.layouts = (list(dict.fromkeys(x)) for x in (options.refinements, options.layouts))
    if options.quick:
        options.batch_size, options.eval_users = min(options.batch_size, 64), min(options.eval_users, 128)
        options.steps, options.reps = options.steps or 2, options.reps or 3
    options.steps = options.steps or 16


def contestants(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(refinement, layout, backend) of each; STOSA's formulation has no packed layout."""
    every = itertools.product(options.refinements, options.layouts, options.backends)
    return [each for each in every if each[1:] != ("packed", "stosa")]


def gate(task: TrainingTask, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Check every contestant against the definition, and return how far off each was. Raises WrongResult."""
    deviations = []
    for refinement in options.refinements:
        say(f"gate: {refinement}, {task.loss}: the definition")
        wanted = yardstick(task, refinement)
        for _, layout, backend in (each for each in contestants(options) if each[0] == refinement):
            for dtype, tolerance in TOLERANCE.items():
                halves = backend == "triton" or (backend in FORMS and not FORMS[backend].on_cpu)
                if halves and dtype == torch.float64:
                    continue
                it = contestant(task, refinement, layout, backend, dropout=0.0)
                off = check(it, wanted, dtype)
                say(f"gate: {it.name}, {task.loss}, {str(dtype)[6:]}: off by {off:.1e}")
                named = {"provider": backend, "layout": layout, "refinement": refinement, "loss": task.loss}
                deviations.append(named | {"dtype": str(dtype)[6:], "steps": GATE_STEPS, "off": off, "tolerance": tolerance})
    return deviations


def leave_out(task: TrainingTask, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Take backends whose only kernel cannot run out of the options, and return them with torch's reason."""
    left = []
    for backend in [name for name in options.backends if name in FORMS and FORMS[name].kernel]:
        for refinement in options.refinements:
            reason = cannot_run(task, refinement, options.layouts[0], backend)
            if reason is not None and backend in options.backends:
                options.backends.remove(backend)
                left.append({"provider": backend, "reason": reason})
                print(f"not run: {backend}: {reason}", flush=True)
    return left


def measure(task: TrainingTask, options: argparse.Namespace, passes: Sequence[str]) -> list[report.Row]:
    """Rows of one task: memory, then times side by side; prints the table."""
    draw = np.random.default_rng(options.seed).permutation
    targets = draw(len(task.targets))[: options.eval_users]
    work = Work(draw(len(task.windows))[: options.steps * options.batch_size], targets)
    rows: list[report.Row] = []
    for pass_ in passes:
        entered = [contestant(task, *each) for each in contestants(options)]
        for it in entered:
            say(f"memory: {pass_}, {it.name}")
            measure_memory(it, pass_, work)
        race(entered, pass_, work, options.reps, options.budget)
        for it in entered:
            name_kernels(it, pass_, work)
        rows += make_rows(entered, pass_, work)
    print("\n".join(table([r for r in rows if r["pass"] == p]) for p in passes), flush=True)
    return rows


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = options_parser()
    options = parser.parse_args(argv)
    settle(parser, options)
    begin = time.perf_counter()
    random.seed(options.seed)
    c = {name: getattr(options, name) for name in ("backbone", "max_len", "hidden", "layers", "heads", "rank")}
    c = EARLIER["model"] | c  # committed results are of these, and no rival has a learned scale
    c |= {} if options.attention_dropout is None else {"attention_dropout": options.attention_dropout}
    tasks = []
    try:
        parts = split(read(options.data) if options.data else make())
        config = AWRSRConfig(num_items=parts.histories.num_items, **c)
        sizes = options.batch_size, torch.device(options.device), options.seed, options.data.name if options.data else "synthetic"
        tasks = [TrainingTask(parts, config, loss, *sizes) for loss in dict.fromkeys(options.loss)]
        Windows(parts, options.max_len)  # raises ValueError if no history can be trained on
    except ValueError as error:
        parser.error(f"argument --data: {error}")
    about = report.about(options.device, "lightning") | {"command": report.command_line("train_bench.py", argv)}
    skipped = leave_out(tasks[0], options)
    if not options.backends:
        print("train_bench.py: no backend can run, nothing was written", file=sys.stderr)
        return 1
    try:
        checked = [row for task in tasks for row in gate(task, options)]
    except WrongResult as error:
        print(f"train_bench.py: WRONG, nothing was written: {error}", file=sys.stderr)
        return 1
    rows = [row for i, p in enumerate(tasks) for row in measure(p, options, PASSES if i == 0 else PASSES[:1])]
    results = about | {"kind": TRAINING, "rows": rows, "gate": checked} | ({"skipped": skipped} if skipped else {})
    report.finish(results, begin, options.out, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
