"""Calls that plans serve, each with the tensors and gradients of its backward: attention, stochastic attention, decoding steps."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from awrsr_kernels import (
    refined_attention,
    refined_attention_varlen,
    stochastic_refined_attention,
    stochastic_refined_attention_varlen,
)

from ..conftest import DEVICE
from .decoding import sequences

Outs = Tensor | tuple[Tensor, ...]
Work = tuple[Callable[[], Outs], list[Tensor], Any]  # a call, tensors that have gradients, the gradient of each output


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_()


def padded(length: int = 12, kv_heads: int = 2, table: str = "shared", gate: Any = None, batch: int = 2, **options: Any) -> Work:
    q = leaf(batch, length, 2, 8).transpose(1, 2).detach().requires_grad_()
    k, v = (leaf(batch, kv_heads, length, 8) for _ in "kv")
    shape = {"shared": (length, 5), "head": (2, length, 5), "entry": (batch, 2, length, 5)}[table]
    given = [q, k, v, leaf(*shape), leaf(*shape)]
    learned = given[: 3 if options.get("refinement") == "none" else 5] + ([gate] if isinstance(gate, Tensor) else [])
    learned += [options["lags"]] if "lags" in options else []
    if "lengths" in options:
        options["lengths"] = torch.tensor(options["lengths"], device=DEVICE)
    call = functools.partial(refined_attention, *given, gate=gate, backend="triton", **options)
    return call, learned, torch.randn(batch, 2, length, 8, device=DEVICE)


def packed(table: str = "shared", **options: Any) -> Work:
    bounds = torch.tensor([0, 5, 5, 20], device=DEVICE)
    shape = {"shared": (17, 5), "entry": (20, 2, 5)}[table]
    given = [*(leaf(20, 2, 8) for _ in "qkv"), leaf(*shape), leaf(*shape)]
    call = functools.partial(refined_attention_varlen, *given, bounds, 15, backend="triton", **options)
    return call, given, torch.randn(20, 2, 8, device=DEVICE)


def positive(*shape: int) -> Tensor:
    return leaf(*shape).exp().detach().requires_grad_()


def stochastic(
    length: int = 12, kv_heads: int = 2, table: str = "shared", gate: Any = None, only: int | None = None, **options: Any
) -> Work:
    """Stochastic attention. only: the output that is used, both by default."""
    batch = 2
    items = [new(batch, heads, length, 8) for heads in (2, kv_heads, kv_heads) for new in (leaf, positive)]
    items[0] = leaf(batch, length, 2, 8).transpose(1, 2).detach().requires_grad_()
    shape = {"shared": (length, 5), "head": (2, length, 5), "entry": (batch, 2, length, 5)}[table]
    tables = [leaf(*shape) for _ in range(4 if options.get("refinement") == "stochastic" else 2)]
    if "lengths" in options:
        options["lengths"] = torch.tensor(options["lengths"], device=DEVICE)
    call = functools.partial(stochastic_refined_attention, *items, *tables, gate=gate, backend="triton", **options)
    learned = items + (tables if options.get("refinement") != "none" else []) + ([gate] if isinstance(gate, Tensor) else [])
    douts = tuple(torch.randn(batch, 2, length, 8, device=DEVICE) for _ in "mc")
    return (call, learned, douts) if only is None else (lambda: call()[only], learned, douts[only])


def stochastic_packed(table: str = "shared", **options: Any) -> Work:
    bounds = torch.tensor([0, 5, 5, 20], device=DEVICE)
    shape = {"shared": (17, 5), "entry": (20, 2, 5)}[table]
    items = [new(20, 2, 8) for _ in "qkv" for new in (leaf, positive)]
    tables = [leaf(*shape) for _ in range(4)]
    options |= {"refinement": "stochastic", "cu_seqlens": bounds, "max_seqlen": 15, "backend": "triton"}
    call = functools.partial(stochastic_refined_attention_varlen, *items, *tables, **options)
    return call, items + tables, tuple(torch.randn(20, 2, 8, device=DEVICE) for _ in "mc")


def step(refinement: str, table: str = "shared", prompts: tuple[int, ...] = (3, 2), gate: Any = None, **options: Any) -> Work:
    """The same step again and again, which returns what is in the cache afterwards as well."""
    given = sequences(refinement, table, list(prompts), 1, heads=2, dtype=torch.float32, **options)
    given = given._replace(gate=gate, **{name: getattr(given, name).contiguous() for name in ("q", "k", "v", "w_q", "w_k")})
    cache = given.cache(8)
    given.decode(cache, 0, "left", "torch")
    end, bounds = cache.end.clone(), (cache.end_bound, cache.length_bound)

    def call() -> tuple[Tensor, ...]:
        cache.end.copy_(end)
        cache.end_bound, cache.length_bound = bounds
        out = given.step(cache, 0, backend="triton")
        return out, cache.end.clone(), *(x.clone() for x in cache.rows().values())

    return call, [], None


def tuple_of(outs: Outs) -> tuple[Tensor, ...]:
    return (outs,) if isinstance(outs, Tensor) else outs


def results(work: Work) -> list[Tensor]:
    call, inputs, douts = work
    outs = call()
    if not inputs:
        return list(tuple_of(outs))
    return [*(out.detach() for out in tuple_of(outs)), *torch.autograd.grad(outs, inputs, douts)]


CALLS: dict[str, Callable[[], Work]] = {
    "short": padded,
    "value": lambda: padded(refinement="value", lengths=[3, 12], padding_side="right"),
    "additive": lambda: padded(refinement="additive", gate=leaf(2), dropout_p=0.3, dropout_seed=3),
    "number as gate": lambda: padded(refinement="additive", gate=0.5),
    "scalar gate, table per entry": lambda: padded(refinement="additive", gate=leaf(), table="entry"),
    "grouped": lambda: padded(kv_heads=1, table="head", lengths=[0, 7]),
    "none": lambda: padded(refinement="none"),
    "resident": lambda: padded(70),
    "both": lambda: padded(70, lengths=[9, 70], refinement="additive", gate=leaf(1)),
    "tiled": lambda: padded(70, causal=False, refinement="additive", gate=leaf(2)),
    "tiled, grouped": lambda: padded(70, kv_heads=1, causal=False, batch=1),
    "lagged": lambda: padded(refinement="additive", gate=leaf(2), lags=leaf(2), shift=True, plain_heads=1),
    "lagged, both": lambda: padded(70, lags=leaf(2, 3), shift=True, lengths=[9, 70]),
    "packed": packed,
    "packed, content tables": lambda: packed("entry", align="left"),
    "stochastic": stochastic,
    "stochastic, none": lambda: stochastic(refinement="none", lengths=[3, 12]),
    "stochastic, value, means alone": lambda: stochastic(refinement="value", only=0),
    "stochastic, additive": lambda: stochastic(refinement="additive", gate=leaf(2), dropout_p=0.3, dropout_seed=3),
    "stochastic, number as gate": lambda: stochastic(refinement="additive", gate=0.5, table="entry"),
    "stochastic, stochastic": lambda: stochastic(refinement="stochastic", table="head"),
    "stochastic, grouped": lambda: stochastic(refinement="stochastic", kv_heads=1, lengths=[0, 7], padding_side="right"),
    "stochastic, tiled": lambda: stochastic(70, refinement="additive", gate=leaf()),
    "stochastic, tiled, value": lambda: stochastic(70, refinement="value", causal=False, dropout_p=0.3, dropout_seed=3),
    "stochastic, tiled, covariances alone": lambda: stochastic(70, kv_heads=1, refinement="stochastic", table="entry", only=1),
    "stochastic, both": lambda: stochastic(70, lengths=[9, 70]),
    "stochastic, packed": stochastic_packed,
    "stochastic, packed, content tables": lambda: stochastic_packed("entry", align="left"),
    "step": lambda: step("simple"),
    "step, none": lambda: step("none"),
    "step, value, content tables": lambda: step("value", "content", kv_heads=1),
    "step, additive": lambda: step("additive", "head", gate=torch.randn(2, device=DEVICE)),
    "step, lagged": lambda: step("additive", gate=torch.randn(2, device=DEVICE), lagged=True),
    "step, number as gate": lambda: step("additive", prompts=(3, 3), gate=0.5),
}
