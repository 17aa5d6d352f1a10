"""Every backend against the reference in float64, output and all gradients, over drawn shapes, strides, layouts and options."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from awrsr_kernels import launch_config, refined_attention, refined_attention_varlen
from awrsr_kernels._triton import launch

from .conftest import DEVICE, cumulative

CASES = {"torch": 120, "short": 40, "tiled": 80}
LENGTHS = {"torch": (1, 5, 16, 40, 150, 300), "short": (1, 5, 16, 17), "tiled": (1, 5, 16, 17, 40, 70)}


def draw(seed: int, sizes: tuple[int, ...], grouped_tables: bool) -> tuple[list[Tensor], dict[str, Any], Any]:
    """Tensors, keywords and the call of one random case."""
    rng = random.Random(seed)
    heads, kv_heads = rng.choice([(2, 2), (2, 1), (1, 1)])
    batch, length = rng.choice([1, 3]), rng.choice(sizes)
    d, dv, r = (rng.choice([1, 3, 8, 16, 20]) for _ in range(3))
    refinement, table = rng.choice(["none", "simple", "value", "additive"]), rng.choice(["shared", "head", "entry"])
    if table == "head" and heads > kv_heads and not grouped_tables:
        table = "shared"
    side, lengths = rng.choice(["left", "right"]), [rng.randint(0, length) for _ in range(batch)]
    dtype = torch.float64 if DEVICE == "cpu" else torch.float32

    def new(*shape: int) -> Tensor:
        x = torch.randn(*shape, dtype=dtype, device=DEVICE)
        if rng.random() < 0.3 and len(shape) == 4:
            x = torch.randn(shape[0], shape[2], shape[1], shape[3], dtype=dtype, device=DEVICE).transpose(1, 2)
        elif rng.random() < 0.2:
            x = torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype, device=DEVICE)[..., ::2]
        return x.requires_grad_()

    args: dict[str, Any] = {"refinement": refinement, "causal": rng.random() < 0.7}
    args |= {"dropout_p": rng.choice([0.0, 0.3]), "dropout_seed": rng.randint(-(2**63), 2**63 - 1)}
    if rng.random() < 0.4:
        total, window = sum(lengths), length + rng.choice([0, 3])
        shapes = {"shared": (window, r), "head": (heads, window, r), "entry": (total, heads, r)}
        if table == "head" and total == heads:
            table = "shared"
        tensors = [new(total, heads, d), new(total, kv_heads, d), new(total, kv_heads, dv)]
        tensors += [new(*shapes[table]), new(*shapes[table])]
        args["align"] = side
        call = lambda t, **kw: refined_attention_varlen(*t[:5], cumulative(lengths), **kw)  # noqa: E731
    else:
        shapes = {"shared": (length, r), "head": (heads, length, r), "entry": (batch, heads, length, r)}
        tensors = [new(batch, heads, length, d), new(batch, kv_heads, length, d), new(batch, kv_heads, length, dv)]
        tensors += [new(*shapes[table]), new(*shapes[table])]
        args |= {"padding_side": side, "lengths": torch.tensor(lengths, device=DEVICE) if rng.random() < 0.6 else None}
        call = lambda t, **kw: refined_attention(*t[:5], **kw)  # noqa: E731
    if refinement == "additive" and rng.random() < 0.7:
        tensors.append(new(rng.choice([1, heads])))
    return tensors, args, call


def run(tensors: list[Tensor], args: dict[str, Any], call: Any, backend: str, dout: Tensor | None = None) -> tuple[Tensor, ...]:
    gate = {"gate": tensors[5]} if len(tensors) > 5 else {}
    out = call(tensors, backend=backend, **args, **gate)
    wanted = tensors[:3] + tensors[5:] if args["refinement"] == "none" else tensors
    if dout is None:
        dout = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return out, *torch.autograd.grad(out, wanted, dout)


def force_tiled(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Send every call to the tiled regime, with tiles small and uneven enough that there are several."""
    rng = random.Random(seed)
    monkeypatch.setattr(launch_config, "MAX_SHORT", 0)
    if DEVICE == "cpu":
        tiles = {name: launch_config.Tile(*rng.choices([16, 32], k=2), 4, 1) for name in ("fwd", "rows", "columns", "tables")}
        monkeypatch.setattr(launch, "tiled_tile", lambda kernel, *_: tiles[kernel])


@pytest.mark.parametrize("backend,seed", [(b, s) for b, count in CASES.items() for s in range(count)])
def test_agrees_with_the_reference(backend: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    tensors, args, call = draw(seed, LENGTHS[backend], grouped_tables=backend != "short")
    expected = run(tensors, args, call, "reference")
    if backend == "tiled":
        force_tiled(monkeypatch, seed)
    found = run(tensors, args, call, "torch" if backend == "torch" else "triton")
    eps = torch.finfo(tensors[0].dtype).eps
    scales = [expected[0].abs().max() if expected[0].numel() else 0.0]
    scales += [max((g.abs().max().item() for g in expected[1:] if g.numel()), default=0.0)] * (len(expected) - 1)
    for name, a, b, scale in zip(["out", "dq", "dk", "dv", "d4", "d5", "d6"], expected, found, scales, strict=False):
        assert b.dtype == a.dtype and b.shape == a.shape
        if a.numel():
            assert (a - b).abs().max() <= 32 * eps * scale, name


@pytest.mark.parametrize("refinement", ["none", "simple", "value", "additive"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_gradcheck(refinement: str, backend: str) -> None:
    if DEVICE != "cpu" and backend == "triton":
        pytest.skip("float64 kernels need the interpreter, that is a machine without a GPU")
    shapes = [(1, 2, 4, 3)] * 3 + [(4, 2)] * 2
    tensors = [torch.randn(*s, dtype=torch.float64, device=DEVICE, requires_grad=True) for s in shapes]
    gate = [torch.randn(2, dtype=torch.float64, device=DEVICE, requires_grad=True)] if refinement == "additive" else []

    def function(*t: Tensor) -> Tensor:
        return refined_attention(*t[:5], refinement=refinement, gate=t[5] if gate else None, backend=backend)

    assert torch.autograd.gradcheck(function, (*tensors, *gate), fast_mode=backend == "triton")
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, (*tensors, *gate), fast_mode=True)
