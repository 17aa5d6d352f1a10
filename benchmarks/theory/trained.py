"""Train small transformers on tasks that need two steps or more, each with the same search for its learning rate.

    python -m benchmarks.theory.trained                      # what results/theory/trained.json lacks; hours
    python -m benchmarks.theory.trained --budget 60 --jobs 2 # as much as fits in an hour; rerun the command to continue
    python -m benchmarks.theory.trained --only induction     # one part
    python -m benchmarks.theory.trained --list               # list what is done and what is missing

A part is a task, or one task in several lengths, with the models that are compared on it. In each part every model is trained with
each of RATES, with seed 0, on the part's first task; the rate with the highest accuracy, or the lowest loss among equal ones, is
used for all seeds and lengths. Batches are drawn anew, so there is no training set to learn by heart; accuracy is measured on
sequences of a seed that no training has.
"""

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from awrsr.files import read_json, write_json
from awrsr.models.network import AWRSRNetwork
from awrsr_kernels.tuning.arguments import whole
from benchmarks.common.report import commit, versions
from benchmarks.theory.models import CONTESTANTS, LANGUAGE, Contestant
from benchmarks.theory.tasks import NOT_ASKED, Hops, Induction, Recall, Task, Text

RESULTS = Path(__file__).resolve().parents[1] / "results/theory/trained.json"
RATES = (1e-3, 3e-3, 1e-2)
TOKENS = 4096  # of a step: fewer sequences where they are longer
TESTED = 1 << 16  # tokens that accuracy is measured on
TEST_SEED = 1 << 40
CHECKS = 10  # times that accuracy is measured during training


class Part(NamedTuple):
    """Tasks and the models that are compared on them, with their size and the number of steps."""

    tasks: tuple[Task, ...]
    models: tuple[Contestant, ...]
    steps: int
    hidden: int = 64
    heads: int = 2
    seeds: int = 5


def deep(kind: str, preset: str, *layers: int) -> tuple[Contestant, ...]:
    """Contestants of several depths."""
    words = {1: "one", 2: "two", 3: "three", 4: "four", 6: "six"}
    return tuple(Contestant(f"{words[count]} {kind}", preset, count) for count in layers)


SHALLOW = (*deep("plain", "plain", 1, 2), *deep("refined", "refined", 1), *deep("lagged", "lagged", 1))
DEEPER = (*deep("plain", "plain", 2, 4), *deep("refined", "refined", 1, 2), *deep("lagged", "lagged", 1, 2))
PARTS = {
    "induction": Part(tuple(map(Induction, (64, 32, 128, 256))), CONTESTANTS, 500),
    "longer": Part((Induction(128),), deep("plain", "plain", 2), 2000),  # do two plain layers learn it with more steps?
    "recall": Part((Recall(), Recall(length=128, pairs=16)), SHALLOW, 400, hidden=128),
    "hops": Part((Hops(length=64, most=8),), DEEPER, 1200),
    "language": Part((Text(),), LANGUAGE, 1000, seeds=3),
}
WIDE = ("induction", "plain, ten times as wide")  # with the first task of this part alone: it takes ten times as long as others


class Run(NamedTuple):
    """A training run: part, task, model, learning rate, seed."""

    part: str
    task: Task
    model: Contestant
    rate: float
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.part, self.task.name, self.model.name, self.rate, self.seed


Entries = dict[tuple[Any, ...], dict[str, Any]]


def searched(part: str, model: Contestant, entries: Entries) -> float | None:
    """The best rate with seed 0 on the part's first task; None until all rates were tried."""
    found = [entries.get(Run(part, PARTS[part].tasks[0], model, rate, 0).key) for rate in RATES]
    tried = [each for each in found if each is not None]
    if len(tried) < len(RATES):
        return None
    return float(max(tried, key=lambda each: (round(each["accuracy"], 3), -each["loss"]))["rate"])


def wanted(entries: Entries, only: list[str]) -> Iterator[Run]:
    """All runs whose rate is known: the search first, then seed by seed."""
    pairs = [(part, model) for part in only for model in PARTS[part].models]
    for part, model in pairs:
        yield from (Run(part, PARTS[part].tasks[0], model, rate, 0) for rate in RATES)
    for seed in range(max(PARTS[part].seeds for part in only)):
        for part, model in pairs:
            tasks = PARTS[part].tasks[: 1 if (part, model.name) == WIDE else None]
            if seed < PARTS[part].seeds and (rate := searched(part, model, entries)):
                yield from (Run(part, task, model, rate, seed) for task in tasks)


def states(network: AWRSRNetwork, tokens: Tensor) -> Tensor:
    """(B, L, E) what the model knows after each token."""
    return network.forward_padded(tokens, torch.full((len(tokens),), tokens.shape[1]))


@torch.no_grad()
def accuracies(network: AWRSRNetwork, task: Task) -> dict[str, float]:
    """Share of right answers over all, and by what sequences ask for, if they ask for different things; and of text the loss, in
    nats per byte."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    right: dict[str, list[float]] = {"all": []}
    if isinstance(task, Text):
        task, right["loss"] = Text(task.length, tested=True), []
    for _ in range(max(1, TESTED // TOKENS)):
        tokens, answers = task.draw(max(1, TOKENS // task.length), generator)
        scores = states(network, tokens) @ network.item_table().T
        hit, asked = scores.argmax(-1) == answers, answers != NOT_ASKED
        right["all"] += hit[asked].float().tolist()
        if isinstance(task, Text):
            right["loss"].append(F.cross_entropy(scores.flatten(0, 1), answers.flatten()).item())
        if isinstance(task, Hops):
            for kind in range(1, task.most + 1):
                of_kind = task.kinds(tokens) == kind
                right.setdefault(str(kind), []).extend(hit[of_kind][asked[of_kind]].float().tolist())
    return {name: sum(each) / max(len(each), 1) for name, each in right.items()}


def train(run: Run) -> dict[str, Any]:
    """Train a model, and return what is stored of it."""
    return fitted(run)[1]


def fitted(run: Run) -> tuple[AWRSRNetwork, dict[str, Any]]:
    """The trained model of a run, and what is stored of it. AdamW, 10 % of the steps to reach the rate and a cosine back to 0."""
    torch.set_num_threads(1)
    part = PARTS[run.part]
    torch.manual_seed(run.seed)
    network = run.model.build(run.task, part.hidden, part.heads)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, run.rate, total_steps=part.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(run.seed)
    seconds, curve, loss = 0.0, [], torch.tensor(0.0)
    for step in range(part.steps):
        began = time.process_time()
        tokens, answers = run.task.draw(max(1, TOKENS // run.task.length), generator)
        asked = answers != NOT_ASKED
        loss = F.cross_entropy(states(network, tokens)[asked] @ network.item_table().T, answers[asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds += time.process_time() - began
        if (step + 1) % (part.steps // CHECKS) == 0:
            curve.append(round(accuracies(network, run.task)["all"], 4))
    found = accuracies(network, run.task)
    entry = {
        "part": run.part, "task": run.task.name, "model": run.model.name, "rate": run.rate, "seed": run.seed,
        "accuracy": found.pop("all"), "loss": loss.item(), "curve": curve, "steps": part.steps, "cpu_seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in network.parameters()), "commit": commit(),
    }  # fmt: skip
    return network, entry | ({"by_kind": found} if found else {})


class Results:
    """The entries of a file, written anew after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = read_json(path)["rows"] if path.exists() else []
        self.entries: Entries = {tuple(row[name] for name in ("part", "task", "model", "rate", "seed")): row for row in stored}

    def add(self, entry: dict[str, Any]) -> None:
        self.entries[tuple(entry[name] for name in ("part", "task", "model", "rate", "seed"))] = entry
        rows = [self.entries[key] for key in sorted(self.entries, key=str)]
        about = {"kind": "theory", "command": "python -m benchmarks.theory.trained", "versions": versions()}
        write_json(self.path, about | {"rows": rows})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all, in this order)")
    add("--budget", type=float, default=0.0, help="start no further run after this many minutes (default: no limit)")
    add("--jobs", type=whole(1), default=1, help="number of parallel runs, with one thread each (default: %(default)s)")
    add("--out", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    add("--list", action="store_true", help="list what is done and what is missing, and run nothing")
    options = parser.parse_args(arguments)
    results = Results(options.out)
    if options.list:
        for part in options.only:
            done = sum(run.key in results.entries for run in dict.fromkeys(wanted(results.entries, [part])))
            unknown = sum(searched(part, model, results.entries) is None for model in PARTS[part].models)
            print(f"{part:10} {done} runs are done; {unknown} of {len(PARTS[part].models)} models have no rate yet")
        return 0
    end = time.monotonic() + 60 * options.budget if options.budget else float("inf")
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool, tqdm(unit="run", disable=None) as bar:
        while True:  # what a search chooses is known only once it has ended
            missing = list(dict.fromkeys(run for run in wanted(results.entries, options.only) if run.key not in results.entries))
            if not missing or time.monotonic() > end:
                break
            bar.total = bar.n + len(missing)
            following = iter([run for run in missing if searched(run.part, run.model, results.entries) is None] or missing)
            running: set[Future[dict[str, Any]]] = set()
            while True:
                while len(running) < options.jobs and time.monotonic() < end and (run := next(following, None)):
                    running.add(pool.submit(train, run))
                if not running:
                    break
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for each in ended:
                    results.add(each.result())
                    bar.update()
    left = sum(run.key not in results.entries for run in wanted(results.entries, options.only))
    print(f"{len(results.entries)} runs are done" + (f", {left} are missing: rerun the same command to continue" if left else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
