"""The model of a GPU: its arithmetic by hand, its limits, and that it never passes for a measurement."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from awrsr_kernels.launch_config import Config
from benchmarks.common import compare
from benchmarks.gpu import model as gpu_model
from benchmarks.gpu.model import H200, UNKNOWN, Gpu, Resources, at_once, find_resources, predict, tasks, times_us, total_us
from benchmarks.operator.launches import Launch
from benchmarks.operator.workloads import Shape, Task

RESULTS = Path(__file__).parents[2] / "benchmarks/results/gpu"
ROUND = Gpu(
    name="a round one", copy=1e12, cache=2e12, matmul=1e14, lanes=1e13,
    processors=100, registers=65536, shared=100 << 10, warps=64, programs=32,
)  # fmt: skip
KERNEL = Launch(
    kernel="short_fwd", stage=0, pass_="fwd", tile=Config(64, 64, 4, 1, 4), programs=400,
    loaded=8_000_000, read=2_000_000, written=1_000_000, operations=10**9, weights=10**6, chain=4, chains=1600,
)  # fmt: skip


def task(batch: int = 64, length: int = 50, refinement: str = "simple", dropout_p: float = 0.0) -> Task:
    return Task(Shape(batch, 2, 2, length, 32, 32, 32), refinement, "bfloat16", dropout_p, "cuda")


def test_programs_at_a_time_by_hand() -> None:
    """65,536 registers / (128 * 4 warps of 32) = 4; 100 KiB / (32 + 1) = 3; 64 warps / 4 = 16; at most 32."""
    assert at_once(4, Resources(128, 0, True), ROUND) == 4
    assert at_once(4, Resources(121, 0, True), ROUND) == 4  # registers come in eights
    assert at_once(4, Resources(32, 32 << 10, True), ROUND) == 3
    assert at_once(4, Resources(24, 0, True), ROUND) == 16
    assert at_once(1, Resources(24, 0, True), ROUND) == 32
    assert at_once(4, Resources(255, 200 << 10, True), ROUND) == 1  # too large, and yet it is launched


def test_a_launch_by_hand() -> None:
    times = times_us(KERNEL, Resources(128, 0, True), ROUND)  # 4 programs on each of 100: one wave
    assert times["memory"] == pytest.approx(3.0)  # 3 MB at 1 TB/s
    assert times["cache"] == pytest.approx(4.0)  # 8 MB at 2 TB/s
    assert times["matmul"] == pytest.approx(1e9 / (1e14 * gpu_model.EFFICIENCY) * 1e6)
    assert times["lanes"] == pytest.approx(gpu_model.INSTRUCTIONS_PER_WEIGHT * 1e6 / 1e13 * 1e6)
    more = times_us(KERNEL._replace(gradients=10**6, drops=10**5), Resources(128, 0, True), ROUND)["lanes"] - times["lanes"]
    assert more == pytest.approx((gpu_model.INSTRUCTIONS_PER_GRADIENT + 0.1 * gpu_model.INSTRUCTIONS_PER_DROP) * 1e6 / 1e13 * 1e6)
    assert times["chain"] == pytest.approx(4 * gpu_model.STEP_US + gpu_model.START_US)
    assert times["launch"] == gpu_model.LAUNCH_US
    assert total_us(times) == pytest.approx(20.0 + gpu_model.LAUNCH_US)  # matmul is the longest


def test_fewer_programs_at_a_time_lengthen_the_chain() -> None:
    four, one = (times_us(KERNEL, Resources(r, shared, True), ROUND)["chain"] for r, shared in ((128, 0), (128, 99 << 10)))
    assert one == pytest.approx(1600 / 100 * gpu_model.STEP_US + 4 * gpu_model.START_US) and one > four


def test_every_tile_of_a_program_begins_with_loads() -> None:
    once, thrice = (times_us(KERNEL._replace(starts=n), Resources(128, 0, True), ROUND)["chain"] for n in (1, 3))
    assert thrice - once == pytest.approx(2 * gpu_model.START_US)


def test_dropout_bits_cost_instructions() -> None:
    plain, dropped = (predict(task(2048, 50, dropout_p=p))[0]["predicted_ms"] for p in (0.0, 0.1))
    assert dropped > plain


@pytest.mark.parametrize("refinement", ["none", "simple", "value", "additive"])
def test_larger_problems_take_longer_and_none_beats_its_floor(refinement: str) -> None:
    for one_way in ([task(b, 50, refinement) for b in (32, 256, 2048)], [task(64, n, refinement) for n in (20, 50, 100, 400)]):
        rows = [predict(t) for t in one_way]
        for less, more in zip(rows, rows[1:], strict=False):
            assert all(a["predicted_ms"] <= b["predicted_ms"] for a, b in zip(less, more, strict=True))
        assert rows[0][2]["predicted_ms"] < rows[-1][2]["predicted_ms"]
        assert all(row["to_floor"] >= 1 for found in rows for row in found)


def test_both_passes_together_are_their_sum() -> None:
    fwd, bwd, both = predict(task())
    assert both["predicted_ms"] == pytest.approx(fwd["predicted_ms"] + bwd["predicted_ms"])
    assert both["launches"] == fwd["launches"] + bwd["launches"]
    assert sum(both["bounds_us"].values()) == pytest.approx(1e3 * both["predicted_ms"])
    assert both["bound_by"] == max(both["bounds_us"], key=both["bounds_us"].__getitem__)


def test_a_slower_gpu_is_predicted_slower() -> None:
    for name in ("copy", "cache", "matmul", "lanes", "processors"):
        slower = replace(H200, **{name: getattr(H200, name) // 50})
        assert predict(task(2048), gpu=slower)[2]["predicted_ms"] > predict(task(2048))[2]["predicted_ms"], name


def test_the_assumptions_agree_with_plain_attention_as_published() -> None:
    """FlashAttention 2 on an H100, causal forward at D 64: 180 to 299 TFLOP/s from L 512 to 16k."""
    long = Task(Shape(2, 4, 4, 8192, 64, 64, 64), "none", "bfloat16", 0.0, "cuda")
    assert 180 < long.flops("fwd") / predict(long)[0]["predicted_ms"] / 1e9 < 299


def row(kernel: str, registers: int, **more: Any) -> dict[str, Any]:
    """As `awrsr_kernels.compile_report` writes it."""
    return {
        "kernel": kernel, "regime": kernel.split("_")[0], "refinement": "simple", "dtype": "bfloat16", "dropout": False,
        "target": "sm_90", "length": 64, "width": 64, "config": Config(64, 64, 4, 1, 4)._asdict(),
        "registers": registers, "shared_bytes": 1000,
    } | more  # fmt: skip


def test_the_compile_report_is_read() -> None:
    tiled = {"length": 0, "config": Config(64, 64, 4, 2)._asdict()}
    report = [
        row("short_fwd", 100),
        row("short_fwd", 50, length=32),
        row("short_fwd", 60, width=128),
        row("short_fwd", 70, dropout=True),
        row("short_fwd", 200, refinement="value"),
        row("short_fwd", 210, target="sm_80"),
        row("short_fwd", 220, dtype="float32"),
        {"kernel": "short_bwd", "refinement": "simple", "dtype": "bfloat16", "target": "sm_90", "error": "does not compile"},
        row("tiled_fwd_stage1", 90, **tiled),
        row("tiled_fwd_stage2", 80, **tiled),
        row("tiled_bwd_tables", 85, **tiled),
        row("tiled_fwd", 75, **tiled, refinement="none"),
    ]

    def found(launch: Launch, of: Task) -> Resources:
        return find_resources(report, launch, of)

    assert found(KERNEL, task()) == Resources(100, 1000, True)
    assert found(KERNEL, task(length=30)) == Resources(50, 1000, True)
    assert found(KERNEL, Task(Shape(64, 2, 2, 50, 32, 32, 65), "simple", "bfloat16", 0.0, "cuda")) == Resources(60, 1000, True)
    assert found(KERNEL, task(dropout_p=0.1)) == Resources(70, 1000, True)
    assert found(KERNEL, task(length=10)) == Resources(100, 1000, False)  # another class: the report is of another table
    assert found(KERNEL._replace(tile=Config(64, 64, 8, 1, 4)), task()) == Resources(100, 1000, False)
    assert found(KERNEL._replace(kernel="short_bwd"), task()) == UNKNOWN
    assert find_resources([], KERNEL, task()) == UNKNOWN
    long = KERNEL._replace(kernel="tiled_fwd", stage=1, tile=Config(64, 64, 4, 2))
    assert found(long, task(length=500)) == Resources(90, 1000, True)
    assert found(long._replace(stage=2), task(length=500)) == Resources(80, 1000, True)
    assert found(long._replace(kernel="tiled_bwd_tables"), task(length=500)) == Resources(85, 1000, True)
    assert found(long, task(length=500, refinement="none")) == Resources(75, 1000, True)


def run(*options: str) -> int:
    return gpu_model.main(["--preset", "recsys", *options])


def test_it_says_that_it_is_a_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("**PREDICTION, not a measurement**: NVIDIA H200")
    assert (tmp_path / "prediction_h200.md").read_text() == printed
    made = json.loads((tmp_path / "prediction_h200.json").read_text())
    assert made["kind"] == "prediction" and made["assumptions"]["step_us"] == gpu_model.STEP_US
    assert {(r["kernel"], r["registers"], r["known"]) for r in made["resources"]} >= {("short_fwd", 255, False)}
    assert len(made["rows"]) == 3 * len(list(tasks(["recsys"], ["simple"], 0.0)))
    with pytest.raises(ValueError, match="row 0 has no median_ms"):  # it cannot be compared as if it were measured
        compare.load(tmp_path / "prediction_h200.json")


def test_measurements_stand_beside_it_and_misses_are_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [r for t in list(tasks(["recsys"], ["simple"], 0.0))[:2] for r in predict(t)][:4]
    for r, factor in zip(rows, (1.0, 1.4, 1.6, 0.5), strict=True):
        r["median_ms"] = factor * r.pop("predicted_ms")
    rows.append(rows[0] | {"provider": "sdpa2"})
    rows.append(rows[0] | {"B": 77})
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"device": "NVIDIA H200 of somebody's", "rows": rows}))
    assert run("--measured", str(path), "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1 measured rows of our kernels have no prediction; 2 are missed")
    assert "measured on NVIDIA H200 of somebody's" in printed
    beside = [line.rsplit("|", 2)[1].strip() for line in printed.splitlines() if line.startswith("| B ")]
    assert beside[:5] == ["1.00x", "1.40x", "MISS 1.60x", "MISS 0.50x", ""]
    made = json.loads((tmp_path / "prediction_h200.json").read_text())["rows"]
    assert [r.get("miss") for r in made[:5]] == [False, False, True, True, None]


def test_a_problem_is_explained_launch_by_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--explain", "64,2,50,32") == 0
    first, names, *lines = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("PREDICTION, not a measurement: NVIDIA H200, B 64 L 50 H 2")
    assert [line.split()[0] for line in lines] == ["short_fwd", "short_bwd", "torch_sum", "torch_cast", "torch_cast"]
    total = 0.0
    for line in lines:
        times = dict(zip(names.split()[-5:], line.split()[-5:], strict=True))
        marked = [float(t.strip("*")) for t in times.values() if t.endswith("*")]
        assert marked == [max(float(t.strip("*")) for t in times.values())]
        total += marked[0] + gpu_model.LAUNCH_US
    assert total == pytest.approx(1e3 * predict(task(64, 50))[2]["predicted_ms"], rel=0.01)


@pytest.mark.parametrize(
    "options,message",
    [
        (["--compile-report", "none.json"], "argument --compile-report: none.json: "),
        (["--measured", "none.json"], "argument --measured: none.json: No such file"),
        (["--explain", "1,2"], "argument --explain: was '1,2', must be B,H,L,D"),
        (["--backbone", "stochastic"], "argument --backbone: was stochastic, must be dot: what the kernels do between Gaussians"),
        (["--dropout", "1"], "argument --dropout: was 1.0, must be in [0, 1)"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"rows": []}', "x.json: must hold a list of rows, as awrsr_kernels.compile_report"),
        ('[{"kernel": "x", "error": "does not compile"}, {"kernel": "x", "registers": 3}]', "x.json: row 1 has no refinement"),
        ("[1]", "x.json: row 0 has no kernel"),
    ],
)
def test_a_compile_report_that_is_none(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SystemExit):
        run("--compile-report", str(tmp_path / "x.json"))
    assert message in " ".join(capsys.readouterr().err.split())


def test_stored_predictions_are_what_the_model_wrote() -> None:
    for path in RESULTS.glob("prediction_*.json"):
        stored = json.loads(path.read_text(encoding="utf-8"))
        assert stored["kind"] == "prediction" and not any("median_ms" in r for r in stored["rows"])
        assert path.with_suffix(".md").read_text(encoding="utf-8") == gpu_model.markdown(stored)
