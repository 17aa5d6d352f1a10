"""The README's example runs as it is printed, and the tables on its pages, or linked from them, are those that benchmarks wrote."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.common import pages
from benchmarks.study.run import DEFAULTS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
LINKED = sorted(set(re.findall(r"\]\(\.\./(benchmarks/results/\w+/\w+\.md)\)", DOCS)))  # tables too wide for a page of prose
PAGES = README + DOCS + "".join((ROOT / path).read_text(encoding="utf-8") for path in LINKED)


def test_the_examples_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    names: dict = {}
    for snippet in snippets:
        exec(snippet, names)
    printed = capsys.readouterr().out
    assert "torch.Size([8, 4, 50, 32]) torch.Size([50, 32])" in printed
    assert "dan" in printed and (tmp_path / "runs/tea/model.safetensors").exists()


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"_TABLE\b|TODO|TBD|XXX", README)


def test_measured_tables_are_the_benchmarks() -> None:
    files = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks/results").rglob("*.json"))}
    tables = {path: results for path, results in files.items() if isinstance(results, dict)}  # study.json is a list of runs
    measured = {path: x for path, x in tables.items() if x.get("kind") in pages.RENDERERS and path.name != DEFAULTS}
    assert {x.get("kind") for x in measured.values()} == set(pages.RENDERERS)
    for path, results in measured.items():
        column = {pages.INITIALISATION: "recall", pages.SEARCH: "test"}.get(results.get("kind"), "median_ms")
        assert results["rows"] and all(column in row for row in results["rows"]), path.name
        assert pages.markdown(results) in PAGES, path.name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists()


def test_searches_were_equally_long() -> None:
    for path in (ROOT / "benchmarks/results").rglob("search_*.json"):
        models = [row["model"] for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
        assert models.count("plain") == models.count("refined") > 0


def test_reports_are_linked_and_of_all_runs() -> None:
    assert {"benchmarks/results/study/study.md", "benchmarks/results/operator/cost.md"} <= set(LINKED)
    runs = len(json.loads((ROOT / "benchmarks/results/study/study.json").read_text(encoding="utf-8")))
    assert (ROOT / "benchmarks/results/study/study.md").read_text(encoding="utf-8").startswith(f"{runs} runs; ")


def test_the_study_in_short_is_that_of_its_tables() -> None:
    page = (ROOT / "benchmarks/results/study/study.md").read_text(encoding="utf-8")
    short = page.split("**In short**")[1].split("\n\n")[1]
    assert short.startswith("| data | settings | layers | plain | plain + mean | additive |") and len(short.splitlines()) > 2
    assert short in README and short in (ROOT / "docs/study.md").read_text(encoding="utf-8")
