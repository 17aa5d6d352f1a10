"""What the operator means, on every backend: hand-worked values, causality, padding, dropout."""

import math

import pytest
import torch

from awrsr_kernels import attention_weights, refined_attention

from .conftest import DEVICE

REFINEMENTS = ("none", "simple", "value", "additive")
BACKENDS = ("reference", "torch", "triton")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_refinement = pytest.mark.parametrize("refinement", REFINEMENTS)


def inputs(length: int = 9) -> list[torch.Tensor]:
    shapes = [(2, 2, length, 8)] * 3 + [(length, 5)] * 2
    return [torch.randn(*shape, device=DEVICE) for shape in shapes]


@every_backend
def test_three_positions_worked_by_hand(backend: str) -> None:
    # All scores are 0, so row i of P is uniform over its past; W_q = W_k = (3, 0, 0): Q_A = K_A = (3, 3/2, 1).
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


@every_backend
@every_refinement
def test_the_future_has_no_effect(backend: str, refinement: str) -> None:
    q, k, v, w_q, w_k = inputs()
    before = refined_attention(q, k, v, w_q, w_k, refinement=refinement, backend=backend)
    for x in (q, k, v):
        x[:, :, 6:] += torch.randn_like(x[:, :, 6:])
    after = refined_attention(q, k, v, w_q, w_k, refinement=refinement, backend=backend)
    torch.testing.assert_close(after[:, :, :6], before[:, :, :6])
    assert (after[:, :, 6:] - before[:, :, 6:]).abs().min() > 0


@every_backend
@every_refinement
@pytest.mark.parametrize("side", ["left", "right"])
def test_nan_in_padding_does_not_leak(backend: str, refinement: str, side: str) -> None:
    lengths = torch.tensor([4, 0], device=DEVICE)
    q, k, v, w_q, w_k = inputs()
    real = slice(5, 9) if side == "left" else slice(0, 4)
    kept = torch.zeros(2, 1, 9, 1, dtype=torch.bool, device=DEVICE)
    kept[0, :, real] = True
    q, k, v, dout = (torch.where(kept, x, math.nan).requires_grad_() for x in (q, k, v, torch.randn_like(v)))
    tables = [w.requires_grad_() for w in (w_q, w_k)] if refinement != "none" else []
    args = {"refinement": refinement, "lengths": lengths, "padding_side": side, "backend": backend}
    out = refined_attention(q, k, v, w_q, w_k, **args)
    grads = torch.autograd.grad(out, [q, k, v, *tables], dout)
    for x in (out, *grads[:3]):
        assert torch.isfinite(x).all() and (x.masked_select(~kept) == 0).all() and (x[0, :, real] != 0).any()
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("causal", [True, False])
def test_dropout_draws_the_reference_bits(backend: str, causal: bool) -> None:
    q, k, v, w_q, w_k = inputs(20)
    args = {"refinement": "additive", "causal": causal, "dropout_p": 0.4, "dropout_seed": -123456789012345}
    expected = refined_attention(q, k, v, w_q, w_k, backend="reference", **args)
    torch.testing.assert_close(refined_attention(q, k, v, w_q, w_k, backend=backend, **args), expected, rtol=1e-4, atol=1e-4)
    plain = refined_attention(q, k, v, w_q, w_k, refinement="additive", causal=causal, backend=backend)
    assert not torch.allclose(plain, expected, atol=1e-2)


@every_backend
def test_dropout_rate_and_scale(backend: str) -> None:
    # Uniform weights over identity values: the output holds Z / L itself.
    zero = torch.zeros(4, 4, 64, 1, device=DEVICE)
    eye = torch.eye(64, device=DEVICE).expand(4, 4, 64, 64)
    mask = 64 * refined_attention(
        zero, zero, eye, None, None, refinement="none", causal=False, dropout_p=0.3, dropout_seed=1, backend=backend
    )
    values = mask.round(decimals=3).unique().tolist()
    assert values == pytest.approx([0.0, 1 / 0.7], abs=2e-3)
    assert (mask > 0).float().mean().item() == pytest.approx(0.7, abs=0.01)  # 5 deviations of 65,536 draws


def test_rows_of_the_weights_sum_to_one() -> None:
    q, k, _, w_q, w_k = inputs()
    lengths = torch.tensor([9, 3], device=DEVICE)
    for refinement, total in (("none", 1.0), ("simple", 1.0), ("value", 1.0), ("additive", 1.5)):
        gate = 0.5 if refinement == "additive" else None
        first, mixed = attention_weights(q, k, w_q, w_k, refinement=refinement, gate=gate, lengths=lengths)
        for weights, expected in ((first, 1.0), (mixed, total)):
            torch.testing.assert_close(weights[0].sum(-1), torch.full_like(weights[0, ..., 0], expected))
            assert (weights[1, :, :6] == 0).all() and (weights[1, :, :, :6] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_repeat_bitwise(backend: str) -> None:
    tensors = [x.requires_grad_() for x in inputs()]
    first = None
    for _ in range(5):
        out = refined_attention(*tensors, refinement="value", dropout_p=0.2, dropout_seed=3, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        first = first or grads
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))
