"""How anything is measured: a clock for either device, turns, quantiles, peak memory, and the error of a wrong result."""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

MIN_ROUNDS = 5


class WrongResult(Exception):
    """A provider's result is not what the definition says."""


def reason_of(error: Exception) -> str:
    """One line of an error, to stand in a table."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class Span(NamedTuple):
    """Two marks, and how long the host was busy between them."""

    start: Any
    end: Any
    host_s: float


class Clock:
    """The CPU's clock, or CUDA events.

    On a GPU each span starts with a cold L2 cache and a queue that the host has filled ahead of it, so that it holds the device's
    time alone; the host's own time is kept beside it, and a call in eager mode takes about the larger of the two.
    """

    LEAD, FLUSH_MS = 8, 0.05  # flushes of the cache at the least, and what one takes at the least, on an H200

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.cache = torch.empty(256 << 20, dtype=torch.int8, device=device) if self.cuda else None

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, function: Callable[[], Any], expected_ms: float = 0.0) -> tuple[Any, Span]:
        """The function's result and its span. expected_ms: how long the host was busy with it before, which the queue outlasts."""
        if self.cache is not None:
            for _ in range(max(self.LEAD, math.ceil(1.5 * expected_ms / self.FLUSH_MS))):
                self.cache.zero_()
        start, before = self.mark(), time.perf_counter()
        result = function()
        host_s = time.perf_counter() - before
        return result, Span(start, self.mark(), host_s)

    def total_ms(self, spans: list[Span]) -> float:
        """Sum of the spans; waits for the GPU."""
        if not self.cuda:
            return sum(s.end - s.start for s in spans) * 1e3
        torch.cuda.synchronize()
        return sum(s.start.elapsed_time(s.end) for s in spans)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turns(count: int, reps: int | None, budget_s: float) -> Iterator[int]:
    """Whose turn it is, 0 to count - 1 in each round, each round starting with another; garbage is not collected meanwhile.

    Rounds: `reps`, or as many as fit in `budget_s` (MIN_ROUNDS at least).
    """
    gc.collect()
    gc.disable()
    try:
        begin, done = time.perf_counter(), 0
        while done < (reps or MIN_ROUNDS) or (reps is None and time.perf_counter() - begin < budget_s):
            yield from ((i + done) % count for i in range(count))
            done += 1
    finally:
        gc.enable()


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    values = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return tuple(values.tolist())  # type: ignore[return-value]


def traced(steps: Sequence[Callable[[Any], Any]], device: torch.device) -> list[int]:
    """Run steps, each given the result of the one before; the most bytes allocated during each, relative to before the first."""
    result, peaks = None, []
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for step in steps:
            torch.cuda.reset_peak_memory_stats()
            result = step(result)
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        return peaks
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print two lines per profile
    activities = [torch.profiler.ProfilerActivity.CPU]
    # One profile for all steps: it does not see the release of what was allocated before it began
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        for step in steps:
            with torch.profiler.record_function("step"):
                result = step(result)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    now = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "step":
            peaks.append(now)
        elif event.name() == "[memory]":
            now += event.nbytes()
            if peaks:
                peaks[-1] = max(peaks[-1], now)
    return peaks
