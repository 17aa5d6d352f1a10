"""What the kernels compile to, without a GPU: registers, stack (spills), shared memory, tensor-core instructions.

    python benchmarks/compile_report.py                                   # every refinement, bfloat16, sm_90
    python benchmarks/compile_report.py --arch sm_80 gfx942 --length 512 --dim 128 --rank 128 --dtype float16

A launch is replaced by Triton's own warm-up on tensors without memory, under a driver that claims the wanted GPU; so what
compiles is what a real launch would compile, alignment of pointers included.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ARCHITECTURES = {  # backend, architecture, lanes of a warp, bytes of shared memory that a program may have
    "sm_80": ("cuda", 80, 32, 166912),
    "sm_90": ("cuda", 90, 32, 232448),
    "sm_100": ("cuda", 100, 32, 232448),
    "sm_120": ("cuda", 120, 32, 101376),
    "gfx942": ("hip", "gfx942", 64, 65536),
}
REFINEMENTS = ("none", "simple", "value", "additive")


class Case(NamedTuple):
    """One call to compile forward and backward. group: query heads per key head. tables: "shared", "head" or "entry"."""

    arch: str
    refinement: str
    dtype: str
    length: int
    dim: int
    rank: int
    dropout_p: float = 0.1
    group: int = 1
    tables: str = "shared"
    batch: int = 4


class _Driver:
    """Stands in for the GPU driver: names a target, and nothing more is asked of it."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(case: Case) -> list[dict[str, Any]]:
    """A row per kernel that the call launches ("variant" tells binaries apart).

    For a process of its own, in which Triton does not interpret.
    """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from awrsr_kernels._triton import short, tiled, tiled_bwd
    from awrsr_kernels._triton.launch import Problem
    from awrsr_kernels.layout import Call, Inputs

    backend, architecture, lanes, shared = ARCHITECTURES[case.arch]
    driver.set_active(_Driver(GPUTarget(backend, architecture, lanes)))
    rows: list[dict[str, Any]] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], tile: Any, device: Any, **arguments: Any) -> None:
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
        compiled = kernel.warmup(grid=grid, **arguments, **options)
        stage = (" 1" if arguments["TABLES"] else " 2") if "TABLES" in arguments and table is not None else ""
        name = kernel.__name__.strip("_").removesuffix("_kernel") + stage
        row = {**case._asdict(), "kernel": name, "tile": list(tile), "variant": compiled.hash}
        rows.append(row | _resources(compiled, backend))

    for module in (short, tiled, tiled_bwd):
        module.launch = compile_only  # type: ignore[attr-defined]
    dtype, heads = getattr(torch, case.dtype), 2 * case.group

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = (new(case.batch, h, case.length, case.dim) for h in (heads, heads // case.group))
    shapes = {"shared": (1, 1), "head": (1, heads), "entry": (case.batch, heads)}
    table = None if case.refinement == "none" else new(*shapes[case.tables], case.length, case.rank)
    gate = new(heads) if case.refinement == "additive" else None
    seed = new(dtype=torch.int64) if case.dropout_p else None
    per_entry = case.tables == "entry"
    call = Call(case.refinement, True, False, True, case.length, per_entry, 0.1, 0.1, case.dropout_p)
    problem = Problem(Inputs(q, k, k, table, table, gate, new(case.batch, dtype=torch.int64), seed), call)
    problem.shared = shared
    if problem.is_short():
        short.short_backward(problem, q, short.short_forward(problem)[1:])
    else:
        tiled_bwd.tiled_backward(problem, q, tiled.tiled_forward(problem))
    return rows


def _resources(compiled: Any, backend: str) -> dict[str, int]:
    """registers, stack (bytes per thread that did not fit in registers), shared (bytes), tensor_core (instructions)."""
    found = {"shared": compiled.metadata.shared}
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
        return found | {"registers": registers, "stack": 4 * spilled, "tensor_core": text.count("v_mfma")}
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([str(tool), option, str(binary)], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return found | {"registers": registers, "stack": stack, "tensor_core": len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", sass))}


def compile_cases(cases: list[Case], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows of all cases, in order, compiled in `jobs` processes; a case that fails yields one row with an "error"."""
    environment = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(compile_case, case) for case in cases]
            for case, future in zip(cases, futures, strict=True):
                try:
                    yield from future.result()
                except Exception as error:
                    yield {**case._asdict(), "error": f"{type(error).__name__}: {error}"}
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], choices=list(ARCHITECTURES))
    parser.add_argument("--refinement", nargs="+", default=list(REFINEMENTS), choices=REFINEMENTS)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--length", nargs="+", type=int, default=[64, 512], help="window; up to 128 is the short regime's")
    parser.add_argument("--dim", nargs="+", type=int, default=[64], help="D and D_v")
    parser.add_argument("--rank", nargs="+", type=int, help="R, one per --dim (default: equal to it)")
    parser.add_argument("--group", type=int, default=1, help="query heads per key head")
    parser.add_argument("--tables", default="shared", choices=["shared", "head", "entry"])
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout_p; 0 compiles without")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    given = parser.parse_args()
    cases = [
        Case(arch, refinement, dtype, length, dim, rank, given.dropout, given.group, given.tables)
        for arch in given.arch
        for dtype in given.dtype
        for length in given.length
        for dim, rank in zip(given.dim, given.rank or given.dim, strict=True)
        for refinement in given.refinement
    ]
    rows = []
    columns = f"{'kernel':20}{'tile':>12}{'regs':>6}{'stack':>7}{'shared':>8}{'mma':>5}"
    print(f"{'arch':7}{'dtype':9}{'L':>5}{'D':>4}{'R':>4} {'refinement':10} {columns}")
    for row in compile_cases(cases, given.jobs):
        rows.append(row)
        head = f"{row['arch']:7}{row['dtype']:9}{row['length']:5}{row['dim']:4}{row['rank']:4} {row['refinement']:10} "
        if "error" in row:
            print(head + row["error"])
        else:
            print(
                f"{head}{row['kernel']:20}{'x'.join(map(str, row['tile'])):>12}{row['registers']:6}{row['stack']:7}"
                f"{row['shared']:8}{row['tensor_core']:5}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
