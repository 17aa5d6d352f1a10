"""What one refined layer does by construction, on every backend, and the tables that say so."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.theory import construction
from benchmarks.theory.construction import Layer, chosen, enough_columns, judge, sequence

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
