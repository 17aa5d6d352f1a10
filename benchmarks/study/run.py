"""Run the study: does refining attention help, when, and what does it cost? All runs of its plan are kept in one file.

    python benchmarks/study.py --folder data                       # everything; takes hours
    python benchmarks/study.py --only core --datasets wikipedia    # some cells
    python benchmarks/study.py --only second-order                 # what docs/study-plan.md plans for the README's table
    python benchmarks/study.py --budget 60 --jobs 2                # as much as fits in an hour; rerun the command to continue
    python benchmarks/study.py --list                              # list what is done and what is missing

A cell is one `awrsr train` command, run with several seeds. A finished run becomes an entry of study.json, and its ranks of the
held-out events become a row of study_ranks.parquet. Finished runs are not repeated; a stopped run resumes from its last epoch.
study_defaults.json stores the defaults of the options that the commands leave out, and what presets set; if one has changed, the
study stops with an error. Cells with an option that has since been removed keep their results and are not run. Validation NDCG@10
chooses the epoch, and test events are ranked once. The groups second-order and second-order-more search first, and then run what
the search chose. `study_report.py` turns these files into a report with pictures.
"""

import argparse
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

from awrsr.files import atomic, read_json, write_json
from awrsr_kernels.tuning.arguments import whole
from benchmarks.common.report import commit, device_name, versions
from benchmarks.study import second_order
from benchmarks.study.plan import DATA, GROUPS, KEY, REMOVED, TAG, Cell, plan

RESULTS = Path(__file__).resolve().parents[1] / "results/study"
ENTRIES, RANKS, TARGETS = "study.json", "study_ranks.parquet", "study_targets.parquet"
DEFAULTS = "study_defaults.json"
DEEPEST = 21  # larger ranks are stored as this one: metrics up to @20 do not distinguish them
RUN_KEY = (*KEY, "seed")
QUICKLY, SMALL = 3, 19  # levels of compression: after each run, and after all, which takes seconds


class Results:
    """The files of the study in a folder: entries, and tables of ranks and targets. Each write replaces a file whole."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lock = folder, threading.Lock()
        entries: list[dict[str, Any]] = read_json(folder / ENTRIES) if (folder / ENTRIES).exists() else []
        self.entries = {run_key(entry): entry for entry in entries}
        self.ranks, self.targets = (
            pl.read_parquet(folder / name) if (folder / name).exists() else None for name in (RANKS, TARGETS)
        )

    def of(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """The entry of a run, made by the command that the plan has now."""
        entry = self.entries.get((*cell.key(), seed))
        return entry if entry is not None and entry["command"] in cell.commands(seed) else None

    def done(self, cell: Cell) -> list[dict[str, Any]]:
        """The entries of a cell, by seed."""
        return [entry for seed in range(cell.seeds) if (entry := self.of(cell, seed))]

    def add(self, entry: dict[str, Any], test: pl.DataFrame, popularity: np.ndarray) -> None:
        """Add an entry, and for each target its rank, its user, the length of its history and how often its item is trained on."""
        key = {name: entry[name] for name in RUN_KEY}
        ranks = pl.DataFrame([key | {"ranks": test["rank"].clip(upper_bound=DEEPEST).to_list()}])
        users = (test["user"].rank("dense") - 1).to_list()  # numbered as they are sorted
        targets = {"dataset": entry["dataset"], "history": test["position"].to_list(), "popularity": popularity.tolist()}
        targets["user"] = users
        with self.lock:
            self.entries[run_key(entry)] = entry
            self.ranks = _replaced(self.ranks, ranks.with_columns(pl.col("ranks").cast(pl.List(pl.UInt8))), RUN_KEY)
            self.targets = _replaced(self.targets, pl.DataFrame([targets]), ("dataset",))
            self.write_tables(QUICKLY)
            order = sorted(self.entries, key=lambda key: [str(x).zfill(4) for x in key])
            write_json(self.folder / ENTRIES, [self.entries[key] for key in order])

    def write_tables(self, level: int) -> None:
        """Write ranks and targets, compressed with this level."""
        for table, name in ((self.ranks, RANKS), (self.targets, TARGETS)):
            if table is not None:
                with atomic(self.folder / name) as temporary:
                    table.write_parquet(temporary, compression="zstd", compression_level=level)


def run_key(row: dict[str, Any]) -> tuple[Any, ...]:
    """The key of a run, from an entry or a row of ranks."""
    return tuple(row[name] for name in RUN_KEY)


def _replaced(table: pl.DataFrame | None, row: pl.DataFrame, key: tuple[str, ...]) -> pl.DataFrame:
    """The table with a row added; it replaces a row with the same key."""
    if table is None:
        return row
    return pl.concat([table.join(row, on=key, how="anti"), row], how="diagonal_relaxed").sort(key)  # older rows may lack columns


def defaults() -> dict[str, dict[str, Any]]:
    """The defaults of `awrsr train`, with data and without, and what its presets set."""
    from awrsr.cli import parser
    from awrsr.presets import PRESETS

    taken = {name: vars(parser(demo).parse_args(["train"]).train) for name, demo in (("data", False), ("no data", True))}
    presets = {f"preset {name}": dict(preset.options) for name, preset in PRESETS.items()}
    return {name: {k: v for k, v in each.items() if k not in ("config", "out")} for name, each in taken.items()} | presets


def keep_defaults(folder: Path) -> list[str]:
    """Add the defaults of new options to those kept in the folder, or return what changed. Removed options keep theirs."""
    now, path = defaults(), folder / DEFAULTS
    kept = read_json(path) if path.exists() else {}
    changed = [
        f"{option} is {now[name].get(option, 'no option')!r} with {name}, was {value!r}"
        for name, each in kept.items()
        for option, value in each.items()
        if option not in REMOVED and (option not in now[name] or now[name][option] != value)
    ]
    merged = {name: kept.get(name, {}) | each for name, each in now.items()}
    if not changed and merged != kept:
        write_json(path, merged)
    return changed


def source(dataset: str, folder: Path | None) -> Path | None:
    """The file of a data set, in the folder if one is given, otherwise fetched; synthetic histories have none."""
    if dataset == "synthetic":
        return None
    if folder is not None:
        return folder / f"{dataset}.txt"
    from awrsr.data.fetch import fetch

    return fetch(dataset)


def train_apart(arguments: list[str], log: Path) -> int:
    """The exit status of `awrsr train` in a process of its own.

    It is forked from one that has imported everything and computed nothing, where systems have such: imports take 5 s a run.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["awrsr.cli", "awrsr.training.run", "benchmarks.study.run"])
    process = context.Process(target=_train, args=(arguments, log))
    process.start()
    process.join()
    return int(process.exitcode)


def _train(arguments: list[str], log: Path) -> None:
    """`awrsr train`, in this process; all output goes to the end of a file."""
    from awrsr.cli import main as awrsr

    with log.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(awrsr(["train", *arguments]))


def trained(arguments: list[str], data: Path | None, out: Path) -> dict[str, Any]:
    """The content of metrics.json after a training in the folder `out`. Raises RuntimeError if training fails."""
    arguments = [*arguments, *(["--data", str(data)] if data else []), "--threads", "1", "--no-progress", "--out", str(out)]
    out.mkdir(parents=True, exist_ok=True)
    status = train_apart(arguments, out / "output.txt")
    if status:
        raise RuntimeError(f"awrsr train {shlex.join(arguments)} ended with status {status}; see {out / 'output.txt'}")
    return read_json(out / "metrics.json")


def run(cell: Cell, seed: int, folder: Path | None, runs: Path, results: Results) -> None:
    """Train a cell with a seed and add the results. Raises RuntimeError if training fails."""
    out, data = runs / f"{cell.name}_{seed}", source(cell.dataset, folder)
    out.mkdir(parents=True, exist_ok=True)
    began = out / "commit"
    if not began.exists():
        began.write_text(f"{commit()}\n", encoding="utf-8")
    metrics = trained(cell.arguments(seed), data, out)
    entry = cell.described(seed) | {
        "epochs": metrics["epochs"],
        "best_epoch": metrics["best_epoch"],
        "params": metrics["parameters"],
        **{name: metrics[name] for name in ("train_seconds", "train_cpu_seconds", "validation", "test")},
        "recall": metrics.get("recall"),
        "curve": [round(epoch["NDCG@10"], 5) for epoch in metrics["curve"]],
        "command": cell.command(seed),
        "commit": began.read_text(encoding="utf-8").strip(),
        "device": device_name("cpu").rpartition(",")[0] + ", 1 thread(s)",
        "versions": versions(),
    }
    test = pl.read_parquet(out / "ranks_test.parquet").with_columns(pl.col("user", "item").cast(pl.String)).sort("user", "position")
    results.add(entry, test, popularity(cell, data, test))


def popularity(cell: Cell, file: Path | None, test: pl.DataFrame) -> np.ndarray:
    """(M,) how often the item of each target is among the training events."""
    from awrsr.analysis.analyse import training_counts
    from awrsr.data.prepare import DataOptions, divide, histories

    options = DataOptions(data=str(file or ""), **DATA.get(cell.dataset, {}))
    split = divide(histories(options), options)
    counts = dict(zip(split.histories.item_ids.astype(str).tolist(), training_counts(split).tolist(), strict=True))
    return np.array([counts[item] for item in test["item"].to_list()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--folder", type=Path, help="Folder with beauty.txt, jazz.txt and so on (default: they are downloaded).")
    groups = [*second_order.GROUPS, *GROUPS]
    add("--only", nargs="+", choices=groups, default=groups, help="Parts of the plan to run (default: all, in this order).")
    add("--datasets", nargs="+", default=[], help="Run only cells of these data sets.")
    add("--cells", nargs="+", default=[], help="Run only cells whose name contains one of these words.")
    add(
        "--seeds",
        type=whole(0),
        default=0,
        help="Maximum number of seeds per cell (default: as planned, which is five for cells that support claims).",
    )
    add("--budget", type=float, default=0.0, help="Start no further run after this many minutes (default: no limit).")
    add("--jobs", type=whole(1), default=1, help="Number of parallel runs, with one thread each (default: %(default)s).")
    add("--runs", type=Path, default=Path("bench-out/study"), help="Folder for the run folders (default: %(default)s).")
    add("--out", type=Path, default=RESULTS, help="Folder of study.json (default: %(default)s).")
    add("--list", action="store_true", help="List what is done and what is missing, and run nothing.")
    options = parser.parse_args(arguments)
    results = Results(options.out)
    cells = selected(options, results)
    if not cells:
        parser.error("no cell of the plan matches --only, --datasets and --cells; --list without them shows all cells")
    if options.list:
        for cell in cells:
            print(f"{cell.group:17} {cell.name:64} {len(results.done(cell))} of {cell.seeds} seeds")
        return 0
    try:
        with FileLock(options.out / ".study.lock", timeout=0):
            if changed := keep_defaults(options.out):
                parser.error(
                    f"out is {options.out}, whose runs were made with other defaults of `awrsr train`: {'; '.join(changed)}. "
                    f"Add the old values to the commands of plan and entries and delete {DEFAULTS}, or use another folder"
                )
            end = time.monotonic() + 60 * options.budget if options.budget else float("inf")
            search = [(cell, 0) for cell in cells if second_order.searching(cell)]
            failed = run_all(search, end, options, results) if search else 0
            cells = selected(options, results)  # those that the search chose have more seeds now
            failed |= run_all([(cell, seed) for cell in cells for seed in seeds(cell, options)], end, options, results)
            results.write_tables(SMALL)
            return failed
    except Timeout:
        parser.error(f"out is {options.out}, where another study.py is running: wait until it ends; --jobs gives it more processes")


def selected(options: argparse.Namespace, results: Results) -> list[Cell]:
    """The cells that the command asks for."""
    cells = [cell for cell in (*second_order.cells(results), *plan()) if cell.group in options.only]
    cells = [cell for cell in cells if not options.datasets or cell.dataset in options.datasets]
    return [cell for cell in cells if not options.cells or any(word in cell.name for word in options.cells)]


def seeds(cell: Cell, options: argparse.Namespace) -> range:
    return range(min(cell.seeds, options.seeds or cell.seeds))


def in_order(wanted: list[tuple[Cell, int]], groups: list[str]) -> list[tuple[Cell, int]]:
    """A first look at all cells first; those of the second order in their own order."""

    def place(each: tuple[Cell, int]) -> tuple[int, ...]:
        cell, seed = each
        own = second_order.rank(cell, seed) if cell.group in second_order.GROUPS else (seed > 0, seed > 2)
        return groups.index(cell.group), *own

    return sorted(wanted, key=place)


def run_all(wanted: list[tuple[Cell, int]], end: float, options: argparse.Namespace, results: Results) -> int:
    """Run what is missing until the time `end`. A failed run does not stop the others; it makes the status 1."""
    missing = [(cell, seed) for cell, seed in in_order(wanted, options.only) if results.of(cell, seed) is None]
    total = len(wanted)
    failed: list[str] = []
    runnable = [(cell, seed) for cell, seed in missing if not cell.removed]
    if len(runnable) < len(missing):
        removed = f"with the removed options {' or '.join(REMOVED)} are missing and are not run"
        print(f"{len(missing) - len(runnable)} runs {removed}; they can be run at the tag {TAG}")
    with tqdm(total=total, initial=total - len(missing), unit="run", disable=None) as bar:

        def work(cell: Cell, seed: int) -> None:
            if time.monotonic() > end:
                return
            bar.set_description(f"{cell.name} seed {seed}")
            try:
                run(cell, seed, options.folder, options.runs, results)
                bar.update()
            except (RuntimeError, OSError, ValueError) as error:
                failed.append(f"{cell.name} seed {seed}: {error}")

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda each: work(*each), runnable))
    left = sum(results.of(cell, seed) is None for cell, seed in missing)
    again = ", rerun the same command to continue" if left > len(missing) - len(runnable) else ""
    print("\n".join([*failed, f"{total - left} of {total} runs are done{again}"]))
    return 1 if failed else 0
