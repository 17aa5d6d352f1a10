"""Times calls of the operator in turn with two stock attention calls and prints the ratios, as JSON.

    python benchmarks/guard/call_time.py torch            # the torch backend, at a recommender's shapes
    python benchmarks/guard/call_time.py host             # what an eager call on the kernels keeps the host busy with

It measures the `awrsr_kernels` that PYTHONPATH names, whatever its commit: beyond the public call it relies on three names, in
`pretend_gpu`. Two stock calls that refine attention weights ("simple") are the yardstick: divided by their time in the same turn, a
time says little about the machine and what else it is doing.

`host` needs no GPU, but a C compiler: Triton's own JIT and launcher run against `cuda_stub.c`, a driver whose calls return at once.
The kernels are compiled for sm_90 and "launched" on tensors in the CPU's memory, whose contents nobody reads. What is missing is
what CUDA itself takes.
"""

import argparse
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
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awrsr_kernels import refined_attention, refined_attention_varlen

SHAPES = ((128, 2, 50, 32), (128, 4, 100, 16))  # B, H, L, D
HOST_LENGTHS = (50, 200)  # a short and a tiled call
Work = Callable[[], Tensor]


def random_tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def two_stock_calls(q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor) -> Tensor:
    tables = torch.cat([w_q, w_k], -1).expand(*q.shape[:2], -1, -1)
    refined_q, refined_k = F.scaled_dot_product_attention(q, k, tables, is_causal=True).chunk(2, -1)
    return F.scaled_dot_product_attention(refined_q, refined_k, v, is_causal=True)


def ratios(
    ours: tuple[Work, list[Tensor]], stock: tuple[Work, list[Tensor]], repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Processor time of `ours` over that of `stock`, one ratio per turn, forward alone and with the backward."""

    def timed(work: Callable[[], Any]) -> float:
        began = time.process_time()
        for _ in range(repeats):
            work()
        return time.process_time() - began

    def both(call: Work, inputs: list[Tensor]) -> Callable[[], Any]:
        dout = torch.randn_like(call())
        return lambda: torch.autograd.grad(call(), inputs, dout)

    measured = {}
    for name, mine, theirs in (("fwd", ours[0], stock[0]), ("fwd+bwd", both(*ours), both(*stock))):
        timed(mine), timed(theirs)  # the first turn compiles, allocates and fills caches
        end, measured[name] = time.process_time() + seconds, list[float]()
        while time.process_time() < end or len(measured[name]) < 5:
            measured[name].append(timed(mine) / timed(theirs))
    return measured


def calls(backend: str, lengths: list[int], heads: int, d: int, dtype: torch.dtype) -> dict[str, tuple[Work, list[Tensor]]]:
    """The public call on one batch, padded and packed, each with the tensors whose gradients it has."""
    b, length, items = len(lengths), max(lengths), sum(lengths)
    padded = random_tensors(*3 * [(b, heads, length, d)], *2 * [(length, d)], dtype=dtype)
    q, k, v, w_q, w_k = packed = random_tensors(*3 * [(items, heads, d)], *2 * [(length, d)], dtype=dtype)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {
        "padded": (functools.partial(refined_attention, *padded, backend=backend), padded),
        "packed": (functools.partial(refined_attention_varlen, q, k, v, w_q, w_k, bounds, length, backend=backend), packed),
    }


def torch_backend(seconds: float) -> dict[str, list[float]]:
    measured = {}
    for b, heads, length, d in SHAPES:
        draw = random.Random(0)  # most histories are short, a few fill the window
        lengths = [min(length, 3 + int(draw.expovariate(1 / 6))) for _ in range(b - 1)] + [length]
        inputs = random_tensors(*3 * [(b, heads, length, d)], *2 * [(length, d)])
        stock = functools.partial(two_stock_calls, *inputs), inputs  # on the padded batch, whatever the layout of ours
        for layout, ours in calls("torch", lengths, heads, d, torch.float32).items():
            for work, found in ratios(ours, stock, 1, seconds).items():
                measured[f"{layout} {b, heads, length, d}, {work}"] = found
    return measured


def host(seconds: float, folder: Path) -> dict[str, list[float]]:
    launches = ctypes.c_long.in_dll(install_stub(folder), "launches")
    pretend_gpu()
    tiny = random_tensors(*3 * [(1, 2, 16, 32)], *2 * [(16, 32)])  # so small that the host is all that they cost
    stock = functools.partial(two_stock_calls, *tiny), tiny
    measured = {}
    for length in HOST_LENGTHS:
        for layout, ours in calls("triton", [30, length], 2, 32, torch.bfloat16).items():
            before = launches.value
            ours[0]()
            if launches.value == before:
                raise SystemExit(f"a {layout} call of length {length} launched no kernel on the stub driver: nothing to time")
            for work, found in ratios(ours, stock, 20, seconds).items():
                measured[f"{layout} {length}, {work}"] = found
    return measured


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
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # whoever asks for libcuda.so.1 later gets this one, by its name

    import triton.backends.nvidia.driver as nvidia
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class StubDriver:
        """What Triton asks of its active driver."""

        utils: Any
        launcher_cls = nvidia.CudaLauncher

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def allocate_default_profile_scratch(self, *_: Any) -> None:
            return None

    active = StubDriver()
    driver.set_active(active)
    active.utils = nvidia.CudaUtils()
    return stub


def pretend_gpu() -> None:
    """Let the library hand tensors in the CPU's memory to the kernels, as if a GPU of 132 processors held them.

    The names are replaced in whichever modules have them, so that this works on any commit.
    """
    answers: dict[str, Callable[..., Any]] = {
        "unsupported_reason": lambda *_, **__: None,  # nothing keeps the kernels from running
        "processors": lambda *_: 132,
        "readable": lambda *_: False,  # on a GPU nobody looks at the values of lengths
    }
    kernels = importlib.import_module("awrsr_kernels._triton")
    for info in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{info.name}")
    replaced = set()
    for module in [m for name, m in sys.modules.items() if name.startswith("awrsr_kernels")]:
        classes = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
        for owner in (module, *classes):
            for name in answers.keys() & vars(owner).keys():
                if not isinstance(vars(owner)[name], ModuleType):
                    setattr(owner, name, answers[name])
                    replaced.add(name)
    if missing := answers.keys() - replaced:
        raise SystemExit(f"awrsr_kernels has no {', '.join(sorted(missing))} any more: bring pretend_gpu in {__file__} up to date")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["torch", "host"])
    parser.add_argument("--seconds", type=float, default=0.5, help="of processor time, to take turns in, per figure")
    default = Path(tempfile.gettempdir()) / f"awrsr-cuda-stub-{os.getuid()}"
    parser.add_argument(
        "--folder", type=Path, default=default, help=f"keeps the stub driver and compiled kernels (default {default})"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(json.dumps(torch_backend(options.seconds) if options.what == "torch" else host(options.seconds, options.folder)))


if __name__ == "__main__":
    main()
