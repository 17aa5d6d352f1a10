"""Measurement: turns, quantiles, peak memory, and the error of a wrong result. The clock is that of the tuner."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

MIN_ROUNDS = 5


class WrongResult(Exception):
    """A provider's result differs from the definition."""


def reason_of(error: Exception) -> str:
    """One line of an error, for a table."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


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
    """Run steps, each on the result of the one before. Returns the peak bytes of each, relative to the state before the first."""
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
