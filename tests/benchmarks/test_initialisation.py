"""The experiment behind the module's start: its tasks ask what they say, and its page says what was measured."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.training import initialisation


def test_recall_asks_for_what_followed_the_last_occurrence() -> None:
    symbols, target = initialisation.draw("recall", torch.Generator().manual_seed(0))
    for row, wanted in zip(symbols[:4].tolist(), target[:4].tolist(), strict=True):
        for i, symbol in enumerate(row):
            earlier = [j for j in range(i) if row[j] == symbol]
            assert wanted[i] == (row[earlier[-1] + 1] if earlier else -100)


def test_distance_asks_for_what_stood_there() -> None:
    symbols, target = initialisation.draw("distance", torch.Generator().manual_seed(0))
    assert torch.equal(target[:, initialisation.DISTANCE :], symbols[:, : -initialisation.DISTANCE])
    assert (target[:, : initialisation.DISTANCE] == -100).all()


def test_every_start_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [each for each in initialisation.STARTS if each.table_std == 1.0 and each.gate != "from 0"]
    assert {each.refinement for each in few} == {"none", "additive", "simple"}
    monkeypatch.setattr(initialisation, "STARTS", few)
    assert initialisation.main(["--steps", "2", "--seeds", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    shares = [row[task][0] for row in results["rows"] for task in initialisation.TASKS]
    assert len(shares) == 2 * len(few) and all(0 <= share <= 1 for share in shares)
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == initialisation.markdown(results)
