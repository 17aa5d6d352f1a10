"""What models reach on real and made-up data: `awrsr train` for every cell of a plan and every seed, and a table of what they say.

    python benchmarks/accuracy.py --folder data --out bench-out/accuracy
    python benchmarks/accuracy.py --cells synthetic lastfm --seeds 3

A cell is a command; its runs are kept, so that a plan that was stopped goes on where it was. Every figure is full ranking on the
held-out last events (see `awrsr.ranking`), the epoch chosen by validation.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

if __package__ is None:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import commit, device_name, versions, write_data  # noqa: E402
from benchmarks.study import source  # noqa: E402

KIND = "accuracy"
BCE = "--loss bce --norm post --attention-dropout 0.5 --schedule cosine --epochs 120 --patience 30"  # one negative overfits
STOSA = "--backbone stosa --max-len 50 --layers 1 --heads 4 --norm post --activation elu --feedforward 4 --attention-dropout 0"
METRICS = ("HR@10", "NDCG@10", "MRR", "HR@5", "HR@20", "NDCG@5", "NDCG@20")
SPREAD = 3  # of them come with their deviation on a page


class Cell(NamedTuple):
    """One row of the table."""

    dataset: str  # beauty, lastfm, ... or synthetic
    model: str  # what the table calls it
    options: str  # of awrsr train

    @property
    def name(self) -> str:
        return "_".join((self.dataset, self.model)).replace(" ", "-").replace(",", "")


def plan() -> list[Cell]:
    cells = [
        Cell("synthetic", "plain, 1 layer", "--refinement none --layers 1"),
        Cell("synthetic", "plain, 2 layers", "--refinement none --layers 2"),
        *(Cell("synthetic", f"{name}, 1 layer", f"--refinement {name} --no-baseline") for name in ("simple", "value", "additive")),
    ]
    for refinement in ("none", "additive"):
        name = "plain" if refinement == "none" else refinement
        cells.append(Cell("beauty", f"{name}, sampled softmax", f"--refinement {refinement} --max-len 50 --epochs 20"))
        cells.append(Cell("beauty", f"{name}, bce", f"--refinement {refinement} --max-len 50 {BCE}"))
        cells.append(Cell("lastfm", f"{name}, sampled softmax", f"--refinement {refinement} --max-len 50"))
    for refinement in ("none", "simple", "value", "additive", "stochastic"):
        name = "plain" if refinement == "none" else refinement
        softmax = "--hidden-dropout 0.5 --epochs 20"
        cells.append(Cell("beauty", f"stosa {name}, sampled softmax", f"{STOSA} --refinement {refinement} {softmax}"))
    bpr = "--loss bpr --pvn-weight 0.005 --batch-size 256 --hidden-dropout 0.3 --epochs 200 --patience 20"
    cells.append(Cell("beauty", "stosa plain, bpr", f"{STOSA} --refinement none {bpr}"))
    return cells


def command(cell: Cell, seed: int, threads: int, folder: Path | None, out: Path) -> list[str]:
    data = [] if cell.dataset == "synthetic" else ["--data", str(source(cell.dataset, folder))]
    return ["train", *data, *shlex.split(cell.options), "--seed", str(seed), "--threads", str(threads), "--out", str(out)]


def run(cell: Cell, seed: int, threads: int, folder: Path | None, out: Path) -> dict[str, Any]:
    """metrics.json of a cell and seed, trained if it is not there yet."""
    metrics = out / "metrics.json"
    if not metrics.exists():
        arguments = command(cell, seed, threads, folder, out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "commit").write_text(f"{commit()}\n", encoding="utf-8")
        with (out / "output.txt").open("w", encoding="utf-8") as log:
            done = subprocess.run([sys.executable, "-m", "awrsr", *arguments], stdout=log, stderr=subprocess.STDOUT, env=os.environ)
        if done.returncode:
            raise SystemExit(f"awrsr {shlex.join(arguments)} ended with status {done.returncode}; see {out / 'output.txt'}")
    found: dict[str, Any] = json.loads(metrics.read_text(encoding="utf-8"))
    return found | {"commit": (out / "commit").read_text(encoding="utf-8").strip()}


def row(cell: Cell, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and standard deviations where there are several."""
    values: dict[str, list[float]] = {name: [r["test"][name] for r in runs] for name in METRICS}
    if all("recall" in r for r in runs):
        values["recall"] = [r["recall"]["HR@1"] / r["recall"]["rule HR@1"] for r in runs]
    rates = ("train_sequences_per_cpu_second", "eval_users_per_cpu_second")
    for name in ("epochs", "best_epoch", "train_seconds", "train_cpu_seconds", *rates):
        values[name] = [r[name] for r in runs]
    means = {name: statistics.fmean(v) for name, v in values.items()}
    spread = {f"{name}_std": statistics.stdev(v) for name, v in values.items() if len(v) > 1}
    return (
        {"dataset": cell.dataset, "model": cell.model, "options": cell.options, "seeds": len(runs)}
        | {"commits": sorted({r["commit"] for r in runs})}
        | means
        | spread
    )


def markdown(results: dict[str, Any]) -> str:
    """The table for a page."""

    def shown(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return "-"
        spread = f"{name}_std" in row and name not in METRICS[SPREAD:]
        return f"{row[name]:.4f}" + (f" ± {row[name + '_std']:.4f}" if spread else "")

    commits = ", ".join(sorted({each[:12] for r in results["rows"] for each in r["commits"]}))
    lines = [f"Test, full ranking, mean and deviation over seeds; {results['device']}, commit {commits}.", ""]
    columns = ["data", "model", "seeds", *METRICS, "recall", "best epoch", "CPU s per epoch"]
    lines += [f"| {' | '.join(columns)} |", "|--" * len(columns) + "|"]
    for r in results["rows"]:
        cells = [r["dataset"], r["model"], str(r["seeds"]), *(shown(r, name) for name in (*METRICS, "recall"))]
        cells += [f"{r['best_epoch']:.0f}", f"{r['train_cpu_seconds'] / r['epochs']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-out/accuracy"), help="runs and results; default %(default)s")
    parser.add_argument("--folder", type=Path, help="folder with beauty.txt, lastfm.txt; default: they are fetched")
    parser.add_argument("--cells", nargs="+", default=[], help="cells whose name holds one of these words; default all")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell; default %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of each run; default %(default)s")
    options = parser.parse_args(arguments)
    cells = [cell for cell in plan() if not options.cells or any(word in cell.name for word in options.cells)]
    if not cells or options.seeds < 1:
        names = ", ".join(cell.name for cell in plan())
        parser.error(f"no cell holds {options.cells}, or seeds is {options.seeds}; cells: {names}")
    rows = []
    with tqdm(total=len(cells) * options.seeds, unit="run", disable=None) as bar:
        for cell in cells:
            runs = []
            for seed in range(options.seeds):
                bar.set_description(f"{cell.name} seed {seed}")
                runs.append(run(cell, seed, options.threads, options.folder, options.out / f"{cell.name}_{seed}"))
                bar.update()
            rows.append(row(cell, runs))
    shown = shlex.join(["python", "benchmarks/accuracy.py", *(arguments if arguments is not None else sys.argv[1:])])
    results: dict[str, Any] = {
        "kind": KIND,
        "device": device_name("cpu"),
        "versions": versions(),
        "commit": commit(),
        "command": shown,
    }
    results["rows"] = rows
    write_data(options.out, results, markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
