"""What each of our kernels moves and multiplies by design, launch by launch: pure functions of sizes, nothing is run.

B sequences, H query heads, H_kv key heads, L window, D, D_v, R features of q, v and the tables; n items of one sequence.

The counts follow `awrsr_kernels/_triton` operand by operand, and a test holds them to what the interpreted kernels load, store and
multiply. Sequences are causal and aligned to the left, tables shared by all heads, as the benchmark has them. Bounds, gates, the
seed and dgate, a few numbers per program, are left out; a float32 product counts once, though a GPU may take three TF32 passes.

Three counts of bytes tell three speeds apart: `loaded` is what all programs together ask for, mostly from cache (every program
wants W; row tiles want all earlier keys), `read` what must come from device memory, each tensor once, `written` what goes there.
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
class Call:
    """One call of the operator, as far as counting goes."""

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
        """Over how many programs a kernel that sums over the batch spreads it."""
        return max(1, min(len(self.lengths), -(-2 * processors // programs)))


def task_launches(task: Task, layout: str, shared: int = SHARED, processors: int = PROCESSORS) -> list[Launch]:
    """Launches of forward and backward of all calls that a layout makes of a task."""
    found = []
    for lengths, window in calls(task, layout):
        found += call_launches(Call(task, lengths, window, layout == "packed"), shared, processors)
    return found


def call_launches(call: Call, shared: int = SHARED, processors: int = PROCESSORS) -> list[Launch]:
    """Launches of one call, forward then backward, in the regime and with the tiles that the package would choose."""
    if call.task.gaussian:
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
    found = tiled_launches(replace(call, lengths=tuple(n * (n > reach) for n in call.lengths)), tiles(call.window), processors)
    if reach:
        few = replace(call, lengths=tuple(n * (n <= reach) for n in call.lengths), window=reach, packed=True)  # no padding written
        found += [*short_launches(few, tiles(reach), processors), *_additions(call)]
    return sorted(found, key=lambda launch: launch.pass_ != "fwd")


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


# The short regime


def seat(lengths: Sequence[int], run: int, rows: int) -> list[int]:
    """How many tiles each run of `run` consecutive sequences fills: a tile takes as many as fit, at most a quarter of its rows."""
    found = []
    for begin in range(0, len(lengths), run):
        tiles, seated, free = 0, 0, 0
        for n in lengths[begin : begin + run]:
            if tiles == 0 or n > free or seated == rows // 4:
                tiles, seated, free = tiles + 1, 0, rows
            seated, free = seated + 1, free - n
        found.append(tiles)
    return found


def short_launches(call: Call, tiles: Tiles, processors: int) -> list[Launch]:
    """One kernel each way: a program takes a run of sequences for one head, tile after tile; backward it leaves a partial dW."""
    s, size, refinement = call.task.shape, call.task.itemsize, call.task.refinement
    refined, value = refinement != "none", refinement == "value"
    d, d_v, r = call.task.features
    block_d, block_v, block_r = call.blocks
    items, softmaxes = call.items * s.H, 2 if refined else 1
    tables = 2 * r * size if refined else 0  # bytes of a row of both
    loaded = items * ((2 * d + d_v) * size + tables)
    read = call.items * (s.H * d + s.H_kv * (d + d_v)) * size + call.window * tables  # a key head once for its query heads

    def turns(tile: Config) -> list[int]:
        run = max(1, -(-len(call.lengths) * s.H // (tile.programs * processors)))
        return seat(call.lengths, run, tile.block_m)

    tile = tiles("short_fwd")
    per_run = turns(tile)
    steps, longest, chain = s.H * sum(per_run), max(per_run, default=0), 4 if refined else 2
    entries = tile.block_m**2 * steps
    width = block_d + (2 if value else 1) * block_v + (3 * block_r if refined else 0)
    forward = Launch(
        kernel="short_fwd", stage=0, pass_="fwd", tile=tile, programs=s.H * len(per_run),
        loaded=loaded, read=read, written=call.rows * s.H * d_v * size,
        operations=2 * entries * width, weights=entries * softmaxes, drops=entries * call.dropped,
        chain=chain * longest, chains=chain * steps, starts=longest,
    )  # fmt: skip

    tile = tiles("short_bwd")
    per_run = turns(tile)
    steps, longest = s.H * sum(per_run), max(per_run, default=0)
    entries, block = tile.block_m**2 * steps, tile.block_m
    moved = refined and (bool(call.task.users) or 2 * call.window <= block)  # P, to the rows of the tables that it meets
    again = refinement == "additive" and not call.dropped  # dM, which takes fewer registers than keeping it
    width = 3 * block_d + (5 if value else 3 if again else 2) * block_v + (9 * block_r if refined else 0) + block * moved
    chain = (7 if refined else 2) + (value or again)  # P, Q_A, R, dQ_A, two or three terms of dP, dQ
    grouped, dout = s.H > s.H_kv, items * d_v * size
    keys = s.H * (d + d_v) * ACCUMULATOR if grouped else s.H_kv * (d + d_v) * size  # bytes of a row of dk and dv
    partials = s.H * len(per_run)
    backward = Launch(
        kernel="short_bwd", stage=0, pass_="bwd", tile=tile, programs=partials,
        loaded=loaded + dout, read=read + dout,
        written=call.rows * (s.H * d * size + keys) + (2 * partials * block * r * ACCUMULATOR if refined else 0),
        operations=2 * entries * width, weights=entries * softmaxes, gradients=entries * softmaxes,
        drops=entries * call.dropped,
        chain=chain * longest, chains=chain * steps, starts=longest,
    )  # fmt: skip
    sums = _table_sums(call, partials, block) + (_group_sums(call) if grouped else []) + _gate_sums(call, len(per_run))
    return [forward, backward, *sums]


# Torch's own kernels after a backward


def _torch(name: str, read: int, written: int) -> Launch:
    return Launch(f"torch_{name}", stage=0, pass_="bwd", tile=None, programs=1, loaded=read, read=read, written=written)


def _cast(call: Call, numbers: int) -> list[Launch]:
    """From float32 to what the inputs are."""
    return [_torch("cast", numbers * ACCUMULATOR, numbers * call.task.itemsize)] if call.task.itemsize < ACCUMULATOR else []


def _table_sums(call: Call, partials: int, rows: int) -> list[Launch]:
    """Partial dW of both tables summed at once, the rows of each table cast to what it is."""
    if call.task.refinement == "none":
        return []
    r = call.task.shape.R
    total, fitted = 2 * rows * r * ACCUMULATOR, call.window * r
    cast = _torch("cast", fitted * ACCUMULATOR, fitted * call.task.itemsize)
    return [_torch("sum", partials * total, total), cast, cast]


def _additions(call: Call) -> list[Launch]:
    """What both regimes found of the tables' gradients and of dgate, added; the short regime's reaches into some rows, of zeros."""
    s, refinement = call.task.shape, call.task.refinement
    tables = [call.window * s.R] * (2 * (refinement != "none"))
    found = [_torch("fill", 0, ACCUMULATOR * x) for x in tables]
    for numbers in tables + [s.H] * (refinement == "additive"):
        found += [_torch("add", 2 * ACCUMULATOR * numbers, ACCUMULATOR * numbers), *_cast(call, numbers)]
    return found


def _group_sums(call: Call) -> list[Launch]:
    """dK and dV of all query heads of a key head summed, copied to where they belong."""
    s, found = call.task.shape, []
    for features in (s.D, s.D_v):
        numbers = call.rows * s.H_kv * features
        found.append(_torch("sum", call.rows * s.H * features * ACCUMULATOR, numbers * ACCUMULATOR))
        found.append(_torch("copy", numbers * ACCUMULATOR, numbers * call.task.itemsize))
    return found


def _gate_sums(call: Call, partials: int) -> list[Launch]:
    """dgate summed over `partials` per head, cast."""
    if call.task.refinement != "additive":
        return []
    heads = call.task.shape.H
    return [_torch("sum", partials * heads * ACCUMULATOR, heads * ACCUMULATOR), *_cast(call, heads)]


# The tiled regime


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
    """What a stage's kernels take: features, blocks and key heads of what plays q, k, v in it."""

    number: int
    d: int
    block_d: int
    k_heads: int
    v_heads: int
    tables: bool
    values: bool
    added: bool  # stage 2 of additive adds stage 1's output, stage 1's backward adds stage 2's dv
    dropped: bool


def _stages(call: Call) -> list[_Stage]:
    s, refinement = call.task.shape, call.task.refinement
    d, _, r = call.task.features
    block_d, _, block_r = call.blocks
    first_dropped = call.dropped and refinement in ("none", "additive")
    first = _Stage(1, d, block_d, s.H_kv, s.H_kv, refinement != "none", refinement != "simple", False, first_dropped)
    if refinement == "none":
        return [first]
    v_heads = s.H if refinement == "value" else s.H_kv
    return [first, _Stage(2, r, block_r, s.H, v_heads, False, True, refinement == "additive", call.dropped)]


def tiled_launches(call: Call, tiles: Tiles, processors: int) -> list[Launch]:
    """A forward kernel per stage; backward a kernel over rows and one over columns per stage, stage 2 first, then the tables'."""
    stages, heads = _stages(call), call.task.shape.H
    rows, columns = tiles("tiled_bwd_rows"), tiles("tiled_bwd_columns")
    found = [_tiled_forward(call, tiles("tiled_fwd"), stage) for stage in stages]
    for stage in reversed(stages):
        # Stage 2's dv goes to memory as it is, except additive's, which stage 1 adds in full precision
        kept_exact = stage.number == 2 and call.task.refinement == "additive"
        plus = stage.number == 1 and call.task.refinement == "additive"
        found.append(_tiled_rows(call, rows, stage))
        found.append(_tiled_columns(call, columns, stage._replace(added=plus), ACCUMULATOR if kept_exact else call.task.itemsize))
    if call.task.refinement == "none":
        return found
    tile = tiles("tiled_bwd_tables")
    splits = call.splits(-(-call.window // tile.block_n) * heads, processors)
    found.append(_tiled_tables(call, tile, stages[0], splits))
    gates = len(call.lengths) * -(-call.window // rows.block_m)
    return [*found, *_table_sums(call, splits * heads, call.window), *_gate_sums(call, gates)]


def _total(call: Call, tile: Config, walk: "functools._lru_cache_wrapper[Walk]") -> Walk:
    """The walk over all query heads."""
    walks = [walk(n, tile) for n in call.lengths]
    steps, loaded = (call.task.shape.H * sum(w[i] for w in walks) for i in (0, 1))
    return Walk(steps, loaded, max((w.longest for w in walks), default=0))


def _operands(call: Call, stage: _Stage) -> tuple[int, int, int]:
    """Bytes of a key row and of a table pair's row, and of a value row, as a tile loads them (0 where there are none)."""
    _, d_v, r = call.task.features
    size = call.task.itemsize
    return stage.d * size, 2 * r * size if stage.tables else 0, d_v * size if stage.values else 0


def _distinct(call: Call, stage: _Stage) -> int:
    """Bytes of q, k, the tables and v as they lie in memory: each once."""
    key, table, value = _operands(call, stage)
    return call.items * (key * (call.task.shape.H + stage.k_heads) + value * stage.v_heads) + call.window * table


def _tiled_forward(call: Call, tile: Config, stage: _Stage) -> Launch:
    _, d_v, r = call.task.features
    _, block_v, block_r = call.blocks
    h, size, walk, square = call.task.shape.H, call.task.itemsize, _total(call, tile, rows_walk), tile.block_m * tile.block_n
    key, table, value = _operands(call, stage)
    items, rest = call.items * h, size == 2  # half precision keeps what rounding lost, for real items
    added = items * d_v * size if stage.added else 0
    results = (2 * r if stage.tables else 0) + (d_v if stage.values else 0)
    width = stage.block_d + (2 * block_r if stage.tables else 0) + (block_v if stage.values else 0)
    return Launch(
        kernel="tiled_fwd", stage=stage.number, pass_="fwd", tile=tile,
        programs=-(-call.window // tile.block_m) * len(call.lengths) * h,
        loaded=items * key + walk.loaded * (key + table + value) + added,
        read=_distinct(call, stage) + added,
        written=(call.rows * h * (results + d_v * stage.added) + items * results * rest) * size + items * ACCUMULATOR,
        operations=2 * square * walk.steps * width, weights=square * walk.steps, drops=square * walk.steps * stage.dropped,
        chain=2 * walk.longest, chains=2 * walk.steps,
    )  # fmt: skip


def _tiled_rows(call: Call, tile: Config, stage: _Stage) -> Launch:
    """dq (or dQ_A) and delta, a program per row tile."""
    _, d_v, r = call.task.features
    _, block_v, block_r = call.blocks
    h, size, walk, square = call.task.shape.H, call.task.itemsize, _total(call, tile, rows_walk), tile.block_m * tile.block_n
    key, table, value = _operands(call, stage)
    items, half = call.items * h, size == 2
    saved = (4 * r + 2 * r * half if stage.tables else 0) + (2 * d_v + d_v * half if stage.values else 0)
    own = items * (saved * size + ACCUMULATOR)  # beside q: gradients, what the forward saved and what it rounded away, lse
    width = 2 * stage.block_d + (2 * block_r if stage.tables else 0) + (block_v if stage.values else 0)
    return Launch(
        kernel="tiled_bwd_rows", stage=stage.number, pass_="bwd", tile=tile,
        programs=-(-call.window // tile.block_m) * len(call.lengths) * h,
        loaded=items * key + own + walk.loaded * (key + table + value),
        read=_distinct(call, stage) + own,
        written=call.rows * h * stage.d * size + items * ACCUMULATOR,
        operations=2 * square * walk.steps * width, weights=square * walk.steps, gradients=square * walk.steps,
        drops=square * walk.steps * stage.dropped,
        chain=2 * walk.longest, chains=2 * walk.steps,
    )  # fmt: skip


def _tiled_columns(call: Call, tile: Config, stage: _Stage, dv_size: int) -> Launch:
    """dk (or dK_A) and dv, a program per column tile and key head."""
    _, d_v, _ = call.task.features
    _, block_v, block_r = call.blocks
    h, walk, square = call.task.shape.H, _total(call, tile, columns_walk), tile.block_m * tile.block_n
    key, table, value = _operands(call, stage)
    owners = min(stage.k_heads, stage.v_heads) if stage.values else stage.k_heads
    numbers = 2 * ACCUMULATOR  # lse and delta of a row
    added = call.items * owners * d_v * ACCUMULATOR if stage.added else 0
    width = 2 * stage.block_d + (2 * block_r if stage.tables else 0) + (2 * block_v if stage.values else 0)
    return Launch(
        kernel="tiled_bwd_columns", stage=stage.number, pass_="bwd", tile=tile,
        programs=-(-call.window // tile.block_n) * len(call.lengths) * owners,
        # In the loop q, dO and [dQ_A | dK_A], which are as wide as a key, a value and a row of both tables
        loaded=call.items * (h * (key + table) + owners * value) + added + walk.loaded * (key + value + table + numbers),
        read=_distinct(call, stage) + call.items * h * (value + table + numbers) + added,
        written=call.rows * (stage.k_heads * key + (owners * d_v * dv_size if stage.values else 0)),
        operations=2 * square * walk.steps * width, weights=square * walk.steps, gradients=square * walk.steps,
        drops=square * walk.steps * stage.dropped,
        chain=2 * walk.longest * (h // owners), chains=2 * walk.steps,
    )  # fmt: skip


def _tiled_tables(call: Call, tile: Config, stage: _Stage, splits: int) -> Launch:
    """Partial dW, a program per rows of the tables, head and share of the batch."""
    _, _, r = call.task.features
    _, _, block_r = call.blocks
    h, walk, square = call.task.shape.H, _total(call, tile, columns_walk), tile.block_m * tile.block_n
    key, table, _ = _operands(call, stage)
    return Launch(
        kernel="tiled_bwd_tables", stage=1, pass_="bwd", tile=tile, programs=-(-call.window // tile.block_n) * splits * h,
        loaded=call.items * h * key + walk.loaded * (key + table + ACCUMULATOR),  # keys; in the loop q, [dQ_A | dK_A] and lse
        read=call.items * ((h + stage.k_heads) * key + h * (table + ACCUMULATOR)),
        written=2 * splits * h * call.window * r * ACCUMULATOR,
        operations=2 * square * walk.steps * (stage.block_d + 2 * block_r), weights=square * walk.steps, drops=0,
        chain=2 * walk.longest * -(-len(call.lengths) // splits), chains=2 * walk.steps,
    )  # fmt: skip
