"""The benchmark: its files, the gate before timing, the memory meter, the readers, and the rivals' own correctness."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from awrsr_kernels.tuning.clock import Clock
from benchmarks import attn_bench
from benchmarks.common import pages
from benchmarks.common.clock import WrongResult, quantiles, traced
from benchmarks.common.report import Row, finish
from benchmarks.operator import report
from benchmarks.operator.gpu_only import precompile
from benchmarks.operator.measure import Entrant, Gate, race
from benchmarks.operator.providers import PROVIDERS, Provider, ours
from benchmarks.operator.workloads import (
    DOT,
    LAYOUTS,
    OPERATOR,
    PRESETS,
    STOCHASTIC,
    Batch,
    Outputs,
    Shape,
    Task,
    build,
    read_histories,
    sample_users,
)

from .tasks import PROBLEMS, as_tuple, task, users_task

ROOT = Path(__file__).resolve().parents[2]
BACKBONES = list(OPERATOR)
OPTION = {DOT: [], STOCHASTIC: ["--backbone", "stochastic"]}
RIVAL = {DOT: "sdpa2", STOCHASTIC: "stosa"}


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device does at best is no matter here."""
    monkeypatch.setattr("benchmarks.operator.roofline.copy_bytes", lambda device: 1 << 20)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_fixed_interface(backbone: str, tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/attn_bench.py", "--device", "cpu", "--shapes", "2,2,5,4", "--reps", "1"]
    command += OPTION[backbone]
    names = RIVAL[backbone], "torch"
    options = ["--providers", *names, "triton", *"--precompile 2 --threads 1 --out".split(), str(tmp_path)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "providers that need one are left out" in done.stdout and "not run: triton" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"device", "versions", "commit", "command", "rows", "skipped", "wrong"} <= set(results)
    assert "--shapes 2,2,5,4" in results["command"]
    assert [s["provider"] for s in results["skipped"]] == ["triton"] and "GPU" in results["skipped"][0]["reason"]
    rows = results["rows"]
    assert {(r["provider"], r["role"], r["pass"]) for r in rows} == {
        (name, role, p) for name, role in zip(names, ("rival", "ours"), strict=True) for p in ("bwd", "fwd", "fwd+bwd")
    }
    keys = "backbone refinement layout B H L D R dtype median_ms p20_ms p80_ms peak_mib first_call_ms".split()
    expected = [backbone, "simple", "padded", 2, 2, 5, 4, 4, "float32"]
    assert len(rows) == 6
    for row in rows:
        assert [row[k] for k in keys[:9]] == expected
        assert all(row[k] > 0 for k in keys[9:]) and all(x is not None for x in row.values())
        assert ("kernels" in row) == (row["provider"] == "sdpa2")  # stock attention's alone, on a CPU
        assert row["to_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"]) and 0 < row["copy_share"]
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.md"}


@pytest.mark.parametrize("name", ["attn_bench", *(p.stem for p in ROOT.glob("benchmarks/*.py") if "forward(\"" in p.read_text())])
def test_no_folder_of_benchmarks_hides_the_standard_library(name: str) -> None:
    """`operator` lies beside the commands; a Python that has not loaded the standard library's before them must find that one."""
    done = subprocess.run([sys.executable, "-S", f"benchmarks/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert "cannot import" not in done.stderr and "No module named 'benchmarks" not in done.stderr


def test_interpreted_triton_is_never_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert attn_bench.main(["--device", "cpu", "--shapes", "1,1,3,4", "--reps", "1", "--providers", "triton"]) == 0
    assert "not run: triton: needs a GPU" in capsys.readouterr().out


@pytest.mark.parametrize("flaw", ["output", "gradient", "nan", "raises"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_wrong_provider_is_refused(
    backbone: str, flaw: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(batch: Batch) -> Outputs:
        *rest, out = as_tuple(ours(batch, "torch"))  # in stochastic attention those of the covariances alone
        if flaw == "raises":
            raise RuntimeError("no such thing")
        if flaw == "gradient":  # of w_k alone, the value unchanged
            out = out + 1e-2 * (batch.w_k.sum() - batch.w_k.sum().detach())
        else:
            out = out * (torch.nan if flaw == "nan" else 1.001)
        return (*rest, out) if rest else out

    monkeypatch.setitem(PROVIDERS, "torch", Provider("torch", "ours", wrong, backbones=(backbone,)))
    rival = RIVAL[backbone]
    options = ["--device", "cpu", "--shapes", "3,2,9,8", "--reps", "1", "--providers", "torch", rival, *OPTION[backbone]]
    status = attn_bench.main(options)
    printed = capsys.readouterr()
    assert status == 1 and "1 results are WRONG" in printed.err
    assert not [x for x in printed.out.splitlines() if x.startswith("torch ") and "WRONG" not in x]
    assert [x for x in printed.out.splitlines() if x.startswith(f"{rival} ")]


def test_a_task_that_breaks_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(entrants: list[Entrant], *rest: object) -> None:
        if entrants[0].batches[0].max_len == 3:
            raise RuntimeError("the device is gone")
        race(entrants, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attn_bench, "race", breaks)
    options = ["--device", "cpu", "--shapes", "1,1,3,4", "1,1,5,4", "--reps", "1", "--providers", "torch", "--out", str(tmp_path)]
    assert attn_bench.main(options) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert {r["L"] for r in results["rows"]} == {5} and "the device is gone" in results["wrong"][0]["reason"]
    assert "the device is gone" in capsys.readouterr().out


RIGHT = {
    DOT: ("textbook", "sdpa2", "sdpa2-split", "sdpa", "reference", "torch"),
    STOCHASTIC: ("stosa", "sdpa2-squares", "sdpa", "reference", "torch"),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("backbone,refinement", PROBLEMS)
def test_the_gate_passes_what_is_right(backbone: str, refinement: str, dropout_p: float) -> None:
    gate = Gate()
    batches = build(task(refinement, dropout_p=dropout_p, backbone=backbone), "padded")
    for name in RIGHT[backbone]:
        entrant = Entrant(PROVIDERS[name], "padded", batches)
        gate.check(entrant)
        assert entrant.first_ms["fwd+bwd"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_gate_on_histories(backbone: str, layout: str) -> None:
    gate, batches = Gate(), build(users_task("additive", backbone=backbone), layout)
    for provider in (PROVIDERS[name] for name in (*RIGHT[backbone], "torch-jagged")):
        if not provider.refusal(batches[0]):
            gate.check(Entrant(provider, layout, batches))
    shifted = Provider("shifted", "ours", lambda b: ours(dataclasses.replace(b, w_q=b.w_q.roll(1, 0)), "torch"))
    with pytest.raises(WrongResult, match="off by"):
        gate.check(Entrant(shifted, layout, batches))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_gate_notices_a_missing_dropout_mask(backbone: str) -> None:
    batches = build(task("value", dropout_p=0.3, backbone=backbone), "padded")
    undropped = Provider("undropped", "ours", lambda b: ours(dataclasses.replace(b, dropout_p=0.0), "torch"))
    with pytest.raises(WrongResult):
        Gate().check(Entrant(undropped, "padded", batches))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_tight_reference_budget_still_gates(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.operator.workloads.GATE_BYTES", 1)
    batch = build(task("additive", backbone=backbone), "padded")[0]
    index, heads, kv_heads, _ = batch.excerpt()
    assert (len(index), heads, kv_heads) == (1, 2, 1)
    Gate().check(Entrant(PROVIDERS["torch"], "padded", [batch]))


def test_memory_meter_on_a_known_pattern() -> None:
    mib = 1 << 20

    def new(size: int) -> Tensor:
        return torch.empty(size * mib, dtype=torch.uint8)

    def first(_: None) -> list[Tensor]:  # holds 3, 8, 5, 7, then 6 MiB
        a, b = new(3), new(5)
        del a
        c = new(2)
        del c
        return [b, new(1)]

    def second(kept: list[Tensor]) -> Tensor:  # holds 10, 5, then 7 MiB
        more = new(4)
        kept.clear()
        kept.append(new(1))
        assert more.numel()
        return new(2)

    assert traced([first, second], torch.device("cpu")) == [8 * mib, 10 * mib]
    assert traced([first], torch.device("cpu")) == [8 * mib]


@pytest.mark.parametrize("backbone,squared", [(DOT, "textbook"), (STOCHASTIC, "stosa")])
def test_memory_of_l_by_l_matrices_shows(backbone: str, squared: str) -> None:
    shape = Shape(1, 1, 1, 512, 8, 8, 8)
    found = {}
    for name in (squared, "torch"):
        entrant = Entrant(PROVIDERS[name], "padded", build(task("simple", shape=shape, backbone=backbone), "padded"))
        attn_bench.measure_memory(entrant)
        found[name] = entrant.peak_mib
    assert found[squared]["fwd"] >= 2 and found[squared]["bwd"] >= 3  # a matrix is 1 MiB
    assert found[squared]["fwd+bwd"] == max(found[squared].values())
    assert found[squared]["fwd+bwd"] <= PROVIDERS[squared].squares[0]
    assert found["torch"]["fwd"] < found[squared]["fwd"]


def test_race_gives_every_entrant_the_same_number_of_samples() -> None:
    batches = build(task(), "padded")
    entrants = [Entrant(PROVIDERS[name], "padded", batches) for name in ("sdpa2", "sdpa")]
    race(entrants, Clock(torch.device("cpu")), True, 3, 0)
    for entrant in entrants:
        assert [len(entrant.samples[p]) for p in ("fwd", "bwd", "fwd+bwd")] == [3, 3, 3]
        assert min(entrant.samples["fwd"]) > 0
        both = [f + b for f, b in zip(entrant.samples["fwd"], entrant.samples["bwd"], strict=True)]
        torch.testing.assert_close(both, entrant.samples["fwd+bwd"])


def test_histories(tmp_path: Path) -> None:
    path = tmp_path / "users.txt"
    path.write_text("1 5 6 7\n2 5\n9 1 1 1 1\n")
    assert read_histories(path) == [3, 1, 4]
    assert sorted(sample_users([3, 1, 4], 10, 3)) == [1, 3, 3] and len(sample_users([3, 1, 4], 2, 50)) == 2
    layouts = {name: build(users_task("simple"), name) for name in LAYOUTS}
    assert [b.q.shape[2] for b in layouts["padded"]] == [9, 9, 9]
    assert [b.q.shape[2] for b in layouts["bucketed"]] == [2, 7, 9]
    assert [b.q.shape[0] for b in layouts["packed"]] == [10, 11, 2]


@pytest.mark.parametrize(
    "text,message",
    [
        ("7\n", ""),
        ("", ""),
    ],
)
def test_malformed_histories(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.txt" + message):
        read_histories(path)
    with pytest.raises(SystemExit):
        attn_bench.main(["--device", "cpu", "--lengths", str(path)])
    assert "argument --lengths" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options,message",
    [
        ("--shapes 1,2,3", "argument --shapes: was '1,2,3', must be B,H,L,D"),
        ("--dim 300", "argument --dim: was '300', must be a whole number in 1..256"),
        ("--dropout 1", "argument --dropout: was '1', must be in [0, 1)"),
        ("--reps 0", "argument --reps: was '0', must be"),
        ("--lengths nowhere.txt", "argument --lengths: nowhere.txt: there is no such file"),
        ("--lengths a --length 5", "argument --lengths: takes lengths from the file"),
        ("--shapes 1,1,1,1 --batch 4", "argument --shapes: sets B, H, L and D"),
        ("--quick --preset long", "argument --quick"),
        ("--threshold 1.2", "argument --threshold: is for --compare"),
        ("--compare a b --threshold 0.5", "argument --threshold: was '0.5', must be a number of at least 1"),
        ("--compare a", "argument --compare: expected 2 arguments"),
        ("--refinement sharp", "argument --refinement: invalid choice: 'sharp'"),
        ("--refinement stochastic", "argument --refinement: was stochastic, must be one of none, simple, value, additive"),
        ("--backbone gaussian", "argument --backbone: invalid choice: 'gaussian'"),
        ("--backbone stochastic --providers textbook", "argument --providers: was textbook, must be one of stosa"),
        ("--providers torch stosa", "argument --providers: was stosa, must be one of textbook"),
    ],
)
def test_bad_options(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        attn_bench.main(["--device", "cpu", *options.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def options_tasks(options: str) -> list[Task]:
    parser = attn_bench.options_parser()
    given = parser.parse_args(["--device", "cpu", *options.split()])
    attn_bench.check(parser, given)
    return attn_bench.make_tasks(parser, given)


def test_the_default_plan_between_gaussians_is_stosas() -> None:
    tasks = options_tasks("--backbone stochastic --refinement all")
    assert {t.shape for t in tasks} == {Shape(128, 4, 4, length, 16, 16, 16) for length in (50, 100, 200)}
    assert [t.refinement for t in tasks[:5]] == ["none", "simple", "value", "additive", "stochastic"]
    assert {t.backbone for t in tasks} == {STOCHASTIC} and "float32 stochastic backbone, none" in tasks[0].label
    assert {(t.backbone, t.shape.B, t.shape.H, t.shape.D) for t in options_tasks("")} == {(DOT, 32, 2, 32)}


def make_row(provider: str, role: str, median_ms: float, layout: str = "padded") -> Row:
    return {"provider": provider, "role": role, "layout": layout, "pass": "fwd", "task": "a task", "median_ms": median_ms} | {
        "p20_ms": median_ms, "p80_ms": median_ms, "peak_mib": 1.0, "seq_per_s": 1.0, "tflops": 1.0, "first_call_ms": 1.0
    }  # fmt: skip


ALIKE = ("task", "pass")


def test_ratio_is_to_the_fastest_rival_in_any_layout() -> None:
    rows = [make_row("textbook", "rival", 9.0), make_row("sdpa2", "rival", 6.0), make_row("sdpa", "floor", 1.0)]
    rows += [make_row("sdpa2", "rival", 4.0, "bucketed"), make_row("torch", "ours", 2.0, "packed")]
    report.add_ratios(rows, ALIKE)
    assert [r["ratio_to_best_rival"] for r in rows] == [4 / 9, 4 / 6, 4.0, 1.0, 2.0]
    assert {r["best_rival"] for r in rows} == {"sdpa2 bucketed"}
    lines = report.table(rows, [{"provider": "x", "layout": "padded", "reason": "dq is off"}]).splitlines()
    assert lines[0] == "a task" and lines[2].startswith("sdpa ") and "2.00x" in lines[3] and "WRONG" in lines[-1]
    alone = [make_row("torch", "ours", 2.0)]
    report.add_ratios(alone, ALIKE)
    assert "ratio_to_best_rival" not in alone[0] and " - " in report.table(alone, [])


def test_eager_and_graph_times_have_a_best_rival_each() -> None:
    """The fastest called eagerly is slow by graph; what has no graph counts in neither."""
    rows = [make_row("sdpa2", "rival", 3.0) | {"graph_ms": 2.0}, make_row("flex2", "rival", 6.0) | {"graph_ms": 1.0}]
    rows += [make_row("textbook", "rival", 9.0), make_row("triton", "ours", 6.0) | {"graph_ms": 0.5}]
    rows += [make_row("torch", "ours", 1.5)]
    report.add_ratios(rows, ALIKE)
    assert [r["ratio_to_best_rival"] for r in rows] == [1.0, 0.5, 1 / 3, 0.5, 2.0]
    assert [r.get("graph_ratio_to_best_rival") for r in rows] == [0.5, 1.0, None, 2.0, None]
    assert {r["best_rival"] for r in rows} == {"sdpa2"} and {r.get("best_rival_by_graph") for r in rows} == {"flex2", None}
    head, *lines = report.table(rows, []).splitlines()[1:]
    assert head.split("first ms")[0].rstrip().endswith("vs rival by graph")
    ours = next(x for x in lines if x.startswith("triton"))
    assert "0.50x" in ours and "2.00x" in ours
    rows = [row | {"pass": "fwd+bwd", "host_ms": 1.0} for row in rows]
    results = {"rows": rows, "device": "a GPU", "versions": {"torch": "x"}, "commit": "y"}
    page = pages.markdown(results).splitlines()
    assert page[-3].endswith("| vs rival | vs rival by graph |") and page[-1].endswith("| 0.50x `sdpa2` | 2.00x `flex2` |")
    older = [{k: v for k, v in row.items() if "by_graph" not in k and "graph_ratio" not in k} for row in rows]
    assert "vs rival" not in pages.markdown(results | {"rows": older})


def test_flops_and_quantiles() -> None:
    square = task("simple", shape=Shape(2, 3, 3, 10, 4, 4, 5))
    assert square.flops("fwd") == 2 * 2 * 3 * (50 * (4 + 10) + 50 * (5 + 4))
    assert dataclasses.replace(square, refinement="value").flops("bwd") == 2.5 * 2 * 2 * 3 * 50 * (4 + 10 + 5 + 4 + 4)
    assert dataclasses.replace(square, refinement="none", users=(3, 1)).flops("fwd") == 2 * 3 * (9 + 1) / 2 * 8
    gaussian = dataclasses.replace(square, backbone=STOCHASTIC)
    widths = {"none": 8 + 8, "simple": 8 + 15 + 8, "value": 8 + 15 + 16, "additive": 2 * 8 + 15 + 8, "stochastic": 8 + 30 + 8}
    for refinement, width in widths.items():
        assert dataclasses.replace(gaussian, refinement=refinement).flops("fwd") == 2 * 2 * 3 * 50 * width
    assert quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]) == (2.5, 1.0, 4.0)


def test_presets_and_small_parts(tmp_path: Path) -> None:
    assert {length for _, length in PRESETS["recsys"].sizes()} == {20, 50, 100, 200}
    assert PRESETS["long"].sizes()[0] == (32, 512) and PRESETS["long"].sizes()[-1] == (2, 8192)
    assert "need a GPU" in precompile([task()], 2)
    huge = task(shape=Shape(64, 8, 8, 65536, 64, 64, 64))
    assert "GiB" in (attn_bench.too_large(huge, PROVIDERS["textbook"]) or "")
    assert attn_bench.too_large(huge, PROVIDERS["torch"]) is None
    with pytest.raises(UnicodeEncodeError):  # in the middle of the second file
        finish({"rows": []}, 0.0, tmp_path, lambda _: "half\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
