"""The README's examples run as printed and give what it says; tables, there and on the pages, are those that benchmarks wrote."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.common import pages
from benchmarks.study.run import DEFAULTS

from . import older_tables

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
    assert names["out"].shape == (8, 4, 50, 32) and names["w_q"].grad.shape == (50, 32)
    assert re.search(r"Ann +┆ 6 +┆ Sun +┆ 1 ", capsys.readouterr().out) and (tmp_path / "runs/days/model.safetensors").exists()


def test_it_stays_short_and_its_links_lead_somewhere() -> None:
    assert len([word for word in README.split() if word != "|"]) < 1650
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"_TABLE\b|TODO|TBD|XXX", README)


def test_measured_tables_are_the_benchmarks() -> None:
    files = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks/results").rglob("*.json"))}
    tables = {path: results for path, results in files.items() if isinstance(results, dict)}  # study.json is a list of runs
    renderers = pages.RENDERERS | older_tables.RENDERERS
    measured = {path: x for path, x in tables.items() if x.get("kind") in renderers and path.name != DEFAULTS}
    assert {x.get("kind") for x in measured.values()} == set(renderers)
    for path, results in measured.items():
        column = {"initialisation": "recall", "search": "test"}.get(results.get("kind"), "median_ms")
        assert results["rows"] and all(column in row for row in results["rows"]), path.name
        assert renderers[results.get("kind")](results) in PAGES, path.name
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


def rows_of(table: str) -> list[list[str]]:
    """Cells of a Markdown table, without its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def readme_table(head: str) -> list[list[str]]:
    return rows_of(head + README.split(head)[1].split("\n\n")[0])


def test_the_study_in_short_is_that_of_its_tables() -> None:
    page = (ROOT / "benchmarks/results/study/study.md").read_text(encoding="utf-8")
    short = page.split("**In short**")[1].split("\n\n")[1]
    assert short.startswith("| data | settings | layers | plain | plain + mean | additive |") and len(short.splitlines()) > 2
    assert short in (ROOT / "docs/study.md").read_text(encoding="utf-8")
    cells = {tuple(row[:3]): row[3:6] + [row[7].split(" (p")[0]] for row in rows_of(short)}
    assert [row[1:] for row in readme_table("| data | plain attention |")] == [
        cells["synthetic", "usual", "1"],
        cells["beauty", "256 wide from cooccurrence", "1"],
        cells["beauty", "usual", "1"],
        cells["wikipedia", "usual", "1"],
        cells["lastfm", "usual", "1"],
    ]


def test_speeds_are_those_of_the_benchmarks() -> None:
    def row(file: str, task: str, layout: str = "padded", column: str = "median_ms") -> list[str]:
        results = json.loads((ROOT / "benchmarks/results" / file).read_text(encoding="utf-8"))["rows"]
        chosen = [r for r in results if r["task"].startswith(task) and r["layout"] == layout and r["pass"] == "fwd+bwd"]
        ms = {r["provider"]: r[column] for r in chosen}
        ours = ms.get("triton", ms["torch"])
        two_calls = min(ms["sdpa2"], ms["sdpa2-split"])
        return [f"{ours:.3g} ms", f"{two_calls / ours:.2f}", f"{ms['sdpa'] / ours:.2f}"]

    cpu, gpu = "operator/2026-11-24_cpu", "gpu/2026-11-28_h200.json"
    assert [[cell.strip("*") for cell in cells[2:]] for cells in readme_table("| on | problem | ours |")] == [
        row(f"{cpu}_beauty.json", "beauty.txt 1024 users, window 50"),
        row(f"{cpu}.json", "B 128 L 100 H 2 D 32 R 100"),
        row(f"{cpu}.json", "B 2 L 2048 H 4 D 64 R 64"),
        row(gpu, "B 512 L 50", column="graph_ms"),
        row(gpu, "B 512 L 200", column="graph_ms"),
        row(gpu, "B 512 L 50", column="host_ms"),
    ]
