"""Errors, backend choice, import cost of the contract, and the kernels as torch operators."""

import subprocess
import sys

import pytest
import torch

from awrsr_kernels import launch_config, refined_attention, refined_attention_varlen

from ..conftest import DEVICE, cumulative
from .problems import Kind

STOCHASTIC = Kind("stochastic", True)


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
        ({"lags": 0.5}, "lags", TypeError),
        ({"lags": ["a"]}, "lags", TypeError),
        ({"lags": []}, "lags", ValueError),
        ({"lags": torch.zeros(3, 2)}, "lags", ValueError),
        ({"lags": torch.zeros(2, dtype=torch.int64)}, "lags", TypeError),
        ({"lags": [0.5], "w_q": torch.zeros(6, 129), "w_k": torch.zeros(6, 129)}, "lags", ValueError),
        ({"lags": [0.5], "refinement": "none"}, "lags", ValueError),
        ({"shift": 1}, "shift", TypeError),
        ({"shift": True, "causal": False}, "shift", ValueError),
        ({"shift": True, "refinement": "value"}, "shift", ValueError),
        ({"plain_heads": 1}, "plain_heads", ValueError),
        ({"plain_heads": 4, "refinement": "additive"}, "plain_heads", ValueError),
        ({"plain_heads": 0.5, "refinement": "additive"}, "plain_heads", TypeError),
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
        ({"k": torch.zeros(2, 4, 6, 9)}, "k", ValueError),
        ({name: torch.zeros(2, 4, 0, 8) for name in "qkv"}, "q", ValueError),
        ({name: torch.zeros(2, 0, 6, 8) for name in "qkv"}, "q", ValueError),
        ({name: torch.zeros(2, 4, 6, 8, dtype=torch.int32) for name in "qkv"}, "q", TypeError),
        ({"w_q": torch.zeros(6), "w_k": torch.zeros(6)}, "w_q", ValueError),
        ({"w_q": torch.zeros(6, 257), "w_k": torch.zeros(6, 257)}, "w_q", ValueError),
        ({"gate": torch.zeros(4, dtype=torch.int64), "refinement": "additive"}, "gate", TypeError),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros((), dtype=torch.int32)}, "dropout_seed", TypeError),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros(2, dtype=torch.int64)}, "dropout_seed", ValueError),
        ({"dropout_p": 0.1, "dropout_seed": torch.zeros((), dtype=torch.int64, device="meta")}, "dropout_seed", ValueError),
        ({"dropout_p": 0.1, "dropout_seed": 2**63}, "dropout_seed", ValueError),
    ],
)
def test_a_wrong_argument_is_named(change: dict, name: str, kind: type[Exception]) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v for k, v in change.items()}
    if DEVICE != "cpu" and name == "lengths" and kind is ValueError and "[1, 7]" in str(change):
        pytest.skip("values of lengths are read on the CPU only")
    with pytest.raises(kind, match=rf"\b{name}\b is .*must be"):
        refined_attention(**{**arguments(), **moved})


@pytest.mark.parametrize(
    "change,name,error",
    [
        ({"q_mean": torch.zeros(4, 6, 8)}, "q_mean", ValueError),
        ({"q_mean": torch.zeros(2, 4, 6, 8, dtype=torch.int32)}, "q_mean", TypeError),
        ({"k_mean": torch.zeros(2, 3, 6, 8)}, "k_mean", ValueError),
        ({"k_mean": torch.zeros(2, 4, 6, 9)}, "k_mean", ValueError),
        ({"v_mean": torch.zeros(2, 4, 7, 8)}, "v_mean", ValueError),
        ({"v_mean": None}, "v_mean", TypeError),
        ({"q_cov": torch.zeros(2, 4, 6, 1)}, "q_cov", ValueError),
        ({"q_cov": None}, "q_cov", TypeError),
        ({"k_cov": torch.zeros(2, 4, 6, 8, dtype=torch.float64)}, "k_cov", TypeError),
        ({"k_cov": torch.zeros(2, 4, 6, 8, device="meta")}, "k_cov", ValueError),
        ({"v_cov": torch.zeros(2, 1, 6, 8)}, "v_cov", ValueError),
        ({"v_cov": 1.0}, "v_cov", TypeError),
        ({"w_q": None}, "w_q", TypeError),
        ({"w_k": torch.zeros(6, 4)}, "w_k", ValueError),
        ({"w_q_cov": None}, "w_q_cov", TypeError),
        ({"w_k_cov": None}, "w_k_cov", TypeError),
        ({"w_k_cov": torch.zeros(6, 4)}, "w_k_cov", ValueError),
        ({"w_q_cov": torch.zeros(6, 4), "w_k_cov": torch.zeros(6, 4)}, "w_q_cov", ValueError),
        ({"w_q_cov": torch.zeros(4, 6, 5), "w_k_cov": torch.zeros(4, 6, 5)}, "w_q_cov", ValueError),
        ({"w_q_cov": torch.zeros(7, 5), "w_k_cov": torch.zeros(7, 5)}, "w_q_cov", ValueError),
        ({"w_k_cov": torch.zeros(6, 5, dtype=torch.float64)}, "w_k_cov", TypeError),
        ({"refinement": "simple"}, "w_q_cov", ValueError),
        ({"refinement": "none", "w_q_cov": None}, "w_k_cov", ValueError),
        ({"refinement": "double"}, "refinement", ValueError),
        ({"gate": 0.5}, "gate", ValueError),
        ({"causal": 1}, "causal", TypeError),
        ({"lengths": torch.tensor([1])}, "lengths", ValueError),
        ({"padding_side": "top"}, "padding_side", ValueError),
        ({"softmax_scale": float("inf")}, "softmax_scale", ValueError),
        ({"dropout_p": -0.1}, "dropout_p", ValueError),
        ({"backend": "cuda"}, "backend", ValueError),
    ],
)
def test_a_wrong_argument_of_the_stochastic_call_is_named(change: dict, name: str, error: type[Exception]) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v for k, v in change.items()}
    given = STOCHASTIC.draw((2, 4, 6, 8), (6, 5)) | moved
    with pytest.raises(error, match=rf"\b{name}\b is .*must be"):
        STOCHASTIC.call(**given)
    if not set(change) & {"v_mean", "v_cov", "dropout_p", "backend"}:
        with pytest.raises(error, match=rf"\b{name}\b is .*must be"):
            STOCHASTIC.weights(**given)


@pytest.mark.parametrize(
    "change,name,error",
    [
        ({"cu_seqlens": None}, "cu_seqlens", TypeError),
        ({"q_cov": torch.zeros(7, 4, 8)}, "q_cov", ValueError),
        ({"k_mean": torch.zeros(7, 4, 8)}, "k_mean", ValueError),
        ({"w_q_cov": torch.zeros(8, 5), "w_k_cov": torch.zeros(8, 5)}, "w_q_cov", ValueError),
        ({"max_seqlen": -1}, "max_seqlen", ValueError),
        ({"align": "top"}, "align", ValueError),
    ],
)
def test_a_wrong_argument_of_the_packed_stochastic_call_is_named(change: dict, name: str, error: type[Exception]) -> None:
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(error, match=rf"\b{name}\b is .*must be"):
        STOCHASTIC.call(**{**STOCHASTIC.draw((6, 4, 8), (9, 5)), "cu_seqlens": cumulative([2, 4]), **moved})


def test_vectors_know_no_stochastic_refinement() -> None:
    with pytest.raises(ValueError, match=r"\brefinement\b is 'stochastic'; it must be one of"):
        refined_attention(**arguments(), refinement="stochastic")


@pytest.mark.parametrize(
    "cu,change,name,kind",
    [
        ([0, 3, 2, 6], {}, "cu_seqlens", ValueError),
        ([1, 6], {}, "cu_seqlens", ValueError),
        ([0, 5], {}, "cu_seqlens", ValueError),
        ([0, 6], {"max_seqlen": 5}, "max_seqlen", ValueError),
        ([], {}, "cu_seqlens", ValueError),
        ([[0, 6]], {}, "cu_seqlens", ValueError),
        ([0.0, 6.0], {}, "cu_seqlens", TypeError),
        ([0, 6], {"max_seqlen": 6.0}, "max_seqlen", TypeError),
        ([0, 6], {"max_seqlen": -1}, "max_seqlen", ValueError),
        ([0, 6], {"align": "top"}, "align", ValueError),
        ([0, 6], {"k": torch.zeros(7, 4, 8)}, "k", ValueError),
        ([0, 6], {"w_q": torch.zeros(5, 9, 5), "w_k": torch.zeros(5, 9, 5)}, "w_q", ValueError),
    ],
)
def test_a_wrong_packed_argument_is_named(cu: list, change: dict, name: str, kind: type[Exception]) -> None:
    reads_values = name in ("cu_seqlens", "max_seqlen") and kind is ValueError
    if DEVICE != "cpu" and reads_values and cu and not isinstance(cu[0], list) and change.get("max_seqlen", 0) >= 0:
        pytest.skip("values of cu_seqlens are read on the CPU only")
    x, w = torch.randn(6, 4, 8, device=DEVICE), torch.randn(9, 5, device=DEVICE)
    bounds = torch.tensor(cu, device=DEVICE, dtype=None if cu else torch.int32)
    moved = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
    with pytest.raises(kind, match=rf"\b{name}\b is .*must be"):
        refined_attention_varlen(**{"q": x, "k": x, "v": x, "w_q": w, "w_k": w, "cu_seqlens": bounds, **moved})


@pytest.mark.skipif(DEVICE != "cpu", reason="the meta device stands in for one whose memory is not read")
def test_a_table_shorter_than_max_seqlen_is_named_without_reading_cu_seqlens() -> None:
    x, w = torch.empty(16, 4, 8, device="meta"), torch.empty(9, 5, device="meta")
    with pytest.raises(ValueError, match=r"\bw_q\b is of 9 rows.*must be at least max_seqlen = 12"):
        refined_attention_varlen(x, x, x, w, w, torch.empty(3, dtype=torch.int32, device="meta"), 12)


def test_a_table_shorter_than_a_sequence_is_named() -> None:
    if DEVICE != "cpu":
        pytest.skip("values of cu_seqlens are read on the CPU only")
    x, w = torch.randn(6, 4, 8), torch.randn(5, 5)
    with pytest.raises(ValueError, match=r"\bw_q\b is of 5 rows"):
        refined_attention_varlen(x, x, x, w, w, cumulative([6]))


@pytest.mark.parametrize("heads", [(), (4,)], ids=["shared", "per head"])
@pytest.mark.parametrize("side, rows", [("left", slice(-6, None)), ("right", slice(6))])
def test_a_table_longer_than_the_batch_says_which_rows_to_take(side: str, rows: slice, heads: tuple[int, ...]) -> None:
    """Those that packed items use of the whole table."""
    x, n = torch.randn(1, 4, 6, 8, device=DEVICE), torch.tensor([3], device=DEVICE)
    tables = torch.randn(2, *heads, 9, 5, device=DEVICE)
    with pytest.raises(ValueError, match=r"w_q is of shape .* L = 6; of a longer table take the last rows") as error:
        refined_attention(x, x, x, *tables, lengths=n, padding_side=side)
    named = {"left": "w_q[..., -6:, :], where padding is on the left", "right": "w_q[..., :6, :], where it is on the right"}
    assert named[side] in str(error.value) and "the same ones of w_k" in str(error.value)
    items = slice(3, None) if side == "left" else slice(3)
    out = refined_attention(x, x, x, *tables[..., rows, :], lengths=n, padding_side=side)[0, :, items].transpose(0, 1)
    packed, align = x[0, :, items].transpose(0, 1), "right" if side == "left" else "left"
    whole = [w[None] if heads else w for w in tables]
    expected = refined_attention_varlen(packed, packed, packed, *whole, cumulative([3]), align=align)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_a_shorter_table_is_not_told_to_be_cut() -> None:
    x, w = torch.randn(2, 4, 6, 8, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    with pytest.raises(ValueError, match="L = 6$"):
        refined_attention(x, x, x, w, w)


def test_a_named_backend_that_cannot_run_raises() -> None:
    dtype = torch.bfloat16 if DEVICE == "cpu" else torch.float64  # what the interpreter and a GPU cannot do
    x, w = torch.randn(1, 1, 5, 4, device=DEVICE, dtype=dtype), torch.randn(5, 3, device=DEVICE, dtype=dtype)
    with pytest.raises(ValueError, match=r"\bbackend\b is \"triton\", which cannot run here: .*(use float32|backend='torch')"):
        refined_attention(x, x, x, w, w, backend="triton")
    assert refined_attention(x, x, x, w, w).dtype == dtype  # "auto" takes another


@pytest.mark.parametrize("cuda", [True, False])
def test_triton_outside_its_reach_says_why(cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = launch_config.unsupported_reason
    if cuda:  # a consumer's GPU: 99 KiB of shared memory for a program
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        monkeypatch.setattr(launch_config, "shared_memory", lambda device: 101376)
        assert reason(torch.device("cuda"), torch.bfloat16, (256, 256, 256)) is None
        assert "take 163840 bytes of shared memory, the GPU has 101376" in str(
            reason(torch.device("cuda"), torch.float32, (8, 8, 129))
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert "older than compute capability 8.0" in str(reason(torch.device("cuda"), torch.float16, (8, 8, 8)))
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        assert "move them to a GPU" in str(reason(torch.device("cpu"), torch.float32, (8, 8, 8)))
        monkeypatch.setattr(launch_config, "find_spec", lambda name: None)
        monkeypatch.delitem(sys.modules, "triton", raising=False)
        assert "pip install triton" in str(reason(torch.device("cpu"), torch.float32, (8, 8, 8)))


def test_a_regime_is_chosen_by_what_fits() -> None:
    h100, consumer, amd = 232448, 101376, 65536
    is_short = launch_config.is_short
    assert is_short(50, (64, 64, 64), 2, h100) and is_short(50, (64, 64, 64), 2, consumer)
    assert not is_short(50, (64, 64, 64), 2, amd) and is_short(32, (64, 64, 64), 2, amd)
    assert not is_short(50, (64, 64, 64), 4, h100) and is_short(32, (64, 64, 64), 4, h100)
    assert not is_short(65, (8, 8, 8), 2, h100) and not is_short(50, (64, 64, 129), 2, h100)

    def tiled(features: tuple[int, int, int], itemsize: int, shared: int) -> launch_config.Config:
        key = launch_config.key_of("tiled_fwd", 1000, features, itemsize)
        assert key is not None
        return launch_config.choose(key, shared)

    assert tiled((64, 64, 64), 2, h100).num_stages == 2 and tiled((64, 64, 64), 2, consumer).num_stages == 1
    assert tiled((8, 256, 8), 4, h100).block_m == 16


def test_import_is_cheap() -> None:
    code = """
import time, torch
start = time.perf_counter()
import awrsr_kernels
print(time.perf_counter() - start)
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(done.stdout) for done in runs) < 0.3  # seconds beyond torch's own


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


@pytest.mark.parametrize("kind", [Kind("simple"), STOCHASTIC], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_shapes_follow_from_the_meta_device(backend: str, kind: Kind) -> None:
    given = {name: x.to("meta") for name, x in kind.draw((2, 4, 6, 8), (6, 5)).items()}
    given = {name: x[..., :3] if name.startswith("v") else x for name, x in given.items()}
    outs = kind.call(**given, lengths=torch.empty(2, dtype=torch.int64, device="meta"), backend=backend)
    assert all(out.shape == (2, 4, 6, 3) for out in outs.values())


def test_a_contiguous_last_dimension_is_not_copied() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from awrsr_kernels._triton.launch import with_rows

    x = torch.randn(2, 5, 3, 8, device=DEVICE).transpose(1, 2)
    assert with_rows(x) is x and with_rows(x[..., ::2]).is_contiguous()
