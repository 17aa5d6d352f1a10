"""Counts what each of our kernels moves and multiplies by design, launch by launch, from sizes alone; nothing is run.

B sequences, H query heads, H_kv key heads, L window, D, D_v, R features of q, v and the tables; n items of one sequence.

The counts follow `awrsr_kernels/_triton` operand by operand, and a test compares them with what the interpreted kernels load, store
and multiply. Sequences are causal and aligned to the left, tables shared by all heads, as the benchmark has them. Bounds, gates,
the seed and dgate, a few numbers per program, are left out; a float32 product counts once, though a GPU may take three TF32 passes.

Three counts of bytes distinguish three speeds: `loaded` is what all programs together load, mostly from cache (every program needs
W, and row tiles need all earlier keys); `read` is what must come from device memory, each tensor once; `written` is what goes
there.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from awrsr_kernels.launch_config import LENGTHS, Config, choose, is_short, key_of, step_config

from .workloads import Task, calls

SHARED = 232448  # bytes of shared memory that a program may have on an H100 or H200
PROCESSORS = 132  # multiprocessors of an H100 or H200
ACCUMULATOR = 4  # bytes of a float32

Tiles = Callable[[str], Config]  # how a kernel is launched, by its name


class Launch(NamedTuple):
    """One launch. A chain is how many products of a program wait for one another: of the busiest program, and of all, added."""

    kernel: str
    stage: int  # 1 is P, 2 is R; 0: the kernel has no stages
    pass_: str
    tile: Config | None  # None: one of torch's own kernels
    programs: int
    loaded: int
    read: int
    written: int
    operations: int = 0  # of whole tiles on matrix units, the masked half included; two per multiply-add
    weights: int = 0  # entries of score tiles that are exponentiated
    gradients: int = 0  # entries of score tiles whose gradient is formed
    drops: int = 0  # entries of score tiles that draw a dropout bit
    chain: int = 0
    chains: int = 0
    starts: int = 1  # tiles that the busiest program begins, one after another, with loads that it must wait for

    @property
    def name(self) -> str:
        return self.kernel + (f" {self.stage}" if self.stage else "")

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class CountedCall:
    """What counting needs to know about one call of the operator."""

    task: Task  # its B and L are not looked at: `lengths` and `window` stand for them
    lengths: tuple[int, ...]
    window: int
    packed: bool

    @property
    def dropped(self) -> bool:
        return self.task.dropout_p > 0

    @property
    def items(self) -> int:
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """Rows of every output: padding is written, as zeros."""
        return self.items if self.packed else len(self.lengths) * self.window

    @property
    def blocks(self) -> tuple[int, int, int]:
        """The features as tiles have them: a power of two of at least 16."""
        return tuple(max(16, 1 << (x - 1).bit_length()) for x in self.task.features)  # type: ignore[return-value]

    def splits(self, programs: int, processors: int) -> int:
        """The number of programs over which a kernel that sums over the batch spreads it."""
        return max(1, min(len(self.lengths), -(-2 * processors // programs)))


def task_launches(task: Task, layout: str, shared: int = SHARED, processors: int = PROCESSORS) -> list[Launch]:
    """Launches of forward and backward of all calls that a layout makes of a task."""
    made = (CountedCall(task, lengths, window, layout == "packed") for lengths, window in calls(task, layout))
    return [launch for call in made for launch in call_launches(call, shared, processors)]


def call_launches(call: CountedCall, shared: int = SHARED, processors: int = PROCESSORS) -> list[Launch]:
    """Launches of one call, forward then backward, in the regime and with the tiles that the package would choose."""
    if call.task.stochastic:
        raise ValueError("backbone was stochastic, must be dot-product: what the kernels do between Gaussians is not counted yet")
    features, itemsize = call.task.features, call.task.itemsize

    def tiles(window: int) -> Tiles:
        def choice(kernel: str) -> Config:
            key = key_of(kernel, window, features, itemsize)
            if key is None:
                raise ValueError(f"D, D_v, R were {features}, must be at most 256")
            return choose(key, shared)

        return choice

    if is_short(call.window, features, itemsize, shared):
        return short_launches(call, tiles(call.window), processors)
    shares = call.task.users and call.task.shape.H == call.task.shape.H_kv  # between the regimes, by length
    reach = max((n for n in LENGTHS if is_short(n, features, itemsize, shared)), default=0) if shares else 0
    launches = tiled_launches(replace(call, lengths=tuple(n * (n > reach) for n in call.lengths)), tiles(call.window), processors)
    if reach:
        few = replace(call, lengths=tuple(n * (n <= reach) for n in call.lengths), window=reach, packed=True)  # no padding written
        launches += [*short_launches(few, tiles(reach), processors), *_additions(call)]
    return sorted(launches, key=lambda launch: launch.pass_ != "fwd")


def step_launch(task: Task, content: bool) -> Launch:
    """A decoding step: in each of B entries the item L - 1 meets those before it. No product of it is one of matrices."""
    s, size, before = task.shape, task.itemsize, task.shape.L - 1
    d, d_v, r = task.features
    refined = task.refinement != "none"
    # Numbers per program of a row: the new item's and, for each before it, those of P and of R
    own, first, second = 2 * d + d_v + 2 * r * refined, d + 2 * r * refined, r + d_v
    if task.refinement in ("none", "value", "additive"):
        first += d_v
    loaded = s.B * s.H * (own + before * (first + second * refined))
    tables = (s.B * s.H if content else 1) * s.L * 2 * r * refined
    kept = s.B * (s.H_kv * (d + d_v) + s.H * ((r + d_v * (task.refinement == "value")) * refined + 2 * r * (refined and content)))
    read = s.B * (s.H * d + s.H_kv * (d + d_v) * s.L) + tables + s.B * s.H * before * r * refined
    if task.refinement == "value":
        read += s.B * s.H * before * d_v
    return Launch(
        kernel="decode_step", stage=0, pass_="fwd", tile=step_config(task.features, size), programs=s.B * s.H,
        loaded=loaded * size, read=read * size, written=(kept + s.B * s.H * d_v) * size,
    )  # fmt: skip


def step_operations(task: Task) -> int:
    """Of a decoding step, two per multiply-add, none on matrix units: every number that a program loads takes part in one."""
    return 2 * step_launch(task, content=False).loaded // task.itemsize


def seat(lengths: Sequence[int], run: int, rows: int) -> list[int]:
    """How many tiles each run of `run` consecutive sequences fills: a tile takes as many as fit, at most a quarter of its rows."""
    counts = []
    for begin in range(0, len(lengths), run):
        tiles, seated, free = 0, 0, 0
        for n in lengths[begin : begin + run]:
            if tiles == 0 or n > free or seated == rows // 4:
                tiles, seated, free = tiles + 1, 0, rows
            seated, free = seated + 1, free - n
        counts.append(tiles)
    return counts


def short_launches(call: CountedCall, tiles: Tiles, processors: int) -> list[Launch]:
    """One kernel each way: a program takes a run of sequences for one head, tile after tile; backward it leaves a partial dW."""
    s, size, refinement = call.task.shape, call.task.itemsize, call.task.refinement
    refined, value = refinement != "none", refinement == "value"
    d, d_v, r = call.task.features
    block_d, block_v, block_r = call.blocks
    items, tables = call.items * s.H, 2 * r * size if refined else 0  # bytes of a row of both
    loaded = items * ((2 * d + d_v) * size + tables)
    read = call.items * (s.H * d + s.H_kv * (d + d_v)) * size + call.window * tables  # a key head once for its query heads

    def launch(pass_: str, tile: Config, width: int, chain: int, dout: int, written: int) -> Launch:
        per_run = runs(tile)
        steps, longest = s.H * sum(per_run), max(per_run, default=0)
        entries = tile.block_m**2 * steps
        weights = entries * (2 if refined else 1)
        return Launch(
            kernel=f"short_{pass_}", stage=0, pass_=pass_, tile=tile, programs=s.H * len(per_run),
            loaded=loaded + dout, read=read + dout, written=written,
            operations=2 * entries * width, weights=weights, gradients=weights * (pass_ == "bwd"), drops=entries * call.dropped,
            chain=chain * longest, chains=chain * steps, starts=longest,
        )  # fmt: skip

    def runs(tile: Config) -> list[int]:
        return seat(call.lengths, max(1, -(-len(call.lengths) * s.H // (tile.programs * processors))), tile.block_m)

    width = block_d + (2 if value else 1) * block_v + (3 * block_r if refined else 0)
    forward = launch("fwd", tiles("short_fwd"), width, 4 if refined else 2, 0, call.rows * s.H * d_v * size)

    tile = tiles("short_bwd")
    block, partials = tile.block_m, len(runs(tile))  # per head
    moved = refined and (bool(call.task.users) or 2 * call.window <= block)  # P, to the rows of the tables that it meets
    again = refinement == "additive" and not call.dropped  # dM, which takes fewer registers than keeping it
    width = 3 * block_d + (5 if value else 3 if again else 2) * block_v + (9 * block_r if refined else 0) + block * moved
    chain = (7 if refined else 2) + (value or again)  # P, Q_A, R, dQ_A, two or three terms of dP, dQ
    grouped = s.H > s.H_kv
    keys = s.H * (d + d_v) * ACCUMULATOR if grouped else s.H_kv * (d + d_v) * size  # bytes of a row of dk and dv
    written = call.rows * (s.H * d * size + keys) + (2 * s.H * partials * block * r * ACCUMULATOR if refined else 0)
    backward = launch("bwd", tile, width, chain, items * d_v * size, written)
    sums = _table_sums(call, s.H * partials, block) + (_group_sums(call) if grouped else []) + _gate_sums(call, partials)
    return [forward, backward, *sums]


def _torch(name: str, read: int, written: int) -> Launch:
    return Launch(f"torch_{name}", stage=0, pass_="bwd", tile=None, programs=1, loaded=read, read=read, written=written)


def _cast(call: CountedCall, numbers: int) -> list[Launch]:
    """From float32 to what the inputs are."""
    return [_torch("cast", numbers * ACCUMULATOR, numbers * call.task.itemsize)] if call.task.itemsize < ACCUMULATOR else []


def _table_sums(call: CountedCall, partials: int, rows: int) -> list[Launch]:
    """Partial dW of both tables summed at once, the rows of each table cast to what it is."""
    if call.task.refinement == "none":
        return []
    r = call.task.shape.R
    total, fitted = 2 * rows * r * ACCUMULATOR, call.window * r
    cast = _torch("cast", fitted * ACCUMULATOR, fitted * call.task.itemsize)
    return [_torch("sum", partials * total, total), cast, cast]


def _additions(call: CountedCall) -> list[Launch]:
    """What both regimes found of the tables' gradients and of dgate, added; the short regime's reaches into some rows, of zeros."""
    s, refinement = call.task.shape, call.task.refinement
    tables = [call.window * s.R] * (2 * (refinement != "none"))
    launches = [_torch("fill", 0, ACCUMULATOR * x) for x in tables]
    for numbers in tables + [s.H] * (refinement == "additive"):
        launches += [_torch("add", 2 * ACCUMULATOR * numbers, ACCUMULATOR * numbers), *_cast(call, numbers)]
    return launches


def _group_sums(call: CountedCall) -> list[Launch]:
    """dK and dV of all query heads of a key head summed, copied to where they belong."""
    s, launches = call.task.shape, []
    for features in (s.D, s.D_v):
        numbers = call.rows * s.H_kv * features
        launches.append(_torch("sum", call.rows * s.H * features * ACCUMULATOR, numbers * ACCUMULATOR))
        launches.append(_torch("copy", numbers * ACCUMULATOR, numbers * call.task.itemsize))
    return launches


def _gate_sums(call: CountedCall, partials: int) -> list[Launch]:
    """dgate summed over `partials` per head, cast."""
    if call.task.refinement != "additive":
        return []
    heads = call.task.shape.H
    return [_torch("sum", partials * heads * ACCUMULATOR, heads * ACCUMULATOR), *_cast(call, heads)]


class Walk(NamedTuple):
    """Steps of the loops over one sequence, and rows of the other side loaded in them, summed over the tiles of one side."""

    steps: int
    loaded: int
    longest: int


@functools.cache
def rows_walk(n: int, tile: Config) -> Walk:
    """Every row tile meets the column tiles up to its diagonal."""
    ends = [min(n, first + tile.block_m) for first in range(0, n, tile.block_m)]
    steps = [-(-end // tile.block_n) for end in ends]
    return Walk(sum(steps), sum(min(n, x * tile.block_n) for x in steps), max(steps, default=0))


@functools.cache
def columns_walk(n: int, tile: Config) -> Walk:
    """Every column tile meets the row tiles from its diagonal on."""
    firsts = [first // tile.block_m * tile.block_m for first in range(0, n, tile.block_n)]
    steps = [-(-(n - first) // tile.block_m) for first in firsts]
    return Walk(sum(steps), sum(n - first for first in firsts), max(steps, default=0))


class _Stage(NamedTuple):
    """What a stage's kernels take: bytes and width in tiles of a row of q or k, of both tables and of v, 0 where there are none."""

    number: int
    key: int
    table: int
    value: int
    block_key: int
    block_table: int
    block_value: int
    k_heads: int
    v_heads: int
    dropped: bool


def _stages(call: CountedCall) -> list[_Stage]:
    s, size, refinement = call.task.shape, call.task.itemsize, call.task.refinement
    (d, d_v, r), (block_d, block_v, block_r) = call.task.features, call.blocks
    refined, valued = refinement != "none", refinement != "simple"
    first_dropped = call.dropped and refinement in ("none", "additive")
    tables, values = (2 * r * size * refined, d_v * size * valued), (2 * block_r * refined, block_v * valued)
    first = _Stage(1, d * size, *tables, block_d, *values, s.H_kv, s.H_kv, first_dropped)
    v_heads = s.H if refinement == "value" else s.H_kv
    second = _Stage(2, r * size, 0, d_v * size, block_r, 0, block_v, s.H, v_heads, call.dropped)
    return [first, second] if refined else [first]


def tiled_launches(call: CountedCall, tiles: Tiles, processors: int) -> list[Launch]:
    """A forward kernel per stage; backward a kernel over rows and one over columns per stage, stage 2 first, then the tables'."""
    stages, heads = _stages(call), call.task.shape.H
    rows, columns, tables = (tiles(f"tiled_bwd_{name}") for name in ("rows", "columns", "tables"))
    launches = [_tiled_forward(call, tiles("tiled_fwd"), stage) for stage in stages]
    for stage in reversed(stages):
        launches += [_tiled_rows(call, rows, stage), _tiled_columns(call, columns, stage)]
    if call.task.refinement == "none":
        return launches
    splits = call.splits(-(-call.window // tables.block_n) * heads, processors)
    launches.append(_tiled_tables(call, tables, stages[0], splits))
    gates = len(call.lengths) * -(-call.window // rows.block_m)
    return [*launches, *_table_sums(call, splits * heads, call.window), *_gate_sums(call, gates)]


def _walked(
    call: CountedCall, kernel: str, stage: _Stage, tile: Config, *,
    programs: int, own: int, row: int, read: int, written: int, width: int, gradients: bool = False, repeats: int = 1,
) -> Launch:  # fmt: skip
    """A kernel whose programs load bytes of their `own` and walk along the other side, `row` bytes per row, per head."""
    walk = rows_walk if kernel in ("tiled_fwd", "tiled_bwd_rows") else columns_walk
    walks = [walk(n, tile) for n in call.lengths]
    steps, passed = (call.task.shape.H * sum(w[i] for w in walks) for i in (0, 1))
    longest, entries = max((w.longest for w in walks), default=0), tile.block_m * tile.block_n * steps
    drops = entries * (stage.dropped and kernel != "tiled_bwd_tables")
    return Launch(
        kernel=kernel, stage=stage.number, pass_="fwd" if kernel == "tiled_fwd" else "bwd", tile=tile, programs=programs,
        loaded=own + passed * row, read=read, written=written,
        operations=2 * entries * width, weights=entries, gradients=entries * gradients, drops=drops,
        chain=2 * longest * repeats, chains=2 * steps,
    )  # fmt: skip


def _distinct(call: CountedCall, stage: _Stage) -> int:
    """Bytes of q, k, the tables and v as they lie in memory: each once."""
    of_items = stage.key * (call.task.shape.H + stage.k_heads) + stage.value * stage.v_heads
    return call.items * of_items + call.window * stage.table


def _tiled_forward(call: CountedCall, tile: Config, stage: _Stage) -> Launch:
    h, half, results = call.task.shape.H, call.task.itemsize == 2, stage.table + stage.value
    items, adds = call.items * h, stage.number == 2 and call.task.refinement == "additive"  # stage 1's output
    added = stage.value * adds
    kept = results * half + ACCUMULATOR  # half precision keeps what rounding lost, for real items
    return _walked(
        call, "tiled_fwd", stage, tile, programs=-(-call.window // tile.block_m) * len(call.lengths) * h,
        own=items * (stage.key + added), row=stage.key + stage.table + stage.value,
        read=_distinct(call, stage) + items * added, written=call.rows * h * (results + added) + items * kept,
        width=stage.block_key + stage.block_table + stage.block_value,
    )  # fmt: skip


def _tiled_rows(call: CountedCall, tile: Config, stage: _Stage) -> Launch:
    """dq (or dQ_A) and delta, a program per row tile."""
    h, half = call.task.shape.H, call.task.itemsize == 2
    items = call.items * h
    own = items * ((stage.table + stage.value) * (2 + half) + ACCUMULATOR)  # gradients, what the forward saved and rounded, lse
    return _walked(
        call, "tiled_bwd_rows", stage, tile, programs=-(-call.window // tile.block_m) * len(call.lengths) * h,
        own=items * stage.key + own, row=stage.key + stage.table + stage.value,
        read=_distinct(call, stage) + own, written=call.rows * h * stage.key + items * ACCUMULATOR,
        width=2 * stage.block_key + stage.block_table + stage.block_value, gradients=True,
    )  # fmt: skip


def _tiled_columns(call: CountedCall, tile: Config, stage: _Stage) -> Launch:
    """dk (or dK_A) and dv, a program per column tile and key head. Of additive stage 1 adds stage 2's dv, in full precision."""
    h, additive, full = call.task.shape.H, call.task.refinement == "additive", call.task.features[1] * ACCUMULATOR
    owners = min(stage.k_heads, stage.v_heads) if stage.value else stage.k_heads
    added = call.items * owners * full * (additive and stage.number == 1)
    dv = full if additive and stage.number == 2 else stage.value
    meets = stage.value + stage.table + 2 * ACCUMULATOR  # dO and [dQ_A | dK_A], as wide as a value and both tables; lse and delta
    return _walked(
        call, "tiled_bwd_columns", stage, tile, programs=-(-call.window // tile.block_n) * len(call.lengths) * owners,
        own=call.items * (h * (stage.key + stage.table) + owners * stage.value) + added, row=stage.key + meets,
        read=_distinct(call, stage) + call.items * h * meets + added, written=call.rows * (stage.k_heads * stage.key + owners * dv),
        width=2 * (stage.block_key + stage.block_value) + stage.block_table, gradients=True, repeats=h // owners,
    )  # fmt: skip


def _tiled_tables(call: CountedCall, tile: Config, stage: _Stage, splits: int) -> Launch:
    """Partial dW, a program per rows of the tables, head and share of the batch."""
    h, meets = call.task.shape.H, stage.table + ACCUMULATOR  # [dQ_A | dK_A] and lse, with q
    return _walked(
        call, "tiled_bwd_tables", stage, tile, programs=-(-call.window // tile.block_n) * splits * h,
        own=call.items * h * stage.key, row=stage.key + meets,
        read=call.items * ((h + stage.k_heads) * stage.key + h * meets),
        written=2 * splits * h * call.window * call.task.shape.R * ACCUMULATOR,
        width=stage.block_key + stage.block_table, repeats=-(-len(call.lengths) // splits),
    )  # fmt: skip
