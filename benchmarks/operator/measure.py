"""The measurements: the correctness gate, times in turns, peak memory."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from awrsr_kernels.reference import rounded_at_every_step
from awrsr_kernels.tolerance import wrong_results
from awrsr_kernels.tuning.clock import Clock, Span

from ..common.clock import WrongResult, reason_of, traced, turns, wait
from ..common.kernels import seen
from .providers import Provider, ours
from .workloads import COVARIANCES, Batch, Outputs

PASSES = ("fwd", "bwd", "fwd+bwd")
SAMPLE_MS = 2.0  # a CPU sample repeats its call until it lasts about this long
SEED = 20241  # of the mask that the gate compares under


@dataclass
class Entrant:
    """A provider with the batches of one layout, and its measurements."""

    provider: Provider
    layout: str
    batches: list[Batch]
    first_ms: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PASSES})
    host_samples: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PASSES})
    graph_ms: dict[str, float] = field(default_factory=dict)
    graph_reason: dict[str, str] = field(default_factory=dict)  # why a pass has no graph_ms
    kernels: dict[str, list[str]] = field(default_factory=dict)  # names of what a pass ran; on a CPU of stock attention alone
    kernels_reason: str = ""  # why there are none


def gradients(out: Outputs, batch: Batch) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, list(batch.leaves.values()), list(batch.douts.values()))


def one_round(entrant: Entrant, clock: Clock, backward: bool) -> dict[str, tuple[float, float]]:
    """One sample of each pass, the sum over the entrant's batches: (milliseconds, the host's milliseconds).

    Every backward has a forward of its own before it, outside its span.
    """
    busy = {p: max(entrant.host_samples[p][-3:], default=0.0) / len(entrant.batches) for p in PASSES}
    spans: dict[str, list[Span]] = {p: [] for p in PASSES}
    for batch in entrant.batches:
        batch = entrant.provider.view(batch)
        forward = functools.partial(entrant.provider.call, batch)
        out, span = clock.timed(forward, busy["fwd"])
        spans["fwd"].append(span)
        if not backward:
            continue
        grads, span = clock.timed(functools.partial(gradients, out, batch), busy["bwd"])
        spans["bwd"].append(span)
        del out, grads
        if clock.cuda:  # measured by itself, as between fwd and bwd above lies a flush
            both = functools.partial(lambda forward, batch: gradients(forward(), batch), forward, batch)
            grads, span = clock.timed(both, busy["fwd+bwd"])
            spans["fwd+bwd"].append(span)
            del grads
    if not clock.cuda:
        spans["fwd+bwd"] = spans["fwd"] + spans["bwd"]
    return {p: (clock.total_ms(spans[p]), sum(s.host_s for s in spans[p]) * 1e3) for p in PASSES}


def race(entrants: list[Entrant], clock: Clock, backward: bool, reps: int | None, budget_s: float) -> None:
    """Fill in samples round-robin, so that all entrants share whatever else the machine does.

    Rounds: `reps`, or as many as fit in `budget_s` (MIN_ROUNDS at least).
    """
    repeats = []
    for entrant in entrants:
        once = one_round(entrant, clock, backward)
        repeats.append(1 if clock.cuda else max(1, round(SAMPLE_MS / max(once["fwd"][0], 1e-3))))
        if clock.cuda:  # so that the first sample knows how long a lead it needs
            for p in PASSES:
                entrant.host_samples[p].append(once[p][1])
    for i in turns(len(entrants), reps, budget_s):
        rounds = [one_round(entrants[i], clock, backward) for _ in range(repeats[i])]
        for p in PASSES:
            entrants[i].samples[p].append(sum(r[p][0] for r in rounds) / repeats[i])
            entrants[i].host_samples[p].append(sum(r[p][1] for r in rounds) / repeats[i])


def measure_memory(entrant: Entrant) -> None:
    """Peak bytes above the inputs, of the batch that takes most; the output, what is saved for the backward, gradients count."""
    for batch in entrant.batches:
        view = entrant.provider.view(batch)
        forward, backward = functools.partial(entrant.provider.call, view), functools.partial(gradients, batch=view)
        fwd, bwd = traced([lambda _, forward=forward: forward(), backward], view.q.device)  # type: ignore[misc]
        peaks = {"fwd": fwd, "bwd": bwd, "fwd+bwd": max(fwd, bwd)}
        for p in PASSES:
            entrant.peak_mib[p] = max(entrant.peak_mib.get(p, 0.0), peaks[p] / 2**20)


def name_kernels(entrant: Entrant, passes: list[str]) -> None:
    """Fill in `kernels` of an entrant for each pass, from its first batch. After everything is timed: profiling costs time."""
    batch = entrant.provider.view(entrant.batches[0])
    forward, device = functools.partial(entrant.provider.call, batch), batch.q.device
    try:
        found = {"fwd": seen(forward, device)}
        if passes != ["fwd"]:
            out = forward()
            found["bwd"] = seen(lambda: gradients(out, batch), device)
            found["fwd+bwd"] = list(dict.fromkeys(found["fwd"] + found["bwd"]))
    except Exception as error:  # a profiler that fails costs no row
        entrant.kernels_reason = reason_of(error)
        return
    entrant.kernels = {p: found[p] for p in passes if found[p]}


def _compute(call: Callable[[Batch], Outputs], batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Outputs and gradients by name, and the milliseconds that forward and backward took."""
    start = time.perf_counter()
    out = call(batch)
    wait(batch.q.device)
    middle = time.perf_counter()
    grads = gradients(out, batch)
    wait(batch.q.device)
    end = time.perf_counter()
    ms = {"fwd": (middle - start) * 1e3, "bwd": (end - middle) * 1e3, "fwd+bwd": (end - start) * 1e3}
    outs = (out,) if isinstance(out, Tensor) else out
    results = {name: x.detach() for name, x in zip(batch.douts, outs, strict=True)}
    return results | {f"d{name}": g for name, g in zip(batch.leaves, grads, strict=True)}, ms


class Gate:
    """No provider is timed before its output and gradients agree with the definition in float64.

    The provider computes the batch as it will be timed, except that the output's gradient is zero outside an excerpt of
    sequences and heads (`Batch.excerpt`): gradients of what is shared then stem from the excerpt alone, and the reference need
    only compute that. Under dropout ours must draw the reference's mask; rivals draw their own and are compared without dropout.
    """

    def __init__(self) -> None:
        self._expected: dict[tuple[int, str, bool, float], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def check(self, entrant: Entrant) -> None:
        """Raises WrongResult; fills in `first_ms`, the time of the very first call, compilation included."""
        entrant.first_ms = dict.fromkeys(PASSES, 0.0)
        for batch in entrant.batches:
            view = replace(entrant.provider.view(batch), dropout_seed=SEED)
            if entrant.provider.role != "ours":
                view = replace(view, dropout_p=0.0)
            exact, same = self._yardstick(id(batch), view)
            index, heads, kv_heads, bounds = view.excerpt()
            results, ms = _compute(entrant.provider.call, _only(view, index, heads))
            for p in PASSES:
                entrant.first_ms[p] += ms[p]
            if bounds is not None and not view.packed:  # what stands in padding is nobody's business
                assert view.bounds is not None
                items = torch.arange(view.max_len, device=bounds.device) < view.bounds[:, None]
                results |= {name: results[name] * items[:, None, :, None] for name in view.douts}
            parts = {name: _excerpt_of(name, results[name], index, heads, kv_heads) for name in exact}
            if lines := wrong_results(parts, exact, same, view.q.dtype):
                raise WrongResult(lines[0])

    def _yardstick(self, key: int, view: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The excerpt by the reference in float64, and in the batch's own dtype."""
        full_key = (key, view.refinement, view.stochastic, view.dropout_p)
        if full_key not in self._expected:
            index, heads, kv_heads, bounds = view.excerpt()
            reference = functools.partial(ours, backend="reference")

            def excerpt(dtype: torch.dtype) -> dict[str, Tensor]:
                names = ("q", "k", "v", "w_q", "w_k", "gate", "dout", *(COVARIANCES if view.stochastic else ()))
                names += ("lags",) * (view.lags is not None)
                parts = {n: _excerpt_of(n, getattr(view, n), index, heads, kv_heads).detach().to(dtype) for n in names}
                leaves: dict[str, Any] = {n: parts[n].requires_grad_(not n.startswith("dout")) for n in names}
                return _compute(reference, replace(view, **leaves, bounds=bounds))[0]

            with rounded_at_every_step():
                self._expected[full_key] = excerpt(torch.float64), excerpt(view.q.dtype)
        return self._expected[full_key]


def _only(batch: Batch, index: Tensor, heads: int) -> Batch:
    """The batch with gradients of its outputs that are zero outside an excerpt."""

    def only(dout: Tensor) -> Tensor:
        kept = torch.zeros_like(dout)
        kept[index, :heads] = dout[index, :heads]
        return kept

    return replace(batch, dout=only(batch.dout), dout_cov=None if batch.dout_cov is None else only(batch.dout_cov))


def _excerpt_of(name: str, x: Tensor, index: Tensor, heads: int, kv_heads: int) -> Tensor:
    name = name if name.startswith("dout") else name.removeprefix("d")
    name = name.removesuffix("_cov")
    if name in ("w_q", "w_k", "lags"):
        return x
    if name == "gate":
        return x[:heads]
    return x[index, : kv_heads if name in ("k", "v") else heads]
