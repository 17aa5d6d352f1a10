"""The tuner's search: which configurations it tries, in which order, and when one is better. It needs no GPU itself."""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..launch_config import LENGTHS, RESIDENT_KERNELS, TABLE, TILED, Config, Key
from ..tuned import misfit
from .timing import Bench, TuningCase, guards

MARGIN = 0.03  # by which a configuration must win, lest noise choose
CHECKING = 0.7  # share of a kernel's time after which no further candidate is compiled and checked
SCREENING, FINALISTS, ROUNDS, FEWEST = 2, 6, 15, 5  # rounds of all, how many remain, rounds of those, however little time is left

WARPS = {16: (1, 2, 4), 32: (1, 2, 4, 8), 64: (2, 4, 8)}  # of the short and resident regimes, by the height of a tile
PROGRAMS = (1, 2, 4, 8, 16)
BLOCKS = (16, 32, 64, 128)
LARGEST_SHARED = 232448  # bytes that a program may have on an H100, more than on any older GPU


def carried(key: Key, config: Config) -> int:
    """Numbers in float32 that a program holds at once, at the least: what it sums up over its loop, and a tile of scores."""
    sums = {
        "short_fwd": 0,
        "short_bwd": 2 * config.block_m,  # dW_q and dW_k
        "resident_fwd": 3 * config.block_m,  # Q_A, K_A and the output
        "resident_bwd": 3 * config.block_m,  # dk, dW_q and dW_k
        "tiled_fwd": 3 * config.block_m,  # Q_A, K_A and the output
        "tiled_bwd_rows": config.block_m,  # dq
        "tiled_bwd_columns": 2 * config.block_n,  # dk and dv
        "tiled_bwd_tables": 2 * config.block_n,  # dW_q and dW_k
    }
    scores = config.block_m * (config.block_m if key.kernel in RESIDENT_KERNELS else config.block_n)
    return sums[key.kernel] * key.width + scores


def estimated_shared(key: Key, config: Config) -> float:
    """Bytes of shared memory in the tiled regime, in proportion to the operands' rows: those of the table's first."""
    row = TABLE[key][0]
    operands, known = (tile.block_m + tile.num_stages * tile.block_n for tile in (config, row.config))
    return row.shared * operands / known


def candidates(key: Key) -> list[Config]:
    """Configurations worth trying, beginning near the table's first row.

    Without those whose sums alone outgrow the registers or whose operands outgrow any GPU's shared memory by far: what is that
    large may compile for a minute and more. What is a little too large remains, and fails when it is checked.
    """
    if key.kernel in RESIDENT_KERNELS:
        count = PROGRAMS[:4] if key.kernel == "resident_bwd" else (0,)
        blocks = [(b, narrow) for b in LENGTHS for narrow in dict.fromkeys((16, b))]
        grid = [Config(m, n, warps, stages, of) for m, n in blocks for warps in WARPS[m] for stages in (1, 2) for of in count]
    elif key.length != TILED:
        heights = [size for size in LENGTHS if size >= key.length]  # a taller tile seats more sequences
        grid = [Config(b, b, warps, 1, programs) for b in heights for warps in WARPS[b] for programs in PROGRAMS]
    else:
        grid = [Config(m, n, warps, stages) for m in BLOCKS for n in BLOCKS for warps in (4, 8) for stages in (1, 2, 3)]
    start = TABLE[key][0].config

    def distance(config: Config) -> float:
        return sum(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(config, start, strict=True))

    fitting = [config for config in grid if carried(key, config) <= 255 * 32 * config.num_warps and not misfit(key, config)]
    if key.length == TILED:
        fitting = [config for config in fitting if estimated_shared(key, config) <= 1.5 * LARGEST_SHARED]
    return sorted(fitting, key=distance)


def describe(config: Config) -> str:
    block_m, block_n, warps, stages, programs = config
    more = f" stages {stages}" * (stages > 1 or not programs) + f" programs {programs}" * (programs > 0)
    return f"{block_m}x{block_n} warps {warps}{more}"


@dataclass
class Verdict:
    """The result of the search for a key."""

    key: Key
    cases: list[TuningCase]
    table: Config
    chosen: Config
    medians: dict[Config, list[float]] = field(default_factory=dict)  # milliseconds, a number per case; of the finalists
    refused: dict[Config, str] = field(default_factory=dict)
    unreached: int = 0

    def score(self, config: Config) -> float:
        """Mean logarithm of its time over that of the table's row, or, where that cannot run, over a millisecond."""
        base = self.medians.get(self.table) or [1.0] * len(self.cases)
        return sum(math.log(ms / other) for ms, other in zip(self.medians[config], base, strict=True)) / len(base)


def medians_of(
    bench: Bench, key: Key, cases: list[TuningCase], configs: list[Config], rounds: int, go_on: Callable[[int], bool]
) -> dict[Config, list[float]]:
    """Median of a case's samples. Rounds are interleaved, each begins with another configuration: what else the GPU does, a clock
    that it lowers or a neighbour, hits all of them alike."""
    samples: dict[Config, list[list[float]]] = {config: [] for config in configs}  # a row per round, a number per case
    for done in itertools.takewhile(go_on, range(rounds)):
        first = done % len(configs)
        for config in (*configs[first:], *configs[:first]):
            samples[config].append([bench.time(case, key, config) for case in cases])
    return {config: [statistics.median(of_case) for of_case in zip(*rows, strict=True)] for config, rows in samples.items()}


def search(
    key: Key, cases: list[TuningCase], table: Config, bench: Bench, seconds: float = math.inf, *, current: Config | None = None,
    say: Callable[[str], None] = print, step: Callable[[str], None] = lambda text: None,
    now: Callable[[], float] = time.monotonic,
) -> Verdict:  # fmt: skip
    """The fastest correct configuration for all cases of a key; the table's row unless another is faster by MARGIN.

    table: the row that decides without the tuner. bench: refuses and times configurations, in tests by an invented clock. current:
    what an earlier run chose; always tried again. A candidate is right if it is so in every case; one that wins must be so in the
    guards (`guards`), too, as the key stands for their shapes as well.
    """
    begin, verdict = now(), Verdict(key, cases, table, table)
    always = [table] if current is None else [table, current]
    queue = list(dict.fromkeys([*always, *candidates(key)]))

    def refuse(config: Config, asked: list[TuningCase]) -> bool:
        reason = next((refusal for case in asked if (refusal := bench.refusal(case, key, config))), None)
        if reason:
            verdict.refused[config] = reason
            say(f"{key.kernel}, {describe(config)}: {reason}")
        return reason is not None

    standing = []
    while queue and (queue[0] in always or now() - begin < CHECKING * seconds):
        config = queue.pop(0)
        step(f"{key.kernel} {describe(config)}")
        if not refuse(config, cases):
            standing.append(config)
    verdict.unreached = len(queue)
    if not standing:
        return verdict

    verdict.medians = medians_of(bench, key, cases, standing, SCREENING, lambda done: True)
    finalists = sorted(standing, key=verdict.score)[:FINALISTS]
    if table in standing and table not in finalists:
        finalists.append(table)
    # Judged by samples of their own: who came first among many has had luck, too
    verdict.medians = medians_of(bench, key, cases, finalists, ROUNDS, lambda done: done < FEWEST or now() - begin < seconds)
    for config in sorted(finalists, key=verdict.score):
        if table in standing and verdict.score(config) >= -math.log(1 + MARGIN):
            break
        if not refuse(config, guards(key, cases[0].dtype)):
            verdict.chosen = config
            break
    return verdict
