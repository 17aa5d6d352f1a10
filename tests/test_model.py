"""The model: packed equals padded, causality, positions from the end, what is stored, what is refused, what is looked into."""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from awrsr.attention import Padded
from awrsr.model import AWRSR, AWRSRConfig
from awrsr_kernels.tolerance import allowed_errors

from .conftest import DEVICE, cumulative
from .small import BACKBONES, ITEMS, KINDS, PUBLISHED, REFINEMENTS, WINDOW, make_lists, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

Kind = dict[str, Any]
MIXES = ([1], [WINDOW], [1, 1, 1], [1, WINDOW, 4], [3, 2, 5, 8, 1], [2, 2])
TABLES = ({}, {"per_head": False}, {"tables": "content"})
NORMED = [{"refinement": each, "correlation_norm": True} for each in ("simple", "value", "additive")]
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # float64


def packed(lists: list[list[int]]) -> tuple[Tensor, Tensor, int]:
    """What `forward` takes."""
    items = torch.tensor([item for each in lists for item in each], dtype=torch.int64)
    return items, cumulative([len(each) for each in lists], "cpu"), max(map(len, lists))


def padded(lists: list[list[int]], window: int = WINDOW, filler: int = 0) -> tuple[Tensor, Tensor]:
    """What `forward_padded` takes."""
    rows = [[filler] * (window - len(each)) + each for each in lists]
    return torch.tensor(rows), torch.tensor([len(each) for each in lists])


def real(out: Tensor, lengths: Tensor) -> Tensor:
    """(B, L, E) -> (T, E): rows of events, in packed order."""
    return torch.cat([row[len(row) - length :] for row, length in zip(out, lengths.tolist(), strict=True)])


def mixed(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(ITEMS, size=length).tolist() for length in lengths]


def both(model: AWRSR, lists: list[list[int]], window: int) -> list[dict[str, Tensor]]:
    """Output and gradients of the packed and of the padded forward, for one random gradient of the output."""
    results = []
    shape = sum(map(len, lists)), model.item_table().shape[1]
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for packs in (True, False):
        model.zero_grad()
        items, lengths = padded(lists, window)
        out = model(*packed(lists)) if packs else real(model.forward_padded(items, lengths), lengths)
        out.backward(upstream.to(out))
        grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        results.append({"out": out.detach()} | {name: grad.clone() for name, grad in grads.items()})
    return results


@pytest.mark.parametrize("lengths", MIXES, ids=str)
@pytest.mark.parametrize("tables", TABLES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *NORMED, PUBLISHED], ids=str)
def test_packed_equals_padded(kind: Kind, tables: dict[str, Any], lengths: list[int]) -> None:
    for norm, gate in (("pre", False), ("post", True)):
        model = make_model(**kind, norm=norm, learned_gate=gate, **tables).double()
        one, other = both(model, mixed(lengths), WINDOW)
        assert one.keys() == other.keys() == {"out"} | {name for name, _ in model.named_parameters()}
        for name in one:
            torch.testing.assert_close(one[name], other[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_packed_equals_padded_in_float32(kind: Kind) -> None:
    """Within the project's tolerance: a few times what the padded forward itself errs in float32."""
    lists = mixed([1, WINDOW, 4, 6])
    exact = both(make_model(**kind).double(), lists, WINDOW)[1]
    found, same = both(make_model(**kind), lists, WINDOW)
    for name, limit in allowed_errors(exact, same, torch.float32).items():
        assert (found[name].double() - exact[name]).abs().max().item() <= limit, name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_narrower_window_changes_nothing(backbone: str) -> None:
    model, lists = make_model(backbone=backbone).double(), mixed([1, 3, 5])
    results = [real(model.forward_padded(*padded(lists, window)), torch.tensor([1, 3, 5])) for window in (5, 7, WINDOW)]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, **EXACT)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [{}, {"backbone": "stosa", "refinement": "stochastic"}], ids=str)
def test_position_tables_do_not_pass_for_content(kind: Kind, size: int) -> None:
    """As many events in the batch as heads and table rows: the operator alone could not tell the two shapes apart."""
    model = make_model(heads=size, max_len=size, **kind).double()
    for lists in (mixed([size]), mixed([1] * size)):
        one, other = both(model, lists, size)
        for name in one:
            torch.testing.assert_close(one[name], other[name], **EXACT)


@pytest.mark.parametrize("tables", ["position", "content"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_padding_holds_has_no_effect(backbone: str, tables: str) -> None:
    model, lists = make_model(backbone=backbone, tables=tables), mixed([1, 4, 6])
    one, other = (real(model.forward_padded(*padded(lists, WINDOW, filler)), torch.tensor([1, 4, 6])) for filler in (0, ITEMS - 1))
    assert torch.equal(one, other)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_padding_gives_its_embedding_no_gradient(backbone: str) -> None:
    model = make_model(backbone=backbone)
    items, lengths = padded([[1, 2], [2, 3, 4]], WINDOW, filler=7)
    real(model.forward_padded(items, lengths), lengths).sum().backward()
    assert model.items.weight.grad is not None
    assert model.items.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_empty_window_has_finite_scores(backbone: str) -> None:
    model = make_model(backbone=backbone)
    assert model.scores_padded(torch.zeros(2, WINDOW, dtype=torch.int64), torch.tensor([0, 3])).isfinite().all()


@pytest.mark.parametrize("tables", ["position", "content"])
@pytest.mark.parametrize("kind", [*KINDS, *NORMED], ids=str)
def test_the_future_has_no_effect(kind: Kind, tables: str) -> None:
    model = make_model(**kind, tables=tables).double()
    lists = mixed([WINDOW, 5])
    before = model(*packed(lists))
    for change in range(1, WINDOW):
        other = [[*lists[0][:change], *((item + 1) % ITEMS for item in lists[0][change:])], lists[1]]
        after = model(*packed(other))
        torch.testing.assert_close(before[:change], after[:change], **EXACT)
        assert (before[change] - after[change]).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_event_of_the_past_has_an_effect(backbone: str) -> None:
    """Two layers of any refinement see all of it: what was perturbed above is not lost by itself."""
    model, (history,) = make_model(backbone=backbone), mixed([WINDOW])
    before = model(*packed([history]))[-1]
    for change in range(WINDOW):
        other = [(item + 1) % ITEMS if place == change else item for place, item in enumerate(history)]
        assert (before - model(*packed([other]))[-1]).abs().max() > 1e-5


@pytest.mark.parametrize("backbone", BACKBONES)
def test_histories_of_a_batch_do_not_meet(backbone: str) -> None:
    model, lists = make_model(backbone=backbone).double(), mixed([3, WINDOW, 1, 6])
    alone = torch.cat([model(*packed([each])) for each in lists])
    torch.testing.assert_close(model(*packed(lists)), alone, **EXACT)


def test_histories_without_events_are_passed_over() -> None:
    model, lists = make_model().double(), mixed([3, 2])
    items, _, longest = packed(lists)
    torch.testing.assert_close(model(items, cumulative([0, 3, 0, 2, 0], "cpu"), longest), model(*packed(lists)), **EXACT)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_positions_count_from_the_end(kind: Kind) -> None:
    """A model of a longer window gives the same numbers where the last rows of its tables are those of the shorter one."""
    short, long = make_model(**kind).double(), make_model(seed=1, **kind, max_len=WINDOW + 4).double()
    state = long.state_dict()
    for name, weight in short.state_dict().items():
        if weight.dim() < 2:
            state[name] = weight
        else:
            state[name][..., -weight.shape[-2] :, :] = weight
    long.load_state_dict(state)
    lists = mixed([1, 4, WINDOW])
    torch.testing.assert_close(short(*packed(lists)), long(*packed(lists)), **EXACT)
    torch.testing.assert_close(short.scores_padded(*padded(lists)), long.scores_padded(*padded(lists, WINDOW + 4)), **EXACT)


def test_a_larger_bound_on_the_longest_history_changes_nothing() -> None:
    model, (items, cu_seqlens, _) = make_model().double(), packed(mixed([1, 4, 3]))
    torch.testing.assert_close(model(items, cu_seqlens, 4), model(items, cu_seqlens, WINDOW), **EXACT)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_offsets_are_of_either_integer_type(integer: torch.dtype) -> None:
    model, (items, cu_seqlens, longest) = make_model(), packed(mixed([1, 4]))
    assert torch.equal(model(items, cu_seqlens.to(integer), longest), model(items, cu_seqlens, longest))


# What is stored


def test_what_is_stored_does_not_depend_on_the_backend() -> None:
    for kind, tables in itertools.product(KINDS, TABLES):
        shapes = [
            {name: weight.shape for name, weight in make_model(backend=backend, **kind, **tables).state_dict().items()}
            for backend in ("reference", "torch", "triton", "auto")
        ]
        assert all(each == shapes[0] for each in shapes)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3], KINDS[4], KINDS[-1]], ids=str)
def test_weights_of_one_backend_serve_another(backend: str, kind: Kind) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    wanted = make_model(**kind, backend="reference").to(DEVICE)
    found = make_model(seed=1, **kind, backend=backend).to(DEVICE)
    found.load_state_dict(wanted.state_dict())
    items, cu_seqlens, longest = packed(mixed([1, 5, WINDOW]))
    inputs = items.to(DEVICE), cu_seqlens.to(DEVICE), longest
    torch.testing.assert_close(found(*inputs), wanted(*inputs), rtol=1e-4, atol=1e-5)


def names(**changes: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(w.shape) for name, w in make_model(layers=1, **changes).state_dict().items() if "attention." in name}


def test_each_option_stores_the_tables_it_needs() -> None:
    plain = {
        "blocks.0.attention.qkv.weight": (24, 8),
        "blocks.0.attention.qkv.bias": (24,),
        "blocks.0.attention.out.weight": (8, 8),
        "blocks.0.attention.out.bias": (8,),
    }
    w_q, w_k, content, gate = (f"blocks.0.attention.{name}" for name in ("w_q", "w_k", "to_tables", "gate"))
    assert names(refinement="none", learned_gate=True) == plain
    assert names(refinement="value", learned_gate=True) == plain | {w_q: (2, WINDOW, 3), w_k: (2, WINDOW, 3)}
    assert names(per_head=False) == plain | {w_q: (WINDOW, 3), w_k: (WINDOW, 3)}
    assert names(tables="content", learned_gate=True) == plain | {content: (8, 12), gate: (2,)}


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


@pytest.mark.parametrize("backbone", BACKBONES)
def test_matched_keys_begin_at_equal_items(backbone: str) -> None:
    torch.manual_seed(0)
    model = AWRSR(AWRSRConfig(num_items=ITEMS, backbone=backbone, init="match", heads=1, refinement="none")).eval()
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
        ("table_init", "identity", ValueError),
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


def test_histories_beyond_the_window_are_refused() -> None:
    model, lists = make_model(), mixed([WINDOW + 1])
    with pytest.raises(ValueError, match=f"max_seqlen is {WINDOW + 1}, must be at most max_len={WINDOW}"):
        model(*packed(lists))
    for call in (model.forward_padded, model.scores_padded, model.weights_padded):
        with pytest.raises(ValueError, match=f"items are {WINDOW + 1} events wide, must be at most max_len={WINDOW}"):
            call(*padded(lists, WINDOW + 1))


# What is looked into


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("tables", ["position", "content"])
@pytest.mark.parametrize("kind", [*({"refinement": each} for each in REFINEMENTS["sasrec"]), *NORMED], ids=str)
def test_attention_maps_are_the_weights_that_the_model_uses(kind: Kind, tables: str, norm: str) -> None:
    """Rows sum as defined, the future has no weight, and the last block's M times its values gives the hidden states."""
    model, (history,) = make_model(**kind, tables=tables, norm=norm, learned_gate=True).double(), mixed([6])
    maps = model.attention_maps(history)
    gate = [block.attention.gate for block in model.blocks]
    assert len(maps) == 2
    for (first, refined), factor in zip(maps, gate, strict=True):
        assert first.shape == refined.shape == (2, 6, 6)
        assert torch.equal(first.triu(1), torch.zeros_like(first)) and torch.equal(refined.triu(1), torch.zeros_like(first))
        torch.testing.assert_close(first.sum(-1), torch.ones(2, 6).double(), **EXACT)
        total = 1.0 if factor is None else 1 + factor.detach()[:, None]
        torch.testing.assert_close(refined.sum(-1), torch.ones(2, 6).double() * total, **EXACT)
        assert torch.equal(first, refined) == (kind["refinement"] == "none")
    with torch.no_grad():
        items = torch.tensor([history])
        x, last = model.embed(items, model.window(items)), list(model.blocks)[-1]
        for block in list(model.blocks)[:-1]:
            x = block(x, Padded(torch.tensor([6])))
        values = last.attention.split(last.attention.qkv(last.before_attention(x)))[2][0]  # (n, H, D)
        attended = last.attention.out(torch.einsum("hij,jhd->ihd", maps[-1][1], values).flatten(-2))
        y = x[0] + attended
        if norm == "pre":
            wanted = model.norm(y + last.feedforward(last.feedforward_norm(y)))
        else:
            y = last.attention_norm(y)
            wanted = last.feedforward_norm(y + last.feedforward(y))
        torch.testing.assert_close(model(*packed([history])), wanted, **EXACT)


@pytest.mark.parametrize("tables", TABLES, ids=str)
@pytest.mark.parametrize("kind", NORMED, ids=str)
def test_without_its_norms_a_normed_layer_is_the_operator(kind: Kind, tables: dict[str, Any]) -> None:
    """In training, too: weights are dropped alike, and those of additive by one mask."""
    model = make_model(**kind, **tables, attention_dropout=0.4, hidden_dropout=0.0, learned_gate=True, layers=1).double().train()
    usual = AWRSR(dataclasses.replace(model.config, correlation_norm=False)).double().train()
    usual.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in usual.state_dict()})
    model.blocks[0].attention.query_norm = model.blocks[0].attention.key_norm = torch.nn.Identity()
    for inputs, forward in ((packed(mixed([3, 7, 1])), "forward"), (padded(mixed([3, 7, 1])), "forward_padded")):
        outs = []
        for each in (model, usual):
            torch.manual_seed(5)
            outs.append(getattr(each, forward)(*inputs))
        torch.testing.assert_close(*outs, **EXACT)


def test_additive_maps_sum_to_two() -> None:
    (_, refined), *_ = make_model(refinement="additive").attention_maps([1, 2, 3])
    torch.testing.assert_close(refined.sum(-1), torch.full((2, 3), 2.0))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_scores_are_products_with_the_item_table(backbone: str) -> None:
    model, lists = make_model(backbone=backbone).double(), make_lists(5, most=WINDOW)
    items, cu_seqlens, longest = packed(lists)
    last, table = model(items, cu_seqlens, longest)[cu_seqlens[1:].long() - 1], model.item_table()
    torch.testing.assert_close(model.scores_padded(*padded(lists)), last @ table.T, **EXACT)
    assert torch.equal(model.item_table(torch.tensor([4, 0])), table[[4, 0]])
    assert backbone == "stosa" or table is model.items.weight


def test_a_norm_is_refused_where_nothing_can_be_normed() -> None:
    for options in ({"refinement": "none"}, {"backbone": "stosa"}):
        with pytest.raises(ValueError, match="correlation_norm is True, must be False"):
            AWRSRConfig(num_items=ITEMS, correlation_norm=True, **options)


def test_distances_have_no_temperature() -> None:
    with pytest.raises(ValueError, match="temperature is 0.1, must be 0 with backbone 'stosa'"):
        AWRSRConfig(num_items=ITEMS, backbone="stosa", temperature=0.1)
