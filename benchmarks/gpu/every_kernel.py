"""Run every kernel once, for sanitizers and profilers.

The calls run forward and backward, padded and packed, with dropout; a few steps are decoded. Stochastic attention is only
packed, since both layouts use the same kernels and sanitizers are slow.

    python -m benchmarks.gpu.every_kernel
    compute-sanitizer --tool racecheck python -m benchmarks.gpu.every_kernel --batch 12 --processors 1
    python -m benchmarks.gpu.every_kernel --batch 512 --windows 50 512 --profile kernels.json

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

from awrsr_kernels import RefinedCache, refined_attention_prefill, refined_attention_step
from awrsr_kernels.checks import REFINEMENTS
from awrsr_kernels.tuned import replace_file

from ..common.arguments import make_parser
from ..operator.measure import gradients
from ..operator.providers import ours
from ..operator.workloads import BACKBONES, DOT, OPERATOR, Shape, Task, build

WINDOWS = (20, 160)  # one for the short regime, one for the tiled


def problems(
    batch: int, windows: Sequence[int], heads: int, dim: int, dtype: str, device: str, backbone: str = DOT
) -> list[tuple[Task, str]]:
    """A task and a layout for each regime, refinement and layout; histories of every length between nothing much and the window."""
    found = []
    for window in windows:
        users = tuple(1 + (7 * i + window - 1) % window for i in range(batch))  # the first fills the window
        for refinement in OPERATOR[backbone]:
            shape = Shape(batch, heads, heads, window, dim, dim, dim)
            task = Task(shape, refinement, dtype, 0.1, device, users=users, batch_size=batch, backbone=backbone)
            found += [(task, layout) for layout in (("padded", "packed") if backbone == DOT else ("packed",))]
    return found


def run(problem: tuple[Task, str]) -> None:
    """Forward and backward."""
    for batch in build(*problem):
        found = gradients(ours(batch, "triton"), batch)
        assert all(torch.isfinite(x).all() for x in found)


def decode(batch: int, heads: int, dim: int, dtype: str, device: str) -> None:
    """A prompt and a step of every refinement with both kinds of tables; entries of different lengths, the first of 40 items."""
    lengths = torch.tensor([40 - 7 * i % 40 for i in range(batch)], device=device)

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(getattr(torch, dtype))

    for refinement, tables in itertools.product(REFINEMENTS, ("position", "content")):
        sizes: dict[str, Any] = {"heads": heads, "head_dim": dim, "rank": dim, "refinement": refinement, "tables": tables}
        cache = RefinedCache(batch, 64, dtype=getattr(torch, dtype), device=device, **sizes)
        position = new(64, dim), new(64, dim)
        for length, call in ((40, functools.partial(refined_attention_prefill, lengths=lengths)), (1, refined_attention_step)):
            q, k, v, *content = (new(batch, heads, length, dim) for _ in range(5))
            w_q, w_k = content if tables == "content" else position
            assert torch.isfinite(call(q, k, v, w_q, w_k, cache, backend="torch" if length > 1 else "triton")).all()


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
        "--windows", type=int, nargs="+", default=WINDOWS, metavar="L", help="windows of the calls (default 20 and 160)"
    )
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
    sizes = options.batch, options.windows, options.heads, options.dim, dtype, device
    todo = [problem for name in options.backbone for problem in problems(*sizes, BACKBONES[name])]
    pretend(options.processors)
    if options.processes > 1:
        workers = min(options.processes, len(todo))
        with multiprocessing.get_context("spawn").Pool(workers, pretend, (options.processors,)) as pool:
            pool.map(run, todo, chunksize=1)
    else:
        for problem in todo:
            run(problem)
    decode(options.batch, options.heads, options.dim, dtype, device)
    print(f"{len(todo)} calls, forward and backward, and steps of decoding")
    if options.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for problem in todo:
                run(problem)
            decode(options.batch, options.heads, options.dim, dtype, device)
            torch.cuda.synchronize()
        replace_file(options.profile, json.dumps(kernel_times(profile), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
