"""Jagged tensors in and out of the operator: packed rows under another name."""

from typing import Any

import pytest
import torch
from torch.nested import nested_tensor_from_jagged

from awrsr_kernels import attention_weights, refined_attention

from ..conftest import DEVICE, cumulative
from .problems import Kind

LENGTHS, T, N, D, R = [3, 0, 5, 1], 9, 9, 4, 3
KINDS = [Kind("none"), Kind("simple"), Kind("additive"), Kind("value", True), Kind("stochastic", True)]


def as_jagged(x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """(T, H, F) as (B, H, j, F)."""
    return nested_tensor_from_jagged(x, offsets).transpose(1, 2)


@pytest.mark.parametrize("side,align", [("left", "right"), ("right", "left")])
@pytest.mark.parametrize("table", ["shared", "per head", "content"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_jagged_call_is_the_packed_one(kind: Kind, table: str, side: str, align: str) -> None:
    shape = {"shared": (N, R), "per head": (T, N, R), "content": (T, T, R)}[table]  # as many heads as items and rows: ambiguous
    given = {name: x.double().requires_grad_() for name, x in kind.draw((T, T, D), shape).items()}
    bounds = cumulative(LENGTHS).long()
    like = nested_tensor_from_jagged(given[kind.items[0]], bounds)
    ragged = {name for name in given if name in kind.items or (table == "content" and name in kind.tables)}
    jagged = {name: as_jagged(x, like.offsets()) if name in ragged else x for name, x in given.items()}
    tables = {name: given[name][None] for name in kind.tables if table == "per head"}
    expected = kind.call(**given | tables, cu_seqlens=bounds, align=align)
    found = kind.call(**jagged, padding_side=side)
    assert len(expected) == len(found)
    for a, b in zip(expected.values(), found.values(), strict=True):
        assert b.shape[0] == len(LENGTHS) and b.layout == torch.jagged
        torch.testing.assert_close(b.values().transpose(0, 1), a, rtol=0, atol=0)
        assert (b + as_jagged(a, like.offsets())).shape == b.shape  # the ragged structure of what came in
    grads = [torch.autograd.grad(sum(o.square().sum() for o in outs), list(given.values())) for outs in (
        [b.values() for b in found.values()], list(expected.values())
    )]  # fmt: skip
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_compiles_into_one_graph() -> None:
    bounds = cumulative(LENGTHS).long()
    like = nested_tensor_from_jagged(torch.randn(T, 2, D, device=DEVICE), bounds)
    q, k, v = (as_jagged(torch.randn(T, 2, D, device=DEVICE), like.offsets()) for _ in range(3))
    w = torch.randn(N, R, device=DEVICE)
    compiled = torch.compile(refined_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, w, w).values(), refined_attention(q, k, v, w, w).values())


X = [torch.randn(T, 2, D, device=DEVICE) for _ in range(3)]
OFFSETS = cumulative(LENGTHS).long()
HOLES = torch.nested.narrow(torch.randn(4, 6, 2, D), 1, torch.tensor([0, 1, 2, 0]), torch.tensor([2, 3, 4, 1]), layout=torch.jagged)


@pytest.mark.parametrize(
    "change,name,error",
    [
        ({"q": nested_tensor_from_jagged(X[0], OFFSETS)}, "q", ValueError),  # (B, j, H, D)
        ({"k": X[1]}, "k", TypeError),
        ({"v": as_jagged(X[2], OFFSETS + torch.tensor([0, 1, 0, 0, 0], device=DEVICE))}, "v", ValueError),
        ({"q": HOLES.to(DEVICE).transpose(1, 2)}, "q", ValueError),
        ({"q": torch.nested.nested_tensor([torch.randn(2, 3, D), torch.randn(2, 1, D)])}, "q", TypeError),
        ({"lengths": torch.tensor(LENGTHS, device=DEVICE)}, "lengths", ValueError),
        ({"padding_side": "top"}, "padding_side", ValueError),
        ({"w_q": torch.randn(4, R, device=DEVICE), "w_k": torch.randn(4, R, device=DEVICE)}, "w_q", ValueError),
        ({"q": X[0].unsqueeze(0)}, "k", TypeError),
        ({"backend": "cuda"}, "backend", ValueError),
    ],
)
def test_a_wrong_jagged_argument_is_named(change: dict[str, Any], name: str, error: type[Exception]) -> None:
    if DEVICE != "cpu" and name == "w_q":
        pytest.skip("lengths are read on the CPU only")
    w = torch.randn(N, R, device=DEVICE)
    given = {name: as_jagged(x, OFFSETS) for name, x in zip("qkv", X, strict=True)} | {"w_q": w, "w_k": w}
    with pytest.raises(error, match=rf"\b{name}\b is .*must be"):
        refined_attention(**given | change)


def test_weights_want_dense_tensors() -> None:
    q = as_jagged(X[0], OFFSETS)
    with pytest.raises(TypeError, match=r"\bq\b is nested"):
        attention_weights(q, q, None, None, refinement="none")
