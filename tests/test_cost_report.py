"""The cost report: counts as by hand, predictions that say so, whatever device the files name, and the committed page."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cost_report
from benchmarks.cost_report import PREDICTION, RESULTS, Point
from benchmarks.roofline import Rates


def test_a_point_under_the_roof_by_hand() -> None:
    """10 operations a byte, where memory allows 10 * 100 = 1000 a second of the 2000 there are; 500 are reached."""
    point = Point("a device", "a problem", "a kernel", 100.0, 1000.0, 2000.0, Rates(copy=100.0, matmul=2000.0), measured=True)
    assert (point.intensity, point.bound, point.share) == (10.0, "memory", 0.5)
    above = point._replace(operations=3000.0)
    assert (above.bound, above.share) == ("arithmetic", 0.75)


def test_what_a_short_forward_moves_by_hand() -> None:
    """q, k, v and the output of B 512 H 2 L 50 D 32 in two bytes, the tables once, and what the backward needs."""
    short = next(p for p in cost_report.predicted([]) if p.name == "short_fwd")
    b, h, length, d = cost_report.SIZES[0]
    rows = b * h * length
    assert short.moved == pytest.approx(2 * (4 * rows * d + 2 * length * d), rel=0.02)


def test_every_prediction_says_so() -> None:
    points = cost_report.predicted([])
    assert {p.name.split()[0] for p in points} >= {"short_fwd", "short_bwd", "tiled_fwd", "tiled_bwd_rows", "decode_step"}
    page = cost_report.markdown(points)
    rows = [line for line in page.splitlines() if line.startswith("| B ")]
    assert len(rows) == len(points) and all(PREDICTION in row for row in rows) and "On a GPU: not measured yet." in page


def results(device: str) -> dict[str, Any]:
    row = {
        "provider": "triton",
        "role": "ours",
        "backbone": "dot-product",
        "refinement": "simple",
        "layout": "padded",
        "pass": "fwd",
    }
    row |= {"B": 8, "H": 2, "L": 50, "D": 32, "dtype": "bfloat16", "bytes": 1e6, "operations": 1e8, "median_ms": 0.01}
    rates = {"copy_gb_per_s": 4000.0, "matmul_tflops": 700.0, "matmul_dtype": "bfloat16"}
    return {"device": device, "rates": rates, "rows": [row, row | {"role": "rival"}, row | {"dtype": "float32"}]}


def test_files_of_a_gpu_are_taken_up_as_measured(tmp_path: Path) -> None:
    (tmp_path / "h200.json").write_text(json.dumps(results("NVIDIA H200")), encoding="utf-8")
    assert cost_report.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "cost.md").read_text(encoding="utf-8")
    assert "**NVIDIA H200**: measured" in page and "not measured yet" not in page
    (row,) = [line for line in page.splitlines() if line.startswith("| B 8 H 2 ")]
    assert PREDICTION not in row and "| memory | 0.01 | 2% |" in row  # 0.25 us of 10
    assert (tmp_path / "cost_roofline.png").exists() and not (tmp_path / "cost_quality.png").exists()


def test_quality_has_a_panel_for_each_data_set() -> None:
    entry = {"refinement": "none", "layers": 1, "train_cpu_seconds": 2.0, "test": {"NDCG@10": 0.1}}
    entries = [entry | {"dataset": name, "layers": layers} for name in ("beauty", "lastfm") for layers in (1, 2)]
    drawn = cost_report.quality(entries)
    assert drawn is not None and [axis.get_title(loc="left") for axis in drawn.axes] == ["beauty", "lastfm"]
    assert cost_report.quality([]) is None


def test_the_committed_page_is_what_the_script_writes() -> None:
    files = cost_report.load(RESULTS)
    resources = [row for found in files if found.get("kind") == "prediction" for row in found["resources"]]
    page = cost_report.markdown([*cost_report.measured(files), *cost_report.predicted(resources)])
    assert (RESULTS / "cost.md").read_text(encoding="utf-8") == page
