"""What the options of training do: losses, clipping, windows, precision, logs, devices; several processes train as one would."""

import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from awrsr import AWRSR, TrainingOptions
from awrsr.cli import main
from awrsr.config import NEGATIVES
from awrsr.data.histories import Histories
from awrsr.data.splits import Split, split
from awrsr.evaluation.ranking import evaluate
from awrsr.training import run as training
from awrsr.training.batches import Windows
from awrsr.training.loop import TrainingLoop
from awrsr.training.losses import LOSSES, draw_negatives

from .runs import QUICK, SMALL, STOSA, command, config, fit, flags, histories, results, train, weights, write

ROOT = Path(__file__).parents[2]
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.txt")


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(Histories.from_lists(histories()))


@pytest.mark.parametrize(
    ("loss", "model"),
    [(loss, {}) for loss in LOSSES] + [(loss, STOSA) for loss in ("sampled_softmax", "cross_entropy", "bpr")],
    ids=str,
)
def test_every_loss_falls_and_ranks_better(loss: str, model: dict[str, Any], parts: Split) -> None:
    """Those of stosa that its help advises."""
    epochs = 48 if loss == "gbce" else 12  # it first lowers all scores, which many negatives make it do
    options = {"epochs": epochs, "patience": 0, "learning_rate": 1e-2, "negatives": 8}
    curve = fit(parts, NO_DROPOUT | model, loss=loss, **options)[1]["curve"]
    assert curve[-1]["loss"] < 0.7 * curve[0]["loss"]
    assert curve[-1]["NDCG@10"] > 0.6  # 0.23 by chance


def test_every_loss_says_how_many_negatives_are_usual() -> None:
    assert NEGATIVES.keys() == LOSSES.keys()


def test_negatives_are_as_many_as_asked_for(parts: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, real = [], LOSSES["bce"]

    def seen(hidden: torch.Tensor, targets: torch.Tensor, table: torch.Tensor, negatives: torch.Tensor, **_: float) -> torch.Tensor:
        shapes.append(negatives.shape[1:])
        assert not (negatives == targets[:, None]).any()
        return real(hidden, targets, table, negatives)

    monkeypatch.setitem(LOSSES, "bce", seen)
    fit(parts, loss="bce", negatives=3, epochs=1)
    assert set(shapes) == {(3,)}


@pytest.mark.parametrize("loss, dropout, anew", [("cross_entropy", 0.5, True), ("bce", 0.0, True), ("cross_entropy", 0.0, False)])
def test_dropout_and_negatives_are_drawn_anew_at_each_step(loss: str, dropout: float, anew: bool) -> None:
    one_user = split(Histories.from_lists([[f"i{n}" for n in range(24)]]))
    options = {"loss": loss, "epochs": 3, "learning_rate": 1e-12, "progress": False}  # nothing is learned
    losses = {each["loss"] for each in fit(one_user, {"hidden_dropout": dropout, "attention_dropout": 0.0}, **options)[1]["curve"]}
    assert len(losses) == (3 if anew else 1)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_gradient_is_clipped(precision: str, parts: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    step, norms = torch.optim.AdamW.step, []

    def watched(self: torch.optim.AdamW, closure: Any = None) -> Any:
        found = step(self, closure)
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    fit(parts, epochs=1, precision=precision)
    free, norms = norms, []
    fit(parts, epochs=1, precision=precision, clip=0.01)
    assert min(free) > 0.02
    assert len(norms) == len(free)
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)


def test_the_learning_rate_falls_by_half_a_cosine(parts: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    step, rates = torch.optim.AdamW.step, []

    def watched(self: torch.optim.AdamW, closure: Any = None) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    fit(parts, epochs=3, patience=0, learning_rate=0.02, schedule="cosine")
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * n / len(rates))) for n in range(len(rates))])
    assert len(rates) % 3 == 0 and rates[0] == 0.02


def test_more_epochs_are_another_run_where_the_rate_falls(data: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert main(command(data, tmp_path / "run", epochs=1, schedule="cosine")) == 0
    error = refused(*command(data, tmp_path / "run", epochs=2, schedule="cosine"))
    assert "holds another run: training.epochs was 1 and is 2 (with schedule 'cosine' the learning rate of each" in error


def test_the_average_of_the_weights_is_evaluated_and_kept(parts: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins as the weights after the first step and follows them closely at first; training goes on with the weights."""
    best_without = fit(parts, epochs=1, average=0.0)[1]["best"]
    after: list[dict[str, torch.Tensor]] = []

    def watched(self: TrainingLoop, outputs: Any, batch: Any, batch_idx: int) -> None:
        after.append({name: weight.detach().clone() for name, weight in self.model.state_dict().items()})
        follow(self, outputs, batch, batch_idx)

    follow = TrainingLoop.on_train_batch_end
    monkeypatch.setattr(TrainingLoop, "on_train_batch_end", watched)
    model, record = fit(parts, epochs=1, average=0.25)
    for name, kept in model.state_dict().items():
        expected = after[0][name]
        for n, later in enumerate(after[1:], 1):
            stays = min(0.25, (1 + n) / (10 + n))
            expected = stays * expected + (1 - stays) * later[name]
        torch.testing.assert_close(kept, expected)
    assert len(after) > 2 and not torch.equal(model.items.weight, after[-1]["items.weight"])
    assert record["best"] != best_without


def test_weight_decay_shrinks_what_no_event_touches() -> None:
    lists = {user: [item for item in items if item != "i7"] + ["i7"] for user, items in histories().items()}
    parts = split(Histories.from_lists(lists))  # i7 is a test target alone: its embedding gets no gradient from bpr on the others
    row = int(np.flatnonzero(parts.histories.item_ids == "i7")[0])
    torch.manual_seed(0)
    model = AWRSR(config(num_items=parts.histories.num_items))
    before = model.items.weight[row].norm().item()
    training.train(model, parts, TrainingOptions(**QUICK, epochs=1, weight_decay=50.0, loss="cross_entropy"))
    assert model.items.weight[row].norm().item() < before


def test_windows_all_trains_on_every_event_and_last_on_the_ends(parts: Split) -> None:
    pairs = parts.train_end - 1  # events that have a target
    sequences = {name: fit(parts, windows=name, epochs=1)[1]["sequences"] for name in ("last", "all")}
    assert sequences["last"] == (pairs > 0).sum() == len(pairs)
    assert sequences["all"] == np.ceil(pairs / SMALL["max_len"]).sum() > sequences["last"]


def test_with_nothing_held_out_every_event_is_trained_on_to_the_end(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    assert main([*command(data, run, epochs=3, patience=1), "--split", "none"]) == 0
    printed = capsys.readouterr().out
    assert "3 epochs, nothing held out" in printed and "NDCG" not in printed and "epoch 3/3" in printed
    found = results(run)
    assert found["epochs"] == found["best_epoch"] == 3 and not {"test", "validation"} & found.keys()
    assert [set(each) for each in found["curve"]] == [{"epoch", "loss"}] * 3 and not list(run.glob("ranks_*"))
    assert main([*command(data, run, epochs=4, patience=1), "--split", "none"]) == 0  # goes on
    whole = tmp_path / "whole"
    assert main([*command(data, whole, epochs=4, patience=1), "--split", "none"]) == 0
    assert weights(run) == weights(whole) and results(run)["epochs"] == 4
    assert main(["recommend", "--run", str(run), "-k", "2"]) == 0
    assert "holds out no events" in refused("evaluate", "--run", run)


def test_a_split_of_nothing_trains_on_the_last_events(parts: Split) -> None:
    everything = split(parts.histories, "none")
    assert np.array_equal(everything.train_end, parts.histories.lengths) and not len(everything.targets("test")[0])
    model, record = fit(everything, NO_DROPOUT, epochs=30, learning_rate=1e-2, patience=1)
    assert record["best_epoch"] == record["epochs"] == 30
    after, _ = fit(parts, NO_DROPOUT, epochs=30, learning_rate=1e-2, patience=0)
    last = [evaluate(each, parts, "test").ranks.mean() for each in (model, after)]
    assert last[0] < last[1]  # it has seen them


@pytest.mark.parametrize("model", [{}, STOSA], ids=["sasrec", "stosa"])
def test_bf16_mixed_trains_in_bfloat16_and_keeps_float32_weights(
    model: dict[str, Any], parts: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Squared distances are not rounded to bfloat16, wherever they are scores."""
    kinds, real = [], LOSSES["sampled_softmax"]
    model = NO_DROPOUT | model
    exact = fit(parts, model, epochs=4, learning_rate=1e-2)[1]["curve"]

    def seen(hidden: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        kinds.append((hidden @ hidden.T).dtype)
        return real(hidden, *rest, **options)

    monkeypatch.setitem(LOSSES, "sampled_softmax", seen)
    trained, record = fit(parts, model, epochs=4, learning_rate=1e-2, precision="bf16-mixed")
    assert set(kinds) == {torch.float32 if trained.by_distance else torch.bfloat16}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    curve = record["curve"]
    assert curve[-1]["loss"] < 0.95 * curve[0]["loss"]
    assert [each["loss"] for each in curve] == pytest.approx([each["loss"] for each in exact], rel=0.02)
    assert curve != exact


@pytest.mark.parametrize("loss", ["bce", "gbce"])
def test_losses_that_distances_cannot_have_are_refused(loss: str, parts: Split, tmp_path: Path) -> None:
    model = AWRSR(config(num_items=24, **STOSA))
    with pytest.raises(ValueError, match=rf"loss is '{loss}', which does not suit backbone 'stosa'"):
        TrainingLoop(model.network, parts, TrainingOptions(loss=loss, **QUICK), tmp_path, {})


@pytest.mark.parametrize("loss", ["sampled_softmax", "cross_entropy", "bpr"])
def test_a_table_of_the_rows_that_a_loss_needs_serves_it_like_the_whole(loss: str, parts: Split, tmp_path: Path) -> None:
    options = TrainingOptions(loss=loss, negatives=3, pvn_weight=0.1 if loss == "bpr" else 0.0, **QUICK)
    run = TrainingLoop(AWRSR(config(num_items=24, **STOSA)).double().network, parts, options, tmp_path, {})
    targets, model = torch.tensor([7, 3, 7, 20]), run.model
    negatives = draw_negatives(loss, targets, 24, 3, torch.Generator().manual_seed(0))
    hidden = model(targets, torch.tensor([0, 4]), 4).detach()
    needed = run.table_of(targets, negatives)
    assert len(needed[1]) == (24 if loss == "cross_entropy" else len(torch.cat([targets, negatives.flatten()]).unique())) <= 24
    results = []
    for given in (needed, (targets, model.item_table(), negatives)):
        model.zero_grad()
        value = LOSSES[loss](hidden, *given, pvn_weight=options.pvn_weight, num_items=24)
        value.sum().backward()
        results.append([value.detach(), model.items.weight.grad])
    torch.testing.assert_close(*results)


def test_64_true_trains_and_stores_in_float64(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", epochs=1, precision="64-true")
    assert {x.dtype for x in AWRSR.load(tmp_path / "run").parameters()} == {torch.float64}


def test_filter_seen_no_ranks_what_the_history_holds(data: Path, tmp_path: Path) -> None:
    found = {name: train(data, tmp_path / name, epochs=1, filter_seen=name) for name in ("auto", "yes", "no")}
    assert not found["auto"]["filter_seen"]  # these histories hold items twice
    assert found["auto"]["test"] == found["no"]["test"]
    assert found["yes"]["test"]["MRR"] > found["no"]["test"]["MRR"]


# Logs.


def test_csv_logs_hold_the_loss_and_the_metrics_of_each_epoch(data: Path, tmp_path: Path) -> None:
    curve = train(data, tmp_path / "run", epochs=3)["curve"]
    (path,) = (tmp_path / "run" / "logs").rglob("*.csv")
    table = pl.read_csv(path)
    for name in ("loss", "NDCG@10"):
        assert table[name].to_list() == pytest.approx([each[name] for each in curve], rel=1e-6)
    assert {"HR@10", "MRR", "epoch"} <= set(table.columns)


def test_tensorboard_logs_hold_the_loss_and_the_metrics_of_each_epoch(data: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs TensorBoard")
    curve = train(data, tmp_path / "run", epochs=3, logger="tensorboard")["curve"]
    (path,) = (tmp_path / "run" / "logs").rglob("events.*")
    read = events.EventAccumulator(str(path)).Reload()
    for name in ("loss", "NDCG@10"):
        assert [each.value for each in read.Scalars(name)] == pytest.approx([each[name] for each in curve], rel=1e-6)


def test_logger_none_writes_no_logs(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", epochs=1, logger="none")
    assert not (tmp_path / "run" / "logs").exists()


def test_a_line_per_epoch_where_there_is_no_terminal(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train(data, tmp_path / "run", epochs=2)
    out, error = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert lines == [
        f"epoch {n}/2  loss {each['loss']:.4f}  NDCG@10 {each['NDCG@10']:.4f}  "
        f"best {max(c['NDCG@10'] for c in found['curve'][:n]):.4f} in epoch {min(n, found['best_epoch'])}"
        for n, each in enumerate(found["curve"], 1)
    ]
    assert error == ""


def test_no_progress_prints_a_line_per_epoch(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(data, tmp_path / "run", epochs=2), "--no-progress"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"] and all("NDCG@10" in line for line in lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_with_loss_and_ndcg_on_a_terminal(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    found = train(data, tmp_path / "run", epochs=2)
    last = found["curve"][-1]["NDCG@10"], max(each["NDCG@10"] for each in found["curve"])
    drawn = next(line for line in reversed(terminal.getvalue().split("\r")) if "epoch" in line)
    assert "epoch 2/2: 100%" in drawn and "8/8" in drawn and "loss=" in drawn
    assert f"NDCG@10={last[0]:.4f}, best={last[1]:.4f}" in drawn
    assert "epoch 1/2" not in capsys.readouterr().out


# Devices.


def test_no_gpu_where_one_is_asked_for_is_an_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(command(data, tmp_path / "run", accelerator="gpu")) == 1
    error = capsys.readouterr().err
    assert error.startswith("awrsr train: accelerator is 'gpu', but torch finds no such device") and "use cpu or auto" in error
    assert not (tmp_path / "run").exists()


def test_a_precision_that_the_device_lacks_is_an_error(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(data, tmp_path / "run", precision="16-mixed")) == 1
    error = capsys.readouterr().err
    assert error == "awrsr train: precision is '16-mixed', which needs a GPU; use bf16-mixed or 32-true\n"
    assert not (tmp_path / "run").exists()


def test_more_processes_than_sequences_are_an_error(parts: Split) -> None:
    with pytest.raises(ValueError, match="batch_size is 4 for 61 training sequences, must leave one for each of 8 processes"):
        Windows(parts, 8).batches(4, seed=0, epoch=0, world=8)


SCRIPT = """
import sys
from awrsr.cli import main

from tests.recommender.runs import flags
from tests.recommender.test_train_options import TOGETHER

arguments, out = sys.argv[1:-1], sys.argv[-1]
for name, options in TOGETHER.items():
    if status := main([*arguments, *flags(**options, out=f"{out}/{name}")]):
        sys.exit(status)
"""
TOGETHER: dict[str, dict[str, Any]] = {
    "bce": {"loss": "bce"},
    "sampled_softmax": {"loss": "sampled_softmax", "sharpness": 0.0},  # sharp weights magnify what rounds otherwise
    "stosa": STOSA | {"loss": "bpr", "pvn_weight": 0.1},
    "published": STOSA | {"loss": "bpr", "mean_branch": "published"},
    "nothing held out": {"split": "none", "item_init": "cooccurrence"},
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, and of one in alone/; 61 users and batches of 15 or 16, so that shares differ."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(SCRIPT)
    data = write(folder / "data.txt")
    options = SMALL | QUICK | {"epochs": 3, "negatives": 5} | NO_DROPOUT
    started = [sys.executable, folder / "script.py", "train", *flags(**options, data=data, devices=2), folder]
    done = subprocess.run(
        started, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout + done.stderr)
    for name, its in TOGETHER.items():
        train(data, folder / "alone" / name, **(options | its))
    return folder


@pytest.mark.parametrize("run", TOGETHER)
def test_two_processes_train_as_one(run: str, together: Path) -> None:
    two, one = results(together / run), results(together / "alone" / run)
    assert one["curve"] and two.keys() == one.keys() and ("test" in one) == (run != "nothing held out")
    for name in one["curve"][0]:
        assert [each[name] for each in two["curve"]] == pytest.approx([each[name] for each in one["curve"]], rel=1e-5)
    for part in {"validation", "test"} & one.keys():
        assert two[part] == pytest.approx(one[part], rel=1e-5)
    got, want = (load_file(out / "model.safetensors") for out in (together / run, together / "alone" / run))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4)


def test_processes_beside_the_first_print_nothing(together: Path) -> None:
    printed = (together / "printed").read_text()
    assert printed.count("61 users") == printed.count("epoch 3/3") == len(TOGETHER)
    assert "Warning" not in printed and "Initializing" not in printed and "recommended" not in printed
