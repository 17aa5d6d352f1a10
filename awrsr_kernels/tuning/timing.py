"""Calls of given shapes for the tuner, checked against the definition and timed with a forced configuration.

B batch, H query heads, H_kv key and value heads, L positions, D head dim (of values, too), R refinement rank.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..api import refined_attention
from ..checks import REFINEMENTS
from ..launch_config import (
    RESIDENT,
    RESIDENT_KERNELS,
    SHORT_KERNELS,
    TILED,
    TILED_KERNELS,
    Config,
    Key,
    is_resident,
    is_short,
    key_of,
)
from ..reference import rounded_at_every_step
from ..tolerance import wrong_results
from ..tuned import forced
from .clock import Clock

REFERENCE_BYTES = 2 << 30  # what the reference's L x L matrices may take
LAUNCHED_FORWARD = ("short_fwd", "resident_fwd", "tiled_fwd")
SEED = 20410  # of the dropout mask
FLUSHES = 16  # of the cache, ahead of a call: the host queues the call meanwhile
SPANS = 5  # to a sample, on a GPU


class TuningCase(NamedTuple):
    """A shape to tune for."""

    batch: int
    heads: int
    length: int
    dim: int
    rank: int
    dtype: torch.dtype
    refinement: str = "simple"
    dropout_p: float = 0.0
    kv_heads: int = 0  # 0: as many as query heads
    ragged: bool = False  # histories of all lengths, rather than of L items each

    def __str__(self) -> str:
        heads = f"H {self.heads}/{self.kv_heads}" if self.kv_heads else f"H {self.heads}"
        rank = f" R {self.rank}" if self.rank != self.dim else ""
        more = (f" dropout {self.dropout_p}" if self.dropout_p else "") + (" ragged" if self.ragged else "")
        return f"B {self.batch} {heads} L {self.length} D {self.dim}{rank} {str(self.dtype)[6:]} {self.refinement}{more}"

    def features(self) -> tuple[int, int, int]:
        return self.dim, self.dim, 1 if self.refinement == "none" else self.rank

    def keys(self, shared: int) -> list[Key]:
        """The keys that configure a forward and a backward, on a GPU with `shared` bytes of shared memory."""
        size = self.length, self.features(), self.dtype.itemsize
        length, features, itemsize = size
        resident = is_resident(length, True, features, itemsize, shared, False)
        kernels = SHORT_KERNELS if is_short(*size, shared) else RESIDENT_KERNELS if resident else TILED_KERNELS
        launched = [name for name in kernels if self.refinement != "none" or name != "tiled_bwd_tables"]
        return [key for name in launched if (key := key_of(name, *size)) is not None]


def guards(key: Key, dtype: torch.dtype) -> list[TuningCase]:
    """Small calls that a configuration must also serve: the most demanding of the key, with every refinement."""
    length = key.length if key.length != TILED else RESIDENT + 7
    return [TuningCase(5, 4, length, key.width, key.width, dtype, name, 0.1, kv_heads=2, ragged=True) for name in REFINEMENTS]


class Workload:
    """The tensors of a case, and its correct results.

    The reference needs L x L matrices, so a large batch is compared by an excerpt of its sequences, first to last (under dropout
    the first ones, as the mask counts them). The whole batch is computed, with an output gradient that is zero elsewhere: gradients
    of the tables then stem from the excerpt alone, and those of the other sequences must be zero.
    """

    def __init__(self, case: TuningCase, device: torch.device) -> None:
        self.case = case
        b, h, length, dim = case.batch, case.heads, case.length, case.dim
        kv_heads = case.kv_heads or h
        random = torch.Generator(device).manual_seed(SEED)
        new = functools.partial(torch.randn, device=device, generator=random)
        tensors = {"q": new(b, h, length, dim), "k": new(b, kv_heads, length, dim), "v": new(b, kv_heads, length, dim)}
        if case.refinement != "none":
            tensors |= {"w_q": new(length, case.rank), "w_k": new(length, case.rank)}
        if case.refinement == "additive":
            tensors["gate"] = new(h)
        self.leaves = {name: x.to(case.dtype).requires_grad_() for name, x in tensors.items()}
        self.dout = new(b, h, length, dim).to(case.dtype)
        self.lengths = None
        if case.ragged:
            self.lengths = torch.randint(length + 1, (b,), device=device, generator=random)
            self.lengths[:2] = torch.tensor([0, length], device=device)[:b]  # nothing, and all
        self.seed = torch.tensor(SEED, device=device)
        count = min(b, max(1, REFERENCE_BYTES // (12 * 8 * h * length**2)))
        self.index = torch.arange(count, device=device)
        if not case.dropout_p:
            self.index = self.index * (b - 1) // max(count - 1, 1)
        self.excerpt_dout = torch.zeros_like(self.dout)
        self.excerpt_dout[self.index] = self.dout[self.index]

    def forward(self, leaves: dict[str, Tensor], lengths: Tensor | None, backend: str) -> Tensor:
        none = {"w_q": None, "w_k": None}
        return refined_attention(
            **none | leaves, refinement=self.case.refinement, lengths=lengths,  # type: ignore[arg-type]
            dropout_p=self.case.dropout_p, dropout_seed=self.seed, backend=backend,
        )  # fmt: skip

    @functools.cached_property
    def references(self) -> list[dict[str, Tensor]]:
        """Results of the excerpt by the definition: in float64, and in the case's own dtype."""
        lengths, results = None if self.lengths is None else self.lengths[self.index], []
        for dtype in (torch.float64, self.case.dtype):
            leaves = {name: self._excerpt(name, x).detach().to(dtype).requires_grad_() for name, x in self.leaves.items()}
            with rounded_at_every_step():
                out = self.forward(leaves, lengths, "reference")
            results.append({"out": out.detach()} | _gradients(out, leaves, self.dout[self.index].to(dtype)))
        return results

    def _excerpt(self, name: str, x: Tensor) -> Tensor:
        return x[self.index] if name in ("out", "q", "k", "v") else x

    def wrong(self) -> list[str]:
        """A line for each result that the kernels get wrong, by the rule of `tolerance.py`."""
        with _poisoned():
            out = self.forward(self.leaves, self.lengths, "triton")
            results = {"out": out.detach()} | _gradients(out, self.leaves, self.excerpt_dout)
        exact, same_dtype = self.references
        lines = wrong_results({n: self._excerpt(n, x) for n, x in results.items()}, exact, same_dtype, self.case.dtype)
        others = torch.ones(self.case.batch, dtype=torch.bool, device=out.device).index_fill(0, self.index, False)
        if not results["out"][others].isfinite().all():
            lines.append("out is not finite beyond the excerpt")
        strays = [n for n in ("q", "k", "v") if results[n][others].count_nonzero()]
        return lines + [f"the gradient of {n} is not zero where that of the output is" for n in strays]

    def prepare(self, backward: bool) -> Callable[[], Any]:
        """One of the two passes, ready to be called."""
        if not backward:
            return lambda: self.forward(self.leaves, self.lengths, "triton")
        out = self.forward(self.leaves, self.lengths, "triton")
        return lambda: _gradients(out, self.leaves, self.dout)


def compile_one(case: TuningCase, key: Key, config: Config) -> None:
    """Compile a configuration into Triton's cache on disk. Errors are ignored here; the later check reports them."""
    with contextlib.suppress(Exception), forced({key: config}):
        device = torch.device("cuda", torch.cuda.current_device())
        Workload(case, device).prepare(backward=True)()
        torch.cuda.synchronize(device)


class DeviceLost(Exception):
    """A launch left the GPU in a state in which nothing runs."""


class Bench:
    """Checks and times configurations on a device. All other kernels of a call run as they would without the tuner."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.clock = device, Clock(device, FLUSHES)
        self.workload = functools.cache(lambda case: Workload(case, device))  # the reference takes longer than the kernels

    def refusal(self, case: TuningCase, key: Key, config: Config) -> str | None:
        """Why `config` must not be chosen for `key`: it does not compile, does not fit, or a result is wrong."""
        workload = self.workload(case)
        try:
            with forced({key: config}):
                lines = workload.wrong()
        except Exception as error:  # Triton's compilers raise whatever they like
            self._check_device(config)
            reason = str(error).strip().splitlines() or [""]
            return f"skipped at {case}: {type(error).__name__}: {reason[0][:160]}"
        return f"WRONG at {case}: {'; '.join(lines)}" if lines else None

    def _check_device(self, config: Config) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            raise DeviceLost(f"{config} broke the GPU's state: {error}") from error

    def time(self, case: TuningCase, key: Key, config: Config) -> float:
        """Milliseconds of the pass that the kernel belongs to, the forward or the backward."""
        prepare = functools.partial(self.workload(case).prepare, backward=key.kernel not in LAUNCHED_FORWARD)
        with forced({key: config}):
            spans = [self.clock.timed(prepare())[1] for _ in range(SPANS if self.clock.cuda else 1)]
            return self.clock.total_ms(spans) / len(spans)


def _gradients(out: Tensor, leaves: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), dout), strict=True))


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Fill memory that torch.empty returns with NaN. Otherwise unwritten memory may hold a correct result of another candidate."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
