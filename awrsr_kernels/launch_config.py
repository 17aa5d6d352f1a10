"""The kernels and tiles for each class of calls, as data, and why a call cannot run on the kernels. Does not import Triton.

A *row* of the table is a configuration of one kernel for a length class (short regime: the longest sequence, which is the height
of the tile), a width class (the widest of D, D_v and R) and a size of element. `choose` is a pure function of the call, the GPU's
shared memory and the tuner's results for this GPU (`tuned.py`).
"""

import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import NamedTuple

import torch

SHORT_KERNELS = ("short_fwd", "short_bwd")
RESIDENT_KERNELS = ("resident_fwd", "resident_bwd")
TILED_KERNELS = ("tiled_fwd", "tiled_bwd_rows", "tiled_bwd_columns", "tiled_bwd_tables")
LENGTHS = (16, 32, 64)  # classes of the short regime
RESIDENT = 256  # the one length class of the resident regime; longer sequences go to the tiled one
WIDTHS = (32, 64, 128, 256)
TILED = 0  # the length class of the tiled kernels
OF_HOPPER = 232448  # bytes of shared memory that a program may have there


class Config(NamedTuple):
    """The launch parameters of a kernel."""

    block_m: int  # rows of a tile
    block_n: int  # columns of a tile; short: as many as rows; resident: items of a narrow block for what 64 leaves over, or as many
    num_warps: int
    num_stages: int
    programs: int = 0  # short, and resident backward: how many of them per processor share a batch


class Key(NamedTuple):
    """The class of calls that a configuration is chosen for."""

    kernel: str
    length: int  # class in LENGTHS, RESIDENT, or TILED
    width: int  # class in WIDTHS
    itemsize: int  # bytes of an element, 4 for float64, too


class Row(NamedTuple):
    """A configuration, and the shared memory that a program of it takes: the greediest call, sm_90, as the report has it."""

    shared: int
    config: Config


Tuned = Mapping[Key, Config]

# Chosen by the compile report (no spills, then occupancy), not tuned on a GPU yet. Rows of one key: the first that fits is taken.
TABLE: dict[Key, list[Row]] = {
    Key("short_fwd", 16, 32, 2): [Row(6144, Config(16, 16, 1, 1, 16))],
    Key("short_fwd", 16, 64, 2): [Row(6144, Config(16, 16, 1, 1, 16))],
    Key("short_fwd", 16, 128, 2): [Row(16384, Config(16, 16, 4, 1, 8))],
    Key("short_fwd", 16, 32, 4): [Row(16384, Config(16, 16, 4, 1, 8))],
    Key("short_fwd", 16, 64, 4): [Row(24576, Config(16, 16, 4, 1, 8))],
    Key("short_fwd", 32, 32, 2): [Row(14336, Config(32, 32, 2, 1, 8))],
    Key("short_fwd", 32, 64, 2): [Row(16384, Config(32, 32, 2, 1, 8))],
    Key("short_fwd", 32, 128, 2): [Row(32768, Config(32, 32, 4, 1, 4))],
    Key("short_fwd", 32, 32, 4): [Row(32768, Config(32, 32, 4, 1, 4))],
    Key("short_fwd", 32, 64, 4): [Row(32768, Config(32, 32, 4, 1, 4))],
    Key("short_fwd", 64, 32, 2): [Row(24576, Config(64, 64, 4, 1, 4))],
    Key("short_fwd", 64, 64, 2): [Row(32768, Config(64, 64, 4, 1, 4))],
    Key("short_fwd", 64, 128, 2): [Row(65536, Config(64, 64, 4, 1, 2))],
    Key("short_bwd", 16, 32, 2): [Row(12800, Config(16, 16, 1, 1, 8))],
    Key("short_bwd", 16, 64, 2): [Row(12800, Config(16, 16, 2, 1, 4))],
    Key("short_bwd", 16, 128, 2): [Row(25088, Config(16, 16, 4, 1, 2))],
    Key("short_bwd", 16, 32, 4): [Row(16384, Config(16, 16, 4, 1, 2))],
    Key("short_bwd", 16, 64, 4): [Row(24576, Config(16, 16, 4, 1, 2))],
    Key("short_bwd", 32, 32, 2): [Row(26624, Config(32, 32, 2, 1, 4))],
    Key("short_bwd", 32, 64, 2): [Row(26624, Config(32, 32, 4, 1, 2))],
    Key("short_bwd", 32, 128, 2): [Row(51200, Config(32, 32, 4, 1, 2))],
    Key("short_bwd", 32, 32, 4): [Row(32768, Config(32, 32, 4, 1, 2))],
    Key("short_bwd", 32, 64, 4): [Row(32768, Config(32, 32, 4, 1, 2))],
    Key("short_bwd", 64, 32, 2): [Row(98304, Config(64, 64, 4, 1, 2))],
    Key("short_bwd", 64, 64, 2): [Row(98304, Config(64, 64, 4, 1, 2))],
    Key("short_bwd", 64, 128, 2): [Row(163840, Config(64, 64, 8, 1, 1))],
    Key("resident_fwd", RESIDENT, 32, 2): [Row(12288, Config(64, 16, 4, 1))],
    Key("resident_fwd", RESIDENT, 64, 2): [Row(24576, Config(64, 16, 4, 1))],
    Key("resident_fwd", RESIDENT, 32, 4): [Row(8192, Config(16, 16, 4, 1))],
    Key("resident_fwd", RESIDENT, 64, 4): [Row(16384, Config(16, 16, 4, 1))],
    Key("resident_bwd", RESIDENT, 32, 2): [Row(40960, Config(64, 16, 4, 1, 2))],
    # It takes 74752 bytes, but before Hopper tensor cores take operands from registers, and 64 rows would spill 9 KB
    Key("resident_bwd", RESIDENT, 64, 2): [Row(172032, Config(64, 16, 4, 1, 2)), Row(40960, Config(32, 32, 4, 1, 2))],
    Key("resident_bwd", RESIDENT, 32, 4): [Row(16384, Config(16, 16, 4, 1, 2))],
    Key("resident_bwd", RESIDENT, 64, 4): [Row(16384, Config(16, 16, 4, 1, 2))],
    # float32 from 33 rows on is tiled: a backward of 64 rows would keep 2.5 KB a thread in local memory, a forward 448 bytes
    **{
        Key(kernel, TILED, width, itemsize): rows
        for kernel in TILED_KERNELS
        for (width, itemsize), rows in {
            (32, 2): [Row(65536, Config(64, 64, 4, 2))],
            (64, 2): [Row(115200, Config(64, 64, 4, 2)), Row(65536, Config(64, 64, 4, 1))],
            (128, 2): [Row(213504, Config(64, 64, 8, 2)), Row(114688, Config(64, 64, 8, 1)), Row(51200, Config(32, 32, 4, 1))],
            (256, 2): [Row(133376, Config(32, 32, 8, 2)), Row(100352, Config(32, 32, 8, 1))],
            (32, 4): [Row(81920, Config(32, 32, 4, 1))],
            (64, 4): [Row(81920, Config(32, 32, 4, 1))],
            (128, 4): [Row(163840, Config(32, 32, 8, 1)), Row(81920, Config(16, 16, 4, 1))],
            (256, 4): [Row(163840, Config(16, 16, 4, 1))],
        }.items()
    },
    # Here 8 warps compute each exponential once, on 64 rows twice. The forward's sums would not fit. Kernels take 200704, 147968
    # and 65536 bytes, but before Hopper tensor cores take operands from registers, and 128 rows would take more slots than 64
    **{
        Key(kernel, TILED, 128, 2): [
            Row(max(shared, 172032), config), Row(114688, Config(64, 64, 8, 1)), Row(51200, Config(32, 32, 4, 1)),
        ]
        for kernel, shared, config in (
            ("tiled_bwd_rows", 200704, Config(128, 32, 8, 2)),
            ("tiled_bwd_columns", 147968, Config(128, 64, 8, 1)),
            ("tiled_bwd_tables", 65536, Config(128, 64, 8, 1)),
        )
    },
    # Smaller than the backward's, so that nothing spills
    Key("tiled_fwd", TILED, 32, 4): [Row(24576, Config(32, 32, 8, 1))],
    Key("tiled_fwd", TILED, 64, 4): [Row(24576, Config(32, 32, 8, 1))],
    Key("tiled_fwd", TILED, 128, 4): [Row(40960, Config(32, 16, 8, 1))],
}

# One new position against a cache: a row at a time, so columns alone are tiled; by width class and size of element. No products on
# tensor cores, no shared memory worth counting. Not timed on a GPU yet: the most columns whose running sums stay in registers.
STEP = 1  # the length class of its kernel, decode_step
STEP_TABLE: dict[tuple[int, int], Config] = {
    (32, 2): Config(1, 32, 4, 1),
    (64, 2): Config(1, 32, 4, 1),
    (128, 2): Config(1, 32, 8, 1),
    (256, 2): Config(1, 16, 8, 1),
    (32, 4): Config(1, 32, 4, 1),
    (64, 4): Config(1, 32, 4, 1),
    (128, 4): Config(1, 16, 8, 1),
    (256, 4): Config(1, 8, 8, 1),
}


def step_config(features: tuple[int, int, int], itemsize: int) -> Config:
    """The configuration of a step; features: D, D_v and R, at most those of the widest class."""
    width = next(size for size in WIDTHS if max(features) <= size)
    return STEP_TABLE[width, 2 if itemsize == 2 else 4]


def table_features(d: int, d_v: int, r: int, stochastic: bool, refinement: str) -> tuple[int, int, int]:
    """What a call's class goes by: D, D_v and R. In stochastic attention D counts means and deviations, D_v both values, and in
    "additive", whose squares take the scores of both stages at once, D and R count together."""
    both = stochastic and refinement == "additive"
    return d + r * int(both), d_v * (1 + int(stochastic)), r  # open sizes are not multiplied with truth values in torch 2.11


def unsupported_reason(device: torch.device, dtype: torch.dtype, features: tuple[int, int, int]) -> str | None:
    """Why the Triton kernels cannot run, and what to do about it; None if they can. features: D, D_v and R."""
    if sys.modules.get("triton") is None and find_spec("triton") is None:  # the search takes longer than a launch
        return "Triton is not installed (pip install triton, Linux only)"
    if max(features) > WIDTHS[-1]:
        return f"{features} features are more than {WIDTHS[-1]}; Gaussians count twice (use backend='torch')"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "the tensors are on the CPU (move them to a GPU, or set TRITON_INTERPRET=1 before Triton is imported)"
        return "Triton's interpreter gets bfloat16 products wrong (use float32)" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"the tensors are on {device.type} (move them to an NVIDIA or AMD GPU)"
    if dtype == torch.float64:
        return "the kernels have no float64 on a GPU (use float32, or backend='torch')"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0 (use backend='torch')"
    needed, present = smallest(features, dtype.itemsize), shared_memory(device)
    if torch.version.cuda and needed > present:
        return f"{features} features in {dtype} take {needed} bytes of shared memory, the GPU has {present} (use backend='torch')"
    return None


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; in the interpreter, those of an H100."""
    if device.type != "cuda":
        return 232448
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def key_of(kernel: str, max_len: int, features: tuple[int, int, int], itemsize: int) -> Key | None:
    """The class of a call; None if the kernel has no class for it. features: D, D_v and R."""
    lengths = LENGTHS if kernel in SHORT_KERNELS else (RESIDENT,)
    length = TILED if kernel in TILED_KERNELS else next((size for size in lengths if max_len <= size), None)
    width = next((size for size in WIDTHS if max(features) <= size), None)
    if length is None or width is None:
        return None
    key = Key(kernel, length, width, 2 if itemsize == 2 else 4)
    return key if key in TABLE else None


def is_short(
    max_len: int, features: tuple[int, int, int], itemsize: int, shared: int, stochastic: bool = False, lagged: bool = False
) -> bool:  # fmt: skip
    """Whether a call runs in the short regime, which holds every matrix of a head on chip.

    shared: bytes of shared memory that a program may have. lagged: whether the call has lags.
    """
    # With operands in registers a lagged backward of 64 rows would keep 2.7 KB a thread in local memory; in float32 one of 32, 1.6
    if lagged and max_len > (16 if itemsize > 2 else 32 if shared < OF_HOPPER else 64):
        return False
    if stochastic and max_len > 32 and max(features) > 64:  # a backward of 64 rows would keep 1.3 KB a thread in local memory
        return False
    keys = [key_of(kernel, max_len, features, itemsize) for kernel in SHORT_KERNELS]
    return all(key is not None and any(row.shared <= shared for row in TABLE[key]) for key in keys)


def is_resident(max_len: int, causal: bool, features: tuple[int, int, int], itemsize: int, shared: int, stochastic: bool) -> bool:
    """Whether the sequences of a call that are not short run in the resident regime."""
    keys = [key_of(kernel, max_len, features, itemsize) for kernel in RESIDENT_KERNELS]
    fits = all(key is not None and any(row.shared <= shared for row in TABLE[key]) for key in keys)
    return causal and not stochastic and fits


def choose(key: Key, shared: int, tuned: Tuned | None = None) -> Config:
    """The configuration to launch: what was tuned for this GPU, otherwise the first row that fits, otherwise the last.

    (The last is for AMD GPUs, which keep operands in registers and take less shared memory than the table says.)
    """
    if tuned and key in tuned:
        return tuned[key]
    rows = TABLE[key]
    return next((row.config for row in rows if row.shared <= shared), rows[-1].config)


def smallest(features: tuple[int, int, int], itemsize: int) -> int:
    """Least bytes of shared memory with which a call of these features can run."""
    keys = [key_of(kernel, 1 << 30, features, itemsize) for kernel in TILED_KERNELS]
    return max(TABLE[key][-1].shared for key in keys if key is not None)
