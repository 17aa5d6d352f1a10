"""The predictor: its arithmetic by hand, its limits, and that it never passes for a measurement."""

from typing import Any

import pytest

from awrsr_kernels.launch_config import Config
from benchmarks.gpu import predict as predictor
from benchmarks.gpu.predict import UNKNOWN, occupancy, predict, times_us
from benchmarks.operator.launches import Launch
from benchmarks.operator.roofline import Rates, ideal_bytes
from benchmarks.operator.workloads import Shape, Task

KERNEL = Launch(
    kernel="short_fwd", stage=0, pass_="fwd", tile=Config(64, 64, 4, 1, 4), programs=528,
    loaded=11_000_000, read=2_000_000, written=2_300_000, operations=395 * 10**6, weights=10**6, chain=4, chains=4 * 528,
)  # fmt: skip


def task(batch: int = 64, length: int = 50, refinement: str = "simple", dropout_p: float = 0.0) -> Task:
    return Task(Shape(batch, 2, 2, length, 32, 32, 32), refinement, "bfloat16", dropout_p, "cuda")


def total(of: Task, pass_: str = "") -> float:
    return sum(row["predicted_us"] for row in predict(of) if pass_ in ("", row["pass"]))


def test_a_launch_by_hand() -> None:
    """4.3 MB at 4.3 TB/s, 11 MB at 5.5, 395 MFLOP at half of 790 T/s; 4 programs on each of 132 processors: one wave."""
    times = times_us(KERNEL, 4)
    expected = {"memory": 1.0, "cache": 2.0, "matmul": 1.0, "chain": 4 * predictor.STEP_US + predictor.START_US}
    assert {name: times[name] for name in expected} == pytest.approx(expected)
    assert times["lanes"] == pytest.approx(34e12 / (132 * 128 * 1.7e9))
    more = times_us(KERNEL._replace(gradients=10**6, drops=10**5), 4)["lanes"] - times["lanes"]
    assert more == pytest.approx((14 + 3.2) * 1e12 / (132 * 128 * 1.7e9))
    assert times_us(KERNEL, 1)["chain"] == pytest.approx(16 * predictor.STEP_US + 4 * predictor.START_US)
    assert times_us(KERNEL._replace(starts=3), 4)["chain"] - times["chain"] == pytest.approx(2 * predictor.START_US)


@pytest.mark.parametrize("refinement", ["none", "additive"])
def test_larger_problems_take_longer_and_none_beats_its_floor(refinement: str) -> None:
    for problems in ([task(b, 50, refinement) for b in (32, 256, 2048)], [task(64, n, refinement) for n in (20, 50, 100, 400)]):
        times = [total(each) for each in problems]
        assert times == sorted(times) and times[0] < times[-1]
        for each in problems:
            for p in ("fwd", "bwd"):
                floor = Rates(predictor.COPY, predictor.MATMUL).floor_ms(ideal_bytes(each, "padded", p), each.flops(p))
                assert total(each, p) > 1e3 * floor
    assert total(task(2048, 50, refinement, dropout_p=0.1)) > total(task(2048, 50, refinement))


def test_the_assumptions_agree_with_plain_attention_as_published() -> None:
    """FlashAttention 2 on an H100, causal forward at D 64: 180 to 299 TFLOP/s from L 512 to 16k."""
    long = Task(Shape(2, 4, 4, 8192, 64, 64, 64), "none", "bfloat16", 0.0, "cuda")
    assert 180 < long.flops("fwd") / total(long, "fwd") / 1e6 < 299


def row(kernel: str, programs: int, **more: Any) -> dict[str, Any]:
    """As `awrsr_kernels.compile_report` writes it."""
    return {
        "kernel": kernel, "refinement": "simple", "dtype": "bfloat16", "dropout": False, "target": "sm_90",
        "length": 64, "width": 64, "config": Config(64, 64, 4, 1, 4)._asdict(), "registers": 100,
        "programs_per_processor": programs,
    } | more  # fmt: skip


def test_the_compile_report_is_read() -> None:
    tiled = {"length": 0, "config": Config(64, 64, 4, 2)._asdict()}
    report = [
        row("short_fwd", 5),
        row("short_fwd", 8, length=32),
        row("short_fwd", 6, width=128),
        row("short_fwd", 7, dropout=True),
        row("short_fwd", 2, refinement="value"),
        row("short_fwd", 3, target="sm_80"),
        {"kernel": "short_bwd", "refinement": "simple", "dtype": "bfloat16", "target": "sm_90", "error": "does not compile"},
        row("tiled_fwd_stage1", 9, **tiled),
        row("tiled_fwd_stage2", 0, **tiled),
    ]

    def of(launch: Launch, problem: Task) -> tuple[int, bool]:
        return occupancy(report, launch, problem)

    assert of(KERNEL, task()) == (5, True) and of(KERNEL, task(length=30)) == (8, True)
    assert of(KERNEL, Task(Shape(64, 2, 2, 50, 32, 32, 65), "simple", "bfloat16", 0.0, "cuda")) == (6, True)
    assert of(KERNEL, task(dropout_p=0.1)) == (7, True)
    assert of(KERNEL._replace(tile=Config(64, 64, 8, 1, 4)), task())[1] is False  # the report is of another tile
    assert of(KERNEL._replace(kernel="short_bwd"), task()) == occupancy([], KERNEL, task()) == UNKNOWN
    long = KERNEL._replace(kernel="tiled_fwd", stage=1, tile=Config(64, 64, 4, 2))
    assert of(long, task(length=500)) == (9, True) and of(long._replace(stage=2), task(length=500)) == (1, True)  # one at least


def test_it_says_that_it_is_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert predictor.main(["64,2,50,32"]) == 0
    first, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("PREDICTION, not a measurement: NVIDIA H200, B 64 L 50 H 2")
    assert [line.split()[0] for line in lines[:5]] == ["short_fwd", "short_bwd", "torch_sum", "torch_cast", "torch_cast"]
    assert lines[5].startswith(f"fwd: {total(task(), 'fwd'):.1f} us, ") and "?: without the compiler's word" in lines[-1]
    with pytest.raises(SystemExit):
        predictor.main(["1,1,1,1", "--compile-report", "none.json"])
    assert "argument --compile-report: none.json: " in capsys.readouterr().err
