"""Options of the model: what each stores, how it starts, what it does to scores and maps, what is refused."""

import functools
from typing import Any

import pytest
import torch

from awrsr import AWRSR, AWRSRConfig

from .small import BACKBONES, ITEMS, WINDOW, make_lists, make_model
from .test_model import EXACT, mixed, packed, padded

pytestmark = pytest.mark.usefixtures("one_thread")


def names(**changes: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(w.shape) for name, w in make_model(layers=1, **changes).state_dict().items() if "attention." in name}


def test_each_option_stores_the_tables_it_needs() -> None:
    plain = {
        "blocks.0.attention.qkv.weight": (24, 8),
        "blocks.0.attention.qkv.bias": (24,),
        "blocks.0.attention.out.weight": (8, 8),
        "blocks.0.attention.out.bias": (8,),
    }
    w_q, w_k, content, gate, scale = (f"blocks.0.attention.{name}" for name in ("w_q", "w_k", "to_tables", "gate", "scale"))
    assert names(refinement="none", learned_gate=True, learned_scale=True) == plain
    assert names(refinement="value", learned_gate=True) == plain | {w_q: (2, WINDOW, 3), w_k: (2, WINDOW, 3)}
    assert names(per_head=False) == plain | {w_q: (WINDOW, 3), w_k: (WINDOW, 3)}
    assert names(tables="content", learned_gate=True) == plain | {content: (8, 12), gate: (2,)}
    assert names(learned_scale=True, per_head=False) == plain | {w_q: (WINDOW, 3), w_k: (WINDOW, 3), scale: (2, 1, 1)}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_gate_of_zero_is_plain_attention(backbone: str) -> None:
    refined, plain = (make_model(backbone=backbone, refinement=name, learned_gate=True) for name in ("additive", "none"))
    state = plain.state_dict()
    with torch.no_grad():
        for name, weight in refined.named_parameters():
            weight.copy_(state[name]) if name in state else weight.zero_() if "gate" in name else None
    torch.testing.assert_close(refined(*packed(mixed([4, 9]))), plain(*packed(mixed([4, 9]))), rtol=1e-5, atol=1e-5)


def test_the_gate_is_a_factor_or_where_a_learned_one_begins() -> None:
    inputs = packed(mixed([4, WINDOW]))
    fixed, one = make_model(gate=3.0), make_model()
    assert fixed.state_dict().keys() == one.state_dict().keys() and not torch.allclose(fixed(*inputs), one(*inputs))
    learned = make_model(gate=3.0, learned_gate=True)
    learned.load_state_dict(fixed.state_dict(), strict=False)
    with torch.no_grad():
        for block in learned.blocks:
            block.attention.gate.fill_(3.0)
    torch.testing.assert_close(learned(*inputs), fixed(*inputs))
    fresh = AWRSR(AWRSRConfig(num_items=ITEMS, gate=3.0, learned_gate=True, heads=2))
    assert fresh.blocks[0].attention.gate.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("tables", [{}, {"per_head": False}, {"tables": "content"}], ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_learned_scale_begins_at_the_fixed_one_and_is_each_heads_own(backbone: str, tables: dict[str, Any]) -> None:
    inputs, kind = packed(mixed([4, WINDOW])), {"backbone": backbone, "refinement": "simple", "layers": 1, "hidden": 8} | tables
    fixed, sharper = make_model(refine_scale=0.5, **kind).double(), make_model(refine_scale=1.5, **kind).double()
    learned = make_model(refine_scale=0.5, learned_scale=True, **kind).double()
    for other in (sharper, learned):
        other.load_state_dict(fixed.state_dict(), strict=False)
    for factor, same in ((1.0, fixed), (3.0, sharper)):
        with torch.no_grad():
            learned.blocks[0].attention.scale.fill_(factor)
        torch.testing.assert_close(learned(*inputs), same(*inputs))
    assert not torch.allclose(sharper(*inputs), fixed(*inputs))
    learned(*inputs).square().sum().backward()
    gradient = learned.blocks[0].attention.scale.grad.flatten().tolist()
    assert len(set(gradient)) == 2 and 0.0 not in gradient
    fresh = AWRSR(AWRSRConfig(num_items=ITEMS, learned_scale=True, heads=2))
    assert fresh.blocks[0].attention.scale.flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_matched_keys_begin_at_equal_items(backbone: str) -> None:
    torch.manual_seed(0)
    model = AWRSR(AWRSRConfig(num_items=ITEMS, backbone=backbone, init="match", heads=1, layers=2, refinement="none")).eval()
    maps = model.attention_maps([3, 1, 4, 1, 5, 9, 2, 6, 5])
    last = maps[-1][0][0, -1]  # the second 5 attends to itself and to the first
    assert last[[4, 8]].sum() > 0.5
    assert maps[0][0][0, -1, [4, 8]].sum() < 0.5  # the first block does not


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_copying_model_begins_by_ranking_what_is_like_the_current_item(backbone: str) -> None:
    torch.manual_seed(0)
    history = [3, 1, 4, 7, 5, 9, 2, 6, 5]
    model = AWRSR(AWRSRConfig(num_items=ITEMS, backbone=backbone, init="copy", heads=1, layers=1, refinement="none"))
    assert model.recommend([history], k=1, filter_seen=False)["item"].to_list() == [5]


def test_shifted_tables_begin_at_what_followed() -> None:
    """Where first-order weights find earlier occurrences of the current item, higher-order ones then find what followed them."""
    torch.manual_seed(0)
    options = {"refinement": "simple", "init": "match", "heads": 1, "layers": 1, "refine_scale": 3.0}
    shares = {}
    for start in ("normal", "shifted"):
        model = AWRSR(AWRSRConfig(num_items=ITEMS, table_init=start, **options)).eval()
        with torch.no_grad():
            model.positions.weight.zero_()
        shares[start] = model.attention_maps([3, 1, 4, 7, 5, 9, 2, 6, 5])[0][1][0, -1, 5].item()
    assert shares["shifted"] > 0.3 > shares["normal"]


@pytest.mark.parametrize("size, rank", [(9, 4), (4, 9)])
@pytest.mark.parametrize("per_head", [True, False])
def test_orthogonal_tables_have_orthogonal_columns(size: int, rank: int, per_head: bool) -> None:
    """Or rows where there are fewer; entries have the deviation that is asked for."""
    options = {"max_len": size, "rank": rank, "per_head": per_head, "table_init": "orthogonal", "table_std": 0.5}
    attention = AWRSR(AWRSRConfig(num_items=ITEMS, **options)).blocks[0].attention
    for table in (attention.w_q, attention.w_k):
        for w in table.detach().view(-1, size, rank):
            w = w if size > rank else w.T
            torch.testing.assert_close(w.T @ w, torch.eye(w.shape[1]) * len(w) * 0.25)


def test_identity_tables_compare_what_events_attend_to() -> None:
    """With a column per position, higher-order scores at the start are products of rows of P, times rank x table_std^2."""
    options = {"refinement": "simple", "table_init": "identity", "table_std": 0.5, "refine_scale": 1.0, "layers": 1}
    model = AWRSR(AWRSRConfig(num_items=ITEMS, max_len=WINDOW, rank=WINDOW, **options)).double().eval()
    first, refined = model.attention_maps(mixed([WINDOW])[0])[0]
    future = torch.ones(WINDOW, WINDOW).triu(1).bool()
    scores = (first @ first.mT * WINDOW * 0.25).masked_fill(future, -torch.inf)
    torch.testing.assert_close(refined, scores.softmax(-1), **EXACT)
    wrapped = AWRSR(AWRSRConfig(num_items=ITEMS, max_len=WINDOW, rank=3, **options)).blocks[0].attention.w_q
    assert torch.equal(wrapped[..., -1, :], wrapped[..., -4, :]) and not torch.equal(wrapped[..., -1, :], wrapped[..., -2, :])


def test_scores_are_cosines_where_there_is_a_temperature() -> None:
    model, lists = make_model(temperature=0.1).double(), make_lists(5, most=WINDOW)
    rows = model(*packed(lists))
    torch.testing.assert_close(rows.norm(dim=-1), torch.full((len(rows),), 10.0, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(model.item_table().norm(dim=-1), torch.ones(ITEMS, dtype=torch.float64), **EXACT)
    assert model.scores_padded(*padded(lists)).abs().max() <= 10


def test_the_scale_of_refinement_reaches_the_operator_and_the_maps() -> None:
    usual, sharp = (make_model(refine_scale=scale, refinement="simple") for scale in (0.0, 40.0))
    lists = make_lists(3, least=5, most=WINDOW)
    inputs = packed(lists)
    assert not torch.allclose(usual(*inputs), sharp(*inputs))
    assert sharp.attention_maps(lists[0])[0][1].max(-1).values.mean() > usual.attention_maps(lists[0])[0][1].max(-1).values.mean()
    torch.testing.assert_close(make_model(refine_scale=3**-0.5, refinement="simple")(*inputs), usual(*inputs))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_only_training_drops(backbone: str) -> None:
    make, inputs = functools.partial(make_model, backbone=backbone), packed(mixed([4, WINDOW]))
    model = make(hidden_dropout=0.5, attention_dropout=0.5)
    assert torch.equal(model(*inputs), model(*inputs))
    model.train()
    assert not torch.equal(model(*inputs), model(*inputs))
    for option in ("hidden_dropout", "attention_dropout"):
        model = make(**({"hidden_dropout": 0.0, "attention_dropout": 0.0} | {option: 0.5})).train()
        assert not torch.equal(model(*inputs), model(*inputs)), option
    model = make(hidden_dropout=0.0, attention_dropout=0.0).train()
    assert torch.equal(model(*inputs), model(*inputs))


# What is refused


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("refinement", "cubic", ValueError),
        ("refinement", ["none"], TypeError),
        ("backbone", "gru", ValueError),
        ("refinement", "stochastic", ValueError),  # of stosa alone
        ("mean_branch", "published", ValueError),
        ("mean_branch", "discarded", ValueError),
        ("tables", "", ValueError),
        ("norm", None, TypeError),
        ("activation", "swish", ValueError),
        ("backend", "cuda", ValueError),
        ("hidden", 63, ValueError),
        ("hidden", 514, ValueError),
        ("hidden", 0, ValueError),
        ("hidden", 64.0, TypeError),
        ("heads", True, TypeError),
        ("heads", 0, ValueError),
        ("layers", "2", TypeError),
        ("layers", -1, ValueError),
        ("rank", 257, ValueError),
        ("rank", 0, ValueError),
        ("max_len", 0, ValueError),
        ("num_items", -1, ValueError),
        ("per_head", 1, TypeError),
        ("learned_gate", "yes", TypeError),
        ("temperature", -0.1, ValueError),
        ("table_init", "zeros", ValueError),
        ("hidden_dropout", 1.0, ValueError),
        ("hidden_dropout", -0.1, ValueError),
        ("hidden_dropout", float("nan"), ValueError),
        ("attention_dropout", True, TypeError),
        ("attention_dropout", 1, ValueError),
        ("table_std", "1", TypeError),
        ("table_std", float("nan"), ValueError),
        ("table_std", float("inf"), ValueError),
    ],
)
def test_an_option_out_of_range_is_named(option: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{option} is "):
        AWRSRConfig(**{option: value})


def test_whole_numbers_serve_as_floats() -> None:
    assert AWRSRConfig(hidden_dropout=0, table_std=2).table_std == 2


def test_distances_in_the_correlation_space_have_no_learned_scale() -> None:
    stored = names(learned_scale=True, backbone="stosa", refinement="stochastic")
    assert not any(name.endswith("scale") for name in stored) and stored


def test_distances_have_no_temperature() -> None:
    with pytest.raises(ValueError, match="temperature is 0.1, must be 0 with backbone 'stosa'"):
        AWRSRConfig(num_items=ITEMS, backbone="stosa", temperature=0.1)
