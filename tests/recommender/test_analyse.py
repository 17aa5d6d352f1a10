"""The analysis: its numbers by slow loops, its page whole, safe and the same each time."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from awrsr import AWRSR, AWRSRConfig
from awrsr.analysis.analyse import ROLES, Analysis, analyse, batches, buckets, roles, training_counts, without_refinement
from awrsr.analysis.page import luminance, page, shade
from awrsr.data.histories import Histories
from awrsr.data.splits import Split, split
from awrsr.evaluation.ranking import evaluate

from .runs import histories, train

WINDOW, HEADS = 7, 2


@pytest.fixture(scope="module")
def parts() -> Split:
    return split(Histories.from_lists(histories(40)))


def make(parts: Split, **options: Any) -> AWRSR:
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden": 16, "layers": 2, "heads": HEADS, "rank": 4, "max_len": WINDOW, "init": "match"}
    model = AWRSR(AWRSRConfig(num_items=parts.histories.num_items, **(small | options))).eval()
    model.item_ids = parts.histories.item_ids
    return model


def rows(model: AWRSR, parts: Split, layer: int, head: int) -> list[tuple[list[str], Any, Any, Any]]:
    """One history at a time: its items, P as a matrix, the last row of P and that of M over its sum."""
    found = []
    h = parts.histories
    for user, place in zip(*parts.targets("test"), strict=True):
        items = h.item_ids[h.of(user)[:place]].tolist()
        p, m = (x[head].double().numpy() for x in model.attention_maps(items)[layer])
        found.append((items[-WINDOW:], p, p[-1], m[-1] / m[-1].sum()))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"refinement": "additive", "gate": 2.0},
        {"refinement": "value", "tables": "content"},
        {"refinement": "stochastic", "backbone": "stosa"},
    ],
    ids=lambda options: options["refinement"],
)
def test_numbers_are_those_of_a_slow_loop(options: dict[str, Any], parts: Split) -> None:
    model = make(parts, **options)
    found = analyse(model, parts, users=10**6)
    assert len(found.heads) == 2 * HEADS and found.histories == len(parts.targets("test")[0])
    for each in found.heads:
        slow: dict[str, list[float]] = {}
        distance: dict[int, list[float]] = {}
        moved_in_all, hops, after = 0.0, 0.0, 0.0
        for items, whole, p, m in rows(model, parts, each.layer - 1, each.head - 1):
            n = len(items)
            one = {"span": math.exp(-sum(x * math.log(x) for x in p if x > 0)), "back": sum(p[j] * (n - 1 - j) for j in range(n))}
            one |= {
                "span_m": math.exp(-sum(x * math.log(x) for x in m if x > 0)),
                "back_m": sum(m[j] * (n - 1 - j) for j in range(n)),
            }
            gone = [max(m[j] - p[j], 0) for j in range(n)]
            led = [sum(p[k] * whole[k, j] for k in range(n)) > p[j] for j in range(n)]
            next_to = [j > 0 and p[j - 1] > p[j] for j in range(n)]
            one |= {"moved": sum(gone), "two_hops_chance": sum(led) / n, "followed_chance": sum(next_to) / n}
            moved_in_all += sum(gone)
            hops += sum(x for x, yes in zip(gone, led, strict=True) if yes)
            after += sum(x for x, yes in zip(gone, next_to, strict=True) if yes)
            for name, value in one.items():
                slow.setdefault(name, []).append(float(value))
            for j in range(n):
                distance.setdefault(n - 1 - j, []).append(float(m[j]))
        for name, values in slow.items():
            assert getattr(each, name) == pytest.approx(np.mean(values), rel=1e-4), name
        assert each.two_hops == pytest.approx(hops / moved_in_all, rel=1e-3)
        assert each.followed == pytest.approx(after / moved_in_all, rel=1e-3)
        assert each.distance_m == pytest.approx([np.mean(distance[d]) for d in range(len(distance))], rel=1e-4)
        assert sum(each.roles) == pytest.approx(1, rel=1e-4) and sum(each.roles_m) == pytest.approx(1, rel=1e-4)
        assert each.gate == (2.0 if options["refinement"] == "additive" else None)


def test_roles_of_events() -> None:
    items = torch.tensor([[9, 9, 5, 7, 5, 8, 5], [5, 1, 5, 2, 3, 4, 5]])
    found = [[ROLES[i] if i < len(ROLES) else "" for i in row] for row in roles(items, torch.tensor([5, 7]))]
    itself, same, after, before, others = ROLES
    assert found[0] == ["", "", same, after, same, after, itself]
    assert found[1] == [same, after, same, after, others, before, itself]


def test_every_history_is_in_a_batch_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awrsr.analysis.analyse.WEIGHTS_HELD", 300)
    every = [np.full(n % WINDOW + 1, n) for n in range(40)]
    found = list(batches(every, HEADS))
    assert sorted(items[0] for batch in found for items in batch) == list(range(40)) and len(found) > 3
    assert all(len(batch) == 1 or len(batch) * HEADS * max(map(len, batch)) ** 2 <= 300 for batch in found)


def test_batches_do_not_change_the_numbers(parts: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(parts)
    usual = analyse(model, parts)
    monkeypatch.setattr("awrsr.analysis.analyse.WEIGHTS_HELD", 300)
    for one, other in zip(usual.heads, analyse(model, parts).heads, strict=True):
        assert one.distance == pytest.approx(other.distance, rel=1e-5) and one.span_m == pytest.approx(other.span_m, rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"tables": "content", "learned_gate": True}, {"backbone": "stosa", "refinement": "stochastic"}]
)
def test_refinement_switched_off_is_first_order_attention(options: dict[str, Any], parts: Split) -> None:
    model = make(parts, **options)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plain = without_refinement(model)
    history = parts.histories.item_ids[parts.histories.of(0)].tolist()
    for (p, m), (kept, _) in zip(plain.attention_maps(history)[:1], model.attention_maps(history)[:1], strict=True):
        assert torch.equal(p, m) and torch.equal(p, kept)
    assert model.config.refinement != "none" and not torch.equal(*model.attention_maps(history)[0])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_predictions_are_compared_with_the_other_model(parts: Split) -> None:
    model, baseline = make(parts), make(parts, refinement="none")
    found = analyse(model, parts, baseline=baseline, examples=2, filter_seen=False)
    ours, theirs = (evaluate(each, parts, filter_seen=False).ranks for each in (model, baseline))
    assert (found.better, found.worse, found.targets) == ((ours < theirs).sum(), (ours > theirs).sum(), len(ours))
    gained = np.sort(1 / ours - 1 / theirs)
    for shown, wanted in ((found.helped, gained[::-1][:2]), (found.hurt, gained[:2])):
        assert [1 / each.rank - 1 / each.other_rank for each in shown] == pytest.approx(wanted)
        for each in shown:
            assert (each.target == each.top[0]) == (each.rank == 1) and len(each.p) == len(each.m) == min(len(each.history), WINDOW)
    assert sum(bucket.targets for bucket in found.by_length) == found.targets == sum(b.targets for b in found.by_popularity)
    assert sum(b.targets * b.gain for b in found.by_length) / found.targets == pytest.approx(found.value - found.other_value)


@pytest.mark.parametrize("seen", [False, True])
def test_both_models_are_asked_as_the_first_was_trained(seen: bool, parts: Split) -> None:
    model, same = make(parts), make(parts)
    model.filter_seen, same.filter_seen = seen, not seen
    found = analyse(model, parts, baseline=same, examples=1)
    assert found.value == found.other_value and found.better == found.worse == 0
    assert found.value == analyse(model, parts, baseline=same, examples=1, filter_seen=seen).value


def test_buckets_hold_their_ends() -> None:
    found = buckets(np.array([1.0, 2, 3, 4]), np.array([0, 3, 4, 99]), (3, 10))
    assert [(b.name, b.targets, b.gain) for b in found] == [("0 to 3", 2, 1.5), ("4 to 10", 1, 3.0), ("11 and more", 1, 4.0)]


def test_items_are_counted_where_they_are_trained_on() -> None:
    assert training_counts(split(Histories.from_lists([[0, 1, 1, 2, 3], [1, 0, 2]]))).tolist() == [1, 3, 0, 0]


@pytest.mark.parametrize(
    "change, message",
    [({"part": "train"}, "part is 'train'"), ({"users": 0}, "users is 0"), ({"examples": 0}, "examples is 0")],
)
def test_what_is_out_of_range_is_named(change: dict[str, Any], message: str, parts: Split) -> None:
    with pytest.raises(ValueError, match=message):
        analyse(make(parts), parts, **change)


def test_a_baseline_of_other_items_is_refused(parts: Split) -> None:
    baseline = make(parts)
    baseline.item_ids = parts.histories.item_ids[::-1]
    with pytest.raises(ValueError, match="baseline knows other items than the model"):
        analyse(make(parts), parts, baseline=baseline)


# The page


def analysis(parts: Split, **options: Any) -> Analysis:
    return analyse(make(parts, **options), parts, users=20, examples=1)


def test_the_page_needs_nothing_else_is_the_same_each_time_and_has_words_from_the_numbers(parts: Split) -> None:
    found = analysis(parts, gate=2.0)
    text = page(found, "run")
    assert not re.search(r"(src|href)=|<script|@import|url\(|https?:", text)
    assert text.count("<figure>") == 3 and text.count("<polyline") == 2 * len(found.heads) == text.count("class=bar")
    assert page(found, "run") == text
    most = max(found.heads, key=lambda head: head.moved)
    assert f"{most.moved:.0%} of a head" in text and f"{most.two_hops:.0%} went where two hops lead" in text
    assert f"{found.better:,} of {found.targets:,} targets rank higher" in text and "switched off" in text


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_in_cells_reads_on_every_shade(parts: Split) -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    cells = re.findall(r"<td style='background:#(\w{6});color:#(000|fff)'>", page(analysis(parts, gate=2.0), "run"))
    assert len(cells) > 20 and {text for _, text in cells} == {"000", "fff"}
    for background, text in cells:
        assert contrast(bytes.fromhex(background), bytes.fromhex(2 * text)) >= 4.5, background
    for grey in range(256):
        text = shade(f"#{3 * bytes([grey]).hex()}", 1.0)[-3:]
        assert contrast([grey] * 3, bytes.fromhex(2 * text)) >= 4.5, grey


def test_words_of_the_page_read_on_its_background(parts: Split) -> None:
    light, dark = page(analysis(parts), "run").split("<style>")[1].split("</style>")[0].split("@media(prefers-color-scheme:dark){")
    for css, background in ((light, "ffffff"), (dark, "181a1b")):
        for words in ("figcaption,.small", ".good,.interval.good", ".bad,.interval.bad"):
            color = re.search(rf"{re.escape(words)}{{color:#(\w+)", css)
            assert color, words
            rgb = color[1] if len(color[1]) == 6 else "".join(2 * each for each in color[1])
            assert contrast(bytes.fromhex(rgb), bytes.fromhex(background)) >= 4.5, words
    for color, text in re.findall(r"background:#(\w{6});color:#(222|fff)", light):
        assert contrast(bytes.fromhex(color), bytes.fromhex("".join(2 * each for each in text))) >= 4.5, color


def test_ids_of_the_data_are_text_and_no_markup() -> None:
    evil = {f"<b>{user}": [f"<script>{item}'\"" for item in items] for user, items in histories(12).items()}
    text = page(analysis(split(Histories.from_lists(evil))), "<title>")
    assert "<script>" not in text and "&lt;script&gt;" in text and "<b>u" not in text and "<h1>&lt;title&gt;</h1>" in text


def test_without_refinement_the_page_says_that_m_is_p(parts: Split) -> None:
    found = analysis(parts, refinement="none")
    text = page(found, "run")
    assert "M is P" in text and found.targets == 0 and "Which predictions change" not in text
    assert all(head.moved < 1e-6 and head.distance == pytest.approx(head.distance_m, abs=1e-6) for head in found.heads)


def test_the_command_writes_the_report(
    home: Path, run: Path, tmp_path: Path, refused: Callable[..., str], printed: Callable[..., str]
) -> None:
    plain, numbers = home / "plain", tmp_path / "numbers.json"
    assert printed("analyse", run) == f"Report: {run / 'analysis.html'}\n" and (run / "analysis.html").stat().st_size > 5_000
    printed("analyse", run, "--baseline", plain, "--part", "validation", "--json", numbers)
    found = json.loads(numbers.read_text(encoding="utf-8"))
    ranked = json.loads((run / "metrics.json").read_text())["validation"]["NDCG@10"]
    assert found["value"] == pytest.approx(ranked) and found["other"] == "the baseline run plain"
    assert "users is 0, must be 1 or more" in refused("analyse", run, "--users", 0)
    train(home / "data.txt", tmp_path / "seen", epochs=1, split="none")
    message = refused("analyse", run, "--baseline", tmp_path / "seen")
    assert "or its split (none) differs" in message and "may have been trained on events held out here" in message
    assert "split, 'none', holds out no events" in refused("analyse", tmp_path / "seen")
