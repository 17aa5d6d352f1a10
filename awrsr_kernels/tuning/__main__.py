"""Find launch configurations for your GPU, and store them where every later call looks for them.

    python -m awrsr_kernels.tune

The launch table, in `launch_config.py`, is not the best one for any particular GPU. Each of its rows is the configuration of one
kernel for a class of shapes. For every row that the given shapes use, the tuner measures other configurations of that kernel, while
all other kernels keep theirs. Before a configuration is timed, output and gradients are checked against the definition. The row is
kept unless another configuration is faster by more than 3 %.

examples:
  python -m awrsr_kernels.tune                                      both presets in bfloat16; ten minutes
  python -m awrsr_kernels.tune --preset recsys --refinement simple additive --dropout 0.1
                                                                    as in your training; shapes of one row are judged together
  python -m awrsr_kernels.tune --shapes 256,2,50,64 1024,2,50,64 --kernel short_fwd short_bwd
  python -m awrsr_kernels.tune --shapes 8,4,1024,64,32 --dtype float16 --seconds 1800 --out tuned.json
  python -m awrsr_kernels.tune --list                               the launch table and what is tuned; needs no GPU
  AWRSR_KERNELS_TUNED=tuned.json python train.py                    use another file of tuned entries

presets: recsys is L 20, 50, 100 and 200 with H 2, D = R = 32 and 64; long is L 512 and 2048 with H 4, D = R = 64.
kernels: short_* hold a whole head on chip (L up to 64), resident_* walk over one (causal, L up to 256, up to 64 features), and
tiled_* compute all other calls. The time of a kernel is that of its
whole pass, forward or backward.

Most of the time is spent on compiling, once per configuration, in several --processes. Triton caches what it compiled, so a second
run gets further in the same --seconds. Configurations close to the launch table's are tried first. Run nothing else on the GPU
while the tuner runs. A file can hold entries for several GPUs and versions of Triton; those of another GPU are never used or
overwritten.
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checks import REFINEMENTS
from ..launch_config import (
    TABLE,
    Config,
    Key,
    choose,
    shared_memory,
    unsupported_reason,
)
from ..tuned import machine, merged, read_entries, tuned_entries, tuned_for, tuned_path, write_entries
from .arguments import number, sizes
from .search import Verdict, candidates, describe, search
from .timing import Bench, DeviceLost, TuningCase, compile_one

PRESETS = {  # B, H, L, D of their shapes
    "recsys": [(512, 2, length, dim) for length in (20, 50, 100, 200) for dim in (32, 64)],
    "long": [(16384 // length, 4, length, 64) for length in (512, 2048)],
}
AHEAD = 0.4  # share of the time that may be spent on compiling ahead


def entry_of(verdict: Verdict, gpu: str, triton: str) -> dict[str, Any]:
    """An entry of the file, with the measurement that it is based on."""
    chosen, table = verdict.medians[verdict.chosen], verdict.medians.get(verdict.table)
    others = [f"{ms:.4f} ms" for ms in table] if table else ["refused"] * len(chosen)
    rows = (f"{case}: {ms:.4f} ms, table {other}" for case, ms, other in zip(verdict.cases, chosen, others, strict=True))
    versions = f"awrsr-kernels {__version__}, torch {torch.__version__}, Triton {triton}, {torch_build()}"
    source = f"{datetime.date.today().isoformat()}, {versions}; medians of the pass: {'; '.join(rows)}"
    return {"gpu": gpu, "triton": triton, "key": list(verdict.key), "config": list(verdict.chosen), "source": source}


def torch_build() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}" if torch.version.hip else "CPU"


def save(path: Path, verdict: Verdict, gpu: str, triton: str) -> None:
    """Merge a verdict into the current file. A key whose table row is kept has no entry."""
    new = [entry_of(verdict, gpu, triton)] if verdict.chosen != verdict.table else []
    write_entries(path, merged(read_entries(path), new, gpu, triton, [verdict.key]))


KEY_COLUMNS = f"{'kernel':<18}{'length':>7}{'width':>6}{'bytes':>6}"


def key_columns(key: Key) -> str:
    return f"{key.kernel:<18}{key.length or 'any':>7}{key.width:>6}{key.itemsize:>6}"


def results_table(verdicts: list[Verdict]) -> str:
    lines = [f"{KEY_COLUMNS}  {'table':<28}{'chosen':<28}{'faster':>8}{'tried':>7}{'refused':>8}{'unreached':>10}"]
    for v in verdicts:
        chosen = "kept" if v.chosen == v.table else describe(v.chosen)
        gain = f"{math.exp(-v.score(v.chosen)) - 1:.1%}" if v.table in v.medians and v.chosen in v.medians else "-"
        tried = len(dict.fromkeys([v.table, v.chosen, *candidates(v.key)])) - v.unreached
        table = describe(v.table) + (" (refused)" if v.table in v.refused else "")
        lines.append(f"{key_columns(v.key)}  {table:<28}{chosen:<28}{gain:>8}{tried:>7}{len(v.refused):>8}{v.unreached:>10}")
    return "\n".join(lines)


def listing(path: Path) -> str:
    """The table, with the tuned entries below each key."""
    entries, lines = read_entries(path), [f"{path}{'' if path.exists() else ' (does not exist: nothing is tuned)'}", ""]
    lines.append(f"{KEY_COLUMNS}  configuration (of several, the first that fits is used)")
    for key, rows in TABLE.items():
        lines.append(f"{key_columns(key)}  {', or '.join(describe(row.config) for row in rows)}")
        for entry in entries:
            if Key(*entry["key"]) == key:
                config = describe(Config(*entry["config"]))
                lines.append(f"    tuned for {entry['gpu']}, Triton {entry['triton']}: {config}")
                lines.append(f"      {entry['source']}")
    return "\n".join(lines)


def progress_bar(total: int) -> Any:
    """A bar of tqdm, or None if tqdm is not installed or there is no terminal."""
    if not sys.stderr.isatty() or not find_spec("tqdm"):
        return None
    from tqdm import tqdm

    return tqdm(total=total, leave=False, unit="candidate")


def make_parser() -> argparse.ArgumentParser:
    description, examples = (__doc__ or "\n\nexamples:").split("\n\nexamples:")
    parser = argparse.ArgumentParser(
        prog="python -m awrsr_kernels.tune", usage="%(prog)s [options]; --help lists them with examples",
        description=description, epilog=f"examples:{examples}", formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add, seconds = parser.add_argument, number(1, 1e9, "a number in [1, 1e+09)")
    add("--preset", nargs="+", choices=tuple(PRESETS), help="sets of shapes to tune for (default: both)")
    add("--shapes", nargs="+", action="extend", type=sizes, metavar="B,H,L,D[,R]", help="shapes to tune for; R is D if left out")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="data type (default bfloat16)")
    add("--refinement", nargs="+", choices=REFINEMENTS, default=["simple"], help="refinements to tune for (default simple)")
    add("--dropout", type=number(0, 1, "a number in [0, 1)"), default=0.0, metavar="P", help="dropout rate (default 0)")
    kernels = list(dict.fromkeys(key.kernel for key in TABLE))
    add("--kernel", nargs="+", choices=kernels, help="kernels to tune (default: all that the shapes use)")
    add("--seconds", type=seconds, default=600.0, metavar="S", help="approximate seconds in all (default 600)")
    cores = os.cpu_count() or 1
    add("--processes", type=int, default=cores, metavar="N", help=f"number of processes that compile (default {cores})")
    add("--out", type=Path, metavar="FILE", help=f"file of tuned entries (default {tuned_path()})")
    add("--list", action="store_true", help="print the launch table and the tuned entries, and exit")
    return parser


def make_cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[TuningCase]:
    if options.shapes and options.preset:
        parser.error("argument --shapes: cannot be combined with --preset; leave out one of them")
    dtype = getattr(torch, options.dtype)
    shapes = options.shapes or [size for name in options.preset or PRESETS for size in PRESETS[name]]
    if options.processes < 1:
        parser.error(f"argument --processes: was {options.processes}, must be at least 1")
    refinements = list(dict.fromkeys(options.refinement))
    cases = [TuningCase(b, h, length, d, (rank or [d])[0], dtype) for b, h, length, d, *rank in dict.fromkeys(shapes)]
    return [case._replace(refinement=name, dropout_p=options.dropout) for case in cases for name in refinements]


def missing_gpu(cases: list[TuningCase]) -> str | None:
    """Why nothing can be measured here, None if it can."""
    if not torch.cuda.is_available():
        return (
            "tuning needs a GPU (NVIDIA of compute capability 8.0 or newer, or AMD) and a torch that sees it: "
            f"torch {torch.__version__} ({torch_build()} build) finds none here; --list works without one"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is 1, which must be unset: the interpreter's times say nothing about a GPU"
    device = torch.device("cuda")
    reasons = ((case, unsupported_reason(device, case.dtype, case.features())) for case in cases)
    return next((f"{case} cannot run on the kernels: {reason}" for case, reason in reasons if reason), None)


def compile_ahead(grouped: dict[Key, list[TuningCase]], processes: int, seconds: float) -> int:
    """Compile candidates in several processes for at most `seconds`, the likeliest of every kernel first. Returns how many."""
    queues = [[(cases[0], key, config) for config in candidates(key)] for key, cases in grouped.items()]
    work = [each for at_once in itertools.zip_longest(*queues) for each in at_once if each is not None]
    end, done = time.monotonic() + seconds, 0
    with multiprocessing.get_context("spawn").Pool(processes) as pool, contextlib.suppress(multiprocessing.TimeoutError):
        for result in [pool.apply_async(compile_one, each) for each in work]:
            result.get(max(0.0, end - time.monotonic()))
            done += 1
    return done


def tune(
    grouped: dict[Key, list[TuningCase]], device: torch.device, bench: Bench, path: Path, names: tuple[str, str], seconds: float
) -> list[Verdict]:
    """Search key after key, each with an even share of the remaining time, and write each verdict as soon as it is known.

    names: the GPU's name and Triton's version, for which the file's entries hold.
    """
    verdicts: list[Verdict] = []
    bar, begin = progress_bar(sum(len(candidates(key)) for key in grouped)), time.monotonic()
    say = functools.partial(print, flush=True) if bar is None else bar.write

    def step(text: str) -> None:
        if bar is not None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

    try:
        for number, (key, cases) in enumerate(grouped.items()):
            share = max(0.0, seconds - (time.monotonic() - begin)) / (len(grouped) - number)
            tuned_before = {**tuned_for(device), **tuned_entries(read_entries(path), *names)}
            table = choose(key, shared_memory(device))
            verdicts.append(search(key, cases, table, bench, share, current=tuned_before.get(key), say=say, step=step))
            save(path, verdicts[-1], *names)
    except KeyboardInterrupt:
        say("interrupted; verdicts reached before are saved")
    finally:
        if bar is not None:
            bar.close()
    return verdicts


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    path = options.out or tuned_path()
    try:
        if options.list:
            print(listing(path))
            return 0
        cases = make_cases(parser, options)
        reason = missing_gpu(cases)
        if reason:
            print(f"awrsr_kernels.tune: {reason}", file=sys.stderr)
            return 2
        write_entries(path, read_entries(path))  # so that a broken file is reported before minutes of work
        device = torch.device("cuda", torch.cuda.current_device())
        shared, names = shared_memory(device), machine(device)
        tuned_for(device)
        grouped: dict[Key, list[TuningCase]] = {}
        for case in cases:
            for key in case.keys(shared):
                if not options.kernel or key.kernel in options.kernel:
                    grouped.setdefault(key, []).append(case)
        if not grouped:
            parser.error(f"argument --kernel: was {' '.join(options.kernel)}, which none of the shapes uses on this GPU")
        print(f"{names[0]}, torch {torch.__version__}, Triton {names[1]}; {len(cases)} shapes, {len(grouped)} kernels", flush=True)
        begin = time.monotonic()
        if options.processes > 1:
            done = compile_ahead(grouped, options.processes, AHEAD * options.seconds)
            print(f"{done} candidates compiled ahead in {time.monotonic() - begin:.0f} s", flush=True)
        verdicts = tune(grouped, device, Bench(device), path, names, options.seconds - (time.monotonic() - begin))
    except (ValueError, OSError, DeviceLost) as error:
        print(f"awrsr_kernels.tune: {error}", file=sys.stderr)  # earlier verdicts are in the file
        return 1
    except torch.OutOfMemoryError:
        print("awrsr_kernels.tune: the GPU's memory does not hold a shape and its reference: use smaller --shapes", file=sys.stderr)
        return 1
    print(f"\n{results_table(verdicts)}\n\n{path}")
    if any(v.unreached for v in verdicts):
        print("not all candidates were measured in the time given; raise --seconds or run the tuner again")
    broken = [v for v in verdicts if v.table in v.refused]
    for v in broken:
        print(f"the table's own row for {v.key} failed: {v.refused[v.table]}; please report it", file=sys.stderr)
    if len(verdicts) < len(grouped):
        return 130  # as shells say of what was interrupted
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
