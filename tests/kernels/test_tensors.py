"""Tensors of every kind that torch can make: negated or zero without memory, made in inference mode, changed in place, without
values or recorded; and numbers of NumPy's and in tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from awrsr_kernels import (
    RefinedCache,
    RefinedMultiheadAttention,
    attention_weights,
    refined_attention,
    refined_attention_prefill,
    refined_attention_step,
    refined_attention_varlen,
)

from ..conftest import DEVICE, ENGINES
from .modules import STOCHASTIC, draw, gradients, summed
from .problems import Kind

LAYOUTS = pytest.mark.parametrize("layout", ["plain", "lengths", "packed"])
every_engine = pytest.mark.parametrize("engine", [*ENGINES, "reference"])


def negated(x: Tensor) -> Tensor:
    """-x as a view that torch negates when it reads it."""
    view = torch.complex(torch.zeros_like(x), x).conj().imag
    assert view.is_neg() and torch.equal(view, -x)
    return view


def close(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every_engine
@pytest.mark.parametrize("kind", [Kind("additive"), Kind("value"), STOCHASTIC], ids=str)
def test_views_that_torch_negates_are_read_with_their_sign(engine: str, kind: Kind, choose: Callable[[str], str]) -> None:
    """Also in one column, where no copy is needed for the layout."""
    backend = choose(engine)
    sizes = {name: 1 for name in (*kind.items, *kind.tables)}
    given = {name: torch.randn(*([2, 2] if name in kind.items else []), 6, size, device=DEVICE) for name, size in sizes.items()}
    if kind.refinement == "additive":
        given["gate"] = torch.rand(2, device=DEVICE)
    signs = {name: x if name.endswith("cov") and name in kind.items else -x for name, x in given.items()}
    signs = {name: x.abs() + 0.1 if name in kind.items and name.endswith("cov") else x for name, x in signs.items()}
    views = {name: negated(-x) for name, x in signs.items()}
    close(kind.call(**views, backend=backend).values(), kind.call(**signs, backend="reference").values())


@every_engine
def test_gradients_that_torch_negates_arrive_with_their_sign(engine: str, choose: Callable[[str], str]) -> None:
    backend = choose(engine)
    given = {name: torch.randn(2, 2, 6, 1, device=DEVICE, requires_grad=True) for name in ("q", "k", "v")}
    given |= {name: torch.randn(6, 1, device=DEVICE, requires_grad=True) for name in ("w_q", "w_k")}
    dout = torch.randn(2, 2, 6, 1, device=DEVICE)
    for _ in range(4):  # of which the kernels plan the later ones
        found = torch.autograd.grad(refined_attention(**given, backend=backend), list(given.values()), negated(dout))
        wanted = torch.autograd.grad(refined_attention(**given, backend="reference"), list(given.values()), -dout)
        close(found, wanted)
    loss = torch.complex(refined_attention(**given, backend=backend), dout).conj().imag.sum()  # its gradient has no memory
    assert not any(x.count_nonzero() for x in torch.autograd.grad(loss, list(given.values()), allow_unused=True) if x is not None)


@every_engine
def test_zeros_without_memory_are_zeros(engine: str, choose: Callable[[str], str]) -> None:
    backend, w = choose(engine), torch.randn(6, 4, device=DEVICE)
    q, v = torch.randn(2, 2, 6, 4, device=DEVICE, requires_grad=True), torch.randn(2, 2, 6, 4, device=DEVICE)
    nothing = torch._efficientzerotensor((2, 2, 6, 4), device=DEVICE)
    close([refined_attention(nothing, v, v, w, w, backend=backend)], [refined_attention(v * 0, v, v, w, w, backend="reference")])
    (dq,) = torch.autograd.grad(refined_attention(q, v, v, w, w, backend=backend), q, nothing)
    assert not dq.count_nonzero()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_step_of_decoding_reads_negated_views(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    given = [torch.randn(2, 2, 1, 1, device=DEVICE) for _ in range(5)]
    outs = []
    for tensors in (given, [negated(-x) for x in given]):
        cache = RefinedCache(2, 4, heads=2, kv_heads=2, head_dim=1, rank=1, refinement="simple", tables="content", device=DEVICE)
        outs.append([refined_attention_step(*tensors, cache, backend=backend) for _ in range(2)])
    close(*outs)


@every_engine
@LAYOUTS
def test_lengths_made_in_inference_mode_serve_a_backward(engine: str, layout: str, choose: Callable[[str], str]) -> None:
    backend = choose(engine)
    given, bounds = draw(Kind("simple"), layout)
    wanted = gradients(summed(Kind("simple"), given, **bounds, backend="reference"), given)
    with torch.inference_mode():
        bounds = {name: x.clone() for name, x in bounds.items()}
        seed = torch.tensor(3, device=DEVICE)
    for _ in range(4):
        close(gradients(summed(Kind("simple"), given, **bounds, backend=backend), given), wanted)
    gradients(summed(Kind("simple"), given, **bounds, dropout_p=0.5, dropout_seed=seed, backend=backend), given)


@every_engine
@LAYOUTS
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kind", [Kind("none"), Kind("value"), STOCHASTIC], ids=str)
def test_results_can_be_changed_in_place(
    kind: Kind, engine: str, layout: str, recorded: bool, choose: Callable[[str], str]
) -> None:
    """As those of any operation; where the backward needs the result itself, torch says so."""
    backend, weight = choose(engine), torch.randn((), device=DEVICE, requires_grad=True)
    given, bounds = draw(kind, layout)
    for _ in range(3):
        with torch.set_grad_enabled(recorded):
            outs = list(kind.call(**given, **bounds, backend=backend).values())
        wanted = [out.detach() + weight.detach() for out in outs]
        for out in outs:
            out += weight  # with a gradient, whatever the call had
        assert all(map(torch.equal, outs, wanted))
        loss = sum((out.sum() for out in outs), torch.zeros((), device=DEVICE))
        assert torch.autograd.grad(loss, weight, retain_graph=True)[0] == sum(out.numel() for out in outs)
        if recorded and engine in ("torch", "short", "reference"):
            gradients(loss, given)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_results_of_decoding_can_be_changed_in_place(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    given, weight = [torch.randn(2, 2, 3, 8, device=DEVICE) for _ in range(5)], torch.randn((), requires_grad=True, device=DEVICE)
    cache = RefinedCache(2, 4, heads=2, kv_heads=2, head_dim=8, rank=8, refinement="value", tables="content", device=DEVICE)
    outs = [refined_attention_prefill(*given, cache, backend=backend)]
    outs += [refined_attention_step(*(x[:, :, :1] for x in given), cache, backend=backend) for _ in range(4)]
    for out in outs:
        out += weight  # a gradient for what decoding itself has none of
    assert torch.autograd.grad(sum((out.sum() for out in outs), torch.zeros(())), weight)[0] == sum(out.numel() for out in outs)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("lengths", [None, [3, 1]])
def test_decoding_without_values_has_shapes(lengths: list[int] | None, backend: str) -> None:
    with FakeTensorMode(), torch.no_grad():
        x, w = torch.randn(2, 2, 3, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
        cache = RefinedCache(2, 4, heads=2, kv_heads=2, head_dim=8, rank=8, refinement="value", tables="position", device=DEVICE)
        given = None if lengths is None else torch.tensor(lengths, device=DEVICE)
        assert refined_attention_prefill(x, x, x, w, w, cache, lengths=given, backend=backend).shape == x.shape
        x = x[:, :, :1]
        assert refined_attention_step(x, x, x, w, w, cache, backend=backend).shape == x.shape


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("kind", [Kind("none"), Kind("additive"), STOCHASTIC], ids=str)
@LAYOUTS
def test_tensors_without_values_have_shapes(kind: Kind, layout: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    with FakeTensorMode():
        given, bounds = draw(kind, layout)
        longest: dict[str, Any] = {"max_seqlen": 6} if layout == "packed" else {}
        outs = kind.call(**given, **bounds, **longest, backend=backend).values()
        assert [out.shape for out in outs] == [given[kind.items[-1]].shape] * len(outs)
        loss = sum((out.sum() for out in outs), torch.zeros((), device=DEVICE))
        assert [x.shape for x in gradients(loss, given)] == [x.shape for x in given.values()]


def test_a_module_without_values_has_shapes() -> None:
    with FakeTensorMode():
        module = RefinedMultiheadAttention(16, 2, max_len=8, device=DEVICE)
        x, real = torch.randn(3, 6, 16, device=DEVICE), torch.tensor([6, 2, 0], device=DEVICE)
        assert module(x, lengths=real).shape == x.shape
        assert module(x, key_padding_mask=torch.zeros(3, 6, dtype=torch.bool, device=DEVICE)).shape == x.shape
        assert module(x.flatten(0, 1), cu_seqlens=torch.arange(0, 24, 6, device=DEVICE), max_seqlen=6).shape == (18, 16)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@LAYOUTS
def test_recorded_programs_serve_other_lengths(layout: str, backend: str, mode: Any) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton")
    kind = Kind("simple")
    given, bounds = draw(kind, layout)
    longest: dict[str, Any] = {"max_seqlen": 6} if layout == "packed" else {}
    values = {name: x.detach() for name, x in given.items()} | bounds

    def function(values: dict[str, Tensor]) -> Tensor:
        return next(iter(kind.call(**values, **longest, backend=backend).values()))

    program = make_fx(function, tracing_mode=mode)(values)
    others = {"lengths": torch.tensor([1, 5], device=DEVICE), "cu_seqlens": torch.tensor([0, 2, 3, 9], device=DEVICE)}
    values |= {name: others[name] for name in bounds}
    close([program(values)], [function(values)])


@every_engine
def test_numbers_may_be_numpys_or_in_tensors(engine: str, choose: Callable[[str], str]) -> None:
    backend = choose(engine)
    q, w = torch.randn(9, 2, 8, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    bounds = torch.tensor([0, 3, 9], device=DEVICE)
    scales: Any
    for number, integer, truth in (
        (float, int, bool), (np.float32, np.int64, np.bool_), (np.float64, np.uint8, np.bool_), (torch.tensor,) * 3,
    ):  # fmt: skip
        scales = {"softmax_scale": number(0.25), "refine_scale": number(0.5), "dropout_p": number(0.5), "causal": truth(True)}
        out = refined_attention_varlen(q, q, q, w, w, bounds, integer(6), **scales, dropout_seed=integer(7), backend=backend)
        same = {"softmax_scale": 0.25, "refine_scale": 0.5, "dropout_p": 0.5, "dropout_seed": 7, "backend": backend}
        assert torch.equal(out, refined_attention_varlen(q, q, q, w, w, bounds, 6, **same))
    x = q[None].transpose(1, 2)[:, :, :6]
    additive: Any = {"refinement": "additive", "backend": backend}
    outs = [refined_attention(x, x, x, w, w, gate=gate, **additive) for gate in (0.5, np.float32(0.5))]
    assert torch.equal(*outs)


def test_a_scale_in_a_tensor_is_read_in_every_call(choose: Callable[[str], str]) -> None:
    backend, x, w = choose("short"), torch.randn(2, 2, 6, 8, device=DEVICE), torch.randn(6, 4, device=DEVICE)
    scale = torch.tensor(0.1)
    for step in range(5):
        out = refined_attention(x, x, x, w, w, softmax_scale=scale, backend=backend)  # type: ignore[arg-type]
        close([out], [refined_attention(x, x, x, w, w, softmax_scale=0.1 + step, backend="reference")])
        scale += 1


def test_numbers_that_would_lose_a_gradient_or_wait_for_a_device_are_refused() -> None:
    x, w = torch.randn(2, 2, 6, 8), torch.randn(6, 4)
    learned = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(TypeError, match="softmax_scale is a tensor that requires a gradient; it must be a number"):
        refined_attention(x, x, x, w, w, softmax_scale=learned)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dropout_p is a tensor on meta; it must be a number"):
        refined_attention(x, x, x, w, w, dropout_p=torch.tensor(0.1, device="meta"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="causal is 1; it must be True or False"):
        refined_attention(x, x, x, w, w, causal=np.int64(1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rank is float; it must be an int"):
        RefinedMultiheadAttention(16, 2, max_len=np.int64(8), rank=np.float32(4))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_beyond_half_precision_keep_every_result_finite(dtype: torch.dtype) -> None:
    """The definition accumulates in float32, as the other backends do."""
    q = torch.full((1, 2, 4, 8), 300.0, dtype=dtype)
    q[..., 2:, :] *= -1
    v, w = torch.randn(1, 2, 4, 8).to(dtype), torch.randn(4, 8).to(dtype)
    exact = attention_weights(*(x.double() for x in (q, q, w, w)), softmax_scale=1.0)
    found = attention_weights(q, q, w, w, softmax_scale=1.0)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)
    leaves = [x.requires_grad_() for x in (q, v, w)]
    for refinement in ("none", "simple", "value", "additive"):
        out = refined_attention(q, q, v, w, w, refinement=refinement, softmax_scale=1.0, backend="reference")
        grads = torch.autograd.grad(out.float().square().sum(), leaves[: 2 + (refinement != "none")])
        assert out.dtype == dtype and all(x.isfinite().all() for x in (out, *grads))
    module = RefinedMultiheadAttention(16, 2, max_len=4, dtype=dtype)
    torch.nn.init.constant_(module.qkv.weight, 20.0)
    assert all(x.isfinite().all() for x in module.weights(torch.full((1, 4, 16), 3.0, dtype=dtype)))


def test_a_step_of_the_reference_keeps_large_scores_finite() -> None:
    half = torch.float16
    cache = RefinedCache(1, 4, heads=2, kv_heads=2, head_dim=8, rank=8, refinement="additive", tables="position", dtype=half)
    x, w = torch.full((1, 2, 3, 8), 300.0, dtype=half), torch.randn(4, 8, dtype=half)
    refined_attention_prefill(x, x, x, w, w, cache, softmax_scale=1.0, backend="reference")
    x = x[:, :, :1]
    assert refined_attention_step(x, x, x, w, w, cache, softmax_scale=1.0, backend="reference").isfinite().all()
