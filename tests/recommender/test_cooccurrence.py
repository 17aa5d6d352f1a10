"""Items that begin by which of them share histories: the association, its factors, and the training that begins with them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from awrsr import TrainingOptions
from awrsr.data.histories import Histories
from awrsr.data.splits import Split, split
from awrsr.training import cooccurrence
from awrsr.training import run as training

from .runs import QUICK, STOSA, fit, histories


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(Histories.from_lists(histories()))


def by_hand(lists: list[list[int]], items: int, reach: int) -> np.ndarray:
    number, pairs = np.zeros(items), np.zeros((items, items))
    for each in lists:
        for i, one in enumerate(each):
            number[one] += 1
            pairs[one, one] += 1
            for other in each[i + 1 : i + 1 + reach]:
                pairs[one, other] += 1
                pairs[other, one] += 1
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.log(pairs * number.sum() / np.outer(number, number)).clip(min=0), nan=0, posinf=0)


@pytest.mark.parametrize("reach", [1, 3, 20])
def test_items_are_associated_by_the_training_events_of_a_history(reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 9, rng.integers(1, 12)).tolist() for _ in range(15)] + [list(range(10))]
    found = Histories.from_lists(lists)
    monkeypatch.setattr(cooccurrence, "REACH", reach)
    for parts in (split(found), split(found, "last-n", n=2)):
        numbered = [found.of(user)[:end].tolist() for user, end in enumerate(parts.train_end)]
        wanted = by_hand(numbered, found.num_items, reach)
        np.testing.assert_allclose(cooccurrence.association(parts).toarray(), wanted, atol=1e-12)


@pytest.mark.parametrize("features", [3, 8, 20])
def test_items_begin_as_a_factorisation(features: int) -> None:
    """Products of what is written are those of the leading factors, but for one factor; other rows and the size stay."""
    found = Histories.from_lists([[0, 1, 2, 7, 8], [2, 1, 3, 0, 7], [4, 5, 6, 7, 0], [6, 5, 6, 8, 7], [9, 4, 5, 1, 2]])
    parts = split(found)
    before = torch.randn(found.num_items, features, dtype=torch.float64)
    items = before.clone()
    cooccurrence.begin_with_cooccurrence(items, parts, 3)
    matrix = cooccurrence.association(parts).toarray()
    trained = matrix.any(1)
    assert 0 < (~trained).sum() < 4 and torch.equal(items[~trained], before[~trained])
    left, values, _ = np.linalg.svd(matrix)
    kept = min(features, len(matrix) - 1)
    wanted = (left[:, :kept] * values[:kept]) @ left[:, :kept].T
    products = (items @ items.T).numpy()[np.ix_(trained, trained)]
    wanted = wanted[np.ix_(trained, trained)]
    np.testing.assert_allclose(products / np.trace(products), wanted / np.trace(wanted), atol=1e-9)
    assert items[trained].square().mean() == pytest.approx(before[trained].square().mean().item())
    again = before.clone()
    cooccurrence.begin_with_cooccurrence(again, parts, 3)
    assert torch.equal(again, items)


@pytest.mark.parametrize("model", [{}, STOSA], ids=["sasrec", "stosa"])
def test_a_new_model_alone_begins_with_what_was_trained_on(model: dict[str, Any], parts: Split) -> None:
    still = {"epochs": 1, "learning_rate": 1e-12, "average": 0.0, "item_init": "cooccurrence"}
    trained, _ = fit(parts, model, **still)
    usual, _ = fit(parts, model, **still | {"item_init": "normal"})
    width = trained.config.hidden
    assert not torch.allclose(trained.items.weight[:, :width], usual.items.weight[:, :width], atol=1e-6)
    torch.testing.assert_close(trained.items.weight[:, width:], usual.items.weight[:, width:])
    h = parts.histories
    other = h.items.copy()
    held_out = h.offsets[1:] - 1
    other[held_out] = other[held_out][::-1]  # who held out what has no part in it
    torch.testing.assert_close(
        fit(replace(parts, histories=replace(h, items=other)), model, **still)[0].items.weight, trained.items.weight
    )
    before = trained.items.weight.clone()
    training.train(trained, parts, TrainingOptions(**(QUICK | still)))  # goes on
    torch.testing.assert_close(trained.items.weight, before)
