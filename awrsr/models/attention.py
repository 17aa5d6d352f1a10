"""The attention layers of both backbones. Only this module of the package imports the operator from `awrsr_kernels`.

T packed events of B histories, L window, E hidden size, H heads, D head dim, R refinement rank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awrsr_kernels import (
    RefinedMultiheadAttention,
    stochastic_attention_weights,
    stochastic_refined_attention,
    stochastic_refined_attention_varlen,
)
from awrsr_kernels.tables import TABLES, RefinedLayer
from awrsr_kernels.wasserstein import points

__all__ = [
    "TABLES",
    "DotProductAttention",
    "Packed",
    "Padded",
    "RefinedAttention",
    "StochasticAttention",
    "points",
    "positive",
]


class Packed(NamedTuple):
    """Packed histories. x is (T, E), and history b holds rows cu_seqlens[b] .. cu_seqlens[b + 1] - 1."""

    cu_seqlens: Tensor  # (B + 1,)
    max_seqlen: int

    def places(self, x: Tensor, size: int) -> Tensor:
        """(T,) positions of the rows of x in windows of `size` that end with their history."""
        ends = self.cu_seqlens[1:].repeat_interleave(self.cu_seqlens.diff(), output_size=len(x))
        return torch.arange(size, size + len(x), device=x.device) - ends


class Padded(NamedTuple):
    """Padded histories. x is (B, L, E), with padding on the left."""

    lengths: Tensor  # (B,)

    def places(self, x: Tensor, size: int) -> Tensor:
        """(L,) positions of the columns of x in a window of `size`."""
        if x.shape[1] > size:
            raise ValueError(f"histories have {x.shape[1]} events, must have at most max_len={size}: keep the last events of each")
        return torch.arange(size - x.shape[1], size, device=x.device)


class RefinedAttention(RefinedLayer):
    """Base of the layers of both backbones. A new layer draws only its tables; the network draws all linear maps."""

    def reset_parameters(self) -> None:
        self.reset_refinement()

    def _draw_content_tables(self, to_tables: Tensor) -> None:
        to_tables.normal_().mul_(self.table_std).div_(self.features**0.5)  # rounded in this order, as in earlier runs


class DotProductAttention(RefinedAttention, RefinedMultiheadAttention):
    """Causal self-attention between events, for the SASRec backbone."""

    def forward(self, x: Tensor, where: Packed | Padded) -> Tensor:  # type: ignore[override]
        """x (..., E) -> (..., E)."""
        out: Tensor = super().forward(x, **where._asdict())  # type: ignore[assignment]  # without weights, as only x is given
        return out

    def weights(self, x: Tensor, where: Padded) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """First-order weights P and the refined weights M that multiply the values, (B, H, L, L) each."""
        return super().weights(x, lengths=where.lengths)

    @torch.no_grad()
    def match_keys(self) -> None:
        """Draw queries of unit scale and make the keys equal to them, so that events attend to similar events."""
        match(self.qkv)

    @torch.no_grad()
    def pass_values(self) -> None:
        """Make the values equal to the events, and the output equal to what attention returns."""
        copy(self.qkv, self.out)


class StochasticAttention(RefinedAttention):
    """Causal stochastic self-attention (STOSA, Fan et al. 2022): events attend to events at a small Wasserstein distance.

    Reads and gives 2 E features, those of means and those of covariances, with linear maps of their own; projected covariances are
    positive by ELU + 1. mean_branch "published" has neither values nor output for means, as whoever uses the layer discards them,
    and gives means of 0.
    """

    stochastic = True

    def __init__(self, hidden: int, heads: int, *, mean_branch: str = "attended", **options: Any) -> None:
        super().__init__(2 * hidden, heads, **options)
        self.attends = mean_branch == "attended"
        self.mean_qkv = nn.Linear(hidden, (3 if self.attends else 2) * hidden)
        self.cov_qkv = nn.Linear(hidden, 3 * hidden)
        self.mean_out = nn.Linear(hidden, hidden) if self.attends else None
        self.cov_out = nn.Linear(hidden, hidden)
        self.reset_parameters()

    def forward(self, x: Tensor, where: Packed | Padded) -> Tensor:
        """x (..., 2 E) [mean | cov] -> (..., 2 E) [mean | cov], with covariances that are not made positive."""
        rows = self.project(x)
        if isinstance(where, Packed):
            mean, cov = stochastic_refined_attention_varlen(**rows, **where._asdict(), **self._packed_options(x))
        else:
            options = where._asdict() | self._padded_options(x) | self._run_options()
            rows = {name: a.transpose(1, 2) for name, a in rows.items()}
            mean, cov = (a.transpose(1, 2) for a in stochastic_refined_attention(**rows, **options))
        mean, cov = mean.flatten(-2), self.cov_out(cov.flatten(-2))
        return torch.cat([torch.zeros_like(cov) if self.mean_out is None else self.mean_out(mean), cov], -1)

    def weights(self, x: Tensor, where: Padded) -> tuple[Tensor, Tensor]:
        rows = {name: a.transpose(1, 2) for name, a in self.project(x).items() if name[0] != "v"}
        return stochastic_attention_weights(**rows, **where._asdict(), **self._padded_options(x))

    @torch.no_grad()
    def match_keys(self) -> None:
        for qkv in (self.mean_qkv, self.cov_qkv):
            match(qkv)

    @torch.no_grad()
    def pass_values(self) -> None:
        """For means only; covariances learn what to pass on."""
        if self.mean_out is not None:
            copy(self.mean_qkv, self.mean_out)

    def project(self, x: Tensor) -> dict[str, Any]:
        """Means and covariances of queries, keys and values, (..., H, D) each, under the operator's names of arguments."""
        mean, cov = x.chunk(2, -1)
        q_cov, k_cov, v_cov = self.split(positive(self.cov_qkv(cov)), 3)
        q_mean, k_mean, *values = self.split(self.mean_qkv(mean), 3 if self.attends else 2)
        v_mean = values[0] if values else v_cov.detach()  # discarded
        return {"q_mean": q_mean, "q_cov": q_cov, "k_mean": k_mean, "k_cov": k_cov, "v_mean": v_mean, "v_cov": v_cov}

    def split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(..., parts E) -> `parts` tensors (..., H, D)."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).unbind(-3)


def positive(x: Tensor) -> Tensor:
    """ELU(x) + 1, which makes covariances positive (STOSA). Below 0 it is exp(x), since (exp(x) - 1) + 1 loses digits."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def match(qkv: nn.Linear) -> None:
    hidden = qkv.in_features
    nn.init.normal_(qkv.weight[:hidden], std=hidden**-0.5)
    qkv.weight[hidden : 2 * hidden] = qkv.weight[:hidden]


def copy(qkv: nn.Linear, out: nn.Linear) -> None:
    nn.init.eye_(qkv.weight[-qkv.in_features :])
    nn.init.eye_(out.weight)
