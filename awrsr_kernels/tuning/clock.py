"""The clock of the tuner and of benchmarks: the CPU's clock, or CUDA events behind a queue that the host has filled."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Span(NamedTuple):
    """Two marks, and the time that the host was busy between them."""

    start: Any
    end: Any
    host_s: float


class Clock:
    """The CPU's clock, or CUDA events.

    On a GPU each span starts with a cold L2 cache and a queue that the host has filled ahead of it, so that it holds the device's
    time alone; the host's own time is kept separately, and a call in eager mode takes about the larger of the two.
    """

    FLUSH_MS = 0.05  # what a flush of the cache takes at the least, on an H200

    def __init__(self, device: torch.device, lead: int = 8) -> None:
        """lead: least number of cache flushes before a span."""
        self.cuda, self.lead = device.type == "cuda", lead
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
            for _ in range(max(self.lead, math.ceil(1.5 * expected_ms / self.FLUSH_MS))):
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
