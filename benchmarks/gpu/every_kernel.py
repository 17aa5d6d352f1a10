"""Run every kernel once, for sanitizers and profilers.

The calls run forward and backward, with dropout, at a window for each of the regimes: short, resident and tiled. Sanitizers are
slow, so there are few calls: every refinement padded, additive also packed, and one call with grouped queries. Stochastic
attention, which has no resident regime, is only packed. With lags, shift and a plain head there is a call for the short and one
for the tiled regime. A few steps are decoded.

    python -m benchmarks.gpu.every_kernel
    compute-sanitizer --tool racecheck python -m benchmarks.gpu.every_kernel --batch 12 --processors 1
    python -m benchmarks.gpu.every_kernel --batch 512 --windows 50 200 512 --profile kernels.json

Without a GPU the kernels run in Triton's interpreter, which only shows that each of them is reached.
"""

import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from awrsr_kernels import RefinedCache, refined_attention, refined_attention_prefill, refined_attention_step
from awrsr_kernels.checks import REFINEMENTS, STOCHASTIC_ATTENTION_REFINEMENTS
from awrsr_kernels.tuned import replace_file

from ..common.arguments import make_parser
from ..operator.measure import gradients
from ..operator.providers import ours
from ..operator.workloads import BACKBONES, DOT, OPERATOR, STOCHASTIC, Shape, Task, build

WINDOWS = {DOT: (20, 160, 320), STOCHASTIC: (20, 160)}  # one for each regime
CALLS = ("padded", "packed", "grouped", "lagged", "decoding")
LAGGED = (20, 160)  # windows of lagged calls, short and tiled
OPTIONS: dict[str, Any] = {"shift": True, "plain_heads": 1}  # of lagged calls


def problems(
    batch: int, windows: Sequence[int], heads: int, dim: int, dtype: str, device: str, backbone: str = DOT,
    refinements: Sequence[str] = STOCHASTIC_ATTENTION_REFINEMENTS, calls: Sequence[str] = CALLS,
) -> list[tuple[Task, str]]:  # fmt: skip
    """Tasks and their layouts. Histories are of many lengths up to the window, in an order in which long and short ones mix."""

    def task(window: int, refinement: str, query_heads: int) -> Task:
        step = window * 5 // 8 | 1
        users = tuple(1 + (step * i + window - 1) % window for i in range(batch))  # the first fills the window
        shape = Shape(batch, query_heads, heads, window, dim, dim, dim)
        return Task(shape, refinement, dtype, 0.1, device, users=users, batch_size=batch, backbone=backbone)

    found = []
    for window, refinement in itertools.product(windows, OPERATOR[backbone]):
        layouts = {"padded": backbone == DOT, "packed": backbone == STOCHASTIC or refinement == "additive"}
        chosen = [layout for layout, needed in layouts.items() if needed and layout in calls and refinement in refinements]
        found += [(task(window, refinement, heads), layout) for layout in chosen]
    if backbone == DOT and "grouped" in calls:
        window = sorted(windows)[len(windows) // 2]  # of three, the resident one; tiled kernels sum over query heads themselves
        found.append((task(window, "simple", 2 * heads), "padded"))
    return found


def run(problem: tuple[Task, str]) -> None:
    """Forward and backward."""
    for batch in build(*problem):
        found = gradients(ours(batch, "triton"), batch)
        assert all(torch.isfinite(x).all() for x in found)


def lagged(batch: int, windows: Sequence[int], heads: int, dim: int, dtype: str, device: str) -> None:
    """Forward and backward with two lags, shifted, a plain head beside others; histories of many lengths."""
    for window in windows:

        def new(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device).to(getattr(torch, dtype)).requires_grad_()

        heads = max(heads, 2)
        lengths = torch.tensor([window - 7 * i % window for i in range(batch)], device=device)
        given = [*(new(batch, heads, window, dim) for _ in "qkv"), *(new(window, min(dim, 64)) for _ in "qk")]
        gate, lags = new(heads), new(heads, 2)
        out = refined_attention(
            *given, refinement="additive", gate=gate, lags=lags, lengths=lengths, dropout_p=0.1, backend="triton", **OPTIONS
        )
        found = torch.autograd.grad(out.sum(), [*given, gate, lags])
        assert all(torch.isfinite(x).all() for x in (out, *found))


def decode(batch: int, heads: int, dim: int, dtype: str, device: str) -> None:
    """A prompt and a step of every refinement with both kinds of tables; entries of different lengths, the first of 40 items."""
    lengths = torch.tensor([40 - 7 * i % 40 for i in range(batch)], device=device)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(getattr(torch, dtype))

    kinds = [(*kind, False) for kind in itertools.product(REFINEMENTS, ("position", "content"))]
    for refinement, tables, lagged in [*kinds, ("additive", "position", heads > 1)]:
        sizes: dict[str, Any] = {"heads": heads, "head_dim": dim, "rank": dim, "refinement": refinement, "tables": tables}
        options = OPTIONS | {"lags": torch.tensor([0.5, 0.25], device=device)} if lagged else {}
        sizes["lags"] = 2 * lagged
        cache = RefinedCache(batch, 64, dtype=getattr(torch, dtype), device=device, **sizes)
        position = new(64, dim), new(64, dim)
        for length, call in ((40, functools.partial(refined_attention_prefill, lengths=lengths)), (1, refined_attention_step)):
            q, k, v, *content = (new(batch, heads, length, dim) for _ in range(5))
            w_q, w_k = content if tables == "content" else position
            backend = "torch" if length > 1 else "triton"
            assert torch.isfinite(call(q, k, v, w_q, w_k, cache, backend=backend, **options)).all()


def pretend(processors: int | None) -> None:
    """Pretend that the GPU has this many processors: with few, a program of the short regime takes several sequences."""
    if processors:
        from awrsr_kernels._triton.problem import Problem

        Problem.processors = lambda self: processors  # type: ignore[method-assign]


def kernel_times(profile: Any) -> list[dict[str, Any]]:
    """Launches and microseconds of each of our kernels, the longest first, from what torch.profiler saw."""
    rows = []
    for event in profile.key_averages():
        if event.key.startswith("_") and event.key.endswith("_kernel") and event.device_time_total > 0:
            total = float(event.device_time_total)
            rows.append({"kernel": event.key, "launches": event.count, "total_us": total, "mean_us": total / event.count})
    return sorted(rows, key=lambda r: -float(r["total_us"]))


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--backbone", nargs="+", choices=BACKBONES, default=list(BACKBONES), help="backbones to run (default both)")
    parser.add_argument("--batch", type=int, default=3, help="number of sequences (default 3)")
    parser.add_argument(
        "--windows",
        type=int,
        nargs="+",
        metavar="L",
        help="windows of the calls (default 20, 160 and 320; stochastic attention 20 and 160)",
    )
    parser.add_argument(
        "--refinement",
        nargs="+",
        choices=STOCHASTIC_ATTENTION_REFINEMENTS,
        default=list(STOCHASTIC_ATTENTION_REFINEMENTS),
        help="refinements of padded and packed calls (default all)",
    )
    parser.add_argument("--calls", nargs="+", choices=CALLS, default=list(CALLS), help="kinds of calls (default all)")
    parser.add_argument("--heads", type=int, default=2, help="number of query heads and of key heads (default 2)")
    parser.add_argument("--dim", type=int, default=32, help="value of D, D_v and R (default 32)")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="data type (default bfloat16)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="spread the calls over N processes, to fill Triton's cache"
    )
    parser.add_argument(
        "--processors", type=int, metavar="N", help="launch as if the GPU had N processors (default: as many as it has)"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="also run under torch.profiler, and write the times of each kernel to this JSON file",
    )
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype if device == "cuda" or options.dtype != "bfloat16" else "float32"  # not in the interpreter

    if options.profile and device == "cpu":
        parser.error("argument --profile: needs a GPU, and torch finds none here")
    sizes = options.heads, options.dim, dtype, device
    todo = []
    for backbone in (BACKBONES[name] for name in options.backbone):
        windows = options.windows or WINDOWS[backbone]
        todo += problems(options.batch, windows, *sizes, backbone, options.refinement, options.calls)
    steps = [functools.partial(lagged, options.batch, LAGGED, *sizes)] if "lagged" in options.calls else []
    steps += [functools.partial(decode, options.batch, *sizes)] if "decoding" in options.calls else []
    pretend(options.processors)
    if options.processes > 1:
        workers = min(options.processes, len(todo))
        with multiprocessing.get_context("spawn").Pool(workers, pretend, (options.processors,)) as pool:
            pool.map(run, todo, chunksize=1)
    else:
        for problem in todo:
            run(problem)
    for step in steps:
        step()
    more = {"lagged": ", lagged ones", "decoding": ", steps of decoding"}
    print(f"{len(todo)} calls, forward and backward{''.join(text for name, text in more.items() if name in options.calls)}")
    if options.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for problem in todo:
                run(problem)
            for step in steps:
                step()
            torch.cuda.synchronize()
        replace_file(options.profile, json.dumps(kernel_times(profile), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
