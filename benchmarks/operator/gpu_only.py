"""For GPUs only: CUDA-graph times in addition to eager ones, and parallel compilation of kernels before anything is timed.

A graph holds a forward, or a forward with its backward. It is replayed as in a training loop that captures its step. A call that
cannot be captured (it synchronises, or allocates in ways that a graph forbids) has a reason instead of a time. Compiling is the
slow part of a first run on a GPU, and a single process compiles one kernel after another.
"""

import functools
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch

from awrsr_kernels.tuning.clock import Clock

from ..common.clock import quantiles, reason_of
from .measure import Entrant, gradients
from .providers import PROVIDERS
from .workloads import Task, build

REPLAYS, SECONDS = 20, 0.5  # of one batch; at least five replays, however long they take
Capture = Callable[[Callable[[], Any]], Callable[[], Any]]


def capture(function: Callable[[], Any]) -> Callable[[], Any]:
    """Record what a function launches; the result replays it. Raises whatever the function or the capture raises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # workspaces and lazily loaded kernels must exist before the capture
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph, eager = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            kept = function()
    except Exception:
        _recover(eager)
        raise

    def replay(kept: Any = kept) -> None:  # the results' memory is the graph's: they live as long as it does
        graph.replay()

    return replay


def _recover(eager: torch.cuda.Stream) -> None:
    """After a failed capture, restore the stream, and a generator that is not in capture mode."""
    torch.cuda.set_stream(eager)
    torch.cuda.synchronize()
    fresh = torch.Generator("cuda").graphsafe_get_state()
    torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)


def time_graphs(entrant: Entrant, clock: Clock, passes: list[str], capture: Capture = capture) -> None:
    """Fill in `graph_ms`, or `graph_reason`, of an entrant for each pass: the median of some replays, summed over its batches."""
    for p in passes:
        if p == "bwd":
            entrant.graph_reason[p] = "a backward is captured together with its forward"
            continue
        try:
            entrant.graph_ms[p] = _time(entrant, clock, p == "fwd+bwd", capture)
        except Exception as error:  # any rival may fail in a way of its own, and costs no other its time
            entrant.graph_reason[p] = reason_of(error)


def _time(entrant: Entrant, clock: Clock, backward: bool, capture: Capture) -> float:
    total = 0.0
    for batch in entrant.batches:
        view = entrant.provider.view(batch)
        forward = functools.partial(entrant.provider.call, view)
        replay = capture(lambda forward=forward, view=view: gradients(forward(), view) if backward else forward())  # type: ignore[misc]
        replay()
        samples: list[float] = []
        begin = time.perf_counter()
        while len(samples) < 5 or (len(samples) < REPLAYS and time.perf_counter() - begin < SECONDS):
            samples.append(clock.total_ms([clock.timed(replay)[1]]))
        total += quantiles(samples)[0]
        del replay
    return total


def compile_one(task: Task) -> str | None:
    """Forward and backward of every batch of a task; why not, if the kernels cannot."""
    try:
        for layout in task.layouts:
            for batch in build(task, layout):
                gradients(PROVIDERS["triton"].call(batch), batch)
        torch.cuda.synchronize()
    except Exception as error:  # the timed run meets the same error and reports it
        return reason_of(error)
    return None


def precompile(tasks: list[Task], processes: int) -> str:
    """Run each task's Triton calls once in `processes` processes, so that this one finds the kernels on disk.

    Returns what to print. The tensors are as large as in the run: Triton compiles for the divisibility of sizes and strides, too.
    """
    tasks = [t for t in dict.fromkeys(tasks) if t.device == "cuda"]
    if not tasks:
        return "nothing to precompile: the Triton kernels need a GPU"
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(processes, len(tasks))) as pool:
        reasons = pool.map(compile_one, tasks, chunksize=1)
    done = f"precompiled {reasons.count(None)} of {len(reasons)} problems in {time.perf_counter() - begin:.1f} s"
    return "\n".join([done, *dict.fromkeys(x for x in reasons if x)])
