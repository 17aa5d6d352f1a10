"""Every backend and regime against the reference: output and all gradients, under the rule of `awrsr_kernels/tolerance.py`."""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from awrsr_kernels import _fallback_chunks, _fallback_selection, refined_attention, refined_attention_varlen
from awrsr_kernels.tolerance import wrong_results

from .conftest import DEVICE, ENGINES, cumulative

LENGTHS = {"torch": (1, 5, 16, 40, 150, 300), "short": (1, 5, 16, 33, 50), "tiled": (1, 5, 17, 40)}
EXAMPLES = {"torch": 20, "short": 5, "tiled": 4} if DEVICE == "cpu" else {"torch": 20, "short": 10, "tiled": 6}
EXAMPLES_ONLY = settings(  # shrinking a failure would take minutes of interpreted kernels
    phases=[Phase.generate],
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Problem(NamedTuple):
    """Arguments of one call; W per "shared", "head" or "entry"; layouts of the tensors in memory are drawn with `seed`."""

    heads: int
    kv_heads: int
    lengths: list[int]
    padded: bool  # to a window, otherwise packed
    ragged: bool  # padded: whether lengths are given
    extra_rows: int  # packed: rows of the table beyond the longest sequence
    widths: tuple[int, int, int]
    table: str
    gate: str
    side: str
    causal: bool
    dropout_p: float
    wide_tables: bool
    seed: int


def problems(lengths: tuple[int, ...]) -> st.SearchStrategy[Problem]:
    heads = st.sampled_from([(1, 1), (2, 2), (2, 1), (6, 3)])
    width = st.sampled_from([1, 3, 8, 16, 20])
    return st.builds(
        lambda heads, **rest: Problem(*heads, **rest),
        heads=heads,
        lengths=st.lists(st.sampled_from((0, *lengths)), min_size=1, max_size=5),
        padded=st.booleans(),
        ragged=st.booleans(),
        extra_rows=st.sampled_from([0, 3]),
        widths=st.tuples(width, width, width),
        table=st.sampled_from(["shared", "head", "entry"]),
        gate=st.sampled_from(["none", "one", "head"]),
        side=st.sampled_from(["left", "right"]),
        causal=st.booleans(),
        dropout_p=st.sampled_from([0.0, 0.3]),
        wide_tables=st.booleans(),
        seed=st.integers(0, 2**63 - 1),
    )


def tensors_of(problem: Problem, refinement: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments with a gradient by name, in one of several memory layouts each."""
    p, random = problem, torch.Generator().manual_seed(problem.seed)
    window, (d, dv, r), batch = max(p.lengths + [1]), p.widths, len(p.lengths)
    if p.padded:
        lead = lambda h: (batch, h, window)  # noqa: E731
        tables = {"shared": (window, r), "head": (p.heads, window, r), "entry": (*lead(p.heads), r)}
    else:
        lead = lambda h: (sum(p.lengths), h)  # noqa: E731
        rows = window + p.extra_rows
        tables = {"shared": (rows, r), "head": (p.heads, rows, r), "entry": (*lead(p.heads), r)}
    shapes = {"q": (*lead(p.heads), d), "k": (*lead(p.kv_heads), d), "v": (*lead(p.kv_heads), dv)}
    if refinement != "none":
        shapes |= {"w_q": tables[p.table], "w_k": tables[p.table]}
    if refinement == "additive" and p.gate != "none":
        shapes["gate"] = (1,) if p.gate == "one" else (p.heads,)

    def new(name: str, shape: tuple[int, ...]) -> Tensor:
        layout = torch.randint(4, (), generator=random).item()
        if layout == 0 and len(shape) == 4:
            x = torch.randn(shape[0], shape[2], shape[1], shape[3], generator=random).transpose(1, 2)
        elif layout == 1 and len(shape) > 1:
            x = torch.randn(*shape[:-1], 2 * shape[-1], generator=random)[..., ::2]  # no contiguous last dimension
        elif layout == 2 and len(shape) > 1:
            x = torch.randn(*shape[:-1], shape[-1] + 5, generator=random)[..., 2:-3]  # rows that start anywhere
        else:
            x = torch.randn(shape, generator=random)
        wide = p.wide_tables and name in ("w_q", "w_k", "gate") and dtype in (torch.float16, torch.bfloat16)
        return x.to(DEVICE, torch.float32 if wide else dtype).requires_grad_()

    return {name: new(name, shape) for name, shape in shapes.items()}


def compute(
    problem: Problem, refinement: str, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Output and gradients by name; the output's gradient is one that `dtype` can hold."""
    p = problem
    args: dict[str, Any] = {"refinement": refinement, "causal": p.causal, "dropout_p": p.dropout_p, "backend": backend}
    args |= {"dropout_seed": p.seed - 2**62}
    given = {"w_q": None, "w_k": None} | tensors
    if p.padded:
        lengths = torch.tensor(p.lengths, device=DEVICE) if p.ragged else None
        out = refined_attention(**given, lengths=lengths, padding_side=p.side, **args)
    else:
        out = refined_attention_varlen(**given, cu_seqlens=cumulative(p.lengths), align=p.side, **args)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(p.seed)).to(dtype).to(out)
    grads = torch.autograd.grad(out, list(tensors.values()), dout)
    return {"out": out} | {f"d{name}": g for name, g in zip(tensors, grads, strict=True)}


def disagreements(problem: Problem, refinement: str, dtype: torch.dtype, backend: str) -> list[str]:
    """What of a backend's output and gradients is further from the definition than the tolerance rule allows."""
    tensors = tensors_of(problem, refinement, dtype)
    read = {name: x.detach().to(dtype) if name in ("w_q", "w_k") else x.detach() for name, x in tensors.items()}
    doubles = {name: x.double().requires_grad_() for name, x in read.items()}  # float32 tables are read in q's dtype
    exact = compute(problem, refinement, doubles, "reference", dtype)
    same = compute(problem, refinement, tensors, "reference", dtype)
    return wrong_results(compute(problem, refinement, tensors, backend, dtype), exact, same, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("refinement", ["none", "simple", "value", "additive"])
@pytest.mark.parametrize("engine", ENGINES)
def test_agrees_with_the_reference(engine: str, refinement: str, dtype: torch.dtype, choose: Callable[[str], str]) -> None:
    if engine != "torch" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("needs a GPU: Triton's interpreter gets bfloat16 products wrong")
    if engine != "torch" and dtype == torch.float64 and DEVICE != "cpu":
        pytest.skip("needs the interpreter, that is a machine without a GPU: the kernels have no float64 there")
    backend = choose(engine)
    reach = 32 if engine == "short" and dtype == torch.float32 and DEVICE != "cpu" else 1000  # longer ones are tiled there

    @settings(EXAMPLES_ONLY, max_examples=EXAMPLES[engine])
    @given(problems(tuple(n for n in LENGTHS[engine] if n <= reach)))
    def holds(problem: Problem) -> None:
        assert disagreements(problem, refinement, dtype, backend) == []

    holds()


@pytest.mark.parametrize("refinement", ["none", "simple", "value", "additive"])
def test_short_histories_beside_long_ones(refinement: str, choose: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call short ones go to the short kernels and long ones to the tiled ones; lengths may be anything."""
    backend, went = choose("mixed"), collections.Counter[str]()
    import awrsr_kernels._triton as kernels

    for name in ("short_forward", "tiled_forward", "short_backward", "tiled_backward"):
        run = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, run=run, name=name: (went.update([name]), run(*args))[1])
    for seed, (kv_heads, table, padded, causal, side) in enumerate(
        [
            (2, "shared", True, True, "left"),
            (2, "head", False, True, "right"),
            (2, "entry", False, False, "left"),
            (2, "entry", True, False, "left"),
            (1, "shared", True, True, "right"),
        ]
    ):
        dtype, dropout_p = (torch.float16 if seed == 1 else torch.float32), 0.3 * (seed < 3)
        problem = Problem(
            2, kv_heads, lengths=[20, 3, 16, 0, 5, 17, 1], padded=padded, ragged=True, extra_rows=3, widths=(16, 8, 20),
            table=table, gate="head", side=side, causal=causal, dropout_p=dropout_p, wide_tables=False, seed=seed,
        )  # fmt: skip
        went.clear()
        assert disagreements(problem, refinement, dtype, backend) == []
        assert len(went) == (4 if kv_heads == 2 else 2)  # grouped queries: tiled alone


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("causal", [True, False])
def test_stock_attention_where_the_torch_backend_takes_it(causal: bool, dtype: torch.dtype) -> None:
    if DEVICE != "cpu":
        pytest.skip("a CPU's shortcut")
    tensors = {name: torch.randn(2, 3, 300, 24).to(dtype).requires_grad_() for name in ("q", "k", "v")}
    doubles = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    dout = torch.randn(2, 3, 300, 24).to(dtype)

    def results(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        out = refined_attention(**given, w_q=None, w_k=None, refinement="none", causal=causal, backend=backend)
        assert backend == "reference" or type(out.grad_fn).__name__ == "_StockAttentionBackward"
        grads = torch.autograd.grad(out, list(given.values()), dout.to(out))
        return {"out": out} | {f"d{name}": g for name, g in zip(given, grads, strict=True)}

    found = results(tensors, "torch")
    assert wrong_results(found, results(doubles, "reference"), results(tensors, "reference"), dtype) == []
    with torch.no_grad():
        out = refined_attention(**tensors, w_q=None, w_k=None, refinement="none", causal=causal, backend="torch")
    assert wrong_results({"out": out}, {"out": results(doubles, "reference")["out"]}, {"out": found["out"]}, dtype) == []


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("table", ["shared", "head", "entry"])
@pytest.mark.parametrize("refinement", ["none", "simple", "value", "additive"])
def test_short_histories_share_windows(refinement: str, table: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend on a CPU: each result agrees, and windows with several histories were used."""
    if DEVICE != "cpu":
        pytest.skip("a CPU's way")
    made: list[list[int]] = []
    used: list[object] = []
    pack = _fallback_selection._pack

    def record(lengths: list[int], span: int) -> list[list[int]]:
        windows = pack(lengths, span)
        assert sorted(i for x in windows for i in x) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in x) <= span for x in windows)
        made.extend(windows)
        return windows

    shares = _fallback_chunks.Plan._find_shares
    monkeypatch.setattr(_fallback_selection, "_SHARING_WEIGHTS", 0)
    monkeypatch.setattr(_fallback_selection, "_pack", record)
    monkeypatch.setattr(_fallback_chunks.Plan, "_find_shares", lambda plan, length: (used.append(plan), shares(plan, length))[1])
    for seed, padded in enumerate([False, True]):
        lengths = torch.randint(0, 12, (60,), generator=torch.Generator().manual_seed(seed)).tolist() + [37, 50, 100]
        problem = Problem(
            heads=4, kv_heads=2, lengths=lengths, padded=padded, ragged=True, extra_rows=3, widths=(20, 16, 8), table=table,
            gate="head", side="right" if padded else "left", causal=causal, dropout_p=0.3 * padded, wide_tables=False, seed=seed,
        )  # fmt: skip
        assert disagreements(problem, refinement, torch.float32, "torch") == []
    assert max(len(window) for window in made) > 5 and len(used) == 2


@pytest.mark.parametrize("refinement", ["none", "simple", "value", "additive"])
@pytest.mark.parametrize("engine", ["reference", *ENGINES])
def test_gradcheck(refinement: str, engine: str, choose: Callable[[str], str]) -> None:
    if DEVICE != "cpu" and engine in ("short", "tiled"):
        pytest.skip("float64 kernels need the interpreter, that is a machine without a GPU")
    backend = choose(engine)
    shapes = [(1, 2, 4, 3)] * 3 + [(4, 2)] * 2
    tensors = [torch.randn(*s, dtype=torch.float64, device=DEVICE, requires_grad=True) for s in shapes]
    gate = [torch.randn(2, dtype=torch.float64, device=DEVICE, requires_grad=True)] if refinement == "additive" else []

    def function(*t: Tensor) -> Tensor:
        return refined_attention(*t[:5], refinement=refinement, gate=t[5] if gate else None, backend=backend)

    assert torch.autograd.gradcheck(function, (*tensors, *gate), fast_mode=backend == "triton")
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, (*tensors, *gate), fast_mode=True)
