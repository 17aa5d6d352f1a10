"""Errors, backend choice, import cost of the contract, and the kernels as torch operators."""

import subprocess
import sys

import pytest
import torch

from awrsr_kernels import refined_attention, refined_attention_varlen
from awrsr_kernels.launch_config import shared_memory

from .conftest import DEVICE, cumulative


def arguments() -> dict:
    q, w = torch.randn(2, 4, 6, 8, device=DEVICE), torch.randn(6, 5, device=DEVICE)
    return {"q": q, "k": q.clone(), "v": q.clone(), "w_q": w, "w_k": w.clone()}


@pytest.mark.parametrize(
    "change,name,kind",
    [
        ({"q": torch.zeros(4, 6, 8)}, "q", ValueError),
        ({"k": torch.zeros(2, 4, 7, 8)}, "k", ValueError),
        ({"k": torch.zeros(2, 3, 6, 8)}, "k", ValueError),
        ({"k": torch.zeros(2, 4, 6, 8, dtype=torch.float64)}, "k", TypeError),
        ({"v": torch.zeros(2, 2, 6, 8)}, "v", ValueError),
        ({"v": torch.zeros(2, 4, 6, 257)}, "v", ValueError),
        ({"v": [1]}, "v", TypeError),
        ({"w_q": torch.zeros(7, 5), "w_k": torch.zeros(7, 5)}, "w_q", ValueError),
        ({"w_q": None}, "w_q", TypeError),
        ({"w_k": torch.zeros(6, 4)}, "w_k", ValueError),
        ({"w_k": torch.zeros(6, 5, dtype=torch.float16)}, "w_k", TypeError),
        ({"refinement": "double"}, "refinement", ValueError),
        ({"gate": 0.5}, "gate", ValueError),
        ({"gate": torch.zeros(3), "refinement": "additive"}, "gate", ValueError),
        ({"causal": 1}, "causal", TypeError),
        ({"lengths": torch.tensor([1, 7])}, "lengths", ValueError),
        ({"lengths": torch.tensor([1])}, "lengths", ValueError),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths", TypeError),
        ({"padding_side": "top"}, "padding_side", ValueError),
        ({"softmax_scale": float("nan")}, "softmax_scale", ValueError),
        ({"refine_scale": "1"}, "refine_scale", TypeError),
        ({"dropout_p": 1.0}, "dropout_p", ValueError),
        ({"dropout_p": 0.1, "dropout_seed": 1.5}, "dropout_seed", TypeError),
        ({"backend": "cuda"}, "backend", ValueError),
        ({"lengths": torch.zeros(2, dtype=torch.int32, device="meta")}, "lengths", ValueError),
    ],
)
def test_a_wrong_argument_is_named(change: dict, name: str, kind: type[Exception]) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v for k, v in change.items()}
    if DEVICE != "cpu" and name == "lengths" and kind is ValueError and "[1, 7]" in str(change):
        pytest.skip("values of lengths are read on the CPU only")
    with pytest.raises(kind, match=rf"\b{name}\b is .*must be"):
        refined_attention(**{**arguments(), **moved})


@pytest.mark.parametrize(
    "cu,keywords,name",
    [
        ([0, 3, 2, 6], {}, "cu_seqlens"),
        ([1, 6], {}, "cu_seqlens"),
        ([0, 5], {}, "cu_seqlens"),
        ([0, 6], {"max_seqlen": 5}, "max_seqlen"),
        ([0, 6], {"align": "top"}, "align"),
    ],
)
def test_a_wrong_packed_argument_is_named(cu: list[int], keywords: dict, name: str) -> None:
    if DEVICE != "cpu" and name != "align":
        pytest.skip("values of cu_seqlens are read on the CPU only")
    x, w = torch.randn(6, 4, 8, device=DEVICE), torch.randn(9, 5, device=DEVICE)
    with pytest.raises(ValueError, match=rf"\b{name}\b is .*must be"):
        refined_attention_varlen(x, x, x, w, w, torch.tensor(cu, device=DEVICE), **keywords)


def test_a_table_shorter_than_a_sequence_is_named() -> None:
    if DEVICE != "cpu":
        pytest.skip("values of cu_seqlens are read on the CPU only")
    x, w = torch.randn(6, 4, 8), torch.randn(5, 5)
    with pytest.raises(ValueError, match=r"\bw_q\b is of 5 rows"):
        refined_attention_varlen(x, x, x, w, w, cumulative([6]))


def test_a_named_backend_that_cannot_run_raises() -> None:
    x, w = torch.randn(1, 1, 129, 4, device=DEVICE), torch.randn(129, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"\bbackend\b.*up to 128.*use backend='torch'"):
        refined_attention(x, x, x, w, w, backend="triton")


def test_what_no_gpu_can_hold_is_known_before_the_launch() -> None:
    assert shared_memory(64, 64, torch.float32) <= 166912  # what sm_80 grants a block
    assert shared_memory(65, 64, torch.bfloat16) is None
    assert shared_memory(65, 16, torch.float32) is None
    assert shared_memory(128, 65, torch.float16) is None


def test_import_works_without_triton_and_without_effects() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, awrsr_kernels
assert "awrsr_kernels._triton" not in sys.modules
x = torch.randn(1, 2, 5, 4)
w = torch.randn(5, 3)
assert awrsr_kernels.refined_attention(x, x, x, w, w).shape == x.shape
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("refinement", ["simple", "additive"])
def test_kernels_are_wellformed_operators(refinement: str) -> None:
    import awrsr_kernels._triton as kernels

    q, w = torch.randn(2, 2, 6, 8, device=DEVICE), torch.randn(1, 1, 6, 4, device=DEVICE)
    tensors = (q, q.clone(), q.clone(), w, w.clone(), None, None, None)
    call = (refinement, True, False, True, 6, False, 0.3, 0.5, 0.0)
    torch.library.opcheck(kernels._forward_op, (*tensors, *call))
    torch.library.opcheck(kernels._backward_op, (torch.randn_like(q), *tensors, *call))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_into_one_graph_forward_and_backward(backend: str) -> None:
    given = arguments()
    tensors = [x.requires_grad_() for x in given.values()]

    def function(*t: torch.Tensor) -> torch.Tensor:
        return refined_attention(*t, refinement="value", backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    found = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_runs_in_its_dtype() -> None:
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = refined_attention(**arguments(), backend="torch")
    assert out.dtype == torch.bfloat16
