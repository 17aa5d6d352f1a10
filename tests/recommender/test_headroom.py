"""Headroom is what a user's own successors add to prediction: large where they decide, none where they do not, and never NaN."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from awrsr.cli import main
from awrsr.data import headroom as module
from awrsr.data.headroom import CUT, MIXTURES, WINDOW, headroom, rows, sentence
from awrsr.data.histories import Histories
from awrsr.data.splits import split
from awrsr.data.synthetic import make


def from_rows(items: np.ndarray) -> Histories:
    return Histories.from_events(np.repeat(np.arange(len(items)), items.shape[1]), items.ravel())


def recall() -> Histories:
    return make(users=600, length=40, noise=0.2)


def markov() -> Histories:
    """Two items are likely after each, the same for all users."""
    rng, items = np.random.default_rng(0), np.zeros((600, 40), dtype=np.int64)
    likely = rng.integers(0, 50, (50, 2))
    for place in range(40):
        follow = likely[items[:, place - 1], rng.integers(0, 2, 600)]
        items[:, place] = np.where(rng.random(600) < 0.7, follow, rng.integers(0, 50, 600))
    return from_rows(items)


def shuffled() -> Histories:
    return from_rows(np.random.default_rng(0).permuted(recall().items.reshape(600, 40), axis=1))


def tastes() -> Histories:
    """Users have five items each, which they take in any order."""
    rng = np.random.default_rng(0)
    return from_rows(rng.integers(0, 5, (600, 40)) + 5 * rng.integers(0, 10, (600, 1)))


@pytest.mark.parametrize(
    ("histories", "least", "most"), [(recall, 0.3, 9), (markov, -0.02, 0.02), (shuffled, -0.02, 0.02), (tastes, -0.02, 0.02)]
)
def test_only_planted_successors_are_headroom(histories: Callable[[], Histories], least: float, most: float) -> None:
    values = headroom(histories())
    assert least < values["headroom"] < most and 0 <= values["headroom_error"] < 0.05 and values["events"] > 2000
    assert values["pays"] == (histories is recall)
    assert ("can be" in sentence(values)) == values["pays"]


def dense(histories: Histories, trained: list[list[int]], past: list[int]) -> np.ndarray:
    """(N, K): every predictor for every item, written down as the module's docstring defines them."""
    size, window, current = histories.num_items, past[-WINDOW:], past[-1]

    def followers(*context: int) -> np.ndarray:
        n = len(context)
        found = [row[i + n] for row in trained for i in range(len(row) - n) if row[i : i + n] == list(context)]
        return np.bincount(np.array(found, dtype=np.int64), minlength=size)

    def halved(n: int) -> np.ndarray:
        result, weight = np.zeros(size), 1.0
        for i in range(len(window) - 1, n - 1, -1):
            if window[i - n : i] == window[-n:]:
                result[window[i]] += weight
                weight /= 2
        return result

    uses = np.bincount([item for row in trained for item in row], minlength=size) + 0.1
    unigram = uses / uses.sum()
    bigram = (followers(current) + 5 * unigram) / (followers(current).sum() + 5)
    two = followers(*past[-2:]) if len(past) > 1 else np.zeros(size)
    trigram = (two + 3 * bigram) / (two.sum() + 3)
    recency = np.bincount(window, 0.85 ** np.arange(len(window))[::-1], minlength=size)
    equal = np.bincount(
        np.array([b for a, b in zip(window, window[1:], strict=False) if a == current], dtype=np.int64), minlength=size
    )
    own = halved(1) / halved(1).sum() if equal.any() else bigram
    pair = halved(2) if len(window) > 2 else np.zeros(size)
    parts = [unigram, bigram, trigram, np.bincount(window, minlength=size) / len(window), recency / recency.sum()]
    parts += [equal / equal.sum() if equal.any() else bigram, own, pair / pair.sum() if pair.any() else own]
    return np.stack(parts, axis=1)


@pytest.mark.parametrize(("items", "length"), [(3, 70), (12, 20), (40, 9)])
def test_probabilities_and_ranks_are_those_of_the_definition(items: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AT_A_TIME", 500)  # several parts
    rng = np.random.default_rng(0)
    lists = [(rng.zipf(1.5, rng.integers(2, length)) % items).tolist() for _ in range(40)]
    histories = Histories.from_lists(lists)
    parts = split(histories, "last-n", n=2)
    users, places = parts.targets("test")
    sample = module._Sample(histories, parts.train_end, users, places)
    trained = [histories.of(user)[:end].tolist() for user, end in enumerate(parts.train_end)]
    tables = [dense(histories, trained, histories.of(u)[:p].tolist()) for u, p in zip(users, places, strict=True)]
    expected = np.stack([table[target] for table, target in zip(tables, sample.target, strict=True)])
    np.testing.assert_allclose(sample.predictors(), expected, rtol=1e-9)
    weights = rng.dirichlet(np.ones(8), len(users))
    gains = sample.gains({"any": weights}, np.arange(len(users)), False)["any"]
    for table, weight, target, gain in zip(tables, weights, sample.target, gains, strict=True):
        score = table @ weight
        rank = np.count_nonzero(score >= score[target] * (1 - 1e-9))
        assert gain == pytest.approx(1 / np.log2(1 + rank) if rank <= CUT else 0)


@pytest.mark.parametrize(
    "lists",
    [
        [],
        [[1]],
        [[1, 2], [2]],
        [[1] * 300],
        [[1, 2, 3]] * 80,
        [list(range(400))],
        [list(range(9 * user, 9 * user + 9)) for user in range(99)],
    ],
    ids=["nothing", "one event", "too short", "one item", "three events", "one user without repeats", "items of one user each"],
)
def test_poor_data_give_no_nan(lists: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = headroom(Histories.from_lists(lists))
    assert "NaN" not in json.dumps(values) and sentence(values) and rows(values)
    assert values["headroom"] in (None, 0) and not values["pays"]


def test_stats_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recall.txt"
    path.write_text("".join(f"{user} {' '.join(map(str, row))}\n" for user, row in enumerate(recall().items.reshape(600, 40))))
    assert main(["data", "stats", str(path), "--json", str(tmp_path / "stats.json")]) == 0
    assert "\n\nRefinement can be expected to pay: knowing what followed" in capsys.readouterr().out
    found = json.loads((tmp_path / "stats.json").read_text())["headroom"]
    assert found["pays"] and list(found["ndcg"]) == list(MIXTURES) and found["holdout"] == 4
    assert main(["data", "stats", str(path), "--no-headroom", "--json", str(tmp_path / "stats.json")]) == 0
    assert "Refinement" not in capsys.readouterr().out and "headroom" not in json.loads((tmp_path / "stats.json").read_text())
