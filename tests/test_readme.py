"""The README's example runs as it is printed, and its measured tables are those that the benchmark wrote."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import accuracy, decode_bench, report, train_report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(snippet, {})
    printed = capsys.readouterr().out
    assert "torch.Size([8, 4, 50, 32]) torch.Size([50, 32])" in printed
    assert "dan" in printed and (tmp_path / "runs/tea/model.safetensors").exists()


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"_TABLE\b|TODO|TBD|XXX", README)


def test_measured_tables_are_the_benchmarks() -> None:
    files = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))}
    measured = {path: results for path, results in files.items() if results.get("kind") != "prediction"}
    assert measured
    for path, results in measured.items():
        pages = {train_report.KIND: train_report, accuracy.KIND: accuracy, decode_bench.KIND: decode_bench}
        page = pages.get(results.get("kind"), report)
        column = "NDCG@10" if page is accuracy else "median_ms"
        assert results["rows"] and all(column in row for row in results["rows"]), path.name
        assert page.markdown(results) in README, path.name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists()


def test_predictions_never_pass_for_measurements() -> None:
    """Whatever is named a prediction says so inside, holds no measured time, and none of its figures stands in the README."""
    for path in (ROOT / "benchmarks/results").glob("*prediction*.json"):
        prediction = json.loads(path.read_text(encoding="utf-8"))
        assert prediction["kind"] == "prediction" and not any("median_ms" in row for row in prediction["rows"])
        table = path.with_suffix(".md").read_text(encoding="utf-8")
        assert table.startswith("**PREDICTION, not a measurement**")
        assert not any(line in README for line in table.splitlines() if line.startswith("| B "))
