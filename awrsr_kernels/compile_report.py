"""Compile every configuration of the launch table, without a GPU, and report registers, spills and shared memory.

    python -m awrsr_kernels.compile_report --target sm_90 --json report.json
    python -m awrsr_kernels.compile_report --target all                          # also: make compile-report
    python -m awrsr_kernels.compile_report --backbone dot --refinement additive --dtype bfloat16 --length 64 --width 64

Each kernel is a row: registers, bytes per thread spilled to local memory, shared memory, tensor-core instructions, loads from and
stores to device memory by width, and how many programs a multiprocessor can hold. On sm_80 and sm_90 also, per causal head of full
length: issue slots of a scheduler, and exponentials computed over those needed (`issue_slots.py`). The length is the largest of the
class, in the resident class 200 and for `issue_slots_100` 100, in the tiled class 512. `budget_ok` is true if the kernel compiles,
fits the chip, uses tensor cores where its products should, spills no more than `spill_budget` allows, reads no register that was
never set, and is within its budgets of slots and exponentials. The exit status is 1 if any row is not ok.

Instead of launching kernels, the report runs Triton's own warm-up on tensors without memory, with a driver that claims to be the
target GPU. It therefore compiles what a real launch would compile, including the alignment of pointers. Rows are cached by a hash
of the kernels' sources.
"""

import argparse
import collections
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from . import issue_slots
from .checks import REFINEMENTS, STOCHASTIC_ATTENTION_REFINEMENTS
from .launch_config import LENGTHS, RESIDENT, STEP, TABLE, TILED, WIDTHS, Config, Key, is_resident, is_short
from .tuned import cache_folder, replace_file


class Target(NamedTuple):
    """A chip. shared: bytes of shared memory that one program may use. processor_shared: bytes of all programs of a processor."""

    backend: str
    architecture: Any
    lanes: int
    shared: int
    processor_shared: int
    warps: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166912, 167936, 64),
    "sm_90": Target("cuda", 90, 32, 232448, 233472, 64),
    "sm_100": Target("cuda", 100, 32, 232448, 233472, 64),
    "gfx942": Target("hip", "gfx942", 64, 65536, 65536, 32),
}
DTYPES = ("bfloat16", "float16", "float32")
REGISTERS = 65536  # of an NVIDIA processor
BATCH = 64
COMPARED = 3  # rows that lagged cases compare
WITHOUT_PRODUCTS = ("sum", "widen", "gather")  # how names of such kernels begin
# (refinement, whether attention is stochastic)
KINDS = [(r, False) for r in REFINEMENTS] + [(r, True) for r in STOCHASTIC_ATTENTION_REFINEMENTS]


class CompileCase(NamedTuple):
    """A call, compiled forward and backward with the largest sizes of its classes, or a step of decoding."""

    target: str
    refinement: str
    dtype: str
    dropout: bool
    length: int  # class in LENGTHS, TILED, or STEP
    width: int
    group: int = 1  # query heads per key head
    stochastic: bool = False  # attention, not refinement; sizes as `table_features` counts them
    lagged: bool = False  # with two lags, shifted, and a plain head

    def columns(self) -> dict[str, Any]:
        """The fields as a row has them; "gaussian" is `stochastic` as in the rows of earlier commits, which `make guard` reads."""
        return {"gaussian" if name == "stochastic" else name: value for name, value in self._asdict().items()}


def cases(target: str) -> list[CompileCase]:
    """Every call whose configurations the table can return on a target."""
    shared, every = TARGETS[target].shared, []
    for dtype in DTYPES:
        itemsize = 2 if dtype != "float32" else 4
        for length in (*LENGTHS, RESIDENT, TILED):
            for width in WIDTHS:
                needed = TABLE[Key("tiled_fwd", TILED, width, itemsize)][-1].shared
                tiled = TARGETS[target].backend == "hip" or needed <= shared
                for name, stochastic in KINDS:
                    sizes = (width, width, width), itemsize, shared, stochastic
                    resident = length == RESIDENT and is_resident(length, True, *sizes)
                    if tiled if length == TILED else resident or is_short(length, *sizes):
                        every += [CompileCase(target, name, dtype, d, length, width, 1, stochastic) for d in (False, True)]
                        lagged = length == TILED or (length != RESIDENT and is_short(length, *sizes, lagged=True))
                        if name == "additive" and not stochastic and lagged:
                            every += [CompileCase(target, name, dtype, d, length, width, lagged=True) for d in (False, True)]
        every += [CompileCase(target, name, dtype, False, STEP, width) for width in WIDTHS for name in REFINEMENTS]
    return every


def sample() -> list[CompileCase]:
    """The cases that the tests compile: each kernel, regime and refinement once on sm_90, and one call on every other target."""
    chosen = [CompileCase("sm_90", r, "bfloat16", True, length, 64, 1, g) for length in (64, TILED) for r, g in KINDS]
    chosen += [CompileCase("sm_90", r, "bfloat16", True, RESIDENT, 32) for r in REFINEMENTS]
    chosen += [CompileCase("sm_90", r, "bfloat16", False, STEP, 64) for r in REFINEMENTS]
    chosen += [CompileCase("sm_90", "additive", "bfloat16", True, length, 64, lagged=True) for length in (64, TILED)]
    chosen += [CompileCase("sm_90", "none", "bfloat16", False, 16, 64, 2, True)]  # grouped queries have a sum of their own
    others = {"sm_80": (64, "float16"), "sm_100": (TILED, "bfloat16"), "gfx942": (TILED, "bfloat16")}
    return chosen + [CompileCase(target, "none", dtype, True, length, 64) for target, (length, dtype) in others.items()]


def spill_budget(case: CompileCase, kernel: str) -> int:
    """Bytes per thread that a kernel may keep in local memory: what was found on sm_90, and why.

    Forward kernels with up to 128 features, and the short backward in half precision with up to 64, keep everything in registers.
    The exception is "additive" with dropout and 64 rows, which is 14 registers short: the gradient of M and both weights are live
    at the same time as the sums for the tables, which take 64; they are spilled once a tile. Grouped-query gradients are written in
    float32, which takes a few registers as well. In stochastic attention, the squares and their gradient take another 48
    registers. 64 rows then spill 88 bytes (refinement "simple") to 632 bytes ("stochastic", which also holds its points); twice the
    warps would halve that, but also the programs of a processor. The tiled forward of "additive", which holds the tiles of P and R
    in stage 2, is two words short in float32. Wider or float32 tiles hold twice as much on chip; there, less spilling would cost
    occupancy or more launches. A step of decoding spills nothing on any target, except for a word or two in float32 with 256
    features, with any tile. The sums over parts of gradients (`_triton/reduce.py`) spill nothing anywhere.

    The short backward of a lagged call holds the scores and their gradient in two places, and the matrix that moves rows: 64 rows
    spill up to 616 bytes, 32 rows up to 208. Its forward spills nothing in half precision with up to 64 features, otherwise up to
    112 bytes.

    The resident backward holds tiles of both weights, their gradients, and up to four sums: it spills up to 340 bytes with 32
    features and 1.1 KB with 64. Twice the warps would spill less, but compute every exponential twice.

    The table was chosen for sm_90. On other targets, forward kernels keep at most 408 bytes in local memory. Backward kernels keep
    up to 1.1 KB on gfx942, 1.3 KB on sm_100 (256 features) and 1.8 KB on sm_80, whose tensor cores need in registers the operands
    of a 64-row tile that sm_90 reads from shared memory. Twice the warps spill as much there, so that is left to `python -m
    awrsr_kernels.tune`.
    """
    half = case.dtype != "float32"
    if kernel.startswith(WITHOUT_PRODUCTS):
        return 0
    if case.length == STEP:
        return 0 if half or case.width <= 128 else 8
    if case.target != "sm_90":
        return 512 if "fwd" in kernel else 2048
    if "resident" in kernel and half:
        return 0 if "fwd" in kernel else 352 if case.width <= 32 else 1152
    if "fwd" in kernel and case.width <= 128:
        if case.lagged and "short" in kernel and (case.width == 128 or not half):
            return 128
        return 0 if half or not (case.stochastic and case.refinement == "additive" and "tiled" in kernel) else 8
    if "fwd" in kernel:
        return 512
    if "short" in kernel and half and case.width <= 64:
        if case.lagged:
            return 640 if case.length == 64 else 224
        if case.stochastic:
            return 640 if case.length == 64 else 0
        return 128 if case.group > 1 else 64 if case.refinement == "additive" and case.dropout and case.length == 64 else 0
    return 1024 if half or "short" in kernel else 2048


def _claim_gpu(name: str) -> None:
    """Install a driver that reports a target, which is all that a warm-up needs."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget(*TARGETS[name][:3])
    number = list(TARGETS).index(name)  # one per target: Triton remembers binaries, and the target itself, by device
    driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: number, get_current_stream=lambda device: 0)
    )


def compile_case(case: CompileCase, window: int = 0, batch: int = BATCH) -> list[dict[str, Any]]:
    """A row per kernel that the call launches ("variant" distinguishes binaries). window: replaces the largest length of the class.

    Call this in a process of its own, in which Triton does not interpret.
    """
    import torch

    from ._triton import decode, lags, reduce, resident, resident_bwd, short, tiled, tiled_bwd, tiled_tables
    from ._triton.problem import Problem
    from ._triton.ptxas import sound_ptxas
    from .call import Call, Inputs

    _claim_gpu(case.target)
    rows: list[dict[str, Any]] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], config: Any, device: Any, **arguments: Any) -> None:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
        with sound_ptxas():
            compiled = kernel.warmup(grid=grid, **arguments, **options)
        stage = ("_stage1" if arguments["TABLES"] else "_stage2") if "TABLES" in arguments and table is not None else ""
        name = kernel.__name__.strip("_").removesuffix("_kernel") + stage
        rows.append(_row(case, name, config._asdict(), compiled) | {"variant": compiled.hash})

    for module in (decode, lags, reduce, short, resident, resident_bwd, tiled, tiled_bwd, tiled_tables):
        module.launch = compile_only  # type: ignore[attr-defined]
    dtype, heads = getattr(torch, case.dtype), 2 * case.group
    length = window or (512 if case.length in (TILED, STEP) else case.length)

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    d_v, both = case.width // (1 + case.stochastic), case.stochastic and case.refinement == "additive"
    d = rank = case.width // (1 + both)
    if case.lagged and case.length == TILED:
        rank = case.width // COMPARED
    q, k = (new(batch, h, length, d) for h in (heads, 2))
    v, dout = (new(batch, h, length, d_v) for h in (2, heads))
    table = None if case.refinement == "none" else new(1, 1, length, rank)
    gate = new(heads) if case.refinement == "additive" else None
    if case.length == STEP:  # k and v are the cache's
        q, k_new, v_new, bound = new(batch, heads, 1, d), new(batch, 2, 1, d), new(batch, 2, 1, d), new(batch, dtype=torch.int64)
        k_a = None if table is None else new(batch, heads, length, rank)
        y = new(batch, heads, length, d_v) if case.refinement == "value" else None
        kept = k, v, k_a, y, None, None, bound, bound
        decode.launch_step(q, k_new, v_new, table, table, gate, *kept, case.refinement, 0.1, 0.1)
        return rows
    seed = new(dtype=torch.int64) if case.dropout else None
    call = Call(case.refinement, True, False, True, length, False, 0.1, 0.1, 0.1 * case.dropout, case.stochastic)
    factors = None
    if case.lagged:
        call, factors = call._replace(shift=True, plain_heads=1), new(heads, COMPARED - 1)
    bounds, v_cov, douts = new(batch, dtype=torch.int64), v if case.stochastic else None, [dout] * (1 + case.stochastic)
    problem = Problem(Inputs(q, k, v, table, table, gate, bounds, seed, v_cov, factors), call)
    problem.shared = TARGETS[case.target].shared
    if problem.is_short():
        short.launch_short_forward(problem)
        gradients = short.launch_short_backward(problem, douts)
    elif problem.is_resident():
        gradients = resident_bwd.launch_resident_backward(problem, douts, resident.launch_resident_forward(problem))
    else:
        gradients = tiled_bwd.launch_tiled_backward(problem, douts, tiled.launch_tiled_forward(problem))
    gradients.summed()
    return rows


def _row(case: CompileCase, kernel: str, config: dict[str, int], compiled: Any) -> dict[str, Any]:
    target = TARGETS[case.target]
    usage = _amd(compiled) if target.backend == "hip" else _nvidia(compiled)
    sass = usage.pop("sass", None)
    counts = {} if sass is None else issue_slots.columns(sass, kernel, Config(**config), **case._asdict())
    usage["shared_bytes"] = compiled.metadata.shared
    budget = spill_budget(case, kernel)
    if target.backend == "hip" or target.architecture >= 100:  # these have other instructions
        usage["unset_registers"] = 0
    fits = usage["shared_bytes"] <= target.shared and usage["spill_bytes"] <= budget and not usage["unset_registers"]
    regime = kernel.split("_")[0]
    tensor_cores = case.length != STEP and not kernel.startswith(WITHOUT_PRODUCTS)
    regime = regime if regime in ("short", "resident", "tiled") else "other"
    row = {"kernel": kernel, "regime": regime, **case.columns(), "config": config}
    row |= usage | {"programs_per_processor": _occupancy(target, usage, config["num_warps"]), "tensor_cores_expected": tensor_cores}
    expected = tensor_cores == (usage["tensor_core_instructions"] > 0)
    return row | counts | {"spill_budget": budget, "budget_ok": fits and expected and not issue_slots.over_budget(counts)}


def _occupancy(target: Target, usage: dict[str, Any], warps: int) -> int:
    """How many programs a processor holds, limited by registers, shared memory and warps."""
    by_shared = target.processor_shared // (usage["shared_bytes"] + (1024 if target.backend == "cuda" else 1))
    if target.backend == "hip":  # four units of 512 registers a lane
        waves = 4 * min(8, 512 // max(8, usage["registers"]))
        return min(by_shared, waves // warps) if warps else 0
    per_warp = -(-usage["registers"] // 8) * 8 * target.lanes
    return min(by_shared, REGISTERS // per_warp // warps, target.warps // warps, 32)


def _nvidia(compiled: Any) -> dict[str, Any]:
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
    bytes_of = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

    def widths(name: str) -> dict[str, int]:
        suffixes = (re.search(r"\.(128|64|U16|S16|U8|S8)\b", x) for x in re.findall(rf"\b{name}[\w.]*", sass))
        return _counted(bytes_of[m[1]] if m else 4 for m in suffixes)

    tensor = len(re.findall(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", sass))
    counts: dict[str, Any] = {"registers": registers, "spill_bytes": stack, "tensor_core_instructions": tensor}
    counts |= {"unset_registers": len(unset_registers(sass)), "loads": widths("LDG"), "stores": widths("STG")}
    return counts | {"sass": sass}


def _counted(sizes: Iterable[int]) -> dict[str, int]:
    """The number of instructions by bytes per thread."""
    return {str(size): count for size, count in sorted(collections.Counter(sizes).items())}


def _uniform(text: str, wide: int) -> set[int]:
    """Numbers of the uniform registers in an operand, each the first of `wide`."""
    return {int(x) + more for x in re.findall(r"\bUR(\d+)\b", text) for more in range(wide)}


def unset_registers(sass: str) -> list[str]:
    """Instructions that read a uniform register that nothing above them writes; see `_triton/ptxas.py`.

    In code for compute capability 8.0 to 9.0.
    """
    written, unset = {-1}, []
    for line in re.findall(r"/\*[0-9a-f]{4,5}\*/\s+([^;]+);", sass):
        instruction = re.sub(r"^@!?U?P\w+\s+", "", line.strip())
        name, _, rest = instruction.partition(" ")
        into, *operands = rest.split(",")
        wide = 4 if ".128" in name else 2 if ".64" in name else 1  # registers of an operand
        if not re.match(r"U|R2UR|S2UR|CS2UR|VOTEU|REDUX", name):
            into, operands, wide = "", [into, *operands], 1  # its destination is not a uniform register
        for text in operands:
            if "gdesc" not in text and not _uniform(text, wide) <= written:  # a descriptor names more registers than it reads
                unset.append(instruction)
        written |= _uniform(into, 2 if ".WIDE" in name else wide)
    return unset


def _amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))  # type: ignore[index]
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2, "short_d16": 2, "ubyte": 1}

    def widths(kind: str) -> dict[str, int]:
        return _counted(sizes.get(x, 2) for x in re.findall(rf"(?:global|buffer)_{kind}_(\w+)", text))

    counts = {"registers": registers, "spill_bytes": 4 * spilled, "tensor_core_instructions": text.count("v_mfma")}
    return counts | {"loads": widths("load"), "stores": widths("store")}


def _source_hash() -> str:
    """A hash of everything that decides what a kernel compiles to."""
    import triton

    root, digest = Path(__file__).parent, hashlib.sha256(triton.__version__.encode())
    others = (root / f"{name}.py" for name in ("call", "dropout", "issue_slots", "launch_config", "tuned"))
    for path in sorted([*root.glob("_triton/*.py"), *others, Path(__file__)]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _cached(case: CompileCase, folder: Path) -> list[dict[str, Any]]:
    """Rows of a case, read or compiled: in a process of its own, as it must not interpret."""
    os.environ.pop("TRITON_INTERPRET", None)
    path = folder / ("-".join(str(x) for x in case) + ".json")
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    try:
        rows = compile_case(case)
    except Exception as error:
        message = (str(error) or repr(error)).splitlines()[0][:200]
        return [case.columns() | {"kernel": "fwd and bwd", "budget_ok": False, "error": f"{type(error).__name__}: {message}"}]
    replace_file(path, json.dumps(rows))
    return rows


def compile_cases(chosen: list[CompileCase], jobs: int, cache: Path) -> Iterator[list[dict[str, Any]]]:
    """Rows of each case, in order, compiled in `jobs` processes; a case that fails yields one row with an "error"."""
    folder = cache / _source_hash()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_cached, chosen, itertools.repeat(folder))


def _line(row: dict[str, Any]) -> str:
    length = {TILED: ">256", STEP: "1"}.get(row["length"], row["length"])
    name = row["refinement"] + (" W2" if row["gaussian"] else "")
    head = f"{row['target']:7}{row['dtype']:9}{length:>4}{row['width']:4} {name:14}{'drop' if row['dropout'] else '':5}"
    if "error" in row:
        return head + row["error"]
    tile = "x".join(str(row["config"][name]) for name in ("block_m", "block_n", "num_warps", "num_stages"))
    loads = " ".join(f"{size}:{count}" for size, count in row["loads"].items())
    text = f"{head}{row['kernel']:26}{tile:>12}{row['registers']:6}{row['spill_bytes']:7}{row['shared_bytes']:8}"
    text += f"{row['tensor_core_instructions']:5}{row['programs_per_processor']:4}"
    for column, form in (("issue_slots", "8,.0f"), ("issue_slots_100", "8,.0f"), ("exponentials", "6.2f")):
        value = row.get(column)
        text += f"{'-':>{form[0]}}" if value is None else f"{value:{form}}"
    text += f"  {loads}"
    if row.get("unset_registers"):
        return text + f"   MISASSEMBLED ({row['unset_registers']} reads of registers that were never set)"
    budgets = ", ".join([f"spill {row['spill_budget']}", *issue_slots.over_budget(row)])
    return text if row["budget_ok"] else text + f"   OVER BUDGET ({budgets})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m awrsr_kernels.compile_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, backbones = parser.add_argument, ("dot", "stochastic")

    def add_filter(name: str, values: tuple[Any, ...], **more: Any) -> None:
        add(name, nargs="+", default=list(values), choices=values, **more)

    add("--target", nargs="+", default=["sm_90"], choices=[*TARGETS, "all"], help="chips to compile for (default sm_90)")
    add("--sample", action="store_true", help="compile only what the tests compile: each kernel, regime and refinement once")
    add_filter("--refinement", STOCHASTIC_ATTENTION_REFINEMENTS, help="refinements to compile (default all)")
    add_filter("--backbone", backbones, help="dot-product or stochastic attention (default both)")
    add_filter("--dtype", DTYPES, help="data types to compile (default all)")
    lengths = (*LENGTHS, RESIDENT, TILED, STEP)
    add_filter("--length", lengths, type=int, help="largest length; 0 means tiled, 1 decoding (default all)")
    add_filter("--width", WIDTHS, type=int, help="largest of D, D_v and R (default all)")
    add("--group", type=int, default=1, help="query heads per key head (default 1)")
    add("--jobs", type=int, default=os.cpu_count(), help="number of processes that compile (default: one per core)")
    add("--json", type=Path, help="file to write the rows to")
    base = cache_folder() / "compiled"
    add("--cache", type=Path, default=base, help=f"folder that caches rows (default {base})")
    options = parser.parse_args(argv)
    if find_spec("triton") is None:
        parser.error("Triton is not installed (pip install triton, Linux only)")

    targets = list(TARGETS) if "all" in options.target else options.target
    wanted = sample() if options.sample else [case for target in targets for case in cases(target)]
    wanted = [c for c in wanted if c.refinement in options.refinement and c.dtype in options.dtype]
    wanted = [c for c in wanted if backbones[c.stochastic] in options.backbone]
    wanted = [c for c in wanted if c.length in options.length and c.width in options.width]
    wanted = [c._replace(group=max(c.group, options.group)) for c in wanted]  # the sample has grouped queries of its own
    columns = f"{'kernel':26}{'tile':>12}{'regs':>6}{'spill':>7}{'shared':>8}{'mma':>5}{'fit':>4}"
    columns += f"{'slots':>8}{'at 100':>8}{'exp':>6}  loads by bytes"
    print(f"{'target':7}{'dtype':9}{'L':>4}{'D':>4} {'refinement':19}{columns}")
    rows: list[dict[str, Any]] = []
    for of_case in compile_cases(wanted, options.jobs, options.cache):
        rows += of_case
        print(*map(_line, of_case), sep="\n", flush=True)
    bad = [row for row in rows if not row["budget_ok"]]
    print(f"{len(rows)} kernels of {len(wanted)} calls compiled, {len(bad)} over their budget")
    if options.json:
        replace_file(options.json, json.dumps(rows, indent=1) + "\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
