"""What one refined layer does by construction, on every backend, and the tables that say so."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.theory import construction, maps, report, trained
from benchmarks.theory.construction import Layer, chosen, enough_columns, judge, sequence
from benchmarks.theory.models import CONTESTANTS, LANGUAGE, Contestant
from benchmarks.theory.tasks import NOT_ASKED, Hops, Induction, Recall, Task, Text, library, one_hop

from ..conftest import DEVICE

PAGE = Path(__file__).resolve().parents[2] / "docs/theory.md"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "backend,dtype", [("reference", "float64"), ("torch", "float64"), ("torch", "float32"), ("triton", "float32")]
)
def test_one_layer_names_what_followed_on_every_backend(backend: str, dtype: str) -> None:
    layer = Layer(features=16, backend=backend, dtype=getattr(torch, dtype), device=DEVICE)
    for length in (16, 30):
        items = sequence(length, 1, generator())
        some, last, asked = judge(items, layer(items, generator()))
        assert some == last == asked > length // 4


def test_exact_tables_answer_with_the_largest_share() -> None:
    for earlier in (1, 2, 5):
        items = sequence(60, earlier, generator(earlier))
        answers = Layer()(items, generator()).tolist()
        wanted = chosen(items)
        assert sum(map(len, wanted)) >= 30
        assert all(answer in of for answer, of in zip(answers, wanted, strict=True) if of)


def test_the_share_is_worked_out_by_hand() -> None:
    """After 0: 1 followed 0 in both of its occurrences, 2 in one of two."""
    assert chosen(torch.tensor([2, 0, 1, 0, 2, 0, 1, 0]))[-1] == {1}
    assert chosen(torch.tensor([0, 1, 2, 1]))[-1] == {2} and chosen(torch.tensor([0, 1]))[-1] == set()


def test_answers_are_judged_by_hand() -> None:
    items = torch.tensor([0, 1, 0, 2, 0, 1])
    assert judge(items, torch.tensor([0, 0, 0, 0, 1, 0])) == (2, 1, 2)  # 1 followed 0, 2 did last; 0 followed 1
    assert judge(items, torch.tensor([0, 0, 0, 0, 2, 2])) == (1, 1, 2)


def test_the_page_has_the_table_of_the_committed_rows_and_the_bound_holds_in_it() -> None:
    results = json.loads((construction.RESULTS / "construction.json").read_text(encoding="utf-8"))
    rows = results["rows"]
    table = construction.table(rows)
    assert table in PAGE.read_text(encoding="utf-8") and table in (construction.RESULTS / "construction.md").read_text(
        encoding="utf-8"
    )
    assert [(r["length"], r["earlier"], r["columns"]) for r in rows] == [(n, c, x.columns) for n, c, x in construction.problems()]
    bounded = [r for r in rows if r["columns"] >= enough_columns(r["length"], r["earlier"], 0.2)]
    assert bounded and all(r["some"] >= 0.8 for r in bounded)


def test_a_hop_goes_to_what_followed_the_last_earlier_occurrence() -> None:
    assert one_hop(torch.tensor([[3, 1, 2, 1, 3, 1]])).tolist() == [[-1, -1, -1, 2, 1, 4]]


def test_hops_are_taken_as_often_as_the_first_token_says() -> None:
    task = Hops(length=40, most=3)
    tokens, answers = task.draw(30, generator())
    assert set(task.kinds(tokens).tolist()) == {1, 2, 3} and (answers[:, 0] == NOT_ASKED).all()
    for row, found, count in zip(tokens[:, 1:].tolist(), answers[:, 1:].tolist(), task.kinds(tokens).tolist(), strict=True):
        for start in range(len(row)):
            place = start
            for _ in range(count):
                earlier = [m for m in range(place) if row[m] == row[place]]
                place = earlier[-1] + 1 if earlier else -1
                if place < 0:
                    break
            assert found[start] == (row[place] if place >= 0 else NOT_ASKED)
        assert all(a != b for a, b in zip(row, row[1:], strict=False))


def test_induction_asks_at_second_occurrences_for_what_followed_the_first() -> None:
    for row, found in zip(*(x.tolist() for x in Induction(12).draw(5, generator())), strict=True):
        assert sorted(row) == sorted(2 * list(set(row)))
        for place, answer in enumerate(found):
            assert answer == (row[row.index(row[place]) + 1] if row[place] in row[:place] else NOT_ASKED)


def test_recall_asks_for_the_value_of_each_key_once() -> None:
    tokens, answers = Recall(length=32, pairs=4, vocabulary=64).draw(20, generator())
    for row, found in zip(tokens.tolist(), answers.tolist(), strict=True):
        value = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        asked = [place for place, answer in enumerate(found) if answer != NOT_ASKED]
        assert len(asked) == len(value) == 4 and all(place >= 8 and found[place] == value[row[place]] for place in asked)


def test_text_asks_for_the_next_byte_and_holds_files_out() -> None:
    learned, held_out = (bytes(part.tolist()) for part in library())
    for tested, source in ((False, learned), (True, held_out)):
        tokens, answers = Text(64, tested=tested).draw(3, generator())
        for row, found in zip(tokens.tolist(), answers.tolist(), strict=True):
            assert row[1:] == found[:-1] and bytes([*row, found[-1]]) in source


def test_chosen_layers_alone_are_refined() -> None:
    network = LANGUAGE[2].build(Induction(10), 16, 2)
    assert [block.attention.refinement for block in network.blocks] == ["none", "additive", "none"]


@pytest.mark.parametrize("model", (*CONTESTANTS, *LANGUAGE), ids=lambda model: model.name)
def test_no_model_sees_the_future_and_each_learns(model: Contestant) -> None:
    torch.manual_seed(0)
    task: Task = Induction(10)
    network = model.build(task, 16, 2)
    tokens, answers = task.draw(4, generator())
    later = tokens.clone()
    later[:, 6:] = later[:, 6:].flip(1)
    one, other = (trained.states(network, x) for x in (tokens, later))
    torch.testing.assert_close(one[:, :6], other[:, :6], rtol=0, atol=1e-6)
    (one @ network.item_table().T)[answers != NOT_ASKED].logsumexp(-1).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in network.parameters())


def test_runs_resume_after_the_search_and_use_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = trained.Part((Induction(8), Induction(6)), CONTESTANTS[:1], 4 * trained.CHECKS, hidden=8)
    for module in (trained, report):
        monkeypatch.setattr(module, "PARTS", {"tiny": tiny})
    monkeypatch.setattr(trained, "TESTED", 64)
    monkeypatch.setattr(trained, "TOKENS", 64)
    results = trained.Results(tmp_path / "trained.json")
    assert [run.rate for run in trained.wanted(results.entries, ["tiny"])] == list(trained.RATES)
    for run in trained.wanted({}, ["tiny"]):
        results.add(trained.train(run) | {"accuracy": float(run.rate == 3e-3)})
    results = trained.Results(tmp_path / "trained.json")  # from the file
    left = [run for run in trained.wanted(results.entries, ["tiny"]) if run.key not in results.entries]
    assert len(left) == 2 * tiny.seeds - 1 and {run.rate for run in left} == {3e-3}
    assert len(results.entries[tuple(results.entries)[0]]["curve"]) == trained.CHECKS
    lines = report.table(results.entries, "tiny")
    assert "| plain |  | 1.000 (1.000, 1 of 5 seeds) |" in lines[2] and lines[0].startswith("| model | induction 6 | induction 8 |")


def test_a_table_of_text_shows_the_loss_and_its_highest() -> None:
    part, model = trained.PARTS["language"], LANGUAGE[0]
    about = {"part": "language", "task": "text", "model": model.name, "accuracy": 0.5, "loss": 0.0, "cpu_seconds": 9.0, "steps": 3}
    rows = [about | {"rate": rate, "seed": 0, "by_kind": {"loss": 2.0}, "parameters": 1000} for rate in trained.RATES]
    rows.append(rows[0] | {"seed": 1, "by_kind": {"loss": 3.0}})
    entries = {tuple(row[name] for name in ("part", "task", "model", "rate", "seed")): row for row in rows}
    assert part.seeds == 3 and report.table(entries, "language") == [
        "| model | loss | parameters | time per step |",
        "|--|--|--|--|",
        "| three plain layers | 2.500 (3.000, 2 of 3 seeds) | 1,000 | 1.00 |",
    ]


def test_the_page_says_what_the_drawn_model_reaches() -> None:
    row = json.loads((construction.RESULTS / "maps.json").read_text(encoding="utf-8"))["rows"][0]
    assert f"right in {row['accuracy']:.1%}".replace("%", " %") in PAGE.read_text(encoding="utf-8") and row["steps"] == 500


def test_a_layer_is_drawn() -> None:
    figure = maps.draw(maps.RUN.model.build(maps.TASK, 8, 2))
    assert len(figure.axes) >= 3
