"""The cache of decoding: preallocated rows of earlier positions.

B batch, H query heads, H_kv key and value heads, N rows, D head dim, D_v value dim, R refinement rank.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from . import checks, habits
from .torch_state import readable


class RefinedCache:
    """What `refined_attention_step` needs of earlier positions of a batch: preallocated rows, one per item.

    Entry b holds its items in rows first[b] .. end[b] - 1. Prompts are stored as they come, padded on the left (first > 0) or on
    the right (first = 0). An item in row j of the cache uses row j - first of a position table. Rows without an item are zero.

    All tensors are public, so that other code can save and hold them::

        k (B, H_kv, N, D)    v (B, H_kv, N, D_v)
        k_a (B, H, N, R)     except with "none"
        q_a (B, H, N, R)     only with lags
        y (B, H, N, D_v)     only with "value"
        w_q, w_k             (B, H, N, R), only with content tables
        first, end           (B,) int64

    Three Python values tell a step what it would otherwise have to read from the device. `end_bound` is an upper bound on all
    values of `end`, and `length_bound` on those of end - first. `ragged` may be False only if first is 0 and end is end_bound for
    all entries. If you write into first or end yourself, or replay a step from a CUDA graph, set these values as well. An end_bound
    that is too small gives wrong results.

    Args:
        batch: number of entries B.
        capacity: number of rows N >= 1; a full cache doubles its capacity.
        heads: query heads H, required.
        kv_heads: H_kv, a divisor of H (default H).
        head_dim: D in 1..256, required.
        value_dim: D_v in 1..256 (default D).
        rank: R in 1..256, required unless refinement is "none".
        refinement: "none", "simple", "value" or "additive".
        lags: number A of lags that prompts and steps will use, in 0..7; 0 with "none".
        tables: "position" (the caller passes the whole table at every step; its number of rows limits the length) or "content" (the
            cache stores a row for every item; the length is not limited).
        dtype: dtype of q, k, v: float32, bfloat16, float16 or float64.
        device: default that of torch.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    k: Tensor
    v: Tensor
    k_a: Tensor | None = None
    q_a: Tensor | None = None
    lags: int = 0  # also of caches that were pickled before there were any
    y: Tensor | None = None
    w_q: Tensor | None = None
    w_k: Tensor | None = None

    @habits.own_signature
    def __init__(
        self,
        batch: int,
        capacity: int,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        rank: int | None = None,
        refinement: str = "simple",
        tables: str = "position",
        lags: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            habits.refuse(RefinedCache.__init__, unknown)
        checks.refinement(refinement)
        checks.choice("tables", tables, ("position", "content"))
        checks.dtype("dtype", dtype)
        batch, capacity = checks.whole("batch", batch, 0), checks.whole("capacity", capacity, 1)
        heads = checks.whole("heads", heads, 1)
        kv_heads = heads if kv_heads is None else checks.divisor("kv_heads", kv_heads, heads)
        d = checks.whole("head_dim", head_dim, 1, checks.MAX_FEATURES)
        d_v = d if value_dim is None else checks.whole("value_dim", value_dim, 1, checks.MAX_FEATURES)
        self.refinement, self.tables, self.heads = refinement, tables, heads
        self.lags = checks.whole("lags", lags, 0, checks.MAX_LAGS)
        if self.lags and refinement == "none":
            checks.refuse("lags", str(lags), '0 with refinement "none"')
        shapes = {"k": (kv_heads, d), "v": (kv_heads, d_v)}
        if refinement != "none":
            r = checks.whole("rank", rank, 1, checks.MAX_FEATURES)
            if (width := (self.lags + 1) * r) > checks.MAX_FEATURES:
                checks.refuse("lags", str(lags), f"so few that (lags + 1) * rank, now {width}, is at most {checks.MAX_FEATURES}")
            shapes |= {"k_a": (heads, r)} | ({"w_q": (heads, r), "w_k": (heads, r)} if tables == "content" else {})
            shapes |= {"q_a": (heads, r)} if self.lags else {}
        if refinement == "value":
            shapes["y"] = (heads, d_v)
        self._names = tuple(shapes)
        with torch.inference_mode(False):  # an inference tensor could not be written outside of that mode
            for name, (h, features) in shapes.items():
                setattr(self, name, torch.zeros(batch, h, capacity, features, dtype=dtype, device=device))
            self.first, self.end = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        self.end_bound, self.length_bound, self.ragged = 0, 0, False

    def __repr__(self) -> str:
        kind = "" if self.refinement == "none" else f", tables={self.tables!r}" + f", lags={self.lags}" * (self.lags > 0)
        used = f"{self.end_bound} of {self.capacity} rows"
        return f"RefinedCache({self.batch} entries, {used}, refinement={self.refinement!r}{kind}, {self.dtype}, {self.device})"

    @property
    def batch(self) -> int:
        return self.k.shape[0]

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        return self.k.device

    def rows(self) -> dict[str, Tensor]:
        """The tensors that have a row per item, by name."""
        return {name: getattr(self, name) for name in self._names}

    @habits.own_signature
    def grow(self, capacity: int, **unknown: NoReturn) -> None:
        """Enlarge the cache to `capacity` rows, at least the present number. Contents are copied into new tensors."""
        if unknown:
            habits.refuse(RefinedCache.grow, unknown)
        capacity = checks.whole("capacity", capacity, self.capacity)
        self._move(self.batch, capacity, lambda x: x)

    @habits.own_signature
    def reorder(self, index: Tensor, **unknown: NoReturn) -> None:
        """Replace the entries by those that `index` selects, a (B',) int32 or int64 tensor (beam search); in place if B' is B."""
        if unknown:
            habits.refuse(RefinedCache.reorder, unknown)
        checks.indices("index", index, self.batch, self.k)
        self.first, self.end = self._fill(self.first, self.first[index]), self._fill(self.end, self.end[index])
        self._move(index.shape[0], self.capacity, lambda x: x[index])
        if readable(index):
            lengths = (self.end - self.first).tolist()
            self.end_bound, self.length_bound = max(self.end.tolist(), default=0), max(lengths, default=0)
            self.ragged = any(n < self.end_bound for n in lengths)

    @habits.own_signature
    def crop(self, length: int, **unknown: NoReturn) -> None:
        """Remove the rows from `length` on, 0 or more. Padding on the left counts as rows."""
        if unknown:
            habits.refuse(RefinedCache.crop, unknown)
        length = checks.whole("length", length, 0)
        if length >= self.end_bound:
            return
        for x in self.rows().values():
            x[:, :, length : self.end_bound] = 0
        self.end.clamp_(max=length)
        self.first.clamp_(max=length)
        self.end_bound = length
        self.length_bound = checks.length_range(self.end - self.first, min(length, self.length_bound))[1]

    def reset(self) -> None:
        """Remove all items, and keep the memory."""
        for x in (*self.rows().values(), self.first, self.end):
            x.zero_()
        self.end_bound, self.length_bound, self.ragged = 0, 0, False

    def make_room(self, rows: int, most: int | None = None) -> None:
        """If `rows` more do not fit after `end_bound`, grow to twice the capacity, or as far as `most` items per entry fill it."""
        needed, padding = self.end_bound + rows, self.end_bound - self.length_bound
        if needed > self.capacity:
            enough = 2 * self.capacity if most is None else min(2 * self.capacity, padding + most)
            self.grow(max(enough, needed))

    @staticmethod
    def _fill(old: Tensor, new: Tensor) -> Tensor:
        """`new` in the memory of `old` if it fits there; never an inference tensor."""
        if old.shape == new.shape:
            return old.copy_(new)
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty_like(new).copy_(new)

    def _move(self, batch: int, capacity: int, select: Callable[[Tensor], Tensor]) -> None:
        """Copy the rows in use, entries chosen by `select`, into `batch` entries of `capacity` rows; in place if sizes match."""
        for name, x in self.rows().items():
            target = x
            if (batch, capacity) != (x.shape[0], x.shape[2]):
                with torch.inference_mode(False):
                    target = x.new_zeros(batch, x.shape[1], capacity, x.shape[3])
                setattr(self, name, target)
            target[:, :, : self.end_bound] = select(x[:, :, : self.end_bound])
