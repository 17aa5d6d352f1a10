"""The README's example runs as it is printed, and its measured tables are those that the benchmark wrote."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.report import markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(snippet, {})
    assert "torch.Size([8, 4, 50, 32]) torch.Size([50, 32])" in capsys.readouterr().out


def test_measured_tables_are_the_benchmarks() -> None:
    results = sorted((ROOT / "benchmarks/results").glob("*.json"))
    assert results
    for path in results:
        assert markdown(json.loads(path.read_text(encoding="utf-8"))) in README, path.name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).exists()
