"""Calls of the operator, drawn: what the backends are held against the definition with."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from awrsr_kernels import (
    attention_weights,
    refined_attention,
    refined_attention_varlen,
    stochastic_attention_weights,
    stochastic_refined_attention,
    stochastic_refined_attention_varlen,
)
from awrsr_kernels.checks import REFINEMENTS, SHIFTED, STOCHASTIC_ATTENTION_REFINEMENTS
from awrsr_kernels.reference import rounded_at_every_step
from awrsr_kernels.tolerance import allowed_errors, wrong_results

from ..conftest import DEVICE, cumulative


class Kind(NamedTuple):
    """Which of the operators, dot-product or stochastic attention, and its refinement."""

    refinement: str
    stochastic: bool = False

    def __str__(self) -> str:
        return "stochastic-attention-" * self.stochastic + self.refinement

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the tables that the call reads."""
        names = () if self.refinement == "none" else ("w_q", "w_k")
        return (*names, "w_q_cov", "w_k_cov") if self.refinement == "stochastic" else names

    @property
    def items(self) -> tuple[str, ...]:
        """Names of the tensors that have a row per item, but tables."""
        return ("q_mean", "q_cov", "k_mean", "k_cov", "v_mean", "v_cov") if self.stochastic else ("q", "k", "v")

    def call(self, **arguments: Any) -> dict[str, Tensor]:
        """Outputs by name, of a padded or, given cu_seqlens, a packed call; tables that are not given are None."""
        padded, packed = (
            (stochastic_refined_attention, stochastic_refined_attention_varlen)
            if self.stochastic
            else (refined_attention, refined_attention_varlen)
        )
        function: Any = packed if "cu_seqlens" in arguments else padded
        out = function(**{"w_q": None, "w_k": None, "refinement": self.refinement} | arguments)
        return {"out_mean": out[0], "out_cov": out[1]} if self.stochastic else {"out": out}

    def weights(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        """P and M; values are left out."""
        function: Any = stochastic_attention_weights if self.stochastic else attention_weights
        given = {name: x for name, x in arguments.items() if not name.startswith("v")}
        return function(**{"w_q": None, "w_k": None, "refinement": self.refinement} | given)

    def draw(self, items: tuple[int, ...], tables: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Random arguments by name, items and tables of one shape each; covariances are positive."""
        shapes = dict.fromkeys(self.items, items) | dict.fromkeys(self.tables, tables)
        found = {name: torch.randn(shape, dtype=dtype, device=DEVICE) for name, shape in shapes.items()}
        return {name: x.abs() + 0.1 if name in self.items and name.endswith("cov") else x for name, x in found.items()}


VECTORS = [Kind(refinement) for refinement in REFINEMENTS]
GAUSSIANS = [Kind(refinement, True) for refinement in STOCHASTIC_ATTENTION_REFINEMENTS]
KINDS = [*VECTORS, *GAUSSIANS]


class RandomCall(NamedTuple):
    """Arguments of one call; W per "shared", "head" or "entry"; layouts of the tensors in memory are drawn with `seed`."""

    heads: int
    kv_heads: int
    lengths: list[int]
    padded: bool  # to a window, otherwise packed
    ragged: bool  # padded: whether lengths are given
    extra_rows: int  # packed: rows of the table beyond the longest sequence
    widths: tuple[int, int, int]
    table: str
    gate: str
    side: str
    causal: bool
    dropout_p: float
    wide_tables: bool
    seed: int
    lags: str = "none"  # or how their factors come, (A,) or (H, A)
    shift: bool = False
    plain_heads: bool = False  # whether the first half of the heads is plain

    def options(self, kind: Kind) -> dict[str, Any]:
        """Shift and plain heads, where the kind of call has them."""
        shift = self.shift and self.causal and not kind.stochastic and kind.refinement in SHIFTED
        plain = self.plain_heads and not kind.stochastic and kind.refinement in ("none", "additive")
        return {"shift": shift, "plain_heads": self.heads // 2 if plain else 0} if shift or plain else {}


def random_calls(lengths: tuple[int, ...]) -> st.SearchStrategy[RandomCall]:
    heads = st.sampled_from([(1, 1), (2, 2), (2, 1), (6, 3)])
    width = st.sampled_from([1, 3, 8, 16, 20])
    return st.builds(
        lambda heads, **rest: RandomCall(*heads, **rest),
        heads=heads,
        lengths=st.lists(st.sampled_from((0, *lengths)), min_size=1, max_size=5),
        padded=st.booleans(),
        ragged=st.booleans(),
        extra_rows=st.sampled_from([0, 3]),
        widths=st.tuples(width, width, width),
        table=st.sampled_from(["shared", "head", "entry"]),
        gate=st.sampled_from(["none", "one", "head"]),
        side=st.sampled_from(["left", "right"]),
        causal=st.booleans(),
        dropout_p=st.sampled_from([0.0, 0.3]),
        wide_tables=st.booleans(),
        seed=st.integers(0, 2**63 - 1),
        lags=st.sampled_from(["none", "shared", "head"]),
        shift=st.booleans(),
        plain_heads=st.booleans(),
    )


def tensors_of(case: RandomCall, kind: Kind, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments with a gradient by name, in one of several memory layouts each; covariances are positive."""
    p, random = case, torch.Generator().manual_seed(case.seed)
    window, (d, dv, r), batch = max(p.lengths + [1]), p.widths, len(p.lengths)
    if p.padded:
        lead = lambda h: (batch, h, window)  # noqa: E731
        tables = {"shared": (window, r), "head": (p.heads, window, r), "entry": (*lead(p.heads), r)}
    else:
        lead = lambda h: (sum(p.lengths), h)  # noqa: E731
        rows = window + p.extra_rows
        tables = {"shared": (rows, r), "head": (p.heads, rows, r), "entry": (*lead(p.heads), r)}
    of_items = {"q": (*lead(p.heads), d), "k": (*lead(p.kv_heads), d), "v": (*lead(p.kv_heads), dv)}
    shapes = {name: of_items[name[0]] for name in kind.items} | {name: tables[p.table] for name in kind.tables}
    if kind.refinement == "additive" and p.gate != "none":
        shapes["gate"] = (1,) if p.gate == "one" else (p.heads,)
    if p.lags != "none" and kind.tables and not kind.stochastic:
        shapes["lags"] = (2,) if p.lags == "shared" else (p.heads, 3)

    def new(name: str, shape: tuple[int, ...]) -> Tensor:
        layout = torch.randint(4, (), generator=random).item()
        wide = p.wide_tables and name in (*kind.tables, "gate", "lags") and dtype in (torch.float16, torch.bfloat16)

        def drawn(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=random)
            x = F.elu(x) + 1 if name in kind.items and name.endswith("cov") else x
            x = torch.where((x + 1).abs() < 0.05, x + 0.1, x) if name == "gate" else x  # at -1 whole outputs cancel
            return x.to(DEVICE, torch.float32 if wide else dtype)

        if layout == 0 and len(shape) == 4:
            x = drawn(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
        elif layout == 1 and len(shape) > 1:
            x = drawn(*shape[:-1], 2 * shape[-1])[..., ::2]  # no contiguous last dimension
        elif layout == 2 and len(shape) > 1:
            x = drawn(*shape[:-1], shape[-1] + 5)[..., 2:-3]  # rows that start anywhere
        else:
            x = drawn(*shape)
        return x.requires_grad_()

    return {name: new(name, shape) for name, shape in shapes.items()}


def compute(case: RandomCall, kind: Kind, tensors: dict[str, Tensor], backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by name; the outputs' gradients are such that `dtype` can hold."""
    p, random = case, torch.Generator().manual_seed(case.seed)
    args: dict[str, Any] = {"causal": p.causal, "dropout_p": p.dropout_p, "dropout_seed": p.seed - 2**62, "backend": backend}
    args |= p.options(kind)
    if p.padded:
        args |= {"lengths": torch.tensor(p.lengths, device=DEVICE) if p.ragged else None, "padding_side": p.side}
    else:
        longest = None if DEVICE == "cpu" else max(p.lengths + [1])  # a CPU reads it, and a GPU may not
        args |= {"cu_seqlens": cumulative(p.lengths), "max_seqlen": longest, "align": p.side}
    outs = kind.call(**tensors, **args)
    douts = [torch.randn(out.shape, generator=random).to(dtype).to(out) for out in outs.values()]
    grads = torch.autograd.grad(list(outs.values()), list(tensors.values()), douts)
    return outs | {f"d{name}": g for name, g in zip(tensors, grads, strict=True)}


def disagreements(case: RandomCall, kind: Kind, dtype: torch.dtype, backend: str) -> list[str]:
    """What of a backend's outputs and gradients is further from the definition than the tolerance rule allows.

    A miss of less than twice the limit counts if another draw of the numbers misses, too, where one draw says little. The rule's
    yardstick is what the reference errs in that dtype, which in half precision and with few numbers is small by luck in one draw of
    some hundreds. In float64 the reference takes distances from differences and everything else takes them from products: wide
    Gaussians miss in one draw of sixty.
    """
    wrong, near = compared(case, kind, dtype, backend)
    if wrong and near and (dtype in (torch.float16, torch.bfloat16) or kind.stochastic and dtype == torch.float64):
        again = (compared(case._replace(seed=case.seed + more), kind, dtype, backend)[0] for more in (1, 2))
        return wrong if any(again) else []
    return wrong


def compared(case: RandomCall, kind: Kind, dtype: torch.dtype, backend: str) -> tuple[list[str], bool]:
    """Lines for results that err by more than is allowed, and whether all stay below twice of it."""
    tensors = tensors_of(case, kind, dtype)
    read = {name: x.detach().to(dtype) if name in kind.tables else x.detach() for name, x in tensors.items()}
    doubles = {name: x.double().requires_grad_() for name, x in read.items()}  # float32 tables are read in q's dtype
    exact = compute(case, kind, doubles, "reference", dtype)
    with rounded_at_every_step():
        same = compute(case, kind, tensors, "reference", dtype)
    found = compute(case, kind, tensors, backend, dtype)
    wrong, limits = wrong_results(found, exact, same, dtype), allowed_errors(exact, same, dtype)
    like = all(found[name].shape == exact[name].shape for name in limits)
    return wrong, like and all(bool(((found[n].double() - exact[n]).abs() <= 2 * limit).all()) for n, limit in limits.items())
