"""Predicted times follow from the counted slots, agree with the run that they are fitted to, and are quoted as predictions."""

import json
from pathlib import Path

import pytest

from benchmarks.operator import predict
from benchmarks.operator.roofline import ideal_bytes

ROOT = Path(__file__).resolve().parents[2]
PREDICTIONS = json.loads((ROOT / "benchmarks/results/gpu/predictions.json").read_text(encoding="utf-8"))
MEASURED = json.loads((ROOT / "benchmarks/results/gpu/2026-11-28_h200.json").read_text(encoding="utf-8"))["rows"]


def kernels(forward: float, backward: float, regime: str = "resident") -> list[predict.Row]:
    slots = {"fwd": forward, "bwd": backward}
    return [{"kernel": f"{regime}_{x}", "regime": regime, "issue_slots": n, "issue_slots_100": n / 4} for x, n in slots.items()]


def test_a_time_is_the_slots_over_the_rate_or_the_bytes() -> None:
    task = next(t for t in predict.tasks() if (t.shape.B, t.shape.L, t.shape.D) == (512, 200, 32))
    row = predict.predict(task, kernels(1e4, 2e4))
    forward = 1024 * 1e4 / (132 * 0.57 * 1.98e9) + predict.LAUNCH
    assert row["predicted_fwd_ms"] == pytest.approx(forward * 1e3)
    assert row["predicted_ms"] == pytest.approx((forward + 1024 * 2e4 / (132 * 0.41 * 1.98e9) + 4 * predict.LAUNCH) * 1e3)
    least = predict.predict(task, kernels(1, 1))  # few slots: memory decides
    moved = ideal_bytes(task, "padded", "fwd+bwd")
    assert least["predicted_ms"] == pytest.approx((moved / predict.BANDWIDTH + 5 * predict.LAUNCH) * 1e3)
    at_100 = next(t for t in predict.tasks() if (t.shape.B, t.shape.L, t.shape.D) == (512, 100, 32))
    assert predict.predict(at_100, kernels(4e4, 8e4))["fwd_slots"] == 1e4
    with pytest.raises(ValueError, match="not recognised"):
        predict.slots_of({"kernel": "resident_fwd", "regime": "resident", "issue_slots": None}, 200)


def times(provider: str, pass_: str) -> dict[tuple[int, int], float]:
    return {(r["B"], r["L"]): r["graph_ms"] for r in MEASURED if r["provider"] == provider and r["pass"] == pass_}


def test_the_rates_reproduce_the_run_that_they_are_fitted_to() -> None:
    """The former tiled kernels: 2 launches forward, 5 backward and torch's."""
    slots = {100: (5758, 12553), 200: (15540, 34582)}
    for (batch, length), ms in times("triton", "fwd+bwd").items():
        if length in slots:
            forward, backward = slots[length]
            total = predict.seconds(forward, 2 * batch, 0, 2, "fwd")
            total += predict.seconds(backward, 2 * batch, 0, 5 + predict.TABLE_LAUNCHES, "bwd")
            assert total * 1e3 == pytest.approx(ms, rel=0.07), (batch, length)


def test_the_committed_predictions_follow_from_their_slots() -> None:
    assert PREDICTIONS["note"].startswith("PREDICTION") and "rows" not in PREDICTIONS  # no report takes them for measured
    assert len(PREDICTIONS["commit"]) == 40
    for task, row in zip(predict.tasks(), PREDICTIONS["predicted"], strict=True):
        assert row["task"] == task.label
        scale = 4 if predict.length_class(row["L"]) == predict.RESIDENT and row["L"] == 100 else 1
        assert predict.predict(task, kernels(row["fwd_slots"] * scale, row["bwd_slots"] * scale)) == row


def test_the_page_quotes_predictions_as_such() -> None:
    page = (ROOT / "docs/gpu.md").read_text(encoding="utf-8").split("## A prediction")[1].split("\n## ")[0]
    assert "has not been measured" in page
    former, rival = times("triton", "fwd+bwd"), times("sdpa2", "fwd+bwd")
    for row in PREDICTIONS["predicted"]:
        at = row["B"], row["L"]
        if row["D"] == 32 and row["L"] >= 100:
            star = "*" if row["few_heads"] else ""
            cells = [str(row["L"]), str(row["B"]), f"{row['predicted_ms']:.3f}{star}", f"{former[at]:.3f}", f"{rival[at]:.3f}"]
            assert f"| {' | '.join(cells)} |" in page
