"""The study: does refining attention help, when, and what does it cost? Every run of a plan, kept in one file.

    python benchmarks/study.py --folder data                       # all of it; hours
    python benchmarks/study.py --only core --datasets wikipedia    # some cells
    python benchmarks/study.py --budget 60 --jobs 2                # what an hour allows; the same command goes on later
    python benchmarks/study.py --list                              # what is done and what is missing

A cell is a command of `awrsr train`, its runs differ in their seed. A finished run becomes an entry of study.json, and its ranks of
the held-out events a row of study_ranks.parquet; what is there is not run again, one that was stopped goes on from its last epoch.
study_defaults.json holds what training took for options that commands leave out: where one changes, the study refuses to go on.
Validation NDCG@10 chooses the epoch, test events are ranked once. `study_report.py` makes tables and pictures of these files.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from filelock import FileLock, Timeout
from tqdm import tqdm

if __package__ is None:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from awrsr.files import atomic, write_json  # noqa: E402
from benchmarks.common.arguments import whole  # noqa: E402
from benchmarks.common.report import commit, device_name, versions  # noqa: E402
from benchmarks.study.plan import DATA, GROUPS, Cell, plan  # noqa: E402

RESULTS = Path(__file__).resolve().parents[1] / "results/study"
ENTRIES, RANKS, TARGETS = "study.json", "study_ranks.parquet", "study_targets.parquet"
DEFAULTS = "study_defaults.json"
DEEPEST = 21  # ranks from there on are kept as this one: no metric up to @20 tells them apart
KEY = ("dataset", "backbone", "variant", "refinement", "tables", "layers", "loss", "seed")


class Results:
    """The files of the study in a folder: entries by key, ranks beside them. Each write replaces a file whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        path = folder / ENTRIES
        self.entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self.ranks = pl.read_parquet(folder / RANKS) if (folder / RANKS).exists() else None
        self.targets = pl.read_parquet(folder / TARGETS) if (folder / TARGETS).exists() else None

    def of(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """The entry of a run, made by the command that the plan has now."""
        key, command = (*cell.key(), seed), cell.command(seed)
        same = (entry for entry in self.entries if tuple(entry[name] for name in KEY) == key and entry["command"] == command)
        return next(same, None)

    def add(self, entry: dict[str, Any], test: pl.DataFrame, history: np.ndarray, popularity: np.ndarray) -> None:
        """An entry, the ranks of its targets, and of each target the length of its history and how often its item is trained on."""
        key = {name: entry[name] for name in KEY}
        with self.lock:
            self.entries = [old for old in self.entries if any(old[name] != key[name] for name in KEY)] + [entry]
            self.entries.sort(key=lambda e: [str(e[name]).zfill(4) for name in KEY])
            ranks = pl.DataFrame([key | {"ranks": test["rank"].clip(upper_bound=DEEPEST).to_list()}])
            ranks = ranks.with_columns(pl.col("ranks").cast(pl.List(pl.UInt8)))
            if self.ranks is not None:
                ranks = pl.concat([self.ranks.join(ranks, on=KEY, how="anti"), ranks]).sort(KEY)
            self.ranks = ranks
            if self.targets is None or entry["dataset"] not in self.targets["dataset"]:
                columns = {"dataset": entry["dataset"], "history": history.tolist(), "popularity": popularity.tolist()}
                found = pl.DataFrame([columns])
                self.targets = found if self.targets is None else pl.concat([self.targets, found]).sort("dataset")
            for table, name in ((self.ranks, RANKS), (self.targets, TARGETS)):
                with atomic(self.folder / name) as temporary:
                    table.write_parquet(temporary, compression="zstd", compression_level=19)
            write_json(self.folder / ENTRIES, self.entries)


def defaults() -> dict[str, dict[str, Any]]:
    """What `awrsr train` takes for options that a command does not name, with data and without."""
    from awrsr.cli import parser

    found = {name: parser(demo).parse_args(["train"]).train for name, demo in (("data", False), ("no data", True))}
    return {name: {k: v for k, v in vars(each).items() if k not in ("config", "out")} for name, each in found.items()}


def keep_defaults(folder: Path) -> list[str]:
    """Write them beside the entries, new options with them; where some differ from what the entries had, tell which instead."""
    now, path = defaults(), folder / DEFAULTS
    then = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    changed = [
        f"{option} is {now[name].get(option, 'no option')!r} with {name}, was {value!r}"
        for name, each in then.items()
        for option, value in each.items()
        if option not in now[name] or now[name][option] != value
    ]
    if not changed and then != now:
        write_json(path, now)
    return changed


def source(dataset: str, folder: Path | None) -> Path:
    """The file of a data set: in the folder if one is given, else fetched."""
    if folder is not None:
        return folder / f"{dataset}.txt"
    from awrsr.data.fetch import fetch

    return fetch(dataset)


def train_apart(arguments: list[str], log: Path) -> int:
    """`awrsr train` in a process of its own, forked from one that has loaded what training needs; its exit status."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["awrsr.training.run", "awrsr.cli.commands"])
    process = server.Process(target=_train, args=(arguments, log))
    process.start()
    process.join()
    return process.exitcode or 0


def _train(arguments: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from awrsr.cli import main

    sys.exit(main(["train", *arguments]))


def run(cell: Cell, seed: int, folder: Path | None, runs: Path, results: Results) -> None:
    """Train a cell with a seed and add what comes out of it. Raises RuntimeError where training ends badly."""
    out = runs / f"{cell.name}_{seed}"
    data = [] if cell.dataset == "synthetic" else ["--data", str(source(cell.dataset, folder))]
    out.mkdir(parents=True, exist_ok=True)
    began = out / "commit"
    if not began.exists():
        began.write_text(f"{commit()}\n", encoding="utf-8")
    arguments = [*cell.arguments(seed), *data, "--threads", "1", "--no-progress", "--out", str(out)]
    status = train_apart(arguments, out / "output.txt")
    if status:
        raise RuntimeError(f"awrsr train {shlex.join(arguments)} ended with status {status}; see {out / 'output.txt'}")
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    entry = cell.described(seed) | {
        "epochs": metrics["epochs"],
        "best_epoch": metrics["best_epoch"],
        "params": metrics["parameters"],
        "train_seconds": metrics["train_seconds"],
        "train_cpu_seconds": metrics["train_cpu_seconds"],
        "validation": metrics["validation"],
        "test": metrics["test"],
        "recall": metrics.get("recall"),
        "curve": [round(epoch["NDCG@10"], 5) for epoch in metrics["curve"]],
        "command": cell.command(seed),
        "commit": began.read_text(encoding="utf-8").strip(),
        "device": device_name("cpu").rpartition(",")[0] + ", 1 thread(s)",
        "versions": versions(),
    }
    test = pl.read_parquet(out / "ranks_test.parquet").with_columns(pl.col("user", "item").cast(pl.String)).sort("user", "position")
    results.add(entry, test, test["position"].to_numpy(), popularity(cell, source(cell.dataset, folder) if data else None, test))


def popularity(cell: Cell, file: Path | None, test: pl.DataFrame) -> np.ndarray:
    """(M,) how often the item of each target is among the training events."""
    from awrsr.data.prepare import DataOptions, divide, histories

    options = DataOptions(data=str(file or ""), **DATA.get(cell.dataset, {}))
    split = divide(histories(options), options)
    h = split.histories
    trained = np.concatenate([h.items[first : first + n] for first, n in zip(h.offsets[:-1], split.train_end, strict=True)])
    counts = dict(zip(h.item_ids.astype(str).tolist(), np.bincount(trained, minlength=h.num_items).tolist(), strict=True))
    return np.array([counts[item] for item in test["item"].to_list()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder with beauty.txt, lastfm.txt, wikipedia.txt; default: they are fetched")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="parts of the plan; default all, in this order"
    )
    parser.add_argument("--datasets", nargs="+", default=[], help="of these data sets alone")
    parser.add_argument("--cells", nargs="+", default=[], help="cells alone whose name holds one of these words")
    parser.add_argument(
        "--seeds", type=whole(0), default=0, help="at most so many of each cell; default as planned, five for claims"
    )
    parser.add_argument("--budget", type=float, default=0.0, help="begin no run after so many minutes; default: no limit")
    parser.add_argument("--jobs", type=whole(1), default=1, help="runs at a time, a thread each; default %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("bench-out/study"), help="folder of the runs; default %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of study.json; default %(default)s")
    parser.add_argument("--list", action="store_true", help="show what is done and what is missing, run nothing")
    options = parser.parse_args(arguments)
    cells = [cell for cell in plan() if cell.group in options.only and (not options.datasets or cell.dataset in options.datasets)]
    cells = [cell for cell in cells if not options.cells or any(word in cell.name for word in options.cells)]
    if not cells:
        parser.error("no cell of the plan is left by only, datasets and cells; --list shows them all")
    results = Results(options.out)
    wanted = [(cell, seed) for cell in cells for seed in range(min(cell.seeds, options.seeds or cell.seeds))]
    wanted.sort(key=lambda each: (options.only.index(each[0].group), each[1] > 0, each[1] > 2))  # a first look at all cells first
    missing = [(cell, seed) for cell, seed in wanted if results.of(cell, seed) is None]
    if options.list:
        for cell in cells:
            done = [seed for seed in range(cell.seeds) if results.of(cell, seed)]
            print(f"{cell.group:8} {cell.name:64} {len(done)} of {cell.seeds} seeds")
        return 0
    try:
        with FileLock(options.out / ".study.lock", timeout=0):
            if changed := keep_defaults(options.out):
                told = f"out is {options.out}, whose runs had other defaults of `awrsr train`: {'; '.join(changed)}. "
                parser.error(
                    f"{told}Name the old values in plan and entries and delete {DEFAULTS}, or begin anew in another folder"
                )
            return run_all(missing, len(wanted), options, results)
    except Timeout:
        parser.error(f"out is {options.out}, where another study.py is at work: wait for it to end, --jobs gives it more processes")


def run_all(missing: list[tuple[Cell, int]], total: int, options: argparse.Namespace, results: Results) -> int:
    """Run what is missing while the budget lasts. 1 where a run failed: the others go on, failures are told at the end."""
    end = time.monotonic() + 60 * options.budget if options.budget else float("inf")
    failed: list[str] = []
    finished: list[Cell] = []
    with tqdm(total=total, initial=total - len(missing), unit="run", disable=None) as bar:

        def work(cell: Cell, seed: int) -> None:
            if time.monotonic() > end:
                return
            bar.set_description(f"{cell.name} seed {seed}")
            try:
                run(cell, seed, options.folder, options.runs, results)
                finished.append(cell)
                bar.update()
            except (RuntimeError, OSError, ValueError) as error:
                failed.append(f"{cell.name} seed {seed}: {error}")

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda each: work(*each), missing))
        left = len(missing) - len(finished)
    print("\n".join([*failed, f"{total - left} of {total} runs are done" + (", the same command goes on" if left else "")]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
