"""Train, evaluate and recommend with a large catalogue, in bounded memory.

examples, from the repository root:
  python -m benchmarks.training.large_catalogue --items 2000 --users 2000          a few seconds
  python -m benchmarks.training.large_catalogue --out bench-out/large              a million items and users: some minutes

A separate process, `awrsr data make`, writes histories to a file, which is then read. Training is the usual one (Lightning, AdamW,
checkpoints) and stops after --steps steps. Validation and test rank all items for --targets users each; as many users get ten
recommendations. The time and the peak resident memory of each stage are printed when it ends. The exit status is 1 if any peak is
above --limit.
"""

import argparse
import contextlib
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from awrsr.config import AWRSRConfig, TrainingOptions
from awrsr.data.histories import Histories
from awrsr.data.readers import read
from awrsr.data.splits import Split, split
from awrsr.evaluation.ranking import evaluate
from awrsr.recommender import AWRSR
from awrsr.training.loop import TrainingLoop
from awrsr.training.trainer import make_trainer
from awrsr_kernels.tuned import replace_file
from awrsr_kernels.tuning.arguments import number, whole

from ..common import report
from ..common.arguments import add_flag, make_parser


def options_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--items", type=whole(10), default=1_000_000, metavar="N", help="number of items in the catalogue (default 1000000)")
    add("--users", type=whole(10), default=1_000_000, metavar="U", help="number of users (default 1000000)")
    add("--length", type=whole(3), default=20, metavar="L", help="number of events of each user (default 20)")
    add("--data", type=Path, metavar="FILE", help="file of histories to read, instead of generating one")
    add("--steps", type=whole(1), default=50, metavar="N", help="number of training steps (default 50)")
    add(
        "--targets",
        type=whole(1),
        default=1000,
        metavar="M",
        help="number of users to evaluate, and to recommend to (default 1000)",
    )
    add(
        "--loss",
        choices=("sampled_softmax", "cross_entropy", "bce"),
        default="sampled_softmax",
        help="training loss (default sampled_softmax)",
    )
    add(
        "--limit",
        type=number(0, 1e9, "a number of GiB"),
        default=12.0,
        metavar="GIB",
        help="largest peak memory allowed, in GiB (default 12)",
    )
    add_flag(add, "--threads")
    add_flag(add, "--seed", help="random seed of data, parameters and training (default 0)")
    add_flag(add, "--out", help="folder for results.json, the data and the run")
    return parser


@contextlib.contextmanager
def timed_stage(rows: list[report.Row], name: str) -> Iterator[report.Row]:
    """Add a row of time and peak memory; yields the row, for further figures of the stage."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    row: report.Row = {"stage": name}
    with contextlib.suppress(OSError):  # let the peak start anew, where Linux allows it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start, cpu = time.perf_counter(), time.process_time()
    yield row
    row |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    row.setdefault("peak_gib", peak_gib())
    rows.append(row)
    more = ", ".join(f"{k} {v:,.5g}" for k, v in row.items() if k not in ("stage", "seconds", "cpu_seconds", "peak_gib"))
    print(f"{name:<10} {row['seconds']:8.1f} s   peak {row['peak_gib']:6.2f} GiB   {more}", flush=True)


def peak_gib(who: int = resource.RUSAGE_SELF) -> float:
    """Of this process since the stage began, where Linux says so, or of all its children so far."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines() if who == resource.RUSAGE_SELF else []
        return int(next(x.split()[1] for x in lines if x.startswith("VmHWM"))) / 2**20
    return resource.getrusage(who).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)


def make_file(options: argparse.Namespace, path: Path, row: report.Row) -> None:
    """`awrsr data make`, in a process of its own so that what it leaves behind is not counted against the reader."""
    sizes = {"users": options.users, "items": options.items, "length": options.length, "seed": options.seed}
    arguments = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, "-m", "awrsr", "data", "make", *arguments, f"--output={path.resolve()}"]
    subprocess.run(command, cwd=report.ROOT, check=True, stdout=subprocess.DEVNULL)
    row |= {"peak_gib": peak_gib(resource.RUSAGE_CHILDREN), "mib": path.stat().st_size / 2**20}


def with_few_targets(parts: Split, count: int) -> Split:
    """Validation and test targets of the first users alone; the others train on all of their events."""
    lengths = parts.histories.lengths
    far = np.arange(len(lengths)) >= count
    return Split(parts.histories, np.where(far, lengths, parts.train_end), np.where(far, lengths, parts.validation_end))


def train(model: AWRSR, parts: Split, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """The real training run, cut off after some steps of its first epoch."""
    settings = TrainingOptions(loss=options.loss, epochs=1, seed=options.seed, logger="none", progress=False)
    training, trainer = TrainingLoop(model.network, parts, settings, folder, {}), make_trainer(settings, folder)
    trainer.limit_train_batches = options.steps
    trainer.fit(training)
    last = training.curve[-1]
    return {"steps": trainer.global_step, "loss": last["loss"], "step_seconds": training.record["seconds"] / trainer.global_step}


def recommend(model: AWRSR, histories: Histories, count: int) -> int:
    offsets = histories.offsets[: count + 1]
    first = replace(histories, items=histories.items[: offsets[-1]], offsets=offsets, user_ids=histories.user_ids[:count])
    return len(model.recommend(first, k=min(10, model.config.num_items)))


def run(options: argparse.Namespace, folder: Path) -> list[report.Row]:
    """All stages, in the order in which a user runs them."""
    rows: list[report.Row] = []
    stage = functools.partial(timed_stage, rows)
    path = options.data or folder / "histories.txt"
    if not options.data:
        with stage("make") as row:
            make_file(options, path, row)
    with stage("read") as row:
        histories = read(path)
        row |= {"users": histories.num_users, "items": histories.num_items, "events": len(histories.items)}
    with stage("split"):
        parts = with_few_targets(split(histories), options.targets)
    with stage("model") as row:
        torch.manual_seed(options.seed)
        model = AWRSR(AWRSRConfig(num_items=histories.num_items))
        model.item_ids = histories.item_ids
        row["parameters"] = sum(p.numel() for p in model.parameters())
    with stage("train") as row:
        row |= train(model, parts, options, folder / "run")
    with stage("load"):
        model = AWRSR.load(folder / "run")
    with stage("evaluate") as row:
        ranked = evaluate(model, parts, filter_seen=not histories.repeats())
        row |= {"targets": len(ranked.ranks), "users_per_cpu_second": ranked.users_per_cpu_second}
    with stage("recommend") as row:
        row["recommendations"] = recommend(model, histories, options.targets)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = options_parser()
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    command = report.command_line("training/large_catalogue.py", argv)
    about = report.about("cpu", "lightning", "polars") | {"command": command, "kind": "large catalogue"}
    with contextlib.ExitStack() as stack:
        folder = options.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            rows = run(options, folder)
        except (ValueError, subprocess.CalledProcessError) as error:
            parser.error(str(error))
    worst, limit = max(rows, key=lambda row: row["peak_gib"]), options.limit
    peak, over = worst["peak_gib"], worst["peak_gib"] > limit
    if options.out:
        results = about | {"limit_gib": limit, "peak_gib": peak, "rows": rows}
        replace_file(options.out / "results.json", json.dumps(results, indent=1))
    print(f"peak {peak:.2f} GiB ({worst['stage']}), {'ABOVE' if over else 'within'} the limit of {limit:g} GiB")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
