"""Calls of the kernels on a stub driver, by compiled handle and by `kernel[grid]`: what Triton's launcher gets, as JSON.

    python -m tests.kernels.launchers FOLDER

FOLDER keeps the stub and compiled kernels. Run this in a process of its own, in which Triton does not interpret.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.guard.call_time import install_stub, pretend_gpu

launched: list[list[Any]] = []


def plain(x: Any) -> Any:
    return x.data_ptr() if isinstance(x, Tensor) else x


def watch(version: str) -> None:
    """Note the arguments of each launch: its grid, the kernel, and what the kernel reads at run time."""
    import triton.backends.nvidia.driver as nvidia
    from triton.runtime import driver

    if version == "3.6":
        compile_module = nvidia.compile_module_from_src

        def compiled(**arguments: Any) -> Any:
            launch = compile_module(**arguments).launch

            def noted(x: int, y: int, z: int, stream: int, function: int, *more: Any) -> None:
                launched.append([x, y, z, stream, function, *more[:2], more[4], [plain(each) for each in more[8:]]])
                launch(x, y, z, stream, function, *more)

            return SimpleNamespace(launch=noted)

        nvidia.compile_module_from_src = compiled
    else:
        launch = driver.active.utils.launch

        def noted(x: int, y: int, z: int, stream: int, function: int, *more: Any) -> None:
            launched.append([x, y, z, stream, function, *more[:3], [plain(each) for each in more[10]]])
            launch(x, y, z, stream, function, *more)

        driver.active.utils.launch = noted


def calls() -> dict[str, Any]:
    from awrsr_kernels import (
        RefinedCache,
        refined_attention,
        refined_attention_step,
        refined_attention_varlen,
        stochastic_refined_attention,
    )

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()

    def padded(length: int, heads: int = 2, **options: Any) -> Any:
        inputs = [drawn(2, 2, length, 32), *(drawn(2, heads, length, 32) for _ in "kv"), *(drawn(length, 32) for _ in "qk")]
        dout = torch.randn(2, 2, length, 32, dtype=torch.bfloat16)
        return lambda: (refined_attention(*inputs, backend="triton", **options), inputs, dout)

    def packed(length: int) -> Any:
        inputs, bounds = [*(drawn(60, 2, 32) for _ in "qkv"), *(drawn(length, 32) for _ in "qk")], torch.tensor([0, 20, 60])
        dout = torch.randn(60, 2, 32, dtype=torch.bfloat16)
        return lambda: (refined_attention_varlen(*inputs, bounds, length, backend="triton"), inputs, dout)

    def stochastic(length: int, **options: Any) -> Any:
        items, tables = [drawn(2, 2, length, 32) for _ in range(6)], [drawn(length, 32) for _ in range(4)]
        douts = [torch.randn(2, 2, length, 32, dtype=torch.bfloat16) for _ in "mc"]
        return lambda: (stochastic_refined_attention(*items, *tables, backend="triton", **options), [*items, *tables], douts)

    def step() -> Any:
        q, k, v, w = (torch.randn(2, 2, 1, 32, dtype=torch.bfloat16) for _ in "qkvw")
        cache = RefinedCache(2, 64, heads=2, head_dim=32, rank=32, tables="content", refinement="value", dtype=torch.bfloat16)
        return lambda: (refined_attention_step(q, k, v, w, w, cache, backend="triton"), [], None)

    lengths = torch.tensor([30, 200])
    return {
        "short": padded(20),
        "additive, dropout": padded(20, refinement="additive", gate=0.5, dropout_p=0.1, dropout_seed=torch.tensor(3)),
        "grouped": padded(20, heads=1),
        "resident": padded(100),
        "tiled": padded(80, causal=False),
        "both": padded(200, lengths=lengths),
        "packed": packed(50),
        "stochastic": stochastic(20, refinement="stochastic"),
        "stochastic, tiled": stochastic(200, refinement="stochastic"),
        "step": step(),
    }


def both_ways(launches: Any, tensors: list[Tensor], pointers: list[int]) -> tuple[list[Any], list[Any]]:
    """The launcher's arguments by handle and by `kernel[grid]`, in the same memory."""
    made = [allocate() for _, allocate in launches.memory]
    launched.clear()
    launches.run_by_handle(pointers, made)
    by_handle = list(launched)
    launched.clear()
    launches.run_by_grid([*tensors, *made])
    by_grid = list(launched)
    for each, (handle, _), launch in zip(by_grid, launches.handles, launches.launches, strict=True):
        order = launch.kernel.arg_names
        if handle.packed:  # what the compiler knows is left out
            each[-1] = [each[-1][order.index(name)] for name in handle.names]
    return by_handle, by_grid


def main(folder: Path) -> dict[str, Any]:
    install_stub(folder)
    import triton

    watch(".".join(triton.__version__.split(".")[:2]))
    pretend_gpu()
    from awrsr_kernels import plans
    from awrsr_kernels._triton.record import Launches

    found: dict[str, Any] = {"triton": triton.__version__}
    for name, call in calls().items():
        plans.forget()
        run, pairs = Launches.run, []

        def twice(launches: Any, tensors: Any, pointers: Any, run: Any = run, pairs: Any = pairs) -> Any:
            if launches.handles is not None:
                pairs.append(both_ways(launches, list(tensors), list(pointers)))
            return run(launches, tensors, pointers)

        Launches.run = twice  # type: ignore[method-assign]
        for _ in range(5):
            out, inputs, dout = call()
            if inputs:
                torch.autograd.grad(out, inputs, dout)
        Launches.run = run  # type: ignore[method-assign]
        found[name] = pairs
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(main(Path(sys.argv[1])), default=str))
