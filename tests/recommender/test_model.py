"""The model: packed equals padded, causality, positions from the end, what is stored, what is refused, what is looked into."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from awrsr import AWRSR
from awrsr.models.attention import Padded
from awrsr_kernels.tolerance import allowed_errors

from ..conftest import DEVICE, cumulative
from .small import BACKBONES, ITEMS, KINDS, PUBLISHED, REFINEMENTS, WINDOW, make_lists, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

Kind = dict[str, Any]
MIXES = ([1], [WINDOW], [1, 1, 1], [1, WINDOW, 4], [3, 2, 5, 8, 1], [2, 2])
TABLES = ({}, {"per_head": False}, {"tables": "content"})
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
@pytest.mark.parametrize("kind", [*KINDS, PUBLISHED], ids=str)
def test_packed_equals_padded(kind: Kind, tables: dict[str, Any], lengths: list[int]) -> None:
    for norm, learned in (("pre", False), ("post", True)):
        scale = learned and kind.get("refinement") != "stochastic"
        model = make_model(**kind, norm=norm, learned_gate=learned, learned_scale=scale, **tables).double()
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
@pytest.mark.parametrize("kind", KINDS, ids=str)
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


@pytest.mark.parametrize("kind", [*KINDS, PUBLISHED, {"suffix": 3, "shift": "added", "refinement": "none"}], ids=str)
def test_the_last_rows_alone_are_those_of_all_rows(kind: Kind) -> None:
    for norm in ("pre", "post"):
        model, (items, cu_seqlens, longest) = make_model(**kind, norm=norm).double(), packed(mixed([3, WINDOW, 1, 6]))
        rows = model(items, cu_seqlens, longest)[cu_seqlens[1:] - 1]
        torch.testing.assert_close(model(items, cu_seqlens, longest, last=True), rows, **EXACT)


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


def test_histories_beyond_the_window_are_refused() -> None:
    model, lists = make_model(), mixed([WINDOW + 1])
    with pytest.raises(ValueError, match=f"max_seqlen is {WINDOW + 1}, must be at most max_len={WINDOW}"):
        model(*packed(lists))
    for call in (model.forward_padded, model.scores_padded, model.weights_padded):
        with pytest.raises(ValueError, match=f"histories have {WINDOW + 1} events, must have at most max_len={WINDOW}"):
            call(*padded(lists, WINDOW + 1))


# What is looked into


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("tables", ["position", "content"])
@pytest.mark.parametrize("kind", [{"refinement": each} for each in REFINEMENTS["sasrec"]], ids=str)
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
        where, last = Padded(torch.tensor([6])), list(model.blocks)[-1]
        x = model.embed(torch.tensor([history]), where)
        for block in list(model.blocks)[:-1]:
            x = block(x, where)
        values = last.attention.qkv(last.before_attention(x)).unflatten(-1, (3, 2, -1))[0, :, 2]  # (n, H, D)
        attended = last.attention.out(torch.einsum("hij,jhd->ihd", maps[-1][1], values).flatten(-2))
        y = x[0] + attended
        if norm == "pre":
            wanted = model.norm(y + last.feedforward(last.feedforward_norm(y)))
        else:
            y = last.attention_norm(y)
            wanted = last.feedforward_norm(y + last.feedforward(y))
        torch.testing.assert_close(model(*packed([history])), wanted, **EXACT)


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
