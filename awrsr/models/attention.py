"""Refined self-attention as a layer: the package's only door to `awrsr_kernels`.

T packed events of B histories, L window, E hidden size, H heads, D head dim, R refinement rank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awrsr_kernels import (
    attention_weights,
    refined_attention,
    refined_attention_varlen,
    stochastic_attention_weights,
    stochastic_refined_attention,
    stochastic_refined_attention_varlen,
)
from awrsr_kernels.checks import MAX_FEATURES
from awrsr_kernels.gaussian import points

__all__ = ["NormedAttention", "Packed", "Padded", "RefinedAttention", "StochasticAttention", "points", "positive"]

TABLES = ("w_q", "w_k", "w_q_cov", "w_k_cov")


class Packed(NamedTuple):
    """Histories one after another, x is (T, E); history b holds rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1."""

    cu_seqlens: Tensor  # (B + 1,)
    max_seqlen: int

    def places(self, x: Tensor, size: int) -> Tensor:
        """(T,) places of the rows of x in windows of `size` that end with their history."""
        ends = self.cu_seqlens[1:].repeat_interleave(self.cu_seqlens.diff(), output_size=len(x))
        return torch.arange(size, size + len(x), device=x.device) - ends


class Padded(NamedTuple):
    """Histories in a window each, x is (B, L, E), padding on the left."""

    lengths: Tensor  # (B,)

    def places(self, x: Tensor, size: int) -> Tensor:
        """(L,) places of the columns of x in a window of `size`."""
        if x.shape[1] > size:
            raise ValueError(f"items are {x.shape[1]} events wide, must be at most max_len={size}: cut histories to their ends")
        return torch.arange(size - x.shape[1], size, device=x.device)


class RefinedAttention(nn.Module):
    """Causal self-attention with refined weights (AWRSR), between two linear maps.

    Tables "position" are parameters (H, max_len, R), or (max_len, R) shared by the heads; a history of n events uses the last n
    rows, so that a row means "so many events before the prediction". Tables "content" are computed from each event by a linear map.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        *,
        refinement: str,
        max_len: int,
        rank: int,
        tables: str = "position",
        per_head: bool = True,
        table_std: float = 1.0,
        table_init: str = "normal",
        refine_scale: float = 0.0,
        learned_scale: bool = False,
        gate: float = 1.0,
        learned_gate: bool = False,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.heads, self.refinement, self.dropout, self.backend = heads, refinement, dropout, backend
        self.refine_scale = refine_scale or None  # None is the operator's 1 / sqrt(rank)
        features = self.make_maps(hidden)
        self.w_q = self.w_k = self.w_q_cov = self.w_k_cov = self.to_tables = self.scale = None
        self.gate: Tensor | float | None = gate if refinement == "additive" else None
        self.table_names = TABLES[: {"none": 0, "stochastic": 4}.get(refinement, 2)]
        if refinement == "none":
            return
        if learned_gate and refinement == "additive":
            self.gate = nn.Parameter(torch.full((heads,), gate))
        if learned_scale:  # of R's scores, on W_q, as the operator has one refine_scale for all heads
            self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        if tables == "content":
            columns = len(self.table_names) * heads * rank
            self.to_tables = nn.Parameter(torch.randn(features, columns) * table_std / features**0.5)
        else:
            shape = (heads, max_len, rank) if per_head else (max_len, rank)
            for name in self.table_names:
                setattr(self, name, nn.Parameter(table_start(table_init, shape) * table_std))
            if table_init == "shifted":
                self.shift_keys()

    def make_maps(self, hidden: int) -> int:
        """The linear maps; the number of features that the layer reads and gives."""
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        return hidden

    def forward(self, x: Tensor, where: Packed | Padded) -> Tensor:
        """x (..., E) -> (..., E)."""
        q, k, v = self.split(self.qkv(x))
        options = self.tables(x, where) | where._asdict() | self.options()
        if isinstance(where, Packed):
            out = refined_attention_varlen(q, k, v, **options)
        else:
            q, k, v = (a.transpose(1, 2) for a in (q, k, v))
            out = refined_attention(q, k, v, **options).transpose(1, 2)
        return self.out(out.flatten(-2))

    def weights(self, x: Tensor, where: Padded) -> tuple[Tensor, Tensor]:
        """First-order weights P and the refined weights M that meet the values, each (B, H, L, L)."""
        q, k, _ = (a.transpose(1, 2) for a in self.split(self.qkv(x)))
        return attention_weights(q, k, **self.tables(x, where), lengths=where.lengths, **self.refining())

    @torch.no_grad()
    def match_keys(self) -> None:
        """Draw queries of unit scale and make the keys equal to them: events attend to events like them."""
        match(self.qkv)

    @torch.no_grad()
    def pass_values(self) -> None:
        """Make values the events themselves, and what is attended to the output."""
        copy(self.qkv, self.out)

    @torch.no_grad()
    def shift_keys(self) -> None:
        """Make row j of w_k row j - 1 of w_q: whoever attends to j - 1 by first-order weights attends to j by higher-order ones."""
        for query, key in zip(self.table_names[::2], self.table_names[1::2], strict=True):
            w_q, w_k = getattr(self, query), getattr(self, key)
            w_k[..., 1:, :] = w_q[..., :-1, :]

    def refining(self) -> dict[str, Any]:
        """Options of the operator that weights depend on."""
        return {"refinement": self.refinement, "gate": self.gate, "refine_scale": self.refine_scale}

    def options(self) -> dict[str, Any]:
        return self.refining() | {"dropout_p": self.dropout if self.training else 0.0, "backend": self.backend}

    def split(self, x: Tensor, parts: int = 3) -> tuple[Tensor, ...]:
        """(..., 3 E) -> three of (..., H, D)."""
        return x.unflatten(-1, (parts, self.heads, -1)).unbind(-3)

    def tables(self, x: Tensor, where: Packed | Padded) -> dict[str, Any]:
        """W_q and W_k, for "stochastic" also those of covariances, as the operator wants them."""
        if not self.table_names:
            return {"w_q": None, "w_k": None}
        if self.to_tables is not None:  # (T, H, R), or (B, H, L, R)
            each = list((x @ self.to_tables).unflatten(-1, (len(self.table_names), self.heads, -1)).unbind(-3))
            if self.scale is not None:
                each[0] = each[0] * self.scale[..., 0]
            found = each if isinstance(where, Packed) else [w.transpose(1, 2) for w in each]
            return dict(zip(self.table_names, found, strict=True))
        tables = {name: getattr(self, name) for name in self.table_names}
        if self.scale is not None:
            tables["w_q"] = tables["w_q"] * self.scale
            tables["w_k"] = tables["w_k"].expand_as(tables["w_q"])
        if isinstance(where, Packed):
            return {name: w if w.dim() == 2 else w[None] for name, w in tables.items()}  # (H, N, R) might pass for content
        last = where.places(x, tables["w_q"].shape[-2])  # a slice would tie an exported program to one window
        return {name: w.index_select(-2, last) for name, w in tables.items()}


class NormedAttention(RefinedAttention):
    """The same with a layer norm in the correlation space: R compares directions of Q_A and K_A, scaled by learned factors.

    The operator has no such norm, so this is a composition of plain attention: one call that gives P times the tables (and times
    the values, where nothing of that is dropped), and one for R. Weights and their dropout are as in the operator.
    """

    def __init__(self, hidden: int, heads: int, *, rank: int, **options: Any) -> None:
        super().__init__(hidden, heads, rank=rank, **options)
        self.query_norm, self.key_norm = nn.LayerNorm(rank), nn.LayerNorm(rank)
        self.refine_scale = self.refine_scale or rank**-0.5

    def forward(self, x: Tensor, where: Packed | Padded) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        dropping: dict[str, Any] = {"dropout_p": self.dropout if self.training else 0.0}
        drops = self.refinement == "additive" and dropping["dropout_p"] > 0
        if drops:  # one mask for P and R
            dropping["dropout_seed"] = torch.randint(1 << 62, (), device=x.device)
        values = [*self.rows(x, where), *([] if self.refinement == "simple" or drops else [v])]
        parts = torch.cat(values, -1).split(MAX_FEATURES, -1)
        joined = torch.cat([self.plain(q, k, part, where) for part in parts], -1)
        q_a, k_a, *attended = joined.split([value.shape[-1] for value in values], -1)
        if self.refinement == "value":
            (v,) = attended
        q_a, k_a = self.query_norm(q_a), self.key_norm(k_a)
        out = self.plain(q_a, k_a, v, where, softmax_scale=self.refine_scale, **dropping)
        if self.refinement == "additive":
            first = self.plain(q, k, v, where, **dropping) if drops else attended[0]
            out = first + out * torch.as_tensor(self.gate, device=x.device)[..., None]
        return self.out(out.flatten(-2))

    def plain(self, q: Tensor, k: Tensor, v: Tensor, where: Packed | Padded, **options: Any) -> Tensor:
        """Plain attention between (..., H, D), with values (..., H, D_v)."""
        options = {"refinement": "none", "backend": self.backend, "w_q": None, "w_k": None} | where._asdict() | options
        if isinstance(where, Packed):
            return refined_attention_varlen(q, k, v, **options)
        return refined_attention(*(a.transpose(1, 2) for a in (q, k, v)), **options).transpose(1, 2)

    def rows(self, x: Tensor, where: Packed | Padded) -> list[Tensor]:
        """W_q and W_k as a row per event and head, each (..., H, R)."""
        if self.to_tables is not None:
            return list((x @ self.to_tables).unflatten(-1, (len(self.table_names), self.heads, -1)).unbind(-3))
        tables = [getattr(self, name) for name in self.table_names]
        place = where.places(x, tables[0].shape[-2]).expand(x.shape[:-1])
        each = [w if w.dim() == 3 else w.expand(self.heads, -1, -1) for w in tables]
        return [w.transpose(0, 1)[place] for w in each]

    def weights(self, x: Tensor, where: Padded) -> tuple[Tensor, Tensor]:
        q, k, _ = (a.transpose(1, 2) for a in self.split(self.qkv(x)))
        first, _ = attention_weights(q, k, None, None, refinement="none", lengths=where.lengths)
        w_q, w_k = (w.transpose(1, 2) for w in self.rows(x, where))
        q_a, k_a = self.query_norm(first @ w_q), self.key_norm(first @ w_k)
        scale: dict[str, Any] = {"softmax_scale": self.refine_scale, "lengths": where.lengths}
        second, _ = attention_weights(q_a, k_a, None, None, refinement="none", **scale)
        if self.refinement == "value":
            return first, second @ first
        if self.refinement == "additive":
            return first, first + second * torch.as_tensor(self.gate, device=x.device)[..., None, None]
        return first, second


class StochasticAttention(RefinedAttention):
    """The same between Gaussians (STOSA, Fan et al. 2022): events attend to events at a small Wasserstein distance.

    Reads and gives 2 E features, those of means and those of covariances, with linear maps of their own; projected covariances are
    positive by ELU + 1. mean_branch "published" has neither values nor output for means, as whoever uses the layer discards them,
    and gives means of 0.
    """

    def __init__(self, hidden: int, heads: int, *, mean_branch: str = "attended", **options: Any) -> None:
        self.attends = mean_branch == "attended"
        super().__init__(hidden, heads, **options)

    def make_maps(self, hidden: int) -> int:
        self.mean_qkv = nn.Linear(hidden, (3 if self.attends else 2) * hidden)
        self.cov_qkv = nn.Linear(hidden, 3 * hidden)
        self.mean_out = nn.Linear(hidden, hidden) if self.attends else None
        self.cov_out = nn.Linear(hidden, hidden)
        return 2 * hidden

    def forward(self, x: Tensor, where: Packed | Padded) -> Tensor:
        """x (..., 2 E) [mean | cov] -> (..., 2 E) [mean | cov], the covariances not made positive."""
        parts, options = self.project(x), self.tables(x, where) | where._asdict() | self.options()
        if isinstance(where, Packed):
            mean, cov = stochastic_refined_attention_varlen(**parts, **options)
        else:
            rows = {name: a.transpose(1, 2) for name, a in parts.items()}
            mean, cov = (a.transpose(1, 2) for a in stochastic_refined_attention(**rows, **options))
        mean, cov = mean.flatten(-2), self.cov_out(cov.flatten(-2))
        return torch.cat([torch.zeros_like(cov) if self.mean_out is None else self.mean_out(mean), cov], -1)

    def weights(self, x: Tensor, where: Padded) -> tuple[Tensor, Tensor]:
        rows = {name: a.transpose(1, 2) for name, a in self.project(x).items() if name[0] != "v"}
        return stochastic_attention_weights(**rows, **self.tables(x, where), lengths=where.lengths, **self.refining())

    @torch.no_grad()
    def match_keys(self) -> None:
        for qkv in (self.mean_qkv, self.cov_qkv):
            match(qkv)

    @torch.no_grad()
    def pass_values(self) -> None:
        """Of means; covariances learn what to pass on."""
        if self.mean_out is not None:
            copy(self.mean_qkv, self.mean_out)

    def project(self, x: Tensor) -> dict[str, Any]:
        """Means and covariances of queries, keys and values, each (..., H, D), by the operator's names."""
        mean, cov = x.chunk(2, -1)
        q_cov, k_cov, v_cov = self.split(positive(self.cov_qkv(cov)))
        q_mean, k_mean, *values = self.split(self.mean_qkv(mean), 3 if self.attends else 2)
        v_mean = values[0] if values else v_cov.detach()  # looked at by nobody
        return {"q_mean": q_mean, "q_cov": q_cov, "k_mean": k_mean, "k_cov": k_cov, "v_mean": v_mean, "v_cov": v_cov}


def positive(x: Tensor) -> Tensor:
    """ELU(x) + 1, what STOSA makes covariances of; below 0 it is exp(x), which keeps the digits that (exp(x) - 1) + 1 loses."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def table_start(how: str, shape: tuple[int, ...]) -> Tensor:
    """Position tables (..., N, R) to begin with, whose entries' mean square is 1."""
    size, rank = shape[-2:]
    if how == "identity":
        return (torch.eye(rank)[torch.arange(size - 1, -1, -1) % rank] * rank**0.5).expand(shape).clone()
    drawn = torch.randn(shape)
    if how == "orthogonal":
        for table in drawn.view(-1, size, rank):
            nn.init.orthogonal_(table, max(size, rank) ** 0.5)
    return drawn


def match(qkv: nn.Linear) -> None:
    hidden = qkv.in_features
    nn.init.normal_(qkv.weight[:hidden], std=hidden**-0.5)
    qkv.weight[hidden : 2 * hidden] = qkv.weight[:hidden]


def copy(qkv: nn.Linear, out: nn.Linear) -> None:
    nn.init.eye_(qkv.weight[-qkv.in_features :])
    nn.init.eye_(out.weight)
