"""Distance to the limits of the device: its rates of copying and multiplying in the same run, and the least a problem must move.

A problem's *floor* is the longer of two times: its bytes at the speed of a large copy, and its operations at the speed of a large
matrix product. Bytes are ideal: every input is read once, every output written once, both tables W once per call, and nothing is
saved for the backward. Operations are those of `Task.flops`. No algorithm that keeps its inputs in device memory gets below the
floor; one that is far above it loses its time elsewhere: launches, the host, padding, exponentials, intermediate results.

On a CPU a problem that fits in the cache moves faster than a copy of large tensors, so small problems may beat their floor.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from awrsr_kernels.tuning.clock import Clock

from .workloads import Shape, Task, calls

ROUNDS = 5
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}  # rows of the square matrices: about 20 and 1 ms


@dataclass(frozen=True)
class Rates:
    """What a device does at best: bytes a second (read and written both count), operations a second (two per multiply-add)."""

    copy: float
    matmul: float

    def floor_ms(self, moved: float, operations: float) -> float:
        return max(moved / self.copy, operations / self.matmul) * 1e3


class Point(NamedTuple):
    """A pass of a call under the roof of its device."""

    device: str
    group: str  # what a picture gives a colour
    problem: str
    call: str
    part: str  # fwd, bwd, fwd+bwd or step
    moved: float  # bytes
    operations: float
    ms: float
    rates: Rates

    @property
    def intensity(self) -> float:
        return self.operations / self.moved

    @property
    def ridge(self) -> float:
        return self.rates.matmul / self.rates.copy

    @property
    def side(self) -> str:
        """Which of the two limits is nearer: the side of the ridge."""
        return "memory" if self.intensity < self.ridge else "arithmetic"

    @property
    def share(self) -> float:
        """Of what the roof allows."""
        return self.rates.floor_ms(self.moved, self.operations) / self.ms

    def row(self) -> dict[str, Any]:
        names = ("device", "problem", "call", "part", "operations", "intensity", "ridge")
        row = {name: getattr(self, name) for name in names}
        return row | {"bytes": self.moved, "side": self.side, "share_of_roof": self.share, "median_ms": self.ms}


def measure_rates(device: str, dtype: str) -> Rates:
    """The fastest of a few copies and of a few matrix products in `dtype` (float32 as torch is set: IEEE or TF32)."""
    clock = Clock(torch.device(device))

    def fastest(function: Callable[[], Any]) -> float:
        function()
        return min(clock.total_ms([clock.timed(function)[1]]) for _ in range(ROUNDS)) / 1e3

    def copy() -> float:
        source = torch.ones(copy_bytes(device) // 4, device=device)
        target = torch.zeros_like(source)
        return 2 * source.nbytes / fastest(lambda: target.copy_(source))

    def matmul() -> float:
        n = MATMUL_SIZE[device]
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * n**3 / fastest(lambda: torch.mm(a, b, out=out))

    return Rates(copy(), matmul())


def free_bytes(device: str) -> int | None:
    """Free memory; None if the system does not report it."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable"))
    return None


def copy_bytes(device: str) -> int:
    """Bytes of a tensor to copy: several times what any cache holds; at most an eighth of free memory."""
    return min(COPY_BYTES[device], (free_bytes(device) or 2 << 30) // 8)


def ideal_bytes(task: Task, layout: str, pass_: str) -> int:
    """Bytes that a pass must move at least: real items of every input, all rows of every output (padding is written, as zeros).

    Between Gaussians means and covariances are inputs and outputs. The gate, lengths and the seed, a number per head or sequence,
    are left out.
    """
    s, size = task.shape, task.itemsize
    if pass_ == "fwd+bwd":
        return ideal_bytes(task, layout, "fwd") + ideal_bytes(task, layout, "bwd")
    inputs, out = s.H * s.D + s.H_kv * (s.D + s.D_v), s.H * s.D_v  # features of all heads, per row
    if task.stochastic:
        inputs, out = 2 * inputs, 2 * out
    total = 0
    for lengths, window in calls(task, layout):
        items = sum(lengths)
        rows = items if layout == "packed" else len(lengths) * window
        tables = 0 if task.refinement == "none" else (4 if task.refinement == "stochastic" else 2) * window * s.R
        if pass_ == "fwd":
            total += items * inputs + tables + rows * out
        else:
            total += items * (inputs + out) + tables + rows * inputs + tables
    return total * size


def shares(task: Task, layout: str, pass_: str, time_ms: float, rates: Rates) -> dict[str, float]:
    """What a time says about a pass, as columns of a row: shares of both rates, the floor, and the distance to it (1 is on it)."""
    moved, operations = ideal_bytes(task, layout, pass_), task.flops(pass_)
    floor = rates.floor_ms(moved, operations)
    seconds = time_ms / 1e3
    return {
        "bytes": moved,
        "operations": operations,
        "copy_share": moved / seconds / rates.copy,
        "matmul_share": operations / seconds / rates.matmul,
        "floor_ms": floor,
        "to_floor": time_ms / floor,
    }


def step_counts(shape: Shape, refinement: str, itemsize: int, content: bool) -> tuple[int, int]:
    """Bytes that a decoding step must move, and its operations. In each of B entries item L - 1 meets those before it.

    Every number that meets the new item is multiplied and added once; no product is one of matrices. content: tables per entry.
    """
    s, before, r = shape, shape.L - 1, shape.R * (refinement != "none")
    value = s.D_v * (refinement == "value")  # P V is cached
    kept = r + value + 2 * r * content  # numbers that the cache gains per head, besides key and value
    own, met = 2 * s.D + s.D_v + 2 * r, s.D + 3 * r  # by the new item, by each one before: key, both tables and K_A
    met += s.D_v * (1 if refinement == "none" else 2 if value or refinement == "additive" else 1)
    operations = 2 * s.B * s.H * (own + before * met)
    tables = (s.B * s.H if content else 1) * s.L * 2 * r
    read = s.B * (s.H * s.D + s.H_kv * (s.D + s.D_v) * s.L) + tables + s.B * s.H * before * (r + value)
    return (read + s.B * (s.H_kv * (s.D + s.D_v) + s.H * (kept + s.D_v))) * itemsize, operations
