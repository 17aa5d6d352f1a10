"""A large catalogue, in small: every stage runs and is measured, and more memory than the limit fails."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import large_catalogue

FEW = ["--items", "2000", "--users", "500", "--targets", "50", "--threads", "1"]


def test_large_catalogue_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert large_catalogue.main([*FEW, "--steps", "2", "--loss", "cross_entropy", "--out", str(tmp_path)]) == 0
    results: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    stages = {row["stage"]: row for row in results["rows"]}
    assert list(stages) == ["make", "read", "split", "model", "train", "load", "evaluate", "recommend"]
    assert results["peak_gib"] == max(row["peak_gib"] for row in results["rows"]) > 0 and results["limit_gib"] == 12
    assert stages["recommend"]["recommendations"] > 0 and stages["train"]["steps"] >= 1
    assert "within the limit of 12 GiB" in capsys.readouterr().out


def test_more_memory_than_the_limit_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert large_catalogue.main([*FEW, "--steps", "1", "--limit", "0.01"]) == 1
    assert "ABOVE the limit of 0.01 GiB" in capsys.readouterr().out
