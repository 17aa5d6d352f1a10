"""Sequences that tests decode, from prompts or from nothing, and the rows that the full call has for them."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from awrsr_kernels import RefinedCache, refined_attention, refined_attention_prefill, refined_attention_step
from awrsr_kernels.checks import REFINEMENTS, SHIFTED

from ..conftest import DEVICE

TABLES = ("shared", "head", "content")
every_refinement = pytest.mark.parametrize("refinement", REFINEMENTS)


class Sequences(NamedTuple):
    """Whole sequences aligned to the left, and how many items of each make its prompt."""

    q: Tensor
    k: Tensor
    v: Tensor
    w_q: Tensor
    w_k: Tensor
    gate: Tensor | None
    prompts: list[int]
    refinement: str
    table: str
    lagged: bool = False  # with two lags, and where the refinement allows it shifted, with a plain head

    @property
    def content(self) -> bool:
        return self.table == "content"

    def options(self) -> dict[str, Any]:
        """What calls take beside tensors of items."""
        if not self.lagged:
            return {}
        lags = {} if self.refinement == "none" else {"lags": torch.tensor([0.5, -0.3], device=DEVICE)}
        plain = {"plain_heads": 1} if self.refinement in ("none", "additive") else {}
        return lags | plain | ({"shift": True} if self.refinement in SHIFTED else {})

    def to(self, dtype: torch.dtype) -> "Sequences":
        return self._replace(**{n: x.to(dtype) for n, x in zip(self._fields[:6], self[:6], strict=True) if x is not None})

    def full(self, steps: int, **options: Any) -> Tensor:
        """(B, H, T, D_v) by the reference."""
        lengths = torch.tensor([n + steps for n in self.prompts], device=DEVICE)
        options = {"backend": "reference", "lengths": lengths, "padding_side": "right"} | self.options() | options
        return refined_attention(*self[:5], refinement=self.refinement, gate=self.gate, **options)

    def cache(self, capacity: int = 4) -> RefinedCache:
        (batch, heads, _, d), (_, kv_heads, _, d_v) = self.q.shape, self.v.shape
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": d, "value_dim": d_v, "rank": self.w_q.shape[-1]}
        tables = "content" if self.content else "position"
        options = {"refinement": self.refinement, "tables": tables, "dtype": self.q.dtype, "device": DEVICE}
        options["lags"] = 2 if "lags" in self.options() else 0
        return RefinedCache(batch, capacity, **sizes, **options)  # type: ignore[arg-type]

    def prompt(self, side: str) -> dict[str, Tensor]:
        """Windows of the prompts, NaN where there is padding."""
        window = max(self.prompts)

        def placed(x: Tensor) -> Tensor:
            found = torch.full_like(x[:, :, :window], torch.nan)
            for b, n in enumerate(self.prompts):
                first = window - n if side == "left" else 0
                found[b, :, first : first + n] = x[b, :, :n]
            return found

        tables = {"w_q": self.w_q, "w_k": self.w_k}
        items = {"q": self.q, "k": self.k, "v": self.v} | (tables if self.content else {})
        return tables | {name: placed(x) for name, x in items.items()}

    def row(self, x: Tensor, step: int) -> Tensor:
        """(B, heads, 1, F): of each entry the item at a step after its prompt."""
        return torch.stack([x[b, :, n + step] for b, n in enumerate(self.prompts)])[:, :, None]

    def step(self, cache: RefinedCache, step: int, **options: Any) -> Tensor:
        tables = [self.row(w, step) if self.content else w for w in (self.w_q, self.w_k)]
        options = {"gate": self.gate} | self.options() | options
        return refined_attention_step(*(self.row(x, step) for x in self[:3]), *tables, cache, **options)

    def decode(self, cache: RefinedCache, steps: int, side: str, backend: str, prompt_backend: str | None = None) -> Tensor:
        """As `full`, from a prompt where there is one and steps."""
        found = self.q.new_zeros(*self.q.shape[:3], self.v.shape[-1])
        if max(self.prompts):
            window = max(self.prompts)
            lengths = torch.tensor(self.prompts, device=DEVICE)
            out = refined_attention_prefill(
                **self.prompt(side), cache=cache, gate=self.gate, lengths=None if min(self.prompts) == window else lengths,
                padding_side=side, backend=prompt_backend or backend, **self.options(),
            )  # fmt: skip
            for b, n in enumerate(self.prompts):
                first = window - n if side == "left" else 0
                found[b, :, :n] = out[b, :, first : first + n]
                assert not out[b, :, :first].any() and not out[b, :, first + n :].any()
        for i in range(steps):
            out = self.step(cache, i, backend=backend)
            for b, n in enumerate(self.prompts):
                found[b, :, n + i] = out[b, :, 0]
        return found


def sequences(
    refinement: str,
    table: str,
    prompts: list[int],
    steps: int,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
    lagged: bool = False,
) -> Sequences:
    """Of uncommon widths, their last dimension not contiguous in memory."""
    batch, length, (d, d_v, r) = len(prompts), max(prompts) + steps, (5, 3, 6)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64, device=DEVICE).to(dtype)[..., ::2]

    w = {"shared": (length, r), "head": (heads, length, r), "content": (batch, heads, length, r)}[table]
    gate = new(heads) if refinement == "additive" else None
    items = new(batch, heads, length, d), new(batch, kv_heads, length, d), new(batch, kv_heads, length, d_v)
    return Sequences(*items, new(*w), new(*w), gate, prompts, refinement, table, lagged)


def needs(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton")
        if dtype == torch.float64 and DEVICE != "cpu":
            pytest.skip("needs the interpreter: the kernels have no float64 on a GPU")
