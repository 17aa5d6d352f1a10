"""The attention layers of both backbones. Only this module of the package imports the operator from `awrsr_kernels`.

T packed events of B histories, L window, E hidden size, H heads, D head dim, R refinement rank.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awrsr_kernels import (
    RefinedMultiheadAttention,
    attention_weights,
    refined_attention,
    refined_attention_varlen,
    stochastic_attention_weights,
    stochastic_refined_attention,
    stochastic_refined_attention_varlen,
)
from awrsr_kernels.lagging import lag, lagged, packed_places, padded_places
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

    def before(self, x: Tensor) -> Tensor:
        """(T,): how many events precede each row of x in its history."""
        return packed_places(self.cu_seqlens, len(x))


class Padded(NamedTuple):
    """Padded histories. x is (B, L, E), with padding on the left."""

    lengths: Tensor  # (B,)

    def places(self, x: Tensor, size: int) -> Tensor:
        """(L,) positions of the columns of x in a window of `size`."""
        if x.shape[1] > size:
            raise ValueError(f"histories have {x.shape[1]} events, must have at most max_len={size}: keep the last events of each")
        return torch.arange(size - x.shape[1], size, device=x.device)

    def before(self, x: Tensor) -> Tensor:
        """(B, L): how many events precede each column of x in its history."""
        return padded_places(self.lengths, x.shape[1])


class RefinedAttention(RefinedLayer):
    """Base of the layers of both backbones. A new layer draws only its tables; the network draws all linear maps."""

    def reset_parameters(self) -> None:
        self.reset_refinement()

    def _draw_content_tables(self, to_tables: Tensor) -> None:
        to_tables.normal_().mul_(self.table_std).div_(self.features**0.5)  # rounded in this order, as in earlier runs


class DotProductAttention(RefinedAttention, RefinedMultiheadAttention):
    """Causal self-attention between events, for the SASRec backbone. H' are the heads of a call, H at least.

    suffix: how many events queries and keys are compared by, S_ij = sum over a of b_a q_(i-a) . k_(j-a) / sqrt(D), b_0 = 1 and the
        others learned per head, from 1/2, 1/4, ... on.
    smeared_keys: k_j becomes (1 - s) k_j + s k_(j-1), with s learned per head: from .05 in even heads, .95 in odd ones.
    shift: "heads": M is multiplied by M+ (reference.py) in all heads but the first plain_heads, times a factor c learned per head
        from shift_gate on. "added": M is P + c P+ in each head, by a call with every head twice.
    unigram: shifted heads add u U+, where U is P without the suffix and u is learned from shift_gate on, by further heads.
    """

    def __init__(
        self, hidden: int, heads: int, *, suffix: int = 1, smeared_keys: bool = False, shift: str = "off", plain_heads: int = 0,
        shift_gate: float = 1.0, unigram: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(hidden, heads, shift=shift == "heads", plain_heads=plain_heads, **options)
        halves = (0.5 ** torch.arange(1.0, suffix)).repeat(heads, 1)
        self.suffix_factors = nn.Parameter(halves) if suffix > 1 else None
        self.smear = nn.Parameter(3.0 * (-1.0) ** torch.arange(1, heads + 1)) if smeared_keys else None
        begin = torch.full((heads - plain_heads,), shift_gate)
        self.shift_gate = nn.Parameter(begin) if shift != "off" else None
        self.unigram_gate = nn.Parameter(begin.clone()) if unigram else None
        self.doubled = shift == "added"

    def forward(self, x: Tensor, where: Packed | Padded, rows: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x (..., E) -> (..., E). rows: of packed histories, those of the output that are wanted."""
        q, k, v = self.compared(x, where)
        if isinstance(where, Packed):
            out = refined_attention_varlen(q, k, v, **where._asdict(), **self._packed_options(x))
            out = out if rows is None else out[rows]
        else:
            q, k, v = (a.transpose(1, 2) for a in (q, k, v))
            out = refined_attention(q, k, v, **where._asdict(), **self._padded_options(x), **self._run_options()).transpose(1, 2)
        return self.out(self.joined(out.transpose(-2, -3)).transpose(-2, -3).flatten(-2))

    def weights(self, x: Tensor, where: Padded) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """First-order weights P and the weights M that multiply the values, with all factors, (B, H, L, L) each."""
        q, k, _ = (a.transpose(1, 2) for a in self.compared(x, where))
        first, weights = attention_weights(q, k, **where._asdict(), **self._padded_options(x))
        return first[:, : self.num_heads], self.joined(weights)

    def compared(self, x: Tensor, where: Packed | Padded) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (..., H', F) each, with the queries and keys of earlier events that are compared as well."""
        q, k, v = self._split(self.qkv(x))
        if self.smear is not None or self.suffix_factors is not None:
            before = where.before(x)
        if self.smear is not None:
            k = k.lerp(lag(k, 1, before, dim=-3), self.smear.sigmoid()[:, None].to(k.dtype))
        if self.suffix_factors is not None:
            factors = F.pad(self.suffix_factors, (1, 0), value=1.0)
            without_suffix = F.pad(q, (0, (factors.shape[1] - 1) * self.head_dim))
            q, k = lagged(q, factors, before, dim=-3), lagged(k, factors.shape[1], before, dim=-3)
        if self.doubled:
            q, k, v = (torch.cat([a, a], -2) for a in (q, k, v))
        elif self.unigram_gate is not None:
            n = self.plain_heads
            q = torch.cat([q, without_suffix[..., n:, :]], -2)
            k, v = (torch.cat([a, a[..., n:, :]], -2) for a in (k, v))
        return q, k, v

    def joined(self, out: Tensor) -> Tensor:
        """Outputs or weights of the heads of a call, (..., H', L, F), times their factors: those of the layer, (..., H, L, F)."""
        if self.shift_gate is None:
            return out
        heads, n = self.num_heads, self.plain_heads
        gate = self.shift_gate[:, None, None].to(out.dtype)
        if self.doubled:
            return out[..., :heads, :, :] + gate * out[..., heads:, :, :]
        shifted = gate * out[..., n:heads, :, :]
        if self.unigram_gate is not None:
            shifted = shifted + self.unigram_gate[:, None, None].to(out.dtype) * out[..., heads:, :, :]
        return torch.cat([out[..., :n, :, :], shifted], -3)

    def _weight_options(self) -> dict[str, Any]:
        """With the scale of queries alone, without those before them."""
        more = {"shift": True, "plain_heads": self.num_heads} if self.doubled else {}
        return super()._weight_options() | {"softmax_scale": self.head_dim**-0.5} | more

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

    def forward(self, x: Tensor, where: Packed | Padded, rows: Tensor | None = None) -> Tensor:
        """x (..., 2 E) [mean | cov] -> (..., 2 E) [mean | cov], with covariances that are not made positive. rows: of packed
        histories, those of the output that are wanted."""
        inputs = self.project(x)
        if isinstance(where, Packed):
            mean, cov = stochastic_refined_attention_varlen(**inputs, **where._asdict(), **self._packed_options(x))
            mean, cov = (mean, cov) if rows is None else (mean[rows], cov[rows])
        else:
            options = where._asdict() | self._padded_options(x) | self._run_options()
            inputs = {name: a.transpose(1, 2) for name, a in inputs.items()}
            mean, cov = (a.transpose(1, 2) for a in stochastic_refined_attention(**inputs, **options))
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
