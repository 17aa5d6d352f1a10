"""Times calls of the operator in turns with two stock attention calls, and prints the ratios as JSON.

    python benchmarks/guard/call_time.py torch         # the torch backend, at a recommender's shapes
    python benchmarks/guard/call_time.py host FOLDER   # what an eager call on the kernels keeps the host busy with

It measures the `awrsr_kernels` that PYTHONPATH names, whatever its commit: beyond the public call it relies on three names, in
`pretend_gpu`. Two stock calls that refine attention weights ("simple") are the yardstick: divided by their time in the same turn, a
time says little about the machine and what else it is doing.

`host` needs no GPU, but a C compiler: Triton's own JIT and launcher run against `cuda_stub.c`, a driver whose calls return at once.
The kernels are compiled for sm_90 and "launched" on tensors in the CPU's memory, whose contents nobody reads; FOLDER
keeps them and the driver. What is missing is what CUDA itself takes.
"""

import ctypes
import functools
import importlib
import itertools
import json
import os
import pkgutil
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awrsr_kernels import (
    RefinedCache,
    refined_attention,
    refined_attention_step,
    refined_attention_varlen,
    stochastic_refined_attention,
)

SHAPES = ((128, 2, 50, 32), (128, 4, 100, 16))  # B, H, L, D
HOST_LENGTHS = (20, 50, 100, 200, 300)  # short, resident and tiled calls
HOST_PACKED = (50, 200)  # of one regime, and of two
SECONDS = 0.5  # of processor time, to take turns in, per figure
Work = tuple[Callable[[], Any], list[Tensor]]  # a call, and the tensors whose gradients it has: none if it has no backward


def random_tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def two_stock_calls(q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor) -> Tensor:
    tables = torch.cat([w_q, w_k], -1).expand(*q.shape[:2], -1, -1)
    refined_q, refined_k = F.scaled_dot_product_attention(q, k, tables, is_causal=True).chunk(2, -1)
    return F.scaled_dot_product_attention(refined_q, refined_k, v, is_causal=True)


def stock(b: int, heads: int, length: int, d: int) -> Work:
    inputs = random_tensors(*3 * [(b, heads, length, d)], *2 * [(length, d)])
    return functools.partial(two_stock_calls, *inputs), inputs


def ours(backend: str, lengths: list[int], heads: int, d: int, dtype: torch.dtype) -> dict[str, Work]:
    """The public call on one batch, padded and packed."""
    b, length, items = len(lengths), max(lengths), sum(lengths)
    padded = random_tensors(*3 * [(b, heads, length, d)], *2 * [(length, d)], dtype=dtype)
    q, k, v, w_q, w_k = packed = random_tensors(*3 * [(items, heads, d)], *2 * [(length, d)], dtype=dtype)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        "padded": (functools.partial(refined_attention, *padded, backend=backend), padded),
        "packed": (functools.partial(refined_attention_varlen, q, k, v, w_q, w_k, bounds, length, backend=backend), packed),
    }


def ratios(name: str, mine: Work, theirs: Work, repeats: int) -> dict[str, list[float]]:
    """Processor time of `mine` divided by that of `theirs`, one ratio per turn, for forward alone and with backward."""

    def timed(work: Callable[[], Any]) -> float:
        began = time.process_time()
        for _ in range(repeats):
            work()
        return time.process_time() - began

    def both(call: Callable[[], Any], inputs: list[Tensor]) -> Callable[[], Any]:
        outs = call()
        douts = [torch.randn_like(out) for out in ([outs] if isinstance(outs, Tensor) else outs)]
        return lambda: torch.autograd.grad(call(), inputs, douts)

    measured: dict[str, list[float]] = {}
    parts = [("fwd", mine[0], theirs[0])] + ([("fwd+bwd", both(*mine), both(*theirs))] if mine[1] else [])
    for part, one, other in parts:
        timed(one), timed(other)  # the first turn compiles, allocates and fills caches
        end, turns = time.process_time() + SECONDS, measured.setdefault(f"{name}, {part}", [])
        while time.process_time() < end or len(turns) < 5:
            turns.append(timed(one) / timed(other))
    return measured


def torch_backend() -> dict[str, list[float]]:
    measured: dict[str, list[float]] = {}
    for b, heads, length, d in SHAPES:
        draw = random.Random(0)  # most histories are short, a few fill the window
        lengths = [min(length, 3 + int(draw.expovariate(1 / 6))) for _ in range(b - 1)] + [length]
        yardstick = stock(b, heads, length, d)  # on the padded batch, whatever the layout of ours
        for layout, call in ours("torch", lengths, heads, d, torch.float32).items():
            measured |= ratios(f"{layout} {b, heads, length, d}", call, yardstick, repeats=1)
    return measured


def host(folder: Path) -> dict[str, list[float]]:
    launches = ctypes.c_long.in_dll(install_stub(folder), "launches")
    pretend_gpu()
    measured: dict[str, list[float]] = {}
    tiny = stock(1, 2, 16, 32)  # so small that only the host's time counts
    for name, call in host_calls().items():
        before = launches.value
        call[0]()
        if launches.value == before:
            raise SystemExit(f"the call {name} launched no kernel on the stub driver: nothing to time")
        measured |= ratios(name, call, tiny, repeats=20)
    return measured


def host_calls() -> dict[str, Work]:
    """Calls of each regime, of two regimes at once (lengths in a window of 200), and with more arguments."""
    calls: dict[str, Work] = {}
    for length in HOST_LENGTHS:
        each = ours("triton", [min(30, length), length], 2, 32, torch.bfloat16)
        calls |= {f"{layout} {length}": call for layout, call in each.items() if layout == "padded" or length in HOST_PACKED}
    options: dict[str, dict[str, Any]] = {"additive 50": {"refinement": "additive"}}
    options |= {f"lengths {length}": {"lengths": torch.tensor([30, length])} for length in HOST_PACKED}
    for name, more in options.items():
        call, inputs = ours("triton", [30, int(name.split()[1])], 2, 32, torch.bfloat16)["padded"]
        calls[name] = functools.partial(call, **more), inputs
    for length in HOST_PACKED:
        inputs = random_tensors(*6 * [(2, 2, length, 32)], *2 * [(length, 32)], dtype=torch.bfloat16)
        calls[f"stochastic {length}"] = functools.partial(stochastic_refined_attention, *inputs, backend="triton"), inputs
    return calls | {"step": (one_step(), [])}


def one_step() -> Callable[[], Tensor]:
    """A step of decoding, always the same."""
    q, k, v = (torch.randn(2, 2, 1, 32, dtype=torch.bfloat16) for _ in "qkv")
    w_q, w_k = (torch.randn(64, 32, dtype=torch.bfloat16) for _ in "qk")
    cache = RefinedCache(2, 64, heads=2, head_dim=32, rank=32, dtype=torch.bfloat16)

    def step() -> Tensor:
        cache.end_bound = cache.length_bound = 9
        return refined_attention_step(q, k, v, w_q, w_k, cache, backend="triton")

    return step


def install_stub(folder: Path) -> ctypes.CDLL:
    """Compile the stub driver, and have Triton compile for sm_90 and launch on it."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise SystemExit("no C compiler (cc, gcc or clang) for the stub driver")
    folder.mkdir(parents=True, exist_ok=True)
    library, source = folder / "libcuda.so.1", Path(__file__).with_name("cuda_stub.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    os.environ |= {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
    os.environ.pop("TRITON_INTERPRET", None)
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # later requests for libcuda.so.1 get this one

    import triton.backends.nvidia.driver as nvidia
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    active = SimpleNamespace(  # what Triton reads from its active driver
        launcher_cls=nvidia.CudaLauncher,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        allocate_default_profile_scratch=lambda *_: None,
    )
    driver.set_active(active)
    active.utils = nvidia.CudaUtils()
    return stub


def pretend_gpu() -> None:
    """Let the library pass tensors in CPU memory to the kernels, as if they were on a GPU with 132 processors.

    The names are replaced in all modules that have them, so that this works on any commit.
    """
    answers: dict[str, Callable[..., Any]] = {
        "unsupported_reason": lambda *_, **__: None,  # nothing keeps the kernels from running
        "processors": lambda *_: 132,
        "readable": lambda *_: False,  # on a GPU the values of lengths are not read
    }
    kernels = importlib.import_module("awrsr_kernels._triton")
    for info in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{info.name}")
    modules = [module for name, module in sys.modules.items() if name.startswith("awrsr_kernels")]
    owners = [*modules, *(x for m in modules for x in vars(m).values() if isinstance(x, type) and x.__module__ == m.__name__)]
    for name, answer in answers.items():
        having = [owner for owner in owners if not isinstance(vars(owner).get(name, sys), ModuleType)]
        if not having:
            raise SystemExit(f"awrsr_kernels no longer has {name}: update pretend_gpu in {__file__}")
        for owner in having:
            setattr(owner, name, answer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(json.dumps(torch_backend() if sys.argv[1] == "torch" else host(Path(sys.argv[2]))))
