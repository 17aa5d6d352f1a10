"""Baselines: their ranks are those of scores that are counted one by one."""

from collections import Counter

import numpy as np
import pytest

from awrsr.cli.train import show
from awrsr.data.histories import Histories
from awrsr.data.splits import Split, split
from awrsr.evaluation import baselines as module
from awrsr.evaluation.baselines import BASELINES, LAST_TIME, MARKOV, POPULARITY, baselines
from awrsr.evaluation.ranking import Evaluation, metrics
from awrsr.evaluation.report import Metrics


def parts(seed: int, users: int = 12, items: int = 9) -> Split:
    draw = np.random.default_rng(seed)
    histories = [draw.zipf(1.6, draw.integers(1, 15)).clip(max=items).tolist() for _ in range(users)]
    return split(Histories.from_lists(histories), "last-n", n=2)


def counted(of: Split, filter_seen: bool) -> dict[str, list[int]]:
    """The same ranks, one target after another."""
    h, uses, after = of.histories, Counter[int](), Counter[tuple[int, int]]()
    for user in range(h.num_users):
        trains = h.of(user)[: of.train_end[user]].tolist()
        uses.update(trains)
        after.update(zip(trains, trains[1:], strict=False))
    ranks: dict[str, list[int]] = {POPULARITY: [], MARKOV: [], LAST_TIME: []}
    for user, place in zip(*of.targets("test"), strict=True):
        *before, target = h.of(user)[: place + 1].tolist()
        earlier = [at for at in range(len(before) - 1) if before[at] == before[-1]]
        answer = before[earlier[-1] + 1] if earlier else -1
        for name in ranks:
            score = {
                i: (name == LAST_TIME and i == answer, name != POPULARITY and after[before[-1], i], uses[i])
                for i in range(h.num_items)
            }
            left = [i for i in score if not (filter_seen and i in before)]
            rank = sum(score[i] >= score[target] for i in left) if target in left else h.num_items
            ranks[name].append(rank)
    return ranks


@pytest.mark.parametrize("filter_seen", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_those_of_counts(seed: int, filter_seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVENTS", 20)  # several parts
    of = parts(seed)
    users, places = of.targets("test")
    ranked = Evaluation(users, places, of.histories.items[of.histories.offsets[users] + places], np.empty(0), 0.0)
    found, wanted = baselines(of, ranked, filter_seen), counted(of, filter_seen)
    assert found == {name: metrics(np.array(wanted[name])) for name in found} and (LAST_TIME in found) is not filter_seen


def test_metrics_print_as_a_table_with_the_baselines() -> None:
    table = repr(found := Metrics({"HR@5": 0.25}, {POPULARITY: {"HR@5": 0.125}}, 1000)).splitlines()
    assert table == ["                 HR@5", "this model     0.2500", "popularity     0.1250", "means over 1,000 held-out events"]
    assert found.table().rows() == [("this model", 0.25), ("popularity", 0.125)] and found["HR@5"] == 0.25
    assert BASELINES == "baselines"


def test_a_model_that_loses_to_a_baseline_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    reached = {name: {"test": {"NDCG@10": value}} for name, value in (("plain", 0.2), ("additive", 0.5))}
    others = {POPULARITY: {"NDCG@10": 0.1}, MARKOV: {"NDCG@10": 0.2}, LAST_TIME: {"NDCG@10": 0.4}}
    show({name: each | {BASELINES: {"test": others}} for name, each in reached.items()})
    out = capsys.readouterr().out
    assert f"plain is no better than {MARKOV} and {LAST_TIME}, which need no training" in out and "additive is no" not in out
