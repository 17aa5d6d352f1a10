"""Times from commit to commit at recommender shapes, and of the host alone: `make track` stores them beside the run before.

Under `make test` each case is a single call whose result is looked at. For claims there is `benchmarks/attn_bench.py`.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.operator.measure import gradients
from benchmarks.operator.providers import PROVIDERS
from benchmarks.operator.workloads import Shape, Task, build

from ..conftest import DEVICE

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark (pip install -e '.[dev]')")

SIZES = ((128, 50), (64, 200))  # B, L


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A thread of its own scatters less than several that share a machine with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def histories(batch: int, window: int) -> tuple[int, ...]:
    """As long-tailed as real ones: half of them no longer than a tenth of the window, some as long as it."""
    return tuple(max(1, round(window * ((i + 1) / batch) ** 4)) for i in range(batch))


@pytest.mark.benchmark(warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("pass_", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("size", SIZES, ids=[f"B{b}-L{length}" for b, length in SIZES])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_time(
    backend: str, size: tuple[int, int], layout: str, pass_: str, benchmark: Callable[..., tuple[Tensor, ...]]
) -> None:
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("needs a GPU: the interpreter's time says nothing")
    torch.use_deterministic_algorithms(False)  # the mode for tests fills every new tensor with NaN, which takes time
    b, length = size
    dtype = "float32" if DEVICE == "cpu" else "bfloat16"
    task = Task(Shape(b, 2, 2, length, 32, 32, 32), "simple", dtype, 0.0, DEVICE, histories(b, length), b)
    batch, call = build(task, layout)[0], PROVIDERS[backend].call

    def run() -> tuple[Tensor, ...]:
        out = call(batch)
        found = (out, *gradients(out, batch)) if pass_ == "fwd+bwd" else (out,)
        if out.is_cuda:
            torch.cuda.synchronize()
        return found

    found = benchmark(run)
    assert len(found) == (6 if pass_ == "fwd+bwd" else 1) and all(torch.isfinite(x).all() for x in found)


@pytest.mark.benchmark(warmup=True, warmup_iterations=10)
@pytest.mark.parametrize("pass_", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("length, launches", [(50, 3), (200, 3), (300, 8)])
def test_time_of_the_host(
    length: int, launches: int, pass_: str, benchmark: Callable[..., tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a planned call of the kernels keeps the host busy with, beside Triton's own launches: here these are only counted."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    torch.use_deterministic_algorithms(False)
    launched: list[object] = []
    kind = InterpretedFunction if DEVICE == "cpu" else JITFunction
    monkeypatch.setattr(kind, "__getitem__", lambda kernel, grid: lambda **_: launched.append(kernel))
    batch = build(Task(Shape(1, 2, 2, length, 32, 32, 32), "simple", "float16", 0.0, DEVICE, None, 1), "padded")[0]

    def run() -> tuple[Tensor, ...]:
        launched.clear()
        out = PROVIDERS["triton"].call(batch)
        return (out, *gradients(out, batch)) if pass_ == "fwd+bwd" else (out,)

    for _ in range(3):
        run()
    benchmark(run)
    assert len(launched) == (launches if pass_ == "fwd+bwd" else 1 + (length == 300))
