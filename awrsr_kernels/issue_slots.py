"""Issue slots and exponentials per head, counted from a kernel's machine code (SASS), and their budgets.

A scheduler of a processor issues at most one instruction of one warp per cycle; each instruction takes an *issue slot*. The kernels
of this package are limited by these slots rather than by memory, so that their number per head predicts a time where no GPU is at
hand (`benchmarks/operator/predict.py`).

The code of a kernel is a nest of loops, found by its backward branches. How often each level runs per head follows from the
regime, the tile and the length; sequences are causal and of full length, and a head has one key head. Loops without floating-point
arithmetic only write zeros to padding, of which there is none. All other instructions count as issued, also in branches that
sequences of full length do not take: the count is an upper limit, but for one block in the loop that forms delta in the resident
backward, whose blocks are all of full size. What a program with a run of sequences does once is left out.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .launch_config import RESIDENT, STEP, TILED, Config

COUNTED = ("sm_80", "sm_90")  # targets
SCHEDULERS, LANES = 4, 32  # of an NVIDIA processor, of a warp
# Length at which a class is counted. The short classes are counted at their largest length, the resident class at 100, too.
TYPICAL = {RESIDENT: 200, TILED: 512}

# Budgets on sm_90 in bfloat16, for the refinement "simple" without dropout: by kernel, length class and counted length, the most
# slots at width 32 and at width 64. Resident, width 32, 100 items: forward and backward together 8,500. The others: what was
# counted plus 4 %.
SLOTS: dict[tuple[str, int, int], tuple[int, int]] = {
    ("short_fwd", 16, 16): (141, 200),
    ("short_fwd", 32, 32): (480, 627),
    ("short_fwd", 64, 64): (1430, 1631),
    ("short_bwd", 16, 16): (262, 531),
    ("short_bwd", 32, 32): (748, 1525),
    ("short_bwd", 64, 64): (2306, 2641),
    ("resident_fwd", RESIDENT, 100): (2950, 3609),
    ("resident_fwd", RESIDENT, 200): (6480, 7990),
    ("resident_bwd", RESIDENT, 100): (5550, 8799),
    ("resident_bwd", RESIDENT, 200): (11530, 17805),
    ("tiled_fwd_stage1", TILED, 512): (19997, 25788),
    ("tiled_fwd_stage2", TILED, 512): (17381, 21320),
    ("tiled_bwd_rows_stage1", TILED, 512): (18334, 25447),
    ("tiled_bwd_rows_stage2", TILED, 512): (15675, 20231),
    ("tiled_bwd_columns_stage1", TILED, 512): (20680, 25909),
    ("tiled_bwd_columns_stage2", TILED, 512): (21096, 26246),
    ("tiled_bwd_tables", TILED, 512): (16216, 19216),
}
SPLIT = ("tiled_fwd", "tiled_bwd_rows")  # kernels with a loop for tiles below the diagonal and one for those on it
TENSOR = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")
ARITHMETIC = re.compile(r"\b(FADD|FMUL|FFMA|DADD|DMUL|DFMA|HMMA|HGMMA|UTC\w*MMA)\b")
RESCALING = 1.25  # exponentials of a kernel over the weights in its tiles, at most; see `most_exponentials`


class Level(NamedTuple):
    """The loops of one depth (depth 0: the code outside loops), or one of them, without the loops inside."""

    instructions: int
    exponentials: int


def nest(sass: str, apart: bool = False, narrow: bool = True) -> list[Level]:
    """The levels of a kernel, from the outermost, of the text that `cuobjdump -sass` prints. apart: the loops of the innermost
    depth are levels of their own, in the order of the code. Without `narrow`, code with matrix products but no loop that a branch
    may skip does not count: narrow blocks."""
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]+);", sass)]
    ends: dict[int, int] = {}  # of loops, by where they begin
    skips: list[tuple[int, int]] = []
    for number, (address, text) in enumerate(code):
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)
        begin = int(target[1], 16) if target else address + 1
        if begin == address:  # a branch to itself follows the last instruction, and fills the rest of the block with NOPs
            code = code[:number]
            break
        if begin < address:
            ends[begin] = address
        elif begin > address + 1:
            skips.append((address, begin))
    loops = sorted(ends.items())
    products = [address for address, text in code if TENSOR.search(text)]
    skips = [(a, b) for a, b in skips if any(a < x < b for x in products) and not any(a < x < b for x, _ in loops)]

    def inside(address: int) -> list[tuple[int, int]]:
        return [(begin, end) for begin, end in loops if begin <= address <= end]

    computing = {loop for address, text in code if ARITHMETIC.search(text) for loop in inside(address)}
    deepest = max((len(inside(begin)) for begin, _ in computing), default=0)
    levels: dict[tuple[int, int], Level] = {}  # by depth and, where loops are kept apart, by where they begin
    for address, text in code:
        around = inside(address)
        if all(loop in computing for loop in around) and (narrow or not any(a < address < b for a, b in skips)):
            which = len(around), around[-1][0] if apart and around and len(around) == deepest else 0
            before = levels.get(which, Level(0, 0))
            levels[which] = Level(before.instructions + 1, before.exponentials + ("MUFU.EX2" in text))
    for depth in range(deepest):
        levels.setdefault((depth, 0), Level(0, 0))
    return [level for _, level in sorted(levels.items(), key=lambda each: (each[0][0], each[1]))]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def remainder(config: Config, length: int) -> int:
    """In the resident regime, the items of a head that make up a narrow block of `block_n`; 0 if all blocks have `block_m`."""
    return length % config.block_m if config.block_n < config.block_m and length % config.block_m <= config.block_n else 0


def tiles(kernel: str, config: Config, length: int) -> tuple[float, float]:
    """Blocks of rows (or of columns, where a kernel owns those) of a head, and tiles that hold a visible weight; those of full size
    in the resident regime."""
    m, n = config.block_m, config.block_n
    if kernel.startswith("resident"):
        blocks = ceil_div(length - remainder(config, length), m)
        return blocks, blocks * (blocks + 1) / 2
    if kernel.startswith("short"):
        share = 1 / max(1, min(m // length, m // 4))  # of a tile, which holds at most a sequence per four rows
        return share, share
    if "columns" in kernel or "tables" in kernel:
        begins = range(0, length, n)
        return len(begins), sum(ceil_div(length - begin // m * m, m) for begin in begins)
    begins = range(0, length, m)
    return len(begins), sum(ceil_div(min(length, begin + m), n) for begin in begins)


def trips(kernel: str, config: Config, length: int, levels: int) -> list[float] | None:
    """How often each level runs per head; None if a kernel of this name does not have as many levels."""
    blocks, every = tiles(kernel, config, length)
    if kernel.startswith("short"):
        runs = [0, blocks]
    elif kernel.startswith("resident"):  # tiles on the diagonal and narrow ones belong to the loop over blocks
        runs = [*([0] if "bwd" in kernel else []), 1, blocks, every - blocks]
    elif "tables" in kernel:
        runs = [0, blocks, every]
    elif levels == 3 and kernel.startswith(SPLIT):  # first the tiles that need no mask
        masked = blocks * ceil_div(config.block_m, config.block_n)
        runs = [blocks, every - masked, masked]
    else:  # grouped query heads, a loop between those, are not counted
        runs = [blocks, every]
    return runs if len(runs) == levels else None


def stages(kernel: str, refinement: str, stochastic: bool) -> int:
    """How many of P and R a kernel computes."""
    if not kernel.startswith("tiled"):
        return 1 if refinement == "none" else 2
    both = stochastic and refinement == "additive"  # (P + R)^2 has a cross term, which the forward adds in its second stage
    return 2 if both and not kernel.endswith(("fwd_stage1", "tables")) else 1


class Count(NamedTuple):
    """Per head: issue slots of each scheduler, exponentials computed, and visible weights, which need one each."""

    slots: float
    done: float
    needed: float


def count(sass: str, kernel: str, config: Config, length: int, refinement: str, stochastic: bool = False) -> Count | None:
    """What a kernel takes per head of `length` items; None if its loops are not those that its regime has."""
    narrow = not kernel.startswith("resident") or remainder(config, length) > 0
    levels = nest(sass, apart=kernel.startswith(SPLIT), narrow=narrow)
    runs = trips(kernel, config, length, len(levels))
    if runs is None:
        return None
    instructions = sum(level.instructions * run for level, run in zip(levels, runs, strict=True))
    exponentials = sum(level.exponentials * run for level, run in zip(levels, runs, strict=True))
    needed = stages(kernel, refinement, stochastic) * length * (length + 1) / 2
    return Count(instructions * config.num_warps / SCHEDULERS, exponentials * LANES * config.num_warps, needed)


def most_exponentials(kernel: str, config: Config, length: int) -> float:
    """The most exponentials per visible weight that a kernel may compute: all of its tiles, whose masked halves on the diagonal
    and surplus rows count as well, and a quarter more, for rescaling (one per row and tile, in each of the lanes that share a row).

    Twice what the tiles hold, in a kernel whose warps repeat each other's work, is above it.
    """
    m, n = config.block_m, config.block_n
    blocks, every = tiles(kernel, config, length)
    computed = every * m * n
    if kernel.startswith("resident"):
        computed = every * m * m + (blocks * m * n + n * n if remainder(config, length) else 0)
    return RESCALING * computed / (length * (length + 1) / 2)


def columns(
    sass: str, kernel: str, config: Config, *, target: str, refinement: str, dtype: str, dropout: bool,
    length: int, width: int, group: int, stochastic: bool, lagged: bool = False,
) -> dict[str, float | None]:  # fmt: skip
    """The columns of the compile report, each with its budget, which is None where there is none.

    There are none for a step of decoding, for sums over parts of gradients and rows beside others, for grouped query heads, for
    lagged calls, whose plain heads take another way, and on sm_100, whose code peels loops and waits out of line, which these rules
    would miscount. Exponentials have no budget in float32 and with more than 64 features, where the sums take more warps than a
    tile has rows for, and for the refinement "stochastic", whose points take exponentials as well.
    """
    if length == STEP or kernel.startswith("sum") or group > 1 or lagged or target not in COUNTED:
        return {}
    plain = target == "sm_90" and dtype == "bfloat16" and refinement == "simple" and not (dropout or stochastic)
    row: dict[str, float | None] = {}
    lengths = {"issue_slots": TYPICAL.get(length, length)} | ({"issue_slots_100": 100} if length == RESIDENT else {})
    for name, at in lengths.items():
        found = count(sass, kernel, config, at, refinement, stochastic)
        budgets = SLOTS.get((kernel, length, at)) if plain and width <= 64 else None
        row |= {name: found and found.slots, f"{name}_budget": budgets and budgets[width > 32]}
        if name == "issue_slots":
            judged = dtype != "float32" and width <= 64 and refinement != "stochastic"
            most = most_exponentials(kernel, config, at) if judged else None
            row |= {"exponentials": found and found.done / found.needed, "exponentials_budget": most}
    return row


def over_budget(row: Mapping[str, Any]) -> list[str]:
    """The columns that are above their budgets or were not counted, and these budgets. Rows without such columns are within."""
    budgets = {name: row.get(f"{name}_budget") for name in ("issue_slots", "issue_slots_100", "exponentials")}
    above = {name: x for name, x in budgets.items() if x is not None and not (row[name] is not None and row[name] <= x)}
    return [f"{name} {x:,.2f}".removesuffix(".00") for name, x in above.items()]
