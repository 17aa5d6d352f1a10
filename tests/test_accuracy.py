"""The table of what models reach: means over runs that are kept, and a command that goes on where it was stopped."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import accuracy


def metrics(ndcg: float, recall: float | None = None) -> dict[str, object]:
    test = {name: {"HR@10": 2 * ndcg, "MRR": ndcg / 2}.get(name, ndcg) for name in accuracy.METRICS}
    found: dict[str, object] = {"test": test, "epochs": 4, "best_epoch": 3, "train_cpu_seconds": 2.0}
    found |= {"commit": "c" * 40, "train_seconds": 1.0, "train_sequences_per_cpu_second": 10.0, "eval_users_per_cpu_second": 20.0}
    return found | ({} if recall is None else {"recall": {"HR@1": recall, "rule HR@1": 0.8}})


def test_a_row_is_mean_and_deviation_over_seeds() -> None:
    cell = accuracy.Cell("synthetic", "plain", "")
    row = accuracy.row(cell, [metrics(0.1, 0.4), metrics(0.3, 0.8)])
    assert row["NDCG@10"] == pytest.approx(0.2) and row["NDCG@10_std"] == pytest.approx(0.02**0.5)
    assert row["recall"] == pytest.approx((0.5 + 1) / 2) and row["seeds"] == 2
    table = accuracy.markdown({"device": "CPU", "rows": [row]})
    assert "| synthetic | plain | 2 | 0.4000 ± 0.2828 | 0.2000 ± 0.1414 |" in table
    assert table.endswith(f" {row['NDCG@20']:.4f} | {row['recall']:.4f} ± {row['recall_std']:.4f} | 3 | 0.5 |\n")


def test_names_of_cells_are_names_of_folders_and_differ() -> None:
    names = [cell.name for cell in accuracy.plan()]
    assert len(set(names)) == len(names) and not any(set(name) & set(" ,/") for name in names)


def test_kept_runs_are_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(command: list[str], **_: object) -> object:
        trained.append(command)
        out = Path(command[command.index("--out") + 1])
        (out / "metrics.json").write_text(json.dumps(metrics(0.1)), encoding="utf-8")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(accuracy, "subprocess", SimpleNamespace(run=train, STDOUT=-2))
    arguments = ["--cells", "lastfm", "--seeds", "2", "--folder", str(tmp_path), "--out", str(tmp_path)]
    assert accuracy.main(arguments) == 0 and len(trained) == 4
    assert accuracy.main(arguments) == 0 and len(trained) == 4
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["model"] for row in results["rows"]] == ["plain, sampled softmax", "additive, sampled softmax"]
    assert "--folder" in results["command"] and results["kind"] == accuracy.KIND


def test_a_run_that_fails_stops_the_plan_and_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"awrsr train --data .*lastfm.txt.* status 1; see .*output.txt"):
        accuracy.main(["--cells", "lastfm", "--seeds", "1", "--folder", str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    assert not (tmp_path / "results.json").exists()


def test_an_unknown_cell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accuracy.main(["--cells", "yelp"])
    assert "no cell holds ['yelp']" in capsys.readouterr().err
