"""The benchmark of training: its files, the gate before timing, ratios."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from awrsr.config import EARLIER, AWRSRConfig
from awrsr.data.splits import split
from awrsr.data.synthetic import make
from awrsr.models import attention
from benchmarks.common import compare, pages
from benchmarks.common.clock import WrongResult
from benchmarks.common.report import Row
from benchmarks.training import contestants as training
from benchmarks.training import report as train_report
from benchmarks.training import train_bench
from benchmarks.training.contestants import TrainingTask, Work, check, contestant, rank_step, yardstick

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--quick --hidden 8 --rank 4 --max-len 6 --layers 1 --eval-users 20 --batch-size 16 --reps 1 --device cpu".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 users of 3 to 11 events."""
    path = tmp_path_factory.mktemp("data") / "users.txt"
    path.write_text("".join(f"{u} {' '.join(str(1 + (u * 7 + i) % 30) for i in range(3 + u % 9))}\n" for u in range(1, 41)))
    return path


@pytest.fixture
def task() -> TrainingTask:
    parts = split(make(users=40, items=20, length=9))
    config = AWRSRConfig(num_items=parts.histories.num_items, max_len=6, hidden=8, **EARLIER["model"] | {"rank": 4, "layers": 1})
    return TrainingTask(parts, config, "bce", 16, torch.device("cpu"), 0, "made")


def test_fixed_interface(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/train_bench.py", "--data", str(data), "--threads", "1", "--out", str(tmp_path), *SMALL]
    command += ["--layouts", "packed", "padded"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"device", "versions", "commit", "command", "kind", "rows", "gate"}
    assert results["device"].startswith("CPU: ")
    rows = results["rows"]
    named = {(r["pass"], r["provider"], r["layout"], r["refinement"]) for r in rows}
    assert len(named) == len(rows) == 2 * 2 * 2 * 2
    for row in rows:
        assert all(row[k] > 0 for k in ("median_ms", "p20_ms", "p80_ms", "peak_mib", "first_call_ms", "seq_per_s", "seq_per_cpu_s"))
        assert all(row[k] is not None for k in compare.REQUIRED)
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["samples"] == 1
    assert len(results["gate"]) == 16 and all(g["off"] <= g["tolerance"] for g in results["gate"])
    assert (tmp_path / "results.md").read_text() == pages.markdown(results)
    other = [row | {"loss": "bpr", "median_ms": 2 * row["median_ms"]} for row in rows if row["pass"] == "train"]
    (tmp_path / "both.json").write_text(json.dumps(results | {"rows": rows + other}))
    one, both = (compare.load(tmp_path / f"{name}.json") for name in ("results", "both"))
    found = compare.compare(one, both, 1.1)
    assert (found.compared, found.regressions, len(found.only_after)) == (len(rows), [], len(other))
    assert "train B 16 H 2 L 6 D 4 R 4 float32 none dropout 0.3 bpr users.txt" in compare.text(found, 1.1)


def test_stosa_beside_its_own_formulation(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    backbone = ["--backbone", "stosa", "--heads", "2", "--backends", "torch", "stosa", "--data", str(data)]
    command = [*SMALL, *backbone, "--layouts", "packed", "padded", "--refinements", "none", "stochastic", "--out", str(tmp_path)]
    assert train_bench.main(command) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    roles = {(row["provider"], row["layout"]): row["role"] for row in results["rows"]}
    assert roles == {("torch", "packed"): "ours", ("torch", "padded"): "ours", ("stosa", "padded"): "rival"}
    assert {row["backbone"] for row in results["rows"]} == {"stosa"} and len(results["gate"]) == 3 * 2 * 2
    for wrong in (["--backbone", "sasrec"], ["--loss", "gbce"], ["--layouts", "packed", "--backends", "stosa"]):
        with pytest.raises(SystemExit):
            train_bench.main([*command, *wrong])
        assert f"argument {wrong[0]}: was {wrong[1]}" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Flash attention", "ignore:Both fused kernels")
def test_stock_attention_in_the_same_model(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Flash has no dropout on a CPU: pinned to it, the contestant is left out with torch's reason."""
    options = ["--refinements", "simple", "--backends", "torch", "sdpa2", "sdpa2-flash", "--layouts", "packed", "padded"]
    assert train_bench.main([*SMALL, *options, "--data", str(data), "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    assert [s["provider"] for s in results["skipped"]] == ["sdpa2-flash"] and "dropout" in results["skipped"][0]["reason"].lower()
    assert {(r["provider"], r["role"]) for r in results["rows"]} == {("torch", "ours"), ("sdpa2", "rival")}
    for row in results["rows"]:
        assert row["best_rival"] in ("sdpa2", "sdpa2 packed") and row["ratio_to_best_rival"] > 0
        assert ("kernels" in row) == (row["provider"] == "sdpa2")
    assert "| to plain | vs rival |" in (tmp_path / "results.md").read_text()
    assert len(results["gate"]) == 2 * 2 * 2
    assert train_bench.main([*SMALL, "--refinements", "simple", "--backends", "sdpa2-flash", "--data", str(data)]) == 1
    assert "no backend can run" in capsys.readouterr().err


@pytest.mark.parametrize("refinement", ["none", "simple", "value", "additive"])
def test_stock_attention_passes_the_gate(refinement: str, task: TrainingTask) -> None:
    wanted = yardstick(task, refinement, batch_size=8)
    for layout in pages.LAYOUTS:
        for form in ("sdpa2", "sdpa2-flash"):
            assert check(contestant(task, refinement, layout, form, dropout=0.0), wanted, torch.float64) < 1e-10


def test_stock_attention_is_what_runs(task: TrainingTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the reference nor another backend stands in for it, in any layout, and in evaluation too."""
    for name in ("refined_attention", "refined_attention_varlen"):
        monkeypatch.setattr(attention, name, None)
    work = Work(torch.arange(16).numpy(), torch.arange(16).numpy())
    for layout in pages.LAYOUTS:
        it = contestant(task, "simple", layout, "sdpa2-math")
        for pass_ in training.PASSES:
            training.name_kernels(it, pass_, work)
        assert it.kernels == dict.fromkeys(training.PASSES, ["_scaled_dot_product_attention_math"])


def test_a_wrong_formulation_is_refused(data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tensors: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, Tensor]:
        mean, cov = training_stosa(tensors, *rest)
        return mean, 1.01 * cov

    training_stosa = training.stosa
    monkeypatch.setattr(training, "stosa", wrong)
    command = [*SMALL, "--backbone", "stosa", "--backends", "stosa", "--data", str(data), "--layouts", "padded"]
    assert train_bench.main([*command, "--refinements", "none"]) == 1
    assert "stosa padded none" in capsys.readouterr().err


def test_ratios_are_computed_from_the_rows() -> None:
    def row(refinement: str, layout: str, ms: float, cpu: float) -> Row:
        named = {"task": "t", "pass": "train", "provider": "torch", "refinement": refinement, "layout": layout}
        return named | {"median_ms": ms, "cpu_ms": cpu}

    rows = [row("none", "packed", 4.0, 2.0), row("additive", "packed", 5.0, 3.0), row("additive", "padded", 20.0, 9.0)]
    train_report.add_ratios(rows)
    assert [r.get("ratio_to_plain") for r in rows] == [1.0, 1.25, None]
    assert [r.get("cpu_ratio_to_plain") for r in rows] == [1.0, 1.5, None]


@pytest.mark.parametrize(
    "loss,refinement", [*(("bce", r) for r in ("none", "simple", "value", "additive")), ("sampled_softmax", "additive")]
)
def test_the_gate_passes_what_is_right(loss: str, refinement: str, task: TrainingTask) -> None:
    task = dataclasses.replace(task, loss=loss)
    wanted = yardstick(task, refinement, batch_size=8)
    for layout in pages.LAYOUTS:
        for dtype in training.TOLERANCE:
            assert check(contestant(task, refinement, layout, "torch", dropout=0.0), wanted, dtype) < 1e-5
    assert len(wanted.losses) == training.GATE_STEPS >= 20 and wanted.losses[-1] < wanted.losses[0]


FLAWS: dict[str, Callable[..., Tensor]] = {
    "output": lambda call, *a, **k: call(*a, **k) * 1.001,
    "doubled": lambda call, *a, **k: call(*a, **k) * 2,
    "nan": lambda call, *a, **k: call(*a, **k) * torch.nan,
    "gradient": lambda call, q, k, v, w_q, w_k, *a, **o: call(q, k, v, w_q.detach(), w_k, *a, **o),
    "positions": lambda call, q, k, v, w_q, w_k, *a, **o: call(q, k, v, w_q.roll(1, -2), w_k, *a, **o),
}


@pytest.mark.parametrize(
    "flaw,dtype", [*((flaw, torch.float64) for flaw in FLAWS), ("nan", torch.float32), ("doubled", torch.float32)]
)
def test_a_sabotaged_backend_stops_the_benchmark(
    flaw: str, dtype: torch.dtype, task: TrainingTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 whatever the flaw; in float32 what is more than rounding."""
    wanted = yardstick(task, "additive", batch_size=8)
    right = attention.refined_attention_varlen
    monkeypatch.setattr(attention, "refined_attention_varlen", lambda *a, **k: FLAWS[flaw](right, *a, **k))
    with pytest.raises(WrongResult, match=r"torch packed additive, torch.float\d\d: the loss of step \d+ is"):
        check(contestant(task, "additive", "packed", "torch", dropout=0.0), wanted, dtype)


def test_wrong_ranks_stop_it_too(task: TrainingTask, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = yardstick(task, "none", batch_size=8)
    monkeypatch.setattr(training, "rank_batch", lambda model, batch: torch.ones(len(batch[1]), dtype=torch.int64))
    with pytest.raises(WrongResult, match=r"\d+ of 40 ranks differ; the first is 1, must be in"):
        check(contestant(task, "none", "packed", "torch", dropout=0.0), wanted, torch.float64)


def test_a_failing_gate_writes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = attention.refined_attention
    monkeypatch.setattr(attention, "refined_attention", lambda *a, **k: right(*a, **k) * (1 + (k["backend"] == "torch")))
    options = ["--data", str(data), "--out", str(tmp_path / "out"), "--refinements", "additive", *SMALL]
    assert train_bench.main(options) == 1
    assert "WRONG, nothing was written: torch bucketed additive" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_layouts_take_the_same_sequences(task: TrainingTask) -> None:
    work = Work(torch.randperm(40).numpy(), torch.arange(40).numpy(), eval_batch=16)
    made = {layout: contestant(task, "none", layout, "torch") for layout in pages.LAYOUTS}
    for pass_ in training.PASSES:
        batches = {layout: work.batches(it, pass_) for layout, it in made.items()}
        assert len({len(b) for b in batches.values()}) == 1
        assert all(sorted(x for b in found for x in b) == list(range(40)) for found in batches.values())
    chosen = torch.arange(40).numpy()
    ranks = [rank_step(it, chosen) for it in made.values()]
    assert all(torch.equal(ranks[0], other) for other in ranks[1:])


def test_others_figures_are_marked_as_quoted() -> None:
    figures = {"train_sequences_per_cpu_second": 1.0, "eval_users_per_cpu_second": 2.0}
    rows = [{"who": "`awrsr train`", "quoted": False} | figures, {"who": "another", "quoted": True} | figures]
    head = {"kind": pages.TRAINING, "device": "CPU", "versions": {"torch": "x"}, "commit": "y"}
    page = pages.markdown(head | {"rows": [ROW], "end_to_end": rows})
    assert "| another | 1 | 2 | quoted, not measured here |" in page and "| `awrsr train` | 1 | 2 | this run |" in page


ROW: Row = {"task": "t", "pass": "train", "provider": "torch", "refinement": "none", "layout": "packed"}
ROW |= {"seq_per_cpu_s": 1234.0, "peak_mib": 5.0}


@pytest.mark.parametrize(
    "options,message",
    [
        ("--data nowhere.txt", "argument --data: nowhere.txt: there is no such file"),
        ("--heads 3", "argument --heads: was 3, must divide --hidden, 64"),
        ("--batch-size 0", "argument --batch-size: was '0', must be a whole number of at least 1"),
        ("--layouts tall", "argument --layouts: invalid choice: 'tall'"),
        ("--backends sdpa2-cudnn --refinements none --device cpu", "argument --backends: was sdpa2-cudnn, which needs a GPU"),
        ("--backends sdpa2 --device cpu", "was sdpa2, which cannot drop weights of additive; set --attention-dropout 0"),
        ("--backends sdpa2 --backbone stosa --device cpu", "argument --backends: was sdpa2, which is for --backbone sasrec"),
        ("--backends triton --device cpu", "argument --backends: was triton, which needs a GPU"),
    ],
)
def test_bad_options(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_bench.main(options.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_histories_too_short_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short.txt"
    path.write_text("1 5 6 7\n2 5 7 6\n")
    with pytest.raises(SystemExit):
        train_bench.main(["--data", str(path), *SMALL])
    assert "argument --data: no history has two events for training" in capsys.readouterr().err
