"""Time and memory of refined attention compared with its rivals. Every result is checked against the definition first.

examples, from the repository root:
  python benchmarks/attn_bench.py                         a minute on two cores; on a GPU, the recommender preset
  python benchmarks/attn_bench.py --quick --out out       fewer problems; writes out/results.json and .md
  python benchmarks/attn_bench.py --preset long --dtype bfloat16 --providers triton torch sdpa2 sdpa2-flash sdpa2-cudnn
  python benchmarks/attn_bench.py --batch 64 128 --length 50 --refinement all --dropout 0.1
  python benchmarks/attn_bench.py --shapes 128,2,50,32 16,8,512,64,32 --passes fwd
  python benchmarks/attn_bench.py --lengths shared/data/beauty.txt --users 512 --window 50
                                                          the same histories padded, bucketed and packed
  python benchmarks/attn_bench.py --backbone stochastic --refinement all --dropout 0.1
                                                          stochastic attention, on a CPU at STOSA's sizes
  python benchmarks/attn_bench.py --refinement lagged --preset recsys
  python benchmarks/attn_bench.py --precompile 8
  python benchmarks/attn_bench.py --compare before/results.json after/results.json --threshold 1.15

providers, rivals: textbook (L x L matrices); textbook+compile; sdpa2 (two stock attention calls); sdpa2-split (one stock call per
value block, so that flash kernels can run); sdpa2-flash and sdpa2-split-cudnn (sdpa2-split by this kernel only), sdpa2-efficient,
sdpa2-cudnn and sdpa2-math (sdpa2 by this kernel only); sdpa2+compile; flex2 (FlexAttention, GPU); flex2-flash (sdpa2-split in
FlexAttention by its FLASH backend, GPU, half precision); varlen2 (varlen_attn, GPU, packed); lagged2 (for --refinement lagged:
stock attention with log-sum-exps; the others, but for textbook, cannot compute it). A kernel that cannot run is left out with
torch's reason.
providers, ours: reference, torch and triton; torch-jagged and triton-jagged (the same on packed rows, as jagged tensors).
provider sdpa: plain attention, for comparison; it computes something else, and less.
providers with --backbone stochastic: stosa (STOSA's formulation, L x L matrices); stosa+compile; sdpa2-squares (stock attention
calls, CPU); flex2-squares (the same in FlexAttention, GPU); sdpa (plain attention of the means); and ours.

"vs rival" is the time of the fastest rival, in any layout, divided by the time of the row: above 1, the row is faster than every
rival. On a GPU the longer of the times of device and host counts. "vs rival by graph" is the same for times of CUDA graphs, with
a fastest rival of their own. results.json names these rivals, and under "kernels" the kernels that a call ran, as the profiler saw
them; on a CPU, only stock attention's. On a GPU,
"median ms" is the time on the device, "host ms" the time on the host, and "graph ms" the time of the call replayed from a CUDA
graph; where a call cannot be captured, results.json gives the reason. Peak memory is what the allocator holds on top of the
inputs. A provider whose output or gradients differ from the float64 reference is not timed; the exit status is then 1.

"copy" and "matmul" are shares of the best rates that this run measured on this device, with a copy of large tensors and a large
matrix product. Bytes are ideal (each input, output and W once), and operations come from the formula in workloads.py, so that
providers can be compared. "/floor" is the time divided by the longer of two times: that which the bytes and that which the
operations take at these rates. 1 is as fast as the device allows; on a CPU, small problems stay in the cache and can be faster than
that.
"""

import os
import sys

if not __package__:  # run as a script: `benchmarks` is importable, and its folder `operator` does not hide the standard library's
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from awrsr_kernels.checks import STOCHASTIC_ATTENTION_REFINEMENTS
from awrsr_kernels.tuning.arguments import number, sizes, whole
from awrsr_kernels.tuning.clock import Clock
from benchmarks.common import compare
from benchmarks.common.arguments import SECONDS, add_flag, make_parser, settle_machine
from benchmarks.common.clock import WrongResult, reason_of
from benchmarks.common.pages import markdown
from benchmarks.common.report import Row, about, command_line, finish
from benchmarks.operator import workloads
from benchmarks.operator.gpu_only import precompile, time_graphs
from benchmarks.operator.measure import PASSES, Entrant, Gate, measure_memory, name_kernels, race
from benchmarks.operator.providers import PROVIDERS, Provider, side_by_side
from benchmarks.operator.report import graph_reasons, make_rows, table
from benchmarks.operator.roofline import Rates, free_bytes, measure_rates
from benchmarks.operator.workloads import BACKBONES, DOT, LAGGED, OPERATOR, Shape, Task, build


def options_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument_group("problem").add_argument
    add(
        "--backbone",
        choices=BACKBONES,
        default="dot",
        help="dot-product attention (dot, default) or stochastic attention, as in STOSA (stochastic)",
    )
    default = "Default: recsys; on a CPU, with B 32 or, for --backbone stochastic, STOSA's sizes (B 128, H 4, D 16, L 50..200)"
    add(
        "--preset", choices=workloads.PRESETS, help=f"set of problems. recsys: L 20..200, B 128..2048; long: L 512..8192. {default}"
    )
    add("--quick", action="store_true", help="only B 32 with L 20 and 50, and few samples")
    add(
        "--shapes",
        nargs="+",
        action="extend",
        type=sizes,
        metavar="B,H,L,D[,R]",
        help="sizes of your own problems; R is D if left out",
    )
    add(
        "--batch",
        nargs="+",
        type=whole(1),
        metavar="B",
        help="batch sizes, instead of the preset's; with --lengths, the number of users per call",
    )
    add("--length", nargs="+", type=whole(1), metavar="L", help="lengths, instead of the preset's")
    add("--lengths", type=Path, metavar="FILE", help="file of real histories, one user per line: user id, then item ids")
    add("--users", type=whole(1), default=256, metavar="N", help="with --lengths: number of users to sample (default 256)")
    add(
        "--window",
        type=whole(1),
        default=50,
        metavar="L",
        help="with --lengths: keep the last L items of each history (default 50)",
    )
    add("--heads", type=whole(1), metavar="H", help="number of query heads")
    add("--dim", type=whole(1, 256), metavar="D", help="number of features of queries and keys")
    add(
        "--refinement",
        nargs="+",
        choices=(*STOCHASTIC_ATTENTION_REFINEMENTS, LAGGED, "all"),
        default=["simple"],
        help="refinements to measure (default simple); lagged, which all leaves out: additive with two lags and shift, half of the "
        "heads plain",
    )
    add("--dtype", choices=workloads.DTYPES, help="data type (default: float32 on a CPU, bfloat16 on a GPU)")
    add(
        "--dropout",
        type=number(0, 1, "in [0, 1)"),
        default=0.0,
        metavar="P",
        help="dropout rate of the weights that multiply the values (default 0)",
    )
    add = parser.add_argument_group("measurement").add_argument
    add(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        help="providers to measure (default: all of this backbone; on a CPU, without those that compile)",
    )
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="passes to report (default: all three)")
    for name in ("--device", "--threads", "--reps", "--budget", "--out"):
        add_flag(add, name)
    add("--limit", type=SECONDS, default=float("inf"), metavar="S", help="start no new problem after S seconds")
    add("--precompile", type=whole(1), metavar="N", help="first compile all kernels, in N processes")
    add = parser.add_argument_group("comparison instead of a measurement").add_argument
    add(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="list the rows of B that are slower or larger than in A; the exit status is 1 if there are any",
    )
    times = number(1, 1e9, "a number of at least 1")
    add("--threshold", type=times, metavar="X", help="with --compare: accept up to X times the figure of A (default 1.1)")
    return parser


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that contradict each other or do not suit the machine, and fill in defaults."""
    if options.threshold and not options.compare:
        parser.error("argument --threshold: is for --compare, which is not given")
    if options.shapes and (options.preset or options.batch or options.length or options.heads or options.dim or options.quick):
        parser.error("argument --shapes: sets B, H, L and D; leave out --preset, --quick, --batch, --length, --heads and --dim")
    if options.lengths and (options.shapes or options.preset or options.length):
        parser.error("argument --lengths: takes lengths from the file; leave out --shapes, --preset and --length (see --window)")
    if options.lengths and options.batch and len(options.batch) > 1:
        parser.error(f"argument --batch: was {options.batch}, must be one number of users per call with --lengths")
    if options.preset and options.quick:
        parser.error("argument --quick: cannot be combined with --preset; leave out one of them")
    settle_machine(parser, options)
    if options.dtype == "float64" and options.device == "cuda" and options.providers == ["triton"]:
        parser.error("argument --dtype: was float64, which the Triton kernels do not support on a GPU")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.backbone = BACKBONES[options.backbone]
    known = OPERATOR[options.backbone]
    named = [name for name in options.refinement if name != "all"]
    options.refinement = list(dict.fromkeys([*known, *named] if "all" in options.refinement else named))
    for name in options.refinement:
        if name not in known and (name != LAGGED or options.backbone != DOT):
            parser.error(f"argument --refinement: was {name}, must be one of {', '.join(known)} with this --backbone")
    of_it = [p.name for p in side_by_side(options.backbone)]
    for name in options.providers or ():
        if name not in of_it:
            parser.error(f"argument --providers: was {name}, must be one of {', '.join(of_it)} with this --backbone")
    options.passes = [p for p in PASSES if p in options.passes]
    if options.budget is None:
        options.budget = 1.5 if options.quick else 5.0 if options.device == "cpu" else 2.0


def make_tasks(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Task]:
    """The tasks that the options describe: one per shape and refinement."""
    named = options.preset or ("recsys" if options.device == "cuda" and not options.quick else None)
    preset = workloads.PRESETS[named] if named else workloads.UNNAMED[options.backbone, options.quick]
    if options.length:
        preset = replace(preset, lengths=tuple(options.length))
    if options.batch:
        preset = replace(preset, batches=tuple(options.batch), tokens=0)
    heads, dim, size = options.heads or preset.heads, options.dim or preset.dim, 0
    users: tuple[int, ...] = ()
    asked = options.shapes or [(b, heads, length, dim) for b, length in preset.sizes()]
    if options.lengths:
        try:
            users = workloads.sample_users(workloads.read_histories(options.lengths), options.users, options.window)
        except ValueError as error:
            parser.error(f"argument --lengths: {error}")
        size = min(options.batch[0] if options.batch else 128, len(users))
        asked = [(len(users), heads, options.window, dim)]
    tasks = []
    for b, h, length, d, *rest in asked:
        shape = Shape(b, h, h, length, d, d, rest[0] if rest else d)
        for refinement in options.refinement:
            source = options.lengths.name if options.lengths else ""
            how = options.dtype, options.dropout, options.device
            tasks.append(Task(shape, refinement, *how, users, size, source, options.backbone))
    return tasks


def chosen_providers(options: argparse.Namespace, skipped: list[dict[str, str]]) -> list[Provider]:
    if options.providers:
        return [PROVIDERS[name] for name in dict.fromkeys(options.providers)]
    left_out = {"varlen2"} if not options.lengths else set()
    chosen = side_by_side(options.backbone)
    if options.device == "cpu":
        reason = "compiling takes about half a minute per shape on a CPU; name it in --providers to include it"
        for name in (p.name for p in chosen if p.name.endswith("+compile")):
            left_out.add(name)
            skipped.append({"provider": name, "layout": "any", "reason": reason})
    return [p for p in chosen if p.name not in left_out]


def too_large(task: Task, provider: Provider) -> str | None:
    """Why a provider's L x L matrices do not fit into memory, None if they do. On a CPU, allocating them would kill the process."""
    s, free = task.shape, free_bytes(task.device)
    needed = provider.squares[task.device == "cuda"] * (task.batch_size or s.B) * s.H * s.L**2 * task.itemsize
    if free is None or needed <= 0.8 * free:
        return None
    return f"its L x L matrices take about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"


class Outcome(NamedTuple):
    """The results of a task, or of all tasks."""

    rows: list[Row]
    skipped: list[dict[str, str]]
    wrong: list[dict[str, str]]


def enter(task: Task, chosen: Sequence[Provider], outcome: Outcome) -> list[Entrant]:
    """The providers of a task that can run and give correct results. Why others do not is added to the outcome."""
    entrants: list[Entrant] = []
    gate, batches = Gate(), {layout: build(task, layout) for layout in task.layouts}
    for provider, layout in itertools.product(chosen, task.layouts):
        entrant = Entrant(provider, layout, batches[layout])
        kept, reason = outcome.skipped, provider.refusal(batches[layout][0]) or too_large(task, provider)
        if reason is None:
            try:
                gate.check(entrant)
                measure_memory(entrant)
                entrants.append(entrant)
            except WrongResult as error:
                kept, reason = outcome.wrong, str(error)
            except torch.OutOfMemoryError:
                reason = "out of memory"
            except Exception as error:
                cannot = provider.role != "ours" or (provider.name == "triton" and isinstance(error, ValueError))
                kept, reason = outcome.skipped if cannot else outcome.wrong, reason_of(error)
            if task.device == "cuda":
                torch.cuda.empty_cache()
        if reason is not None:
            kept.append({"provider": provider.name, "layout": layout, "task": task.label, "reason": reason})
    return entrants


def measure(task: Task, chosen: Sequence[Provider], options: argparse.Namespace, rates: Rates) -> Outcome:
    """Check and time the providers of one task, print its table, and return the results."""
    torch.manual_seed(0)
    random.seed(0)
    torch._dynamo.reset()  # or the compilations of one shape would count towards the limit of the next
    outcome = Outcome([], [], [])
    entrants = enter(task, chosen, outcome)
    if entrants:
        clock = Clock(torch.device(task.device))
        race(entrants, clock, options.passes != ["fwd"], options.reps, options.budget)
        for entrant in entrants if clock.cuda else ():
            time_graphs(entrant, clock, options.passes)
        for entrant in entrants:  # last, as profiling slows what follows
            name_kernels(entrant, options.passes)
    outcome.rows.extend(make_rows(task, entrants, options.passes, rates))
    print(table(outcome.rows, outcome.wrong), flush=True)
    return outcome


def run(options: argparse.Namespace, tasks: list[Task]) -> dict[str, Any]:
    """Measure all tasks and print each as it is done. A task that fails is reported as wrong and does not stop the others."""
    total = Outcome([], [], [])
    chosen = chosen_providers(options, total.skipped)
    rates = measure_rates(options.device, options.dtype)
    known = {"copy_gb_per_s": rates.copy / 1e9, "matmul_tflops": rates.matmul / 1e12, "matmul_dtype": options.dtype}
    print(
        f"best rates: copy {rates.copy / 1e9:.4g} GB/s, matrix product in {options.dtype} {rates.matmul / 1e12:.4g} TFLOP/s\n"
    )
    if options.precompile:
        print(precompile(tasks, options.precompile))
    begin = time.perf_counter()
    for task in tasks:
        everyone = {"provider": "all", "layout": "any", "task": task.label}
        if time.perf_counter() - begin > options.limit:
            total.skipped.append(everyone | {"reason": f"--limit: no time for {task.label}"})
            continue
        try:
            for all_of_it, part in zip(total, measure(task, chosen, options, rates), strict=True):
                all_of_it.extend(part)
        except Exception as error:
            total.wrong.append(everyone | {"reason": reason_of(error)})
            print(table([], total.wrong[-1:]), flush=True)
    return {"rates": known} | total._asdict()


def comparison(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Print how the second file differs from the first. Returns 1 if a figure is worse than the threshold allows, otherwise 0."""
    try:
        before, after = (compare.load(path) for path in options.compare)
    except ValueError as error:
        parser.error(f"argument --compare: {error}")
    if before["device"] != after["device"]:
        parser.error(f"argument --compare: the files are of different devices, {before['device']!r} and {after['device']!r}")
    threshold = options.threshold or 1.1
    outcome = compare.compare(before, after, threshold)
    print(compare.text(outcome, threshold))
    return int(bool(outcome.regressions))


def main(argv: Sequence[str] | None = None) -> int:
    parser = options_parser()
    options = parser.parse_args(argv)
    check(parser, options)
    if options.compare:
        return comparison(parser, options)
    tasks = make_tasks(parser, options)
    begin = time.perf_counter()
    head = about(options.device) | {"command": command_line("attn_bench.py", argv)}
    if options.device == "cpu":
        print("No GPU is used: the providers that need one are left out, and the others are compared on the CPU.")
    results = head | run(options, tasks)
    for provider, reason in dict.fromkeys((s["provider"], s["reason"]) for s in results["skipped"]):
        print(f"not run: {provider}: {reason}")
    for provider, reason in graph_reasons(results["rows"]):
        print(f"no graph: {provider}: {reason}")
    finish(results, begin, options.out, markdown)
    if results["wrong"]:
        print(f"{len(results['wrong'])} results are WRONG and were not timed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
