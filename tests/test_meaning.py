"""What the operator means, on every backend and regime: hand-worked values, causality, padding, packing, dropout, determinism."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from awrsr_kernels import _fallback_selection, attention_weights, refined_attention, refined_attention_varlen

from .conftest import DEVICE, ENGINES, cumulative

REFINEMENTS = ("none", "simple", "value", "additive")
Choose = Callable[[str], str]
every_engine = pytest.mark.parametrize("engine", ["reference", *ENGINES])
every_own_engine = pytest.mark.parametrize("engine", ENGINES)
every_refinement = pytest.mark.parametrize("refinement", REFINEMENTS)
every_side = pytest.mark.parametrize("side", ["left", "right"])


def inputs(length: int = 9) -> list[Tensor]:
    shapes = [(2, 2, length, 8)] * 3 + [(length, 5)] * 2
    return [torch.randn(*shape, device=DEVICE) for shape in shapes]


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
@every_refinement
def test_the_future_has_no_effect(engine: str, refinement: str, choose: Choose) -> None:
    backend = choose(engine)
    q, k, v, w_q, w_k = inputs()
    before = refined_attention(q, k, v, w_q, w_k, refinement=refinement, backend=backend)
    for x in (q, k, v):
        x[:, :, 6:] += torch.randn_like(x[:, :, 6:])
    after = refined_attention(q, k, v, w_q, w_k, refinement=refinement, backend=backend)
    torch.testing.assert_close(after[:, :, :6], before[:, :, :6])
    assert (after[:, :, 6:] - before[:, :, 6:]).abs().min() > 0


@every_engine
def test_an_entry_does_not_depend_on_its_neighbours(engine: str, choose: Choose) -> None:
    backend = choose(engine)
    q, k, v, w_q, w_k = inputs(20)
    lengths = torch.tensor([20, 7], device=DEVICE)
    both = refined_attention(q, k, v, w_q, w_k, lengths=lengths, backend=backend)
    alone = refined_attention(q[1:], k[1:], v[1:], w_q, w_k, lengths=lengths[1:], backend=backend)
    torch.testing.assert_close(both[1:], alone)


@every_engine
@every_refinement
@every_side
def test_nan_in_padding_does_not_leak(engine: str, refinement: str, side: str, choose: Choose) -> None:
    backend = choose(engine)
    lengths = torch.tensor([4, 0], device=DEVICE)  # the second entry has no item at all: every row is masked
    q, k, v, w_q, w_k = inputs()
    real = slice(5, 9) if side == "left" else slice(0, 4)
    kept = torch.zeros(2, 1, 9, 1, dtype=torch.bool, device=DEVICE)
    kept[0, :, real] = True
    q, k, v, dout = (torch.where(kept, x, math.nan).requires_grad_() for x in (q, k, v, torch.randn_like(v)))
    content = torch.where(kept, torch.randn(2, 2, 9, 5, device=DEVICE), math.nan)
    for tables in ((w_q, w_k), (content, content.flip(-1))):
        tables = [w.detach().requires_grad_() for w in tables]
        args: dict[str, Any] = {"refinement": refinement, "lengths": lengths, "padding_side": side, "backend": backend}
        out = refined_attention(q, k, v, *tables, **args)
        grads = torch.autograd.grad(out, [q, k, v, *(tables if refinement != "none" else [])], dout)
        for x in (out, *grads[:3]):
            assert torch.isfinite(x).all() and (x.masked_select(~kept) == 0).all() and (x[0, :, real] != 0).any()
        assert all(torch.isfinite(g).all() for g in grads)


@every_engine
@every_refinement
@every_side
def test_packed_equals_padded(engine: str, refinement: str, side: str, choose: Choose) -> None:
    backend = choose(engine)
    counts, window = [11, 0, 20, 1], 20
    lengths = torch.tensor(counts, device=DEVICE)
    q, k, v = (torch.randn(4, 2, window, 8, device=DEVICE) for _ in range(3))
    tables = torch.randn(2, window, 5, device=DEVICE)
    rows = [slice(window - n, window) if side == "left" else slice(0, n) for n in counts]

    def pack(x: Tensor) -> Tensor:
        return torch.cat([x[b, :, r] for b, r in enumerate(rows)], dim=1).transpose(0, 1)

    args: dict[str, Any] = {"refinement": refinement, "dropout_p": 0.3, "dropout_seed": 5, "backend": backend}
    padded = refined_attention(q, k, v, *tables, lengths=lengths, padding_side=side, **args)
    align = {"left": "right", "right": "left"}[side]  # padding on the left aligns items with the table's right end
    packed = refined_attention_varlen(pack(q), pack(k), pack(v), *tables, cumulative(counts), align=align, **args)
    torch.testing.assert_close(packed, pack(padded))


@every_own_engine
def test_neighbours_stay_hidden_from_huge_scores(engine: str, choose: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short histories share a window or a tile; one that saw another would show here."""
    monkeypatch.setattr(_fallback_selection, "_SHARING_WEIGHTS", 0)
    q, k, v = (scale * torch.randn(15, 1, 8, device=DEVICE) for scale in (1e15, 1e15, 1))
    found, wanted = (
        refined_attention_varlen(q, k, v, None, None, cumulative([4, 5, 6]), refinement="none", backend=backend)
        for backend in (choose(engine), "reference")
    )
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@every_engine
def test_nothing_to_attend_to(engine: str, choose: Choose) -> None:
    backend = choose(engine)
    w = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    for x in (torch.randn(0, 2, 4, 8, device=DEVICE), torch.randn(0, 2, 8, device=DEVICE)):
        x.requires_grad_()
        if x.dim() == 4:
            out = refined_attention(x, x, x, w, w, backend=backend)
        else:
            out = refined_attention_varlen(x, x, x, w, w, cumulative([0, 0]), backend=backend)
        dx, dw = torch.autograd.grad(out, [x, w], torch.zeros_like(out))
        assert out.shape == x.shape and dx.shape == x.shape and (dw == 0).all()


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
        out = refined_attention_varlen(pick(zero), pick(zero), pick(eye), None, None, cumulative(counts), **args)
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


def test_rows_of_the_weights_sum_to_one() -> None:
    q, k, _, w_q, w_k = inputs()
    lengths = torch.tensor([9, 3], device=DEVICE)
    for refinement, total in (("none", 1.0), ("simple", 1.0), ("value", 1.0), ("additive", 1.5)):
        gate = 0.5 if refinement == "additive" else None
        first, mixed = attention_weights(q, k, w_q, w_k, refinement=refinement, gate=gate, lengths=lengths)
        for weights, expected in ((first, 1.0), (mixed, total)):
            torch.testing.assert_close(weights[0].sum(-1), torch.full_like(weights[0, ..., 0], expected))
            assert (weights[1, :, :6] == 0).all() and (weights[1, :, :, :6] == 0).all()


@every_own_engine
@every_refinement
def test_fifty_runs_agree_bit_for_bit(engine: str, refinement: str, choose: Choose) -> None:
    interpreted = engine != "torch" and DEVICE == "cpu"
    if interpreted and refinement != "additive":
        pytest.skip("needs a GPU: minutes in the interpreter, where additive alone takes every path")
    backend = choose(engine)
    tensors = [x[..., :1, :, :].requires_grad_() if x.dim() == 4 else x.requires_grad_() for x in inputs(6 if interpreted else 30)]
    wanted = tensors if refinement != "none" else tensors[:3]
    gate = torch.ones(1, device=DEVICE, requires_grad=True) if refinement == "additive" else None
    first: list[Tensor] = []
    for _ in range(50):
        out = refined_attention(*tensors, refinement=refinement, gate=gate, dropout_p=0.2, dropout_seed=3, backend=backend)
        found = [out, *torch.autograd.grad(out.square().sum(), wanted + ([gate] if gate is not None else []))]
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
