"""Bytes and operations counted per launch are those of the kernels themselves, as the interpreter runs them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from awrsr_kernels.launch_config import Config
from benchmarks.operator.decode_bench import DecodingInputs, step
from benchmarks.operator.launches import (
    CountedCall,
    Launch,
    columns_walk,
    rows_walk,
    seat,
    short_launches,
    step_launch,
    task_launches,
    tiled_launches,
)
from benchmarks.operator.measure import gradients
from benchmarks.operator.providers import ours
from benchmarks.operator.roofline import ideal_bytes
from benchmarks.operator.workloads import Shape, Task, build, calls

from ..conftest import DEVICE

REFINEMENTS = ("none", "simple", "value", "additive")
TILE = Config(32, 16, 4, 1)  # what the fixture `choose` gives the tiled regime
PROCESSORS = 1  # what launchers assume in the interpreter
SHAPE = Shape(B=5, H=2, H_kv=1, L=40, D=8, D_v=12, R=20)
USERS = (20, 1, 40, 40, 3)  # under two heads, runs of three forward and of all five backward: tiles of one and of two sequences
CASES = {  # name: (layout, task but for its refinement)
    "padded": ("padded", Task(SHAPE, "", "float16", 0.1, "cpu", USERS, len(USERS))),
    "packed": ("packed", Task(SHAPE, "", "float16", 0.1, "cpu", USERS, len(USERS))),
    "full": ("padded", Task(SHAPE, "", "float16", 0.0, "cpu")),
    "own key heads": ("padded", Task(replace(SHAPE, H=1, L=8), "", "float32", 0.0, "cpu")),  # several full sequences in a tile
}


@dataclass
class Meter:
    """What one launch did: bytes by count and, of loads, addresses, so that what is loaded twice counts once."""

    kernel: str
    programs: int
    loaded: int = 0
    written: int = 0
    operations: int = 0
    addresses: list[np.ndarray] = field(default_factory=list)

    @property
    def read(self) -> int:
        return sum(np.unique(a).size * size for size, a in self.by_size())

    def by_size(self) -> Iterator[tuple[int, np.ndarray]]:
        for size in sorted({int(a[0]) for a in self.addresses}):
            yield size, np.concatenate([a[1:] for a in self.addresses if a[0] == size])


@pytest.fixture
def meters(monkeypatch: pytest.MonkeyPatch) -> list[Meter]:
    """A meter per launch, filled as launches run. Bounds and seed, which are integers, and single numbers are not counted."""
    if DEVICE != "cpu":
        pytest.skip("the counts are read off Triton's interpreter, which a machine with a GPU does not use here")
    pytest.importorskip("triton", reason="needs Triton")
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

    from awrsr_kernels._triton import decode, short, tiled, tiled_bwd

    found: list[Meter] = []
    load, store, dot = (getattr(InterpreterBuilder, f"create_{x}") for x in ("masked_load", "masked_store", "dot"))

    def count_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        kind = np.dtype(_get_np_dtype(ptrs.get_element_ty()))
        if ptrs.data.size > 1 and kind.kind == "f":
            size = kind.itemsize
            touched = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data]
            found[-1].loaded += touched.size * size
            found[-1].addresses.append(np.concatenate([[size], touched.astype(np.int64)]))
        return load(self, ptrs, mask, *rest)

    def count_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if ptrs.data.size > 1:
            found[-1].written += int(mask.data.sum()) * np.dtype(_get_np_dtype(ptrs.get_element_ty())).itemsize
        return store(self, ptrs, value, mask, *rest)

    def count_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        found[-1].operations += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return dot(self, a, b, *rest)

    for name, function in (("masked_load", count_load), ("masked_store", count_store), ("dot", count_dot)):
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", function)

    def watch(module: ModuleType) -> None:
        launch = module.launch

        def metered(kernel: Any, grid: tuple[int, ...], *rest: Any, **arguments: Any) -> None:
            found.append(Meter(kernel.__name__.strip("_").removesuffix("_kernel"), grid[0]))
            launch(kernel, grid, *rest, **arguments)

        monkeypatch.setattr(module, "launch", metered)

    for module in (decode, short, tiled, tiled_bwd):
        watch(module)
    return found


def hold_to(meters: list[Meter], counted: list[Launch]) -> None:
    """Our kernels among the counted launches are those that ran, and each did what was counted."""
    kernels = [x for x in counted if x.tile is not None]
    assert [(x.kernel, x.programs) for x in kernels] == [(m.kernel, m.programs) for m in meters]
    for launch, meter in zip(kernels, meters, strict=True):
        for name in ("loaded", "read", "written", "operations"):
            assert getattr(launch, name) == getattr(meter, name), (launch.kernel, launch.stage, name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("refinement", REFINEMENTS)
@pytest.mark.parametrize("regime", ["short", "tiled"])
def test_counts_are_what_the_kernels_do(
    regime: str, refinement: str, case: str, meters: list[Meter], choose: Callable[[str], str]
) -> None:
    layout, task = CASES[case][0], replace(CASES[case][1], refinement=refinement)
    backend = choose(regime)
    batch = build(task, layout)[0]
    gradients(ours(batch, backend), batch)
    if regime == "tiled":
        counted = tiled_launches(CountedCall(task, *calls(task, layout)[0], layout == "packed"), lambda _: TILE, PROCESSORS)
    else:
        counted = task_launches(task, layout, processors=PROCESSORS)
    hold_to(meters, counted)


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_counts_of_a_decoding_step(refinement: str, content: bool, meters: list[Meter]) -> None:
    s = replace(SHAPE, L=35)
    sizes = [(s.B, s.H, s.L, s.D), (s.B, s.H_kv, s.L, s.D), (s.B, s.H_kv, s.L, s.D_v)]
    tables = [(s.B, s.H, s.L, s.R) if content else (s.L, s.R)] * 2
    inputs = DecodingInputs(*(torch.randn(size) for size in sizes + tables), refinement)
    provider, _ = step(inputs, "triton")
    provider.call()
    hold_to(meters[-1:], [step_launch(Task(s, refinement, "float32", 0.0, "cpu"), content)])


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("refinement", ["none", "additive"])
def test_counts_where_both_regimes_share_a_call(
    refinement: str, layout: str, meters: list[Meter], monkeypatch: pytest.MonkeyPatch
) -> None:
    from awrsr_kernels._triton.problem import Problem

    monkeypatch.setattr(Problem, "processors", lambda _: PROCESSORS)
    users = (70, 5, 64, 80, 3)
    task = Task(Shape(B=5, H=2, H_kv=2, L=80, D=8, D_v=12, R=20), refinement, "float16", 0.1, "cpu", users, len(users))
    batch = build(task, layout)[0]
    gradients(ours(batch, "triton"), batch)
    assert {meter.kernel.split("_")[0] for meter in meters} == {"short", "tiled"}
    hold_to(meters, task_launches(task, layout, processors=PROCESSORS))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("refinement", ["none", "additive"])
@pytest.mark.parametrize("regime", ["short", "tiled"])
def test_torchs_own_kernels_are_counted(regime: str, refinement: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a backward: partials of the tables summed, cast; query heads summed, copied; dgate summed, cast."""
    pytest.importorskip("triton", reason="needs Triton")
    from torch.utils._python_dispatch import TorchDispatchMode

    from awrsr_kernels._triton import decode, short, tiled, tiled_bwd
    from awrsr_kernels._triton.problem import Problem
    from awrsr_kernels.call import Call, Inputs

    for module in (decode, short, tiled, tiled_bwd):
        monkeypatch.setattr(module, "launch", lambda *_, **arguments: None)
    names = {"sum": "torch_sum", "_to_copy": "torch_cast", "copy_": "torch_copy"}
    ran: list[tuple[str, int, int]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            if name in names:
                ran.append((names[name], args[name == "copy_"].nbytes, result.nbytes))
            return result

    s = replace(SHAPE, L=20 if regime == "short" else 80)
    q, k, v, w, gate = (
        torch.zeros(shape, dtype=getattr(torch, dtype))
        for shape in ((s.B, s.H, s.L, s.D), (s.B, s.H_kv, s.L, s.D), (s.B, s.H_kv, s.L, s.D_v), (1, 1, s.L, s.R), (s.H,))
    )
    dout = q.new_zeros(s.B, s.H, s.L, s.D_v)
    refined = {"none": (None, None, None), "additive": (w, w, gate)}[refinement]
    problem = Problem(Inputs(q, k, v, *refined, None, None), Call(refinement, True, False, False, s.L, False, 0.1, 0.1, 0.0))
    with Record():
        if regime == "short":
            short.launch_short_backward(problem, [dout])
        else:
            tiled_bwd.launch_tiled_backward(problem, [dout], tiled.launch_tiled_forward(problem))
    counted = task_launches(Task(s, refinement, dtype, 0.0, "cpu"), "padded", processors=PROCESSORS)
    assert ran == [(x.kernel, x.read, x.written) for x in counted if x.tile is None]


def test_walks_by_hand() -> None:
    """Five items under tiles of 2 x 2 rows: tiles of two, two and one rows reach 1, 2 and 3 column tiles, and so back."""
    tile = Config(2, 2, 4, 1)
    assert rows_walk(5, tile) == (1 + 2 + 3, 2 + 4 + 5, 3)
    assert columns_walk(5, tile) == (3 + 2 + 1, 5 + 3 + 1, 3)
    assert rows_walk(0, tile) == columns_walk(0, tile) == (0, 0, 0)


def test_seats_by_hand() -> None:
    """In tiles of 16 rows, which take four sequences at most, empty ones included."""
    assert seat((8, 8, 1, 16), 4, 16) == [3]
    assert seat((8, 8, 1, 16), 2, 16) == [1, 2]
    assert seat((1, 1, 1, 1, 1), 5, 16) == [2]
    assert seat((0, 0, 0, 16, 0), 5, 16) == [2]
    assert seat((), 5, 16) == []


def test_a_short_call_by_hand() -> None:
    """300 full sequences of 20 items, one head, D = D_v = 32, R = 16, bfloat16, in tiles of 32 rows: one to a tile.

    Four programs per processor: on 132 of them one sequence each, on 10 runs of eight and one of four.
    """
    task = Task(Shape(300, 1, 1, 20, 32, 32, 16), "simple", "bfloat16", 0.0, "cpu")
    call = CountedCall(task, *calls(task, "padded")[0], packed=False)
    forward = short_launches(call, lambda _: Config(32, 32, 4, 1, 4), 132)[0]
    assert (forward.kernel, forward.programs, forward.starts, forward.drops) == ("short_fwd", 300, 1, 0)
    assert forward.read == 300 * (2 * 20 * 3 * 32) + 2 * (2 * 20 * 16)  # q, k, v of all sequences and the tables once
    assert forward.loaded == 300 * (2 * 20 * 3 * 32) + 300 * 2 * (2 * 20 * 16)  # the tables for every sequence
    assert forward.written == 300 * (2 * 20 * 32)
    assert forward.operations == 300 * 2 * 32 * 32 * (32 + 16 + 16 + 16 + 32)  # QK^T, two tables, Q_A K_A^T, R V
    assert (forward.weights, forward.gradients) == (300 * 2 * 32 * 32, 0)
    assert (forward.chain, forward.chains) == (4, 300 * 4)
    backward = short_launches(call, lambda _: Config(32, 32, 4, 1, 4), 10)[1]
    assert (backward.kernel, backward.programs, backward.starts) == ("short_bwd", 38, 8)
    assert backward.written == 3 * 300 * (2 * 20 * 32) + 38 * 2 * (4 * 32 * 16)  # dQ, dK, dV; partial dW of whole tiles
    assert (backward.weights, backward.gradients) == (300 * 2 * 32 * 32, 300 * 2 * 32 * 32)
    assert (backward.chain, backward.chains) == (8 * 7, 300 * 7)


def test_key_heads_of_several_query_heads() -> None:
    """Their gradients leave in float32, per query head."""
    own, shared = (task_launches(Task(Shape(8, 4, h, 50, 32, 32, 32), "none", "bfloat16", 0.0, "cpu"), "padded") for h in (4, 2))
    assert shared[1].written - own[1].written == 2 * 8 * 4 * 50 * 32 * (4 - 2)
    assert [x.kernel for x in own] == ["short_fwd", "short_bwd"]
    assert [x.kernel for x in shared] == ["short_fwd", "short_bwd", *2 * ("torch_sum", "torch_copy")]


def test_what_is_not_counted() -> None:
    with pytest.raises(ValueError, match="backbone was stochastic, must be dot-product"):
        task_launches(replace(CASES["full"][1], refinement="simple", backbone="stochastic"), "padded")


def test_what_no_kernel_takes() -> None:
    with pytest.raises(ValueError, match=r"D, D_v, R were \(32, 32, 300\), must be at most 256"):
        task_launches(Task(Shape(8, 4, 2, 50, 32, 32, 300), "simple", "bfloat16", 0.0, "cpu"), "padded")


@pytest.mark.parametrize("length", [50, 500])
@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_no_design_moves_less_than_the_ideal(refinement: str, length: int) -> None:
    task = Task(Shape(8, 4, 2, length, 32, 32, 32), refinement, "bfloat16", 0.0, "cpu")
    for p in ("fwd", "bwd"):
        launches = [x for x in task_launches(task, "padded") if x.pass_ == p]
        assert sum(x.bytes for x in launches) >= ideal_bytes(task, "padded", p)
        assert sum(x.operations for x in launches) >= task.flops(p) / 2.5 ** (p == "bwd")
        assert all(x.loaded >= x.read for x in launches)


@pytest.mark.parametrize("layout", ["padded", "bucketed", "packed"])
def test_longer_histories_cost_more(layout: str) -> None:
    totals = []
    for longest in (10, 40, 100, 300):
        task = Task(Shape(4, 2, 2, 300, 32, 32, 32), "value", "bfloat16", 0.1, "cpu", (3, 7, 9, longest), 2)
        launches = task_launches(task, layout)
        totals.append([sum(getattr(x, name) for x in launches) for name in ("loaded", "read", "written")])
    for less, more in zip(totals, totals[1:], strict=False):
        assert all(a <= b for a, b in zip(less, more, strict=True)) and less[0] < more[0]
