"""A call as its launches see it: tensors as kernels take them, sizes, regime, and the arguments that kernels share.

B sequences, H query heads, H_kv key heads, N table rows, D, D_v, R features of q, v and the tables.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from ..call import Call, Inputs
from ..dropout import quantise
from ..launch_config import LENGTHS, SHORT_KERNELS, Config, choose, table_features
from ..launch_config import is_resident as is_resident_call
from ..launch_config import is_short as is_short_call
from ..launch_config import key_of as key_of_call
from ..launch_config import shared_memory as shared_memory_of
from ..torch_state import materialised
from ..tuned import tuned_for
from .launch import NO_VIEW, View, allocate, ceil_div, gradient_of, heads_inside, view_of, with_rows

Result = TypeVar("Result")
PIECE = 256  # bytes, whose multiples buffers in one piece begin at


def remembered(function: Callable[..., Result]) -> Callable[..., Result]:
    """functools.cache, except for symbolic sizes of torch.compile, which have no hash."""
    known = functools.lru_cache(1024)(function)

    def call(*arguments: Any) -> Result:
        try:
            return known(*arguments)
        except TypeError:
            return function(*arguments)

    return call


is_short, is_resident = remembered(is_short_call), remembered(is_resident_call)
key_of, shared_memory = remembered(key_of_call), remembered(shared_memory_of)


@remembered
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def block_of(features: int) -> int:
    """Width of a tile for so many features."""
    return max(16, 1 << (features - 1).bit_length())


class Problem:
    """What kernels are launched for: tensors with a contiguous last dimension, sizes, and the arguments that kernels share."""

    def __init__(self, inputs: Inputs, call: Call, together: bool = False) -> None:
        """together: whether `buffers` allocates what is not an output in one piece."""
        self.q, self.k, self.v = with_rows(inputs.q), with_rows(inputs.k), with_rows(inputs.v)
        self.w_q = None if inputs.w_q is None else with_rows(inputs.w_q)
        self.w_k = None if inputs.w_k is None else with_rows(inputs.w_k)
        self.v_cov = None if inputs.v_cov is None else with_rows(inputs.v_cov)
        self.gate, self.seed, bounds = (None if x is None else materialised(x) for x in (inputs.gate, inputs.seed, inputs.bounds))
        self.bounds = None if bounds is None else bounds.contiguous()  # kernels assume stride 1
        self.call, self.together = call, together
        q, k, v, bounds = self.q, self.k, self.v, self.bounds
        self.heads, self.kv_heads, self.rows = q.shape[1], k.shape[1], q.shape[2]
        self.group = self.heads // self.kv_heads
        self.batch = bounds.shape[0] - 1 if call.varlen and bounds is not None else q.shape[0]
        self.lags = None if inputs.lags is None else with_rows(inputs.lags)
        self.compared = inputs.compared()  # rows that a correlation compares, side by side in the tiled regime
        self.rank = 1 if self.w_q is None else self.w_q.shape[-1]
        widths = q.shape[-1], v.shape[-1], self.rank
        self.short_features = table_features(*widths, call.stochastic, call.refinement)
        self.features = table_features(*widths[:2], self.compared * self.rank, call.stochastic, call.refinement)
        self.accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.interpreted = q.device.type == "cpu"
        self.shared = shared_memory(q.device)
        self.reach: int | None = None

    def is_short(self) -> bool:
        return self.short_reach() == self.call.max_len

    def is_resident(self) -> bool:
        """Whether sequences that are not short run in the resident regime."""
        call, sizes = self.call, (self.features, self.q.dtype.itemsize, self.shared, self.call.stochastic)
        plain = self.lags is None and not call.shift and not call.plain_heads
        return plain and is_resident(call.max_len, call.causal, *sizes)

    def short_reach(self) -> int:
        """Length of the longest sequence that the short kernels compute.

        If max_len is not short, they compute the short sequences of a call with lengths. 0, so none, without lengths or under
        grouped-query attention, where the regimes sum dK differently.
        """
        if self.reach is None:
            sizes = self.short_features, self.q.dtype.itemsize, self.shared, self.call.stochastic, self.lags is not None
            reach = next((n for n in reversed(LENGTHS) if is_short(n, *sizes)), 0)
            if self.call.max_len <= reach:  # with a symbolic max_len, the one guard: a graph per regime
                self.reach = self.call.max_len
            else:
                self.reach = reach if self.bounds is not None and self.group == 1 else 0
        return self.reach

    def least(self) -> int:
        """Length of the shortest sequence that the tiled kernels compute."""
        return self.short_reach() + 1

    def config(self, kernel: str) -> Config:
        short = kernel in SHORT_KERNELS
        length, features = (self.short_reach(), self.short_features) if short else (self.call.max_len, self.features)
        key = key_of(kernel, length, features, self.q.dtype.itemsize)
        assert key is not None
        tuned = None if self.call.stochastic else tuned_for(self.q.device)  # the tuner measures dot-product scores only
        return choose(key, self.shared, tuned)

    def view(self, x: Tensor, packed: bool | None = None) -> View:
        """A tensor as kernels take it (`view_of`). packed: whether it is; by default as the call."""
        return view_of(x, self.call.varlen if packed is None else packed)

    @functools.cached_property
    def tensors(self) -> dict[str, View]:
        w_q, w_k = (self.q, self.q) if self.w_q is None or self.w_k is None else (self.w_q, self.w_k)
        views = {"q": self.q, "k": self.k, "v": self.v, "w_q": w_q, "w_k": w_k}
        return {name: self.view(x) for name, x in views.items()} | {"v_cov": self.covariance_view(self.v_cov)}

    def covariance_view(self, x: Tensor | None) -> View:
        """A tensor of covariances; none where attention is not stochastic."""
        return NO_VIEW if x is None or not self.call.stochastic else self.view(x)

    def scales(self) -> tuple[float, float]:
        """Scales of both stages. Kernels compute half a squared distance (`score_tile`), so its scale is doubled."""
        call = self.call
        return call.softmax_scale * (1 + call.stochastic), call.refine_scale * (1 + (call.refinement == "stochastic"))

    @functools.cached_property
    def sequences(self) -> dict[str, Any]:
        return {
            "bounds_ptr": self.bounds,
            "rows_total": self.rows,
            "max_len": self.call.max_len,
            "table_rows": 0 if self.w_q is None else self.w_q.shape[2],
            "CAUSAL": self.call.causal,
            "VARLEN": self.call.varlen,
            "ALIGN_RIGHT": self.call.align_right,
            "PER_ENTRY": self.call.per_entry,
        }

    @functools.cached_property
    def dropout(self) -> dict[str, Any]:
        threshold, scale = quantise(self.call.dropout_p)
        return {"seed_ptr": self.seed, "drop_threshold": threshold, "drop_scale": scale}

    def gate_stride(self) -> int:
        return 0 if self.gate is None or self.gate.numel() == 1 else self.gate.stride(0)

    def lag_arguments(self) -> dict[str, Any]:
        lags = self.lags
        stride = 0 if lags is None or lags.shape[0] == 1 else lags.stride(0)
        return {"lags_ptr": lags, "lags_head": stride, "LAGS": self.compared - 1}

    def followed(self) -> dict[str, Any]:
        """Lags, shift and plain heads, for the short kernels."""
        plain = self.call.plain_heads
        options = {"plain_heads": plain, "SHIFT": self.call.shift, "PLAIN": plain > 0 and self.call.refinement == "additive"}
        return self.lag_arguments() | options

    def refinement(self) -> dict[str, Any]:
        return {
            "REFINEMENT": self.call.refinement,
            "STOCHASTIC": self.call.stochastic,
            "gate_ptr": self.gate,
            "gate_stride": self.gate_stride(),
            "softmax_scale": self.scales()[0],
            "refine_scale": self.scales()[1],
        }

    @functools.cached_property
    def widths(self) -> dict[str, Any]:
        d, dv, r = self.q.shape[-1], self.v.shape[-1], self.rank
        blocks = [block_of(x) for x in (d, dv, r)]
        return {
            "D": d, "DV": dv, "R": r, "BLOCK_D": blocks[0], "BLOCK_DV": blocks[1], "BLOCK_R": blocks[2],
            "PRECISION": self.precision(),
        }  # fmt: skip

    def precision(self) -> str:
        """Of float32 products: exact without tensor cores, otherwise three TF32 passes, or one if torch allows TF32."""
        if self.q.dtype != torch.float32 or self.interpreted or driver.active.get_current_target().backend != "cuda":
            return "ieee"
        if self.call.stochastic:  # distances are small differences of large products
            return "tf32x3"
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"

    def run(self, programs: int) -> int:
        """Consecutive sequences per program of the short regime, such that every processor gets `programs` programs."""
        return max(1, ceil_div(self.batch * self.heads, programs * self.processors()))

    def splits(self, programs: int) -> int:
        """Number of splits of the batch such that `programs` programs per split make two per processor."""
        return max(1, min(self.batch, ceil_div(2 * self.processors(), programs)))

    def offset_type(self, block: int, *more: Tensor | None) -> Any:
        """Dtype of offsets within a tile of the short regime: int32 unless a tensor's strides are too large for it."""
        tensors = [x for x in (self.q, self.k, self.v, self.v_cov, self.w_q, self.w_k, *more) if x is not None]
        rows = block if self.bounds is None else max(block, self.rows)
        widest = max(block * (entry or 0) + rows * (row or 0) for _, entry, _, row in map(self.view, tensors))
        return tl.int64 if widest >= 2**31 else tl.int32

    def processors(self) -> int:
        if self.q.device.type != "cuda":
            return 1  # interpreted: few programs, so that each loops over several sequences
        return processors(self.q.device)

    def buffers(self, widths: dict[str, int | None]) -> dict[str, Tensor]:
        """Uninitialised memory of so many features for each item and query head; None: a number per row."""
        apart = [name for name in widths if not self.together or name.startswith("out")]
        made = {name: self._buffer(name, widths[name]) for name in apart}
        lie = {name: self._lie(name, width) for name, width in widths.items() if name not in apart}
        bytes_of = [-(-math.prod(size) * dtype.itemsize // PIECE) * PIECE for size, _, dtype in lie.values()]
        if lie:
            piece, offset = self.q.new_empty(sum(bytes_of), dtype=torch.uint8), 0
            for (name, (size, stride, dtype)), length in zip(lie.items(), bytes_of, strict=True):
                made[name] = piece.narrow(0, offset, length).view(dtype).as_strided(size, stride)
                offset += length
        return {name: made[name] for name in widths}

    def _dtype(self, name: str) -> torch.dtype:
        """Of a buffer. Stage 2 of "additive" adds to the covariances of stage 1, with either sign, before they become an output."""
        full = name == "first_cov" and self.call.refinement == "additive"
        return self.accumulator if full else self.q.dtype

    def _buffer(self, name: str, width: int | None) -> Tensor:
        if width is None:
            return self.row_numbers()
        return allocate(self.q, self.heads, width, self.call.varlen, self._dtype(name))

    def _lie(self, name: str, width: int | None) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
        """Size, strides and dtype of a buffer."""
        entries, rows, heads = self.q.shape[0], self.rows, self.heads
        if width is None:
            return (entries, heads, rows), (heads * rows, rows, 1), self.accumulator
        size = entries, heads, rows, width
        outer = heads * rows * width
        if heads_inside(self.q, self.call.varlen):
            return size, (outer, width, heads * width, 1), self._dtype(name)
        return size, (outer, rows * width, width, 1), self._dtype(name)

    def row_numbers(self) -> Tensor:
        """Uninitialised memory for a number per head and row, (entries, H, rows)."""
        return self.q.new_empty(self.q.shape[0], self.heads, self.rows, dtype=self.accumulator)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        return gradient_of(self.q), gradient_of(self.k), gradient_of(self.v)

    def covariance_gradient(self) -> Tensor | None:
        return None if self.v_cov is None else gradient_of(self.v_cov)

    def table_gradients(self) -> tuple[Tensor, Tensor]:
        assert self.w_q is not None and self.w_k is not None
        return gradient_of(self.w_q), gradient_of(self.w_k)
