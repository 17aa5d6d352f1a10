"""Floors, shares, CUDA-graph times, and the comparison of two result files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from awrsr_kernels.tuning.clock import Clock
from benchmarks import attn_bench
from benchmarks.operator import report, roofline
from benchmarks.operator.gpu_only import time_graphs
from benchmarks.operator.measure import Entrant
from benchmarks.operator.plots import against_length
from benchmarks.operator.providers import PROVIDERS
from benchmarks.operator.roofline import Rates, ideal_bytes, measure_rates, shares
from benchmarks.operator.workloads import STOCHASTIC, Shape, Task, build

SHAPE = Shape(B=2, H=4, H_kv=2, L=10, D=8, D_v=6, R=5)
SQUARE = Task(SHAPE, "simple", "bfloat16", 0.0, "cpu")


def test_what_is_copied_fits_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 20 < roofline.copy_bytes("cpu") <= 256 << 20
    monkeypatch.setattr(roofline, "free_bytes", lambda device: 800)
    assert roofline.copy_bytes("cpu") == 100


def test_rates_are_positive_and_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "copy_bytes", lambda device: 8 << 20)
    monkeypatch.setitem(roofline.MATMUL_SIZE, "cpu", 64)
    rates = measure_rates("cpu", "float32")
    assert 1e6 < rates.copy < 1e14 and 1e6 < rates.matmul < 1e16


def test_a_copy_moves_its_bytes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read and written: with a clock that says a second for everything, the rates are the counts themselves."""
    monkeypatch.setattr(roofline, "copy_bytes", lambda device: 1 << 12)
    monkeypatch.setitem(roofline.MATMUL_SIZE, "cpu", 8)
    monkeypatch.setattr(Clock, "total_ms", lambda self, spans: 1e3)
    assert measure_rates("cpu", "float32") == Rates(copy=2 * 4096, matmul=2 * 8**3)


def test_ideal_bytes_by_hand() -> None:
    q, k, v, out, tables = 2 * 4 * 10 * 8, 2 * 2 * 10 * 8, 2 * 2 * 10 * 6, 2 * 4 * 10 * 6, 2 * 10 * 5
    assert ideal_bytes(SQUARE, "padded", "fwd") == 2 * (q + k + v + tables + out)
    assert ideal_bytes(SQUARE, "padded", "bwd") == 2 * (q + k + v + out + tables + q + k + v + tables)
    assert ideal_bytes(SQUARE, "padded", "fwd+bwd") == sum(ideal_bytes(SQUARE, "padded", p) for p in ("fwd", "bwd"))


def test_between_gaussians_means_and_covariances_move() -> None:
    items, tables = 2 * (2 * 4 * 10 * 8 + 2 * 2 * 10 * 8 + 2 * 2 * 10 * 6), 2 * 10 * 5
    out = 2 * 2 * 4 * 10 * 6
    for refinement, number in (("none", 0), ("simple", 1), ("stochastic", 2)):
        gaussian = replace(SQUARE, refinement=refinement, backbone=STOCHASTIC)
        assert ideal_bytes(gaussian, "padded", "fwd") == 2 * (items + number * tables + out)
        assert ideal_bytes(gaussian, "padded", "bwd") == 2 * (2 * items + 2 * number * tables + out)
    assert gaussian.plain == replace(SQUARE, refinement="none")


def test_the_anchor_of_134_and_369_megabytes() -> None:
    plain = Task(Shape(512, 4, 4, 128, 64, 64, 64), "none", "bfloat16", 0.0, "cpu")
    assert round(ideal_bytes(plain, "padded", "fwd") / 1e6) == 134
    assert round(ideal_bytes(plain, "padded", "fwd+bwd") / 1e6) == 369


def test_padding_is_written_but_not_read() -> None:
    task = Task(SHAPE, "none", "float32", 0.0, "cpu", users=(3, 1, 10), batch_size=2)
    inputs, out = 4 * 8 + 2 * 8 + 2 * 6, 4 * 6
    assert ideal_bytes(task, "packed", "fwd") == 4 * 14 * (inputs + out)
    assert ideal_bytes(task, "padded", "fwd") == 4 * (14 * inputs + 30 * out)
    assert ideal_bytes(task, "bucketed", "fwd") == 4 * (14 * inputs + (2 * 3 + 10) * out)


def test_the_floor_is_the_longer_of_bytes_and_operations() -> None:
    moved, operations = ideal_bytes(SQUARE, "padded", "fwd"), SQUARE.flops("fwd")
    slow_copy = shares(SQUARE, "padded", "fwd", 5.0, Rates(copy=moved, matmul=100 * operations))
    assert slow_copy["floor_ms"] == pytest.approx(1000) and slow_copy["to_floor"] == pytest.approx(0.005)
    slow_matmul = shares(SQUARE, "padded", "fwd", 4000.0, Rates(copy=moved, matmul=operations / 2))
    assert slow_matmul["floor_ms"] == pytest.approx(2000) and slow_matmul["to_floor"] == pytest.approx(2)
    assert slow_matmul["copy_share"] == pytest.approx(0.25) and slow_matmul["matmul_share"] == pytest.approx(0.5)


def entrant(name: str = "sdpa2") -> Entrant:
    found = Entrant(PROVIDERS[name], "padded", build(Task(SHAPE, "simple", "float32", 0.0, "cpu"), "padded"))
    found.samples = {p: [2.0, 4.0] for p in found.samples}
    found.peak_mib = found.first_ms = dict.fromkeys(found.samples, 1.0)
    return found


def test_graph_times_stand_beside_the_eager_ones() -> None:
    """The capture itself needs a GPU; here it hands back the function, and its replays are what is timed."""
    calls = []

    def capture(function: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: calls.append(function())

    timed = entrant()
    time_graphs(timed, Clock(torch.device("cpu")), ["fwd", "bwd", "fwd+bwd"], capture)
    assert set(timed.graph_ms) == {"fwd", "fwd+bwd"} and min(timed.graph_ms.values()) > 0
    assert "together with its forward" in timed.graph_reason["bwd"]
    assert isinstance(calls[0], torch.Tensor) and len(calls[-1]) == 5  # outputs first, then gradients of q, k, v and both W
    rows = report.make_rows(Task(SHAPE, "simple", "float32", 0.0, "cpu"), [timed], ["fwd", "bwd"])
    assert rows[0]["graph_ms"] == timed.graph_ms["fwd"] and "graph_reason" not in rows[0] and "graph_ms" not in rows[1]
    assert "graph ms" in report.table(rows, [])


def test_what_cannot_be_captured_has_a_reason() -> None:
    def capture(function: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    timed = entrant()
    time_graphs(timed, Clock(torch.device("cpu")), ["fwd"], capture)
    assert timed.graph_ms == {}
    assert timed.graph_reason == {"fwd": "RuntimeError: operation not permitted when stream is capturing"}
    rows = 2 * report.make_rows(Task(SHAPE, "simple", "float32", 0.0, "cpu"), [timed], ["fwd"])
    assert report.graph_reasons(rows) == [("sdpa2", "RuntimeError: operation not permitted when stream is capturing")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", ["triton", "sdpa2-split"])
def test_calls_are_captured(name: str) -> None:
    timed = Entrant(PROVIDERS[name], "padded", build(Task(SHAPE, "simple", "bfloat16", 0.0, "cuda"), "padded"))
    time_graphs(timed, Clock(torch.device("cuda")), ["fwd", "fwd+bwd"])
    assert set(timed.graph_ms) == {"fwd", "fwd+bwd"} and not timed.graph_reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_failed_capture_leaves_nothing_behind() -> None:
    """Neither the capture's stream nor a random generator that believes the capture goes on."""
    from benchmarks.operator.gpu_only import capture

    before, x = torch.cuda.current_stream(), torch.ones(2, device="cuda")

    def synchronises() -> float:
        torch.rand(2, device="cuda")
        return x.sum().item()

    with pytest.raises(RuntimeError):
        capture(synchronises)
    assert torch.cuda.current_stream() == before
    assert torch.rand(2, device="cuda").isfinite().all() and (x + 1).sum().item() == 4


def test_several_lengths_make_a_picture() -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    tasks = [Task(replace(SHAPE, L=length), "simple", "float32", 0.1, "cpu") for length in (10, 20)]
    rows = [row for each in tasks for row in report.make_rows(each, [entrant()], ["fwd+bwd"], Rates(1e9, 1e12))]
    drawn = against_length([{"device": "x", "rows": rows}])
    assert drawn is not None and [axis.get_xlabel() for axis in drawn.axes] == ["L", "L"]
    assert against_length([{"device": "x", "rows": rows[:1]}]) is None  # one length


# Comparison


def results(*times: float, device: str = "one", **more: Any) -> dict[str, Any]:
    row = {"provider": "torch", "backbone": "dot-product", "refinement": "simple", "layout": "padded", "dtype": "float32"}
    sizes = {"B": 1, "H": 1, "D": 8, "R": 8, "pass": "fwd"} | more
    return {"device": device, "rows": [row | sizes | {"L": 10 * i, "median_ms": t} for i, t in enumerate(times, 1)]}


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def run_compare(tmp_path: Path, before: Any, after: Any, *options: str) -> int:
    files = [write(tmp_path / f"{name}.json", content) for name, content in (("a", before), ("b", after))]
    return attn_bench.main(["--compare", *files, *options])


def test_compare_lists_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = results(1.0, 2.0, 3.0, 4.0), results(1.05, 3.0, 1.5, 4.0)
    before["rows"].append(before["rows"][0] | {"L": 99})
    after["rows"].append(after["rows"][0] | {"L": 77})
    assert run_compare(tmp_path, before, after) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("4 rows compared")
    assert [line.split()[0] for line in printed[1:]] == ["REGRESSION", "improvement", "only", "only"]
    assert "1.50x" in printed[1] and "L 20" in printed[1] and "0.50x" in printed[2] and "L 30" in printed[2]
    assert "first file" in printed[3] and "L 99" in printed[3] and "second file" in printed[4] and "L 77" in printed[4]


def test_compare_passes_what_stays_within_the_threshold(tmp_path: Path) -> None:
    before, after = results(1.0, 2.0), results(1.05, 2.9)
    assert run_compare(tmp_path, before, after, "--threshold", "1.5") == 0
    assert run_compare(tmp_path, before, after, "--threshold", "1.4") == 1
    assert run_compare(tmp_path, after, before) == 0  # faster is no regression


def test_compare_keeps_backbones_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = results(1.0), results(1.0)
    after["rows"].append(after["rows"][0] | {"backbone": STOCHASTIC})
    assert run_compare(tmp_path, before, after) == 0
    assert "only in the second file: torch padded fwd B 1 H 1 L 10 D 8 R 8 stochastic backbone float32" in capsys.readouterr().out


def test_compare_marks_what_scatters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = results(1.0, 1.0, p20_ms=1.0, p80_ms=1.5), results(2.0, 2.0, p20_ms=1.0, p80_ms=1.5)
    after["rows"][1]["p80_ms"] = 2.5
    assert run_compare(tmp_path, before, after) == 1
    marked = {line.split("L ")[1].split()[0]: line.endswith("(unsteady)") for line in capsys.readouterr().out.splitlines()[1:]}
    assert marked == {"10": False, "20": True}


def test_compare_minds_memory_and_graphs_where_both_have_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_compare(tmp_path, results(1.0, peak_mib=10), results(1.0, peak_mib=20, graph_ms=5.0)) == 1
    assert "peak_mib 10 -> 20" in capsys.readouterr().out


def test_compare_refuses_other_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_compare(tmp_path, results(1.0), results(9.0, device="two"))
    assert stop.value.code == 2 and "different devices, 'one' and 'two'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content,reason",
    [
        ("{", "not JSON"),
        ([], 'must hold an object with "device" and "rows"'),
        ({"rows": []}, 'must hold an object with "device"'),
        ({"device": "one", "rows": [{}]}, "row 0 has no provider, backbone"),
        ({"device": "one", "rows": [1]}, "row 0 has no provider"),
        (results(1.0, -2.0), "row 1: median_ms was -2.0, must be a positive number"),
        (results(float("nan")), "row 0: median_ms was nan"),
        (results(1.0, graph_ms="fast"), "row 0: graph_ms was 'fast'"),
        ({"device": "one", "rows": 2 * results(1.0)["rows"]}, "row 1 is of the same problem"),
    ],
)
def test_compare_refuses_malformed_files(content: Any, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_compare(tmp_path, results(1.0), content)
    printed = " ".join(capsys.readouterr().err.split())
    assert stop.value.code == 2 and f"{tmp_path / 'b.json'}: {reason}" in printed


def test_compare_names_the_file_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attn_bench.main(["--compare", write(tmp_path / "a.json", results(1.0)), str(tmp_path / "none.json")])
    assert f"{tmp_path / 'none.json'}: No such file" in capsys.readouterr().err
