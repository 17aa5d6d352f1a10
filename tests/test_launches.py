"""Bytes and operations counted per launch are those of the kernels themselves, as the interpreter runs them."""

import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from awrsr_kernels.launch_config import Tile
from benchmarks.launches import Call, call_launches, columns_walk, rows_walk, task_launches, tiled_launches
from benchmarks.measure import gradients
from benchmarks.providers import ours
from benchmarks.roofline import ideal_bytes
from benchmarks.workloads import Shape, Task, build

from .conftest import DEVICE

REFINEMENTS = ("none", "simple", "value", "additive")
TILE = Tile(32, 16, 4, 1)  # what the fixture `choose` gives the tiled regime
PROCESSORS = 2  # what launchers assume in the interpreter
USERS = (20, 1, 40)
SHAPE = Shape(B=3, H=2, H_kv=1, L=40, D=8, D_v=12, R=20)


@dataclasses.dataclass
class Meter:
    """What one launch did: bytes by count and, of loads, addresses, so that what is loaded twice counts once."""

    kernel: str
    programs: int
    loaded: int = 0
    written: int = 0
    operations: int = 0
    addresses: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def read(self) -> int:
        return sum(np.unique(a).size * size for size, a in self.by_size())

    def by_size(self) -> Iterator[tuple[int, np.ndarray]]:
        for size in sorted({int(a[0]) for a in self.addresses}):
            yield size, np.concatenate([a[1:] for a in self.addresses if a[0] == size])


@pytest.fixture
def meters(monkeypatch: pytest.MonkeyPatch) -> list[Meter]:
    """A meter per launch, filled as launches run. Numbers per program (bounds, gates, the seed) are not counted."""
    if DEVICE != "cpu":
        pytest.skip("the counts are read off Triton's interpreter, which a machine with a GPU does not use here")
    pytest.importorskip("triton", reason="needs Triton")
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

    from awrsr_kernels._triton import short, tiled, tiled_bwd

    found: list[Meter] = []
    load, store, dot = (getattr(InterpreterBuilder, f"create_{x}") for x in ("masked_load", "masked_store", "dot"))

    def count_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        if ptrs.data.size > 1:
            size = np.dtype(_get_np_dtype(ptrs.get_element_ty())).itemsize
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

    for module in (short, tiled, tiled_bwd):
        watch(module)
    return found


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("refinement", REFINEMENTS)
@pytest.mark.parametrize("regime", ["short", "tiled"])
def test_counts_are_what_the_kernels_do(
    regime: str, refinement: str, layout: str, meters: list[Meter], choose: Callable[[str], str]
) -> None:
    dtype = "float16" if layout == "padded" else "float32"
    task = Task(SHAPE, refinement, dtype, 0.1, "cpu", users=USERS, batch_size=len(USERS))
    backend = choose(regime)
    batch = build(task, layout)[0]
    gradients(ours(batch, backend), batch)
    call = Call(SHAPE, refinement, dtype, True, USERS, SHAPE.L, layout == "packed")
    counted = tiled_launches(call, lambda _: TILE, PROCESSORS) if regime == "tiled" else call_launches(call, processors=PROCESSORS)
    kernels = [x for x in counted if x.tile is not None]
    assert [(x.kernel, x.programs) for x in kernels] == [(m.kernel, m.programs) for m in meters]
    for launch, meter in zip(kernels, meters, strict=True):
        for name in ("loaded", "read", "written", "operations"):
            assert getattr(launch, name) == getattr(meter, name), (launch.kernel, launch.stage, name)


def test_torchs_own_kernels_are_counted() -> None:
    """What follows a backward: the sum of the partials, fitted to the table, cast to its dtype."""
    pytest.importorskip("triton", reason="needs Triton")
    from torch.utils._python_dispatch import TorchDispatchMode

    from awrsr_kernels._triton.launch import Problem
    from awrsr_kernels.layout import Call as KernelCall
    from awrsr_kernels.layout import Inputs

    ran: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    q, w = torch.zeros(3, 2, 40, 8, dtype=torch.float16), torch.zeros(1, 1, 40, 20, dtype=torch.float16)
    call = KernelCall("simple", True, False, False, 40, False, 0.1, 0.1, 0.0)
    problem = Problem(Inputs(q, q, q, w, w, None, None, None), call)
    with Record():
        for _ in "qk":
            problem.sum_tables(torch.zeros(2, 2, 64, 20))
    kernels = [x for x in ran if x not in ("zeros", "view", "slice", "_unsafe_view")]
    counted = [x for x in call_launches(Call(SHAPE, "simple", "float16", False, USERS, 40, False)) if x.tile is None]
    names = {"sum": "torch_sum", "constant_pad_nd": "torch_pad", "_to_copy": "torch_cast"}
    assert [names[x] for x in kernels] == [x.kernel for x in counted]


def test_walks_by_hand() -> None:
    """Five items under tiles of 2 x 2 rows: tiles of two, two and one rows reach 1, 2 and 3 column tiles, and so back."""
    tile = Tile(2, 2, 4, 1)
    assert rows_walk(5, tile) == (1 + 2 + 3, 2 + 4 + 5, 3)
    assert columns_walk(5, tile) == (3 + 2 + 1, 5 + 3 + 1, 3)
    assert rows_walk(0, tile) == columns_walk(0, tile) == (0, 0, 0)


def test_a_short_forward_by_hand() -> None:
    """Two full sequences of 20 items, one head, D = D_v = 32, R = 16, bfloat16, in a tile of 32 rows."""
    task = Task(Shape(2, 1, 1, 20, 32, 32, 16), "simple", "bfloat16", 0.0, "cpu")
    forward = task_launches(task, "padded")[0]
    assert (forward.kernel, forward.programs, forward.drops) == ("short_fwd", 2, 0)
    assert forward.read == 2 * (2 * 20 * 3 * 32) + 2 * (2 * 20 * 16)  # q, k, v of two sequences and the tables once
    assert forward.loaded == 2 * (2 * 20 * 3 * 32) + 2 * 2 * (2 * 20 * 16)  # each program asks for the tables
    assert forward.written == 2 * (2 * 20 * 32)
    assert forward.operations == 2 * 2 * 32 * 32 * (32 + 16 + 16 + 16 + 32)  # QK^T, two tables, Q_A K_A^T, R V
    assert (forward.weights, forward.gradients) == (2 * 2 * 32 * 32, 0)
    backward = task_launches(task, "padded")[1]
    assert (backward.weights, backward.gradients) == (2 * 2 * 32 * 32, 2 * 2 * 32 * 32)


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
