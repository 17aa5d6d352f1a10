"""What the operator means, on every backend and regime: hand-worked values, causality, padding, packing, dropout, determinism."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from awrsr_kernels import refined_attention, refined_attention_varlen
from awrsr_kernels.wasserstein import SMALLEST

from ..conftest import DEVICE, ENGINES, cumulative
from .problems import GAUSSIANS, KINDS, Kind

Choose = Callable[[str], str]
every_engine = pytest.mark.parametrize("engine", ["reference", *ENGINES])
every_own_engine = pytest.mark.parametrize("engine", ENGINES)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
every_gaussian_kind = pytest.mark.parametrize("kind", GAUSSIANS, ids=str)
one_of_either = pytest.mark.parametrize("kind", [Kind("simple"), Kind("stochastic", True)], ids=str)
every_side = pytest.mark.parametrize("side", ["left", "right"])


@every_engine
def test_three_positions_worked_by_hand(engine: str, choose: Choose) -> None:
    # All scores are 0, so row i of P is uniform over its past; W_q = W_k = (3, 0, 0): Q_A = K_A = (3, 3/2, 1).
    backend = choose(engine)
    zero = torch.zeros(1, 1, 3, 1, device=DEVICE)
    v = torch.tensor([1.0, 2.0, 4.0], device=DEVICE).view(1, 1, 3, 1)
    w = torch.tensor([3.0, 0.0, 0.0], device=DEVICE).view(3, 1)
    e = [math.exp(3 * 1.5), math.exp(1.5 * 1.5), math.exp(3), math.exp(1.5), math.exp(1)]
    simple = [1.0, (e[0] + 2 * e[1]) / (e[0] + e[1]), (e[2] + 2 * e[3] + 4 * e[4]) / (e[2] + e[3] + e[4])]
    plain = [1.0, 1.5, 7 / 3]
    value = [1.0, (e[0] + 1.5 * e[1]) / (e[0] + e[1]), (e[2] + 1.5 * e[3] + 7 / 3 * e[4]) / (e[2] + e[3] + e[4])]
    wanted = {"none": plain, "simple": simple, "value": value, "additive": [a + b for a, b in zip(plain, simple, strict=True)]}
    for refinement, rows in wanted.items():
        out = refined_attention(zero, zero, v, w, w, refinement=refinement, backend=backend)
        torch.testing.assert_close(out.flatten().cpu(), torch.tensor(rows), rtol=1e-5, atol=1e-5)


@every_engine
@pytest.mark.parametrize("kind", [Kind("stochastic", True)], ids=str)
def test_three_gaussians_worked_by_hand(engine: str, kind: Kind, choose: Choose) -> None:
    # All distances are 0, so row i of P is uniform over its past; W_q = W_k = (3, 0, 0) for means and covariances:
    # correlations lie at a = (3, 3/2, 1), their covariances are ELU(a) + 1 = a + 1.
    zero = torch.zeros(1, 1, 3, 1, device=DEVICE)
    mean, cov, a = zero + 2, zero + 3, [3.0, 1.5, 1.0]
    v_mean, v_cov = torch.tensor([1.0, 2.0, 4.0], device=DEVICE).view(1, 1, 3, 1), torch.tensor([8.0, 4.0, 2.0], device=DEVICE)
    w = torch.tensor([3.0, 0.0, 0.0], device=DEVICE).view(3, 1)
    outs = kind.call(
        q_mean=mean, q_cov=cov, k_mean=mean, k_cov=cov, v_mean=v_mean, v_cov=v_cov.view(1, 1, 3, 1),
        w_q=w, w_k=w, w_q_cov=w, w_k_cov=w, backend=choose(engine),
    )  # fmt: skip
    for i in range(3):
        e = [math.exp(-((a[i] - x) ** 2) - (math.sqrt(a[i] + 1) - math.sqrt(x + 1)) ** 2) for x in a[: i + 1]]
        weights = [x / sum(e) for x in e]
        mean_of_row, cov_of_row = (sum(x * y for x, y in zip(*pair, strict=False)) for pair in (
            (weights, v_mean.flatten().tolist()), ([x * x for x in weights], v_cov.tolist())
        ))  # fmt: skip
        assert outs["out_mean"][0, 0, i, 0].item() == pytest.approx(mean_of_row, rel=1e-5)
        assert outs["out_cov"][0, 0, i, 0].item() == pytest.approx(cov_of_row, rel=1e-5)


def test_scores_are_wasserstein_distances() -> None:
    gaussians = {"mean": torch.tensor([[0.0], [1.0]]), "cov": torch.tensor([[1.0], [4.0]])}  # 1 + (2 - 1)^2 apart
    given = {f"{name}_{part}": x[None, None] for name in "qk" for part, x in gaussians.items()}
    first, _ = Kind("none", True).weights(**given, causal=False)
    far = 1 / (1 + math.exp(2))
    torch.testing.assert_close(first[0, 0], torch.tensor([[1 - far, far], [far, 1 - far]]))
    equal = {name: torch.full((1, 1, 4, 3), 0.7) for name in given}
    first, _ = Kind("none", True).weights(**equal, causal=False)
    torch.testing.assert_close(first, torch.full((1, 1, 4, 4), 0.25))


@every_engine
@every_gaussian_kind
def test_small_covariances_are_read_as_the_smallest(engine: str, kind: Kind, choose: Choose) -> None:
    """And get no gradient; covariances of values are taken as they are."""
    backend, given = choose(engine), kind.draw((1, 2, 9, 4), (9, 3))
    few = torch.tensor([0.0, -3.0, 1e-30, SMALLEST / 2, SMALLEST, SMALLEST * 2], device=DEVICE)
    for name, first in (("q_cov", 1), ("k_cov", 2), ("v_cov", 3)):
        given[name][0, :, first : first + 6, 1] = few
    raised = {name: x.clamp(min=SMALLEST) if name in ("q_cov", "k_cov") else x for name, x in given.items()}
    leaves = [x.requires_grad_() for x in given.values()]
    outs, expected = kind.call(**given, backend=backend), kind.call(**raised, backend=backend)
    assert all(torch.equal(outs[name], expected[name]) for name in outs)
    found = torch.autograd.grad(sum(out.square().sum() for out in outs.values()), leaves)
    grads = dict(zip(given, found, strict=True))
    assert all(torch.isfinite(g).all() for g in grads.values())
    for name in ("q_cov", "k_cov"):
        small = given[name] <= SMALLEST
        assert small.sum() == 10 and (grads[name][small] == 0).all() and (grads[name][~small] != 0).any()


@every_engine
@pytest.mark.parametrize("kind", [Kind("stochastic", True)], ids=str)
@pytest.mark.parametrize("table", [-1000.0, -60.0, 0.0])
def test_covariances_of_correlations_may_vanish(engine: str, kind: Kind, table: float, choose: Choose) -> None:
    """ELU + 1 of what lies far below 0 is 0 in float32; at 0 its two sides meet."""
    given = kind.draw((1, 2, 9, 4), (9, 3))
    given |= {name: torch.full((9, 3), table, device=DEVICE) for name in ("w_q_cov", "w_k_cov")}
    results = []
    for backend in (choose(engine), "reference"):
        leaves = [x.detach().requires_grad_() for x in given.values()]
        outs = list(kind.call(**dict(zip(given, leaves, strict=True)), backend=backend).values())
        results.append([*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)])
    for found, expected in zip(*results, strict=True):
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@every_engine
@every_kind
def test_the_future_has_no_effect(engine: str, kind: Kind, choose: Choose) -> None:
    backend = choose(engine)
    given = kind.draw((2, 2, 9, 8), (9, 5))
    before = kind.call(**given, backend=backend)
    for name in kind.items:
        given[name][:, :, 6:] += torch.rand_like(given[name][:, :, 6:])
    after = kind.call(**given, backend=backend)
    for name in before:
        torch.testing.assert_close(after[name][:, :, :6], before[name][:, :, :6])
        assert (after[name][:, :, 6:] - before[name][:, :, 6:]).abs().min() > 0


@every_engine
@one_of_either
def test_an_entry_does_not_depend_on_its_neighbours(engine: str, kind: Kind, choose: Choose) -> None:
    backend = choose(engine)
    given = kind.draw((2, 2, 20, 8), (20, 5))
    lengths = torch.tensor([20, 7], device=DEVICE)
    both = kind.call(**given, lengths=lengths, backend=backend)
    second = {name: x[1:] if name in kind.items else x for name, x in given.items()}
    alone = kind.call(**second, lengths=lengths[1:], backend=backend)
    for name in both:
        torch.testing.assert_close(both[name][1:], alone[name])


@every_engine
@every_kind
@every_side
def test_nan_in_padding_does_not_leak(engine: str, kind: Kind, side: str, choose: Choose) -> None:
    backend = choose(engine)
    lengths = torch.tensor([4, 0], device=DEVICE)  # the second entry has no item at all: every row is masked
    real = slice(5, 9) if side == "left" else slice(0, 4)
    kept = torch.zeros(2, 1, 9, 1, dtype=torch.bool, device=DEVICE)
    kept[0, :, real] = True
    for nowhere, tables in ((math.nan, (9, 5)), (math.nan, (2, 2, 9, 5)), (math.inf, (2, 2, 9, 5))):
        given = kind.draw((2, 2, 9, 8), tables)
        given = {name: torch.where(kept, x, nowhere) if x.dim() == 4 else x for name, x in given.items()}
        leaves = [x.requires_grad_() for x in given.values()]
        outs = kind.call(**given, lengths=lengths, padding_side=side, backend=backend)
        douts = [torch.where(kept, torch.randn_like(out), nowhere) for out in outs.values()]
        grads = dict(zip(given, torch.autograd.grad(list(outs.values()), leaves, douts), strict=True))
        for name, x in (outs | grads).items():
            assert torch.isfinite(x).all() and (x != 0).any(), name
            if x.dim() == 4:
                assert (x.masked_select(~kept) == 0).all() and (x[0, :, real] != 0).any(), name


@pytest.mark.parametrize("engine", ["reference", "short", "resident", "tiled"])
@pytest.mark.parametrize("refinement", ["none", "simple", "additive"])
def test_later_queries_and_keys_reach_no_earlier_item_even_as_nan(engine: str, refinement: str, choose: Choose) -> None:
    """docs/support.md says what a NaN reaches elsewhere."""
    options: dict[str, Any] = {"backend": choose(engine)} | ({} if engine == "resident" else {"shift": True})
    kind = Kind(refinement)
    options |= {"lags": [0.5]} if kind.tables and engine in ("reference", "tiled") else {}
    given = kind.draw((2, 2, 20, 8), (20, 5))
    expected = kind.call(**given, **options)["out"]
    for name, value in itertools.product(("q", "k"), (math.nan, math.inf, -math.inf)):
        changed = {n: x.clone() for n, x in given.items()}
        changed[name][:, :, 17:, 3] = value
        found = kind.call(**changed, **options)["out"]
        assert torch.equal(found[:, :, :17], expected[:, :, :17]) and not found[:, :, 17:].isfinite().all()


@every_engine
@every_kind
@every_side
def test_packed_equals_padded(engine: str, kind: Kind, side: str, choose: Choose) -> None:
    backend = choose(engine)
    counts, window = [11, 0, 20, 1], 20
    lengths = torch.tensor(counts, device=DEVICE)
    given = kind.draw((4, 2, window, 8), (window, 5))
    rows = [slice(window - n, window) if side == "left" else slice(0, n) for n in counts]

    def pack(x: Tensor) -> Tensor:
        return torch.cat([x[b, :, r] for b, r in enumerate(rows)], dim=1).transpose(0, 1)

    args: dict[str, Any] = {"dropout_p": 0.3, "dropout_seed": 5, "backend": backend}
    padded = kind.call(**given, lengths=lengths, padding_side=side, **args)
    align = {"left": "right", "right": "left"}[side]  # padding on the left aligns items with the table's right end
    given = {name: pack(x) if name in kind.items else x for name, x in given.items()}
    packed = kind.call(**given, cu_seqlens=cumulative(counts), align=align, **args)
    for name in padded:
        torch.testing.assert_close(packed[name], pack(padded[name]))


def with_gradients(kind: Kind, given: dict[str, Any], backend: str) -> list[Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if name in (*kind.items, *kind.tables)}
    outs = list(kind.call(**given | leaves, backend=backend).values())
    return [*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), list(leaves.values()))]


@pytest.mark.parametrize("engine", [*ENGINES, "mixed"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_lengths_may_lie_anywhere_in_memory(engine: str, packed: bool, choose: Choose) -> None:
    """A column of a table of numbers, or one number for all."""
    lengths, backend = [4, 0, 7, 4], choose(engine)
    bounds = [cumulative(lengths).long(), cumulative([5, 5, 5]).long()] if packed else [torch.tensor(lengths, device=DEVICE)]
    strided = [torch.stack([x + 1, x, -x], 1)[:, 1] for x in bounds]
    kind, name = Kind("simple"), "cu_seqlens" if packed else "lengths"
    pairs = [(kind.draw((15, 2, 8) if packed else (4, 2, 9, 8), (9, 3)), x, y) for x, y in zip(bounds, strided, strict=True)]
    if not packed:
        pairs.append((pairs[0][0], torch.full((4,), 5, device=DEVICE), torch.tensor([5], device=DEVICE).expand(4)))
    for given, plain, odd in pairs:
        wanted, found = (with_gradients(kind, given | {name: each}, backend) for each in (plain, odd))
        assert odd.stride() != plain.stride() and all(map(torch.equal, wanted, found))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_forward_without_a_backward_gives_the_same(
    engine: str, kind: Kind, choose: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels then leave out what the backward alone needs."""
    given = kind.draw((2, 2, 20, 8), (20, 3), torch.float16) | {"lengths": torch.tensor([20, 11], device=DEVICE), "dropout_p": 0.2}
    backend, made = choose(engine), []
    if engine in ("resident", "tiled"):
        from awrsr_kernels._triton.problem import Problem

        monkeypatch.setattr(Problem, "buffers", lambda *a, make=Problem.buffers: made.append(make(*a)) or made[-1])
    alone = kind.call(**given, dropout_seed=3, backend=backend)
    leaves = {name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in given.items()}
    beside = kind.call(**leaves, dropout_seed=3, backend=backend)
    assert all(torch.equal(x, beside[name]) and beside[name].requires_grad and not x.requires_grad for name, x in alone.items())
    if made and not kind.stochastic and engine == "resident":
        without, with_backward = map(set, made)
        come_back = [*["k_a"] * bool(kind.tables), *["first_values"] * (kind.refinement == "value")]
        assert without == {"out", *come_back}
        assert with_backward > without


@every_own_engine
def test_neighbours_stay_hidden_from_huge_scores(engine: str, choose: Choose) -> None:
    """Short histories share a window or a tile; one that saw another would show here."""
    q, k, v = (scale * torch.randn(15, 1, 8, device=DEVICE) for scale in (1e15, 1e15, 1))
    found, wanted = (
        refined_attention_varlen(q, k, v, None, None, cumulative([4, 5, 6]), refinement="none", backend=backend)
        for backend in (choose(engine), "reference")
    )
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@every_engine
@one_of_either
def test_nothing_to_attend_to(engine: str, kind: Kind, choose: Choose) -> None:
    backend = choose(engine)
    for shape, bounds in (((0, 2, 4, 8), {}), ((0, 2, 8), {"cu_seqlens": cumulative([0, 0])})):
        given = kind.draw(shape, (4, 3))
        leaves = [x.requires_grad_() for x in given.values()]
        outs = list(kind.call(**given, **bounds, backend=backend).values())
        grads = torch.autograd.grad(outs, leaves, [torch.zeros_like(out) for out in outs])
        assert all(x.shape == shape for x in (*outs, *grads[: len(kind.items)]))
        assert all((g == 0).all() for g in grads)


def dropout_mask(backend: str, layout: str, counts: list[int], seed: int) -> list[Tensor]:
    """(H, n, n) Z of each sequence: with equal weights and one-hot values the output of "none" shows it."""
    window, heads = max(counts), 3
    zero = torch.zeros(len(counts), heads, window, 1, device=DEVICE)
    args: dict[str, Any] = {"refinement": "none", "causal": False, "dropout_p": 0.3, "dropout_seed": seed, "backend": backend}
    first = [window - n if layout == "left" else 0 for n in counts]
    eye = torch.zeros(len(counts), heads, window, window, device=DEVICE)
    for b, n in enumerate(counts):
        eye[b, :, first[b] : first[b] + n, :n] = torch.eye(n, device=DEVICE)
    if layout == "packed":
        rows = [(b, i) for b, n in enumerate(counts) for i in range(n)]
        pick = lambda x: torch.stack([x[b, :, i] for b, i in rows])  # noqa: E731
        out = refined_attention_varlen(pick(zero), pick(zero), pick(eye), None, None, cumulative(counts), window, **args)
        parts = [part.transpose(0, 1) for part in out.split(counts)]
    else:
        lengths = torch.tensor(counts, device=DEVICE)
        out = refined_attention(zero, zero, eye, None, None, lengths=lengths, padding_side=layout, **args)
        parts = [out[b, :, first[b] : first[b] + n] for b, n in enumerate(counts)]
    return [n * part[..., :n] for part, n in zip(parts, counts, strict=True)]


@every_engine
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
def test_dropout_bits_are_the_same_everywhere(engine: str, layout: str, choose: Choose) -> None:
    counts, seed = [32 if engine == "short" else 48, 17, 5], -123456789012345
    wanted = [mask > 0 for mask in dropout_mask("reference", "left", counts, seed)]
    assert 0.6 < wanted[0].float().mean() < 0.8 and not torch.equal(wanted[0][0], wanted[0][1])
    for mask, bits in zip(dropout_mask(choose(engine), layout, counts, seed), wanted, strict=True):
        assert torch.equal(mask > 0, bits)


@every_engine
def test_almost_everything_dropped_is_finite_in_half_precision(engine: str, choose: Choose) -> None:
    q = torch.randn(1, 2, 40, 8, device=DEVICE, dtype=torch.float16).div(64)
    out = refined_attention(q, q, q, None, None, refinement="none", dropout_p=1 - 1e-9, dropout_seed=6, backend=choose(engine))
    assert out.isfinite().all() and out.any()


@every_engine
def test_dropout_rate_and_scale(engine: str, choose: Choose) -> None:
    masks = dropout_mask(choose(engine), "left", [32] * 24, seed=1)
    kept = torch.cat([mask.flatten() for mask in masks])
    assert kept.round(decimals=3).unique().tolist() == pytest.approx([0.0, 1 / 0.7], abs=2e-3)
    assert (kept > 0).float().mean().item() == pytest.approx(0.7, abs=0.009)  # 5 deviations of 73,728 draws


@every_own_engine
def test_dropout_follows_the_global_seed(engine: str, choose: Choose) -> None:
    backend = choose(engine)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        q, k, v, w_q, w_k = (torch.ones(1, 1, 16, 4, device=DEVICE) for _ in range(5))
        found.append(refined_attention(q, k, v, w_q[0, 0], w_k[0, 0], dropout_p=0.5, backend=backend))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@every_engine
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_keeps_the_gradients(engine: str, reentrant: bool, choose: Choose) -> None:
    backend, tensors = choose(engine), [torch.randn(2, 2, 9, 4, device=DEVICE, requires_grad=True) for _ in range(5)]

    def call(*tensors: Tensor) -> Tensor:
        return refined_attention(*tensors, refinement="value", dropout_p=0.3, backend=backend)

    found = []
    for run in (call, lambda *tensors: checkpoint(call, *tensors, use_reentrant=reentrant)):
        torch.manual_seed(1)
        run(*tensors).sin().sum().backward()
        found.append([x.grad for x in tensors])
        for x in tensors:
            x.grad = None
    assert all(map(torch.equal, *found))


@every_kind
def test_rows_of_the_weights_sum_to_one(kind: Kind) -> None:
    given = kind.draw((2, 2, 9, 8), (9, 5))
    lengths, gate, total = torch.tensor([9, 3], device=DEVICE), None, 1.0
    if kind.refinement == "additive":
        gate, total = 0.5, 1.5
    first, mixed = kind.weights(**given, gate=gate, lengths=lengths)
    for weights, expected in ((first, 1.0), (mixed, total)):
        torch.testing.assert_close(weights[0].sum(-1), torch.full_like(weights[0, ..., 0], expected))
        assert (weights[1, :, :6] == 0).all() and (weights[1, :, :, :6] == 0).all()


@every_own_engine
@every_kind
def test_many_runs_agree_bit_for_bit(engine: str, kind: Kind, choose: Choose) -> None:
    interpreted = engine != "torch" and DEVICE == "cpu"
    if interpreted and kind.refinement != "additive":
        pytest.skip("needs a GPU: minutes in the interpreter, where additive alone takes every path")
    backend, length = choose(engine), 6 if interpreted else 30
    given = kind.draw((2, 1, length, 8), (length, 5))
    given |= {"gate": torch.ones(1, device=DEVICE)} if kind.refinement == "additive" else {}
    leaves = [x.requires_grad_() for x in given.values()]
    first: list[Tensor] = []
    for _ in range(12 if interpreted else 50):
        outs = list(kind.call(**given, dropout_p=0.2, dropout_seed=3, backend=backend).values())
        found = [*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


@every_own_engine
def test_more_heads_than_a_grid_dimension_holds(engine: str, choose: Choose) -> None:
    if engine != "torch" and DEVICE == "cpu":
        pytest.skip("needs a GPU: 65,537 interpreted programs take minutes")
    backend = choose(engine)
    q, k, v = (torch.randn(65_537, 1, 2, 4, device=DEVICE, requires_grad=True) for _ in range(3))
    w = torch.randn(2, 3, device=DEVICE, requires_grad=True)
    found, expected = (refined_attention(q, k, v, w, w, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(out.sum(), [q, w]) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


def many_zeros(count: int) -> Tensor:
    if DEVICE == "cpu":  # they take no memory until they are written
        return torch.from_numpy(np.zeros(count, dtype=np.float16))
    return torch.zeros(count, dtype=torch.float16, device=DEVICE)


@every_own_engine
def test_offsets_beyond_two_to_the_31(engine: str, choose: Choose) -> None:
    backend = choose(engine)
    far = 2**31 + 8
    flat = many_zeros(far + 1024)
    big = flat.as_strided((2, 1, 5, 8), (far, 40, 8, 1))
    big.copy_(torch.randn(2, 1, 5, 8))
    w = torch.randn(5, 3, device=DEVICE, dtype=torch.float16)
    small = big.clone(memory_format=torch.contiguous_format)
    found, expected = (refined_attention(x, x, x, w, w, backend=backend) for x in (big, small))
    assert torch.equal(found, expected) and (found[1] != 0).any()


@pytest.mark.parametrize("engine", [*ENGINES, "mixed"])
def test_rows_beyond_two_to_the_31(engine: str, choose: Choose) -> None:
    """Time-major memory, padded on the left: the items of a short history are rows whose offsets int32 cannot count."""
    backend, length, far = choose(engine), 40, 1 << 26
    big = many_zeros(length * far + 1024).as_strided((2, 1, length, 8), (8, 8, far, 1))
    big.copy_(torch.randn(2, 1, length, 8))
    lengths = torch.tensor([5, 3], device=DEVICE)
    w = torch.randn(length, 3, device=DEVICE, dtype=torch.float16)
    small = big.clone(memory_format=torch.contiguous_format)
    found, expected = (refined_attention(x, x, x, w, w, lengths=lengths, backend=backend) for x in (big, small))
    assert torch.equal(found, expected) and (found[1] != 0).any()
