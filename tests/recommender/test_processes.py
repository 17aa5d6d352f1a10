"""Forked processes and threads: nothing waits for ever, and nobody changes the mode of a model that others use."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from awrsr.data.splits import split
from awrsr.evaluation.ranking import evaluate
from awrsr.models.network import in_evaluation
from awrsr.recommending import Rules, top_items

from .runs import command
from .small import as_numbered, make_lists, make_model

ROOT = Path(__file__).parents[2]

# The parent uses all threads of torch and polars, as a server does that loads everything before it forks its workers.
FORKS = """
import io, os, signal, sys, torch
from awrsr import AWRSR, Histories, read
from awrsr.data.prepare import moment
home, elsewhere = sys.argv[1:]
torch.set_num_threads(2)
torch.randn(1000, 1000).exp().sum()
model = AWRSR.load(home + "/run")
text, parquet = home + "/data.txt", elsewhere + "/data.parquet"
histories = read(text)
import polars as pl
table = pl.DataFrame({"user": histories.user_ids[histories.owners], "item": histories.item_ids[histories.items]})
table.write_parquet(parquet)
table.write_csv(elsewhere + "/data.csv")
many = {f"u{n}": [f"i{n * j % 24}" for j in range(60)] for n in range(3000)}
large = AWRSR(num_items=5000, hidden=64).eval()
wide = {n: [(n * j) % 5000 for j in range(50)] for n in range(300)}

def columns(frame):
    return frame.to_dict(as_series=False)

def caught(source):
    try:
        read(source)
    except ValueError as error:
        return type(error).__name__, str(error)

def reads(path):
    found = read(path)
    return found.items.tolist(), found.item_ids.tolist(), found.user_ids.tolist()

def saved(folder):
    model.save(elsewhere + folder)
    return columns(AWRSR.load(elsewhere + folder).recommend(many, k=2))

CALLS = {
    "load": lambda: columns(AWRSR.load(home + "/run").similar_items(["i3"], k=2)),
    "save": lambda: saved("/saved"),
    "recommend": lambda: columns(model.recommend(many, k=3, batch_size=512)),
    "recommend with much work": lambda: columns(large.recommend(wide, k=5)),
    "similar_items": lambda: columns(model.similar_items(["i3"], k=2)),
    "attention_maps": lambda: [p.tolist() for p, _ in large.attention_maps(list(range(50)))],
    "read text": lambda: reads(text),
    "read csv": lambda: reads(elsewhere + "/data.csv"),
    "read parquet": lambda: reads(parquet),
    "read a stream": lambda: reads(open(text, "rb")),
    "read a stream of text": lambda: reads(io.StringIO("ann i1 i2\\n")),
    "read a wrong file": lambda: caught(elsewhere),
    "read a wrong stream": lambda: caught(io.BytesIO(b"ann\\n")),
    "from_lists": lambda: Histories.from_lists(many).items.tolist(),
    "from_events": lambda: Histories.from_events(table["user"], table["item"]).items.tolist(),
    "from_lists of both kinds": lambda: Histories.from_lists(
        {n: [f"{j}.0" if j % 2 else j for j in range(n % 50)] + ["a", "NULL"] for n in range(999)}, missing_ids="drop"
    ).items.tolist(),
    "from_events with dates": lambda: Histories.from_events(
        [1, 1, None] * 9, ["1", "b", "3"] * 9, ["2019-10-02", "2019-10-01 00:00:00 UTC", "2019-10-03T01:00"] * 9, missing_ids="drop"
    ).times.tolist(),
    "recommend by text": lambda: columns(large.recommend({n: [str(j) for j in items] + ["x"] for n, items in wide.items()}, k=2)),
    "a date": lambda: moment("test_from", "2014-05-31"),
}
expected = {name: call() for name, call in CALLS.items()}
workers = {}
for name, call in CALLS.items():
    if pid := os.fork():
        workers[pid] = name
        continue
    signal.alarm(60)
    same = call() == expected[name]
    os._exit(0 if same else 3)
wrong = {}
for pid, name in workers.items():
    if status := os.waitpid(pid, 0)[1]:
        wrong[name] = "hangs" if status == signal.SIGALRM else status
print(wrong or "ok")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="macOS and Windows start processes by spawn")
def test_a_forked_worker_computes_what_its_parent_does(home: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKS, home, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.stdout == "ok\n", done.stdout + done.stderr


def test_threads_leave_the_mode_of_a_model_in_training_alone() -> None:
    """Each of them once switched the model to evaluation and back, under the others' feet."""
    model, lists = make_model(hidden_dropout=0.5, attention_dropout=0.5), make_lists(40)
    parts = split(as_numbered(lists))
    calls: dict[str, Any] = {
        "recommend": lambda: model.recommend(lists, k=5, batch_size=4)["score"].to_list(),
        "attention_maps": lambda: [m.tolist() for _, m in model.attention_maps(lists[0])],
        "evaluate": lambda: evaluate(model, parts, "test").ranks.tolist(),
    }
    expected = {name: call() for name, call in calls.items()}
    model.train()
    modes, wrong = [], []

    def work(name: str) -> None:
        for _ in range(10):
            if calls[name]() != expected[name]:
                wrong.append(name)
            modes.append(all(module.training for module in model.modules()))

    threads = [threading.Thread(target=work, args=(name,)) for name in list(calls) * 2]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        modes.append(all(module.training for module in model.modules()))
    assert not wrong and modes and all(modes)


def test_recommendations_that_are_given_up_leave_the_mode_of_the_model_alone() -> None:
    model = make_model().train()
    tables = top_items(model, as_numbered(make_lists(3)), 2, Rules(), batch_size=2)
    next(tables)
    next(tables)
    assert all(module.training for module in model.modules())


def test_a_twin_in_evaluation_shares_tensors_and_hooks_and_keeps_what_is_compiled() -> None:
    model = make_model(hidden_dropout=0.5)
    items, lengths = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    expected, seen = model.scores_padded(items, lengths), list[Any]()
    model.network.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    model.train()
    twin = in_evaluation(model.network)
    assert torch.equal(twin.scores_padded(items, lengths), expected) and seen
    assert all(a is b for a, b in zip(model.network.parameters(), twin.parameters(), strict=True))
    assert model.network.training and not twin.training
    model.network.compile(backend="eager")
    assert not in_evaluation(model.network).training and in_evaluation(model.network.eval()) is model.network


def test_threads_of_the_command_line_do_not_spin_for_long_while_they_wait(home: Path) -> None:
    """Threads that spin take the time of what runs beside them, and of each other. torch reads this when it is imported."""
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    program = "import os, sys; from awrsr.cli import main; early = 'torch' not in sys.modules; "
    program += "main(['data', 'stats', sys.argv[1]]); print(early, os.environ.get('GOMP_SPINCOUNT'))"
    words = [sys.executable, "-c", program, home / "data.txt"]
    for given, count in ({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7"):
        environment = {name: value for name, value in os.environ.items() if name not in names} | given
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.endswith(f"True {count}\n"), done.stdout + done.stderr


@pytest.mark.parametrize("threads, said", [(1, "Training on 1 CPU thread; "), (2, "Training on 2 CPU threads; ")])
def test_train_says_how_many_threads_it_uses(
    threads: int, said: str, home: Path, tmp_path: Path, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert said in printed(*command(home / "data.txt", tmp_path / "out", epochs=1, threads=threads))
