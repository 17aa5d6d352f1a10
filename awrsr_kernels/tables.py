"""The learned parts of a refined attention layer: tables, gate and scale. Creates, initialises and passes them to the operator.

B batch, L positions, T packed positions, E features of a row, H heads, R refinement rank, N max_len.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .backends import BACKENDS

TABLES = ("w_q", "w_k", "w_q_cov", "w_k_cov")  # the last two for refinement "stochastic" alone
STARTS = ("normal", "orthogonal", "identity", "shifted")
SHARPNESS = 25.0  # of position tables by default: what a match needs against the small entries of P (docs/module.md)


class RefinedLayer(nn.Module):
    """Base of the layers that call the operator. It holds everything except their linear maps.

    A subclass makes its linear maps after this class has made its parameters, and then draws all of them. The arguments are those
    of `RefinedMultiheadAttention`, with E = features for content tables.
    """

    stochastic = False  # whether a subclass computes stochastic attention, where refinement may be "stochastic"
    w_q: Tensor | None
    w_k: Tensor | None
    to_tables: Tensor | None
    gate: Tensor | float | None
    scale: Tensor | None
    lags: Tensor | None
    shift, plain_heads = False, 0  # also of layers that were pickled before there was a choice

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        max_len: int | None,
        refinement: str,
        tables: str,
        rank: int,
        per_head: bool,
        gate: bool | float,
        gate_init: float,
        dropout: float,
        table_std: float | None,
        sharpness: float | None,
        table_init: str,
        refine_scale: float | None,
        learned_scale: bool,
        lags: int = 0,
        shift: bool = False,
        plain_heads: int = 0,
        backend: str,
        causal: bool = True,
        align: str = "right",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.refinement(refinement, self.stochastic)
        checks.choice("tables", tables, ("position", "content"))
        checks.choice("table_init", table_init, STARTS)
        checks.choice("align", align, ("left", "right"))
        checks.choice("backend", backend, BACKENDS)
        checks.probability("dropout", dropout)
        checks.number("gate_init", gate_init)
        self.rank = checks.whole("rank", rank, 1, checks.MAX_FEATURES)
        if table_std is None and sharpness is None and tables == "position":
            sharpness = SHARPNESS if checks.scale("refine_scale", refine_scale, 1) > 0 else None
        self.table_std = start_std(table_std, sharpness, refine_scale, self.rank)
        if refinement != "additive" and gate is not True and gate is not False:
            checks.refuse("gate", str(gate), f'left alone unless refinement is "additive"; refinement is "{refinement}"')
        if gate_init and (refinement != "additive" or gate is not True):
            was = f'refinement is "{refinement}"' if refinement != "additive" else f"gate is {gate}"
            checks.refuse("gate_init", str(gate_init), f'left alone unless refinement is "additive" and its gate is learned; {was}')
        self.features, self.num_heads = features, num_heads
        self.refinement, self.tables, self.align, self.gate_init = refinement, tables, align, gate_init
        self.table_init = table_init
        self.dropout, self.refine_scale, self.backend = dropout, refine_scale, backend
        self.causal, self.per_head = checks.flag("causal", causal), checks.flag("per_head", per_head)
        self.table_names = TABLES[: {"none": 0, "stochastic": 4}.get(refinement, 2)]
        self.max_len: int | None = None
        self.w_q = self.w_k = self.to_tables = self.gate = self.scale = self.lags = None

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        if refinement == "additive" and gate is not False:
            self.gate = new(num_heads) if gate is True else checks.number("gate", gate)
        if checks.flag("learned_scale", learned_scale) and self.table_names:
            self.scale = new(num_heads, 1, 1)
        self.shift = checks.shift(shift, refinement, causal)
        self.plain_heads = checks.plain_heads(plain_heads, refinement, num_heads)
        if checks.whole("lags", lags, 0, checks.MAX_LAGS) and self.table_names:
            if (lags + 1) * rank > checks.MAX_FEATURES:
                checks.refuse("lags", str(lags), f"so few that (lags + 1) * rank is at most {checks.MAX_FEATURES}; rank is {rank}")
            self.lags = new(num_heads, lags)
        heads = num_heads if per_head else 1
        if self.table_names and tables == "content":
            self.to_tables = new(features, len(self.table_names) * heads * self.rank)
        elif self.table_names:
            if max_len is None:
                checks.refuse("max_len", "None", 'given with position tables; or use tables="content"')
            self.max_len = checks.whole("max_len", max_len, 1)
            for name in self.table_names:
                setattr(self, name, new(heads, max_len, self.rank) if per_head else new(max_len, self.rank))

    @torch.no_grad()
    def reset_refinement(self) -> None:
        """Draw the tables, and set the gate to gate_init, the scale to 1 and the factors of lags to 1/2, 1/4, ..."""
        if self.to_tables is not None:
            self._draw_content_tables(self.to_tables)
        else:
            tables = [getattr(self, name) for name in self.table_names]
            for w_q, w_k in zip(tables[::2], tables[1::2], strict=True):
                draw_position_tables(w_q, w_k, self.table_init, self.table_std)
        if isinstance(self.gate, Tensor):
            self.gate.fill_(self.gate_init)
        if self.scale is not None:
            self.scale.fill_(1)
        if self.lags is not None:
            self.lags.copy_(0.5 ** torch.arange(1, self.lags.shape[1] + 1))

    def _draw_content_tables(self, to_tables: Tensor) -> None:
        to_tables.normal_(std=self.table_std / self.features**0.5)

    def _tables(self, x: Tensor) -> dict[str, Any]:
        """The whole position tables, (N, R) or (H, N, R) each, or content tables computed from x (..., E), (..., H, R) each."""
        if not self.table_names:
            return {"w_q": None, "w_k": None}
        scale = self.scale
        if self.to_tables is None:
            tables = {name: getattr(self, name) for name in self.table_names}
        else:
            shape = (*x.shape[:-1], self.num_heads, self.rank)
            computed = (x @ self.to_tables).unflatten(-1, (len(self.table_names), -1, self.rank)).unbind(-3)
            tables = {name: w.expand(shape) for name, w in zip(self.table_names, computed, strict=True)}
            scale = None if scale is None else scale[..., 0]
        if scale is not None:  # the operator has one refine_scale for all heads, so each head's factor goes to W_q
            tables["w_q"] = tables["w_q"] * scale.to(tables["w_q"].dtype)
            tables["w_k"] = tables["w_k"].expand_as(tables["w_q"])
        return tables

    def _cached_tables(self, x: Tensor) -> dict[str, Any]:
        """The tables for a `RefinedCache`: whole position tables, or content tables of x (B, L, E), (B, H, L, R) each."""
        tables = self._tables(x)
        return tables if self.to_tables is None else {name: w if w is None else w.transpose(1, 2) for name, w in tables.items()}

    def _padded_options(self, x: Tensor) -> dict[str, Any]:
        """The operator's other arguments for rows x (B, L, E): tables, and everything else that weights depend on."""
        tables = self._cached_tables(x)
        if self.table_names and self.to_tables is None:
            assert self.max_len is not None
            size = x.shape[1]
            if size > self.max_len:
                checks.refuse("x", f"{size} positions long", f"at most max_len = {self.max_len} long with position tables")
            if torch.compiler.is_compiling() or size < self.max_len:
                first = self.max_len - size if self.align == "right" else 0
                used = torch.arange(first, first + size, device=x.device)  # a slice would tie an exported program to one length
                tables = {name: w.index_select(-2, used) for name, w in tables.items()}
        return tables | self._weight_options() | {"padding_side": self._padding_side()}

    def _packed_options(self, x: Tensor) -> dict[str, Any]:
        """The operator's other arguments for packed rows x (T, E)."""
        tables = self._tables(x)
        if self.table_names and self.to_tables is None:  # (H, N, R) might pass for content
            tables = {name: w if w.dim() == 2 else w[None] for name, w in tables.items()}
        return tables | self._weight_options() | self._run_options() | {"align": self.align}

    def _weight_options(self) -> dict[str, Any]:
        options = {"refinement": self.refinement, "gate": self.gate, "refine_scale": self.refine_scale, "causal": self.causal}
        if self.stochastic:
            return options
        lags = getattr(self, "lags", None)  # a layer that was pickled before there were any has none
        return options | {"lags": lags, "shift": self.shift, "plain_heads": self.plain_heads}

    def _run_options(self) -> dict[str, Any]:
        return {"dropout_p": self.dropout if self.training else 0.0, "backend": self.backend}

    def _padding_side(self) -> str:
        return "left" if self.align == "right" else "right"


def start_std(table_std: float | None, sharpness: float | None, refine_scale: float | None, rank: int) -> float:
    """The root mean square of the entries of tables before training: table_std itself, or what gives `sharpness`, which is the
    score refine_scale * table_std^2 * rank of two positions whose first-order weights all lie on one matching pair of rows."""
    factor = checks.scale("refine_scale", refine_scale, rank)
    for name, value in (("table_std", table_std), ("sharpness", sharpness)):
        if value is not None and checks.number(name, value) < 0:
            checks.refuse(name, str(value), "0 or more")
    if sharpness is None:
        return 1.0 if table_std is None else checks.number("table_std", table_std)
    if table_std is not None:
        checks.refuse("table_std", str(table_std), f"left out if sharpness is given, which sets it; sharpness is {sharpness}")
    if factor <= 0:
        checks.refuse("refine_scale", str(refine_scale), f"above 0 if sharpness is given; sharpness is {sharpness}")
    return (checks.number("sharpness", sharpness) / (factor * rank)) ** 0.5


@torch.no_grad()
def draw_position_tables(w_q: Tensor, w_k: Tensor, start: str, std: float) -> None:
    """Fill two tables (..., N, R) with entries whose mean square is std^2, in one of the ways of `STARTS`.

    "shifted" with R >= N is exact: rows of W_q are orthogonal, row j of W_k is row j - 1 of W_q, and row 0 of W_k, which nothing
    precedes, is 0. With fewer columns, rows are random and nearly orthogonal.
    """
    exact = start == "shifted" and w_q.shape[-1] >= w_q.shape[-2]
    for w in (w_q, w_k):
        _draw(w, "orthogonal" if exact else start, std)
    if start == "shifted":
        w_k[..., 1:, :] = w_q[..., :-1, :]
    if exact:
        w_k[..., 0, :] = 0


def _draw(w: Tensor, start: str, std: float) -> None:
    size, rank = w.shape[-2:]
    if start == "identity":
        column = torch.arange(size - 1, -1, -1) % rank
        w.copy_(torch.eye(rank)[column] * rank**0.5).mul_(std)
        return
    w.normal_(std=std)
    if start == "orthogonal":
        for table in w.view(-1, size, rank):
            full = torch.empty_like(table, dtype=torch.promote_types(w.dtype, torch.float32))  # no half precision in torch's QR
            table.copy_(nn.init.orthogonal_(full, max(size, rank) ** 0.5)).mul_(std)
