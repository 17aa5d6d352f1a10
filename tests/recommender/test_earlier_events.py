"""Options by which attention looks at the events before and after those it compares: no event is seen too early, or in another
history; both layouts agree; what they start as; what is refused."""

from typing import Any

import pytest
import torch

from awrsr import AWRSR, AWRSRConfig

from .small import ITEMS, WINDOW, make_model
from .test_model import EXACT, both, mixed, packed, padded, real

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: tuple[dict[str, Any], ...] = (
    {"refinement": "none", "suffix": 3},
    {"refinement": "none", "smeared_keys": True, "suffix": 2},
    {"refinement": "additive", "smeared_keys": True, "suffix": 5, "learned_gate": True, "tables": "content"},
    {"refinement": "none", "shift": "added", "shift_gate": 2.0},
    {"refinement": "none", "shift": "heads", "plain_heads": 1, "suffix": 3, "unigram": True},
    {"refinement": "simple", "shift": "heads"},
    {"refinement": "additive", "lags": 2, "learned_scale": True},
    {"refinement": "additive", "lags": 3, "shift": "heads", "plain_heads": 1, "suffix": 3, "learned_gate": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_event_is_seen_too_early_or_in_another_history(options: dict[str, Any]) -> None:
    """Later events, and those of other histories, are edited; the layouts agree in outputs and gradients."""
    model, lists = make_model(**options).double(), mixed([4, WINDOW, 1, 2])
    before = model(*packed(lists)).split([4, WINDOW, 1, 2])
    for change in range(WINDOW):
        later = [(item + 1) % ITEMS for item in lists[1][change:]]
        edited = [[(item + 5) % ITEMS for item in lists[0]], [*lists[1][:change], *later], lists[2], lists[3]]
        after = model(*packed(edited)).split([4, WINDOW, 1, 2])
        torch.testing.assert_close(before[1][:change], after[1][:change], **EXACT)
        torch.testing.assert_close(before[3], after[3], **EXACT)
        assert (before[1][change] - after[1][change]).abs().max() > 1e-3
        items, lengths = padded(edited)
        torch.testing.assert_close(real(model.forward_padded(items, lengths), lengths), torch.cat(after), **EXACT)
    one, other = both(model, lists, WINDOW)
    assert one.keys() == other.keys() == {"out"} | {name for name, _ in model.named_parameters()}
    for name in one:
        torch.testing.assert_close(one[name], other[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        assert one[name].any(), f"{name} has no gradient"


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_precision_and_maps_agree_with_the_model(options: dict[str, Any]) -> None:
    model, (history,) = make_model(**options, layers=1), mixed([WINDOW])
    exact = model(*packed([history]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(*packed([history]))
    assert (rounded.float() - exact).abs().max() < 0.15 * exact.abs().max()
    ((first, weights),) = model.double().attention_maps(history)
    assert not first.triu(1).any() and not weights.triu(1).any()
    block = list(model.blocks)[0]
    x = model.embed(torch.tensor([history]), where := _padded(len(history)))
    values = block.attention._split(block.attention.qkv(block.before_attention(x)))[2][0]
    attended = block.attention.out(torch.einsum("hij,jhd->ihd", weights, values).flatten(-2))
    assert (weights != 0).any(-1)[:, 1:].all()
    torch.testing.assert_close(block.attention(block.before_attention(x), where)[0], attended, **EXACT)


def _padded(length: int) -> Any:
    from awrsr.models.attention import Padded

    return Padded(torch.tensor([length]))


def test_a_suffix_adds_the_scores_of_the_events_before_by_its_factors() -> None:
    model = make_model(refinement="none", suffix=3, layers=1).double()
    attention, where = list(model.blocks)[0].attention, _padded(WINDOW)
    x = model.embed(torch.tensor(mixed([WINDOW])), where)
    q, k, _ = (a[0].transpose(0, 1) for a in attention._split(attention.qkv(x)))
    scores = q @ k.transpose(1, 2) / 2  # of 4 features a head
    later = [torch.nn.functional.pad(scores, (a, 0, a, 0))[:, :WINDOW, :WINDOW] for a in (1, 2)]
    scores = scores + sum(f[:, None, None] * each for f, each in zip(attention.suffix_factors.T, later, strict=True))
    hidden = torch.ones(WINDOW, WINDOW).triu(1).bool()
    torch.testing.assert_close(attention.weights(x, where)[0][0], scores.masked_fill(hidden, -torch.inf).softmax(-1))


def test_options_start_as_described_and_need_their_backbone() -> None:
    attention = AWRSR(num_items=ITEMS, suffix=3, smeared_keys=True, heads=2).blocks[0].attention
    assert attention.suffix_factors.tolist() == [[0.5, 0.25]] * 2
    assert attention.smear.sigmoid().tolist() == pytest.approx([0.047, 0.953], abs=1e-3)
    options = {"lags": 2, "shift": "heads", "shift_gate": 3.0, "plain_heads": 2, "heads": 4, "rank": 8}
    attention = AWRSR(num_items=ITEMS, **options).blocks[0].attention
    assert attention.lags.tolist() == [[0.5, 0.25]] * 4 and attention.shift_gate.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("options, message", [
    ({"hidden": 128, "suffix": 5}, "suffix is 5, must be at most 256 / hidden / heads = 64"),
    ({"rank": 64, "lags": 4}, r"lags is 4, must be so small that \(lags \+ 1\) \* rank is at most 256; rank is 64"),
    ({"plain_heads": 2}, "plain_heads is 2, must be below heads, 2"),
    ({"refinement": "simple", "plain_heads": 1}, "plain_heads is 1, which needs refinement none or additive"),
    ({"refinement": "value", "shift": "heads"}, "shift is 'heads', which needs another refinement than value"),
    ({"shift": "added"}, "shift is 'added', which needs refinement none"),
    ({"refinement": "none", "unigram": True, "suffix": 3}, "unigram is True, which needs shift heads"),
    ({"backbone": "stosa", "suffix": 3}, "suffix is 3, which needs backbone 'sasrec'"),
    ({"backbone": "stosa", "lags": 2}, "lags is 2, which needs backbone 'sasrec'"),
], ids=str)  # fmt: skip
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AWRSRConfig(**options)
