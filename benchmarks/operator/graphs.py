"""CUDA-graph times beside the eager ones: what a call costs once the host is out of the way altogether.

A graph holds a forward, or a forward with its backward; it is replayed as a training loop that captures its step would. What
cannot be captured (a call that synchronises, or allocates in ways a graph forbids) has no time but a reason.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from .measure import Clock, Entrant, gradients, quantiles

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
    """After a failed capture: back to the stream before it, and a generator that does not believe it goes on."""
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
            line = str(error).splitlines()[0] if str(error) else ""
            entrant.graph_reason[p] = f"{type(error).__name__}: {line}"


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
