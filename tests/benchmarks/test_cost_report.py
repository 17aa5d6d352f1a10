"""The cost report: counts as by hand, whatever device the files name, and the committed page."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from benchmarks.common import pages
from benchmarks.operator import cost_report, plots
from benchmarks.operator.cost_report import NOT_YET, RESULTS
from benchmarks.operator.roofline import Point, Rates, step_counts
from benchmarks.operator.workloads import Shape

GPU = "NVIDIA H200"


def test_a_point_under_the_roof_by_hand() -> None:
    """10 operations a byte, where memory allows 10 * 100 = 1000 a second of the 2000 there are; 500 are reached."""
    rates = Rates(copy=100.0, matmul=2000.0)
    point = Point("a device", "a group", "a problem", "a call", "fwd", 100.0, 1000.0, 2000.0, rates)
    assert (point.intensity, point.ridge, point.side, point.share) == (10.0, 20.0, "memory", 0.5)
    above = point._replace(operations=3000.0)
    assert (above.side, above.share) == ("arithmetic", 0.75)


def test_what_a_decoding_step_multiplies_by_hand() -> None:
    """Two earlier items per head: a key, rows of both tables, of K_A and values, of 4 each; the new one: q, k, v, both tables."""
    moved, operations = step_counts(Shape(2, 1, 1, 3, 4, 4, 4), "simple", 2, content=False)
    assert operations == 2 * 2 * (2 * (4 + 8 + 4 + 4) + (4 + 4 + 4 + 8))
    assert moved == 2 * (3 * 8 + 2 * (4 + 8 * 3 + 4 * 2 + 8 + 4 + 4))  # tables once; q, keys, values, K_A; then k, v, K_A, out


def fake(kind: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    named = {"device": GPU, "commit": "0" * 40, "versions": {"torch": "3"}, "end_to_end": []}
    return named | ({} if kind is None else {"kind": kind}) | {"rows": rows}


def write_fakes(folder: Path) -> None:
    """Results of every benchmark, as a GPU would leave them."""
    sizes = {"B": 8, "H": 2, "H_kv": 2, "L": 50, "D": 32, "D_v": 32, "R": 32, "dtype": "bfloat16", "dropout_p": 0.0, "source": ""}
    row = {"provider": "triton", "role": "ours", "backbone": "dot-product", "refinement": "simple", "layout": "padded"}
    row |= sizes | {"task": "fake", "pass": "fwd", "bytes": 1e6, "operations": 1e8, "median_ms": 0.01, "peak_mib": 1.0}
    row |= {"graph_ms": 0.01, "host_ms": 0.5}
    both, rival = {"pass": "fwd+bwd", "median_ms": 0.4, "graph_ms": 0.03}, {"provider": "sdpa2", "role": "rival"}
    rows = [row, row | rival, row | {"dtype": "float32"}, row | both, row | rival | both, row | both | {"L": 100}]
    rates = {"copy_gb_per_s": 4000.0, "matmul_tflops": 700.0, "matmul_dtype": "bfloat16"}
    step = row | {"provider": "step", "tables": "position"}
    train = row | {"provider": "torch", "layout": "packed", "pass": "train", "seq_per_s": 1.0}
    files = {
        "attn": fake(None, rows) | {"rates": rates},
        "train": fake(pages.TRAINING, [train]),
        "decode": fake(pages.DECODING, [step, step | {"provider": "sdpa2", "median_ms": 0.02}]),
    }
    for name, results in files.items():
        (folder / f"{name}.json").write_text(json.dumps(results), encoding="utf-8")


def test_files_of_a_gpu_are_taken_up_as_measured(tmp_path: Path) -> None:
    write_fakes(tmp_path)
    assert cost_report.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "operator/cost.md").read_text(encoding="utf-8")
    assert f"**{GPU}**: measured" in page and NOT_YET not in page
    call, _, step = [line for line in page.split("## Under the roof")[1].splitlines() if line.startswith("| B ")]
    assert "| fwd, fwd+bwd | 1, 1 | 100, 100 | memory, memory | 0.01, 0.03 | 2%, 1% |" in call  # 0.25 us of 10 and of 30
    assert "`step`" in step
    assert "| fake | padded | 1.00, 1, 0.50 | 1.00, 1, 0.50 |" in page and page.count(f"{GPU}, torch 3") == 3
    assert all((tmp_path / f"operator/cost_{name}.png").exists() for name in ("operator", "roofline"))
    rows = json.loads((tmp_path / "operator/cost.json").read_text(encoding="utf-8"))
    assert [x["median_ms"] for x in rows] == [0.01, 0.03, 0.03, 0.01]


def test_without_a_study_or_results_the_rest_is_written(tmp_path: Path) -> None:
    assert cost_report.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "operator/cost.md").read_text(encoding="utf-8")
    assert page.count(f"On a GPU: {NOT_YET}.") == 3
    assert sorted(path.name for path in (tmp_path / "operator").iterdir()) == ["cost.json", "cost.md"]


def test_quality_has_a_panel_for_each_data_set_and_marks_single_seeds() -> None:
    usual = {"variant": "default", "backbone": "sasrec", "tables": "position", "loss": "sampled_softmax", "refinement": "none"}
    entry = usual | {"train_seconds": 2.0, "test": {"NDCG@10": 0.1}, "dataset": "beauty", "layers": 1, "seed": 0}
    other = entry | {"seed": 1, "test": {"NDCG@10": 0.3}}
    left_out = entry | {"loss": "bce", "test": {"NDCG@10": 9.0}}
    drawn = plots.quality([entry, other, left_out, entry | {"dataset": "lastfm"}])
    assert drawn is not None
    beauty, lastfm = drawn.axes
    assert [axis.get_title(loc="left") for axis in drawn.axes] == ["beauty, 2 seeds", "lastfm, 1 seed"]
    assert [axis.containers[0][0].get_markerfacecolor() == "white" for axis in (beauty, lastfm)] == [False, True]
    assert beauty.containers[0][0].get_ydata() == pytest.approx([0.2])
    assert plots.quality([]) is None


def test_letters_of_pictures_can_be_read_at_the_width_of_a_page() -> None:
    files = cost_report.load(RESULTS)
    entries = json.loads((RESULTS / "study/study.json").read_text(encoding="utf-8"))
    operator = plots.against_length([x for x in files if x.get("kind") is None], cost_report.SHOWN)
    for figure in (operator, plots.roofline(cost_report.measured(files)), plots.quality(entries)):
        assert figure is not None
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        pixels = {round(text.get_fontsize() / 72 * 700 / figure.get_figwidth(), 1) for text in texts}
        assert len(texts) > 20 and min(pixels) >= 9, pixels


def test_the_committed_page_is_what_the_script_writes() -> None:
    files = cost_report.load(RESULTS)
    points = cost_report.measured(files)
    assert (RESULTS / "operator/cost.md").read_text(encoding="utf-8") == cost_report.markdown(files, points)
    rows = json.loads((RESULTS / "operator/cost.json").read_text(encoding="utf-8"))
    assert rows == [p.row() for p in points]
