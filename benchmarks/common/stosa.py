"""STOSA's attention as in its authors' code: a rival of the operator and, in a model, of the recommender."""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-24  # what STOSA's code keeps covariances above


def squared_distance(mean_q: Tensor, cov_q: Tensor, mean_k: Tensor, cov_k: Tensor) -> Tensor:
    """The squared 2-Wasserstein distances: an L x L matrix of the means, one of the deviations, their sum."""

    def matrix(a: Tensor, b: Tensor) -> Tensor:
        return -2 * torch.matmul(a, b.transpose(-1, -2)) + (a**2).sum(-1, True) + (b**2).sum(-1, True).transpose(-1, -2)

    mean_q, cov_q, mean_k, cov_k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (mean_q, cov_q, mean_k, cov_k))
    return matrix(mean_q, mean_k) + matrix(cov_q.clamp(min=SMALLEST).sqrt(), cov_k.clamp(min=SMALLEST).sqrt())


def stosa(
    tensors: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    gate: Tensor | float,
    refinement: str,
    dropout_p: float,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """STOSA's attention line by line, with the refinements on top as a paper's code would write them.

    tensors: means and covariances of q, of k and of v. tables: W_q and W_k, for "stochastic" those of the covariances after them.
    lengths: (B,) items of each entry, padded on the left, as STOSA does; rows of padding come out as something finite.
    Half precision is that of products with values and tables; distances and weights are float32, as in STOSA's code.
    """
    group = tensors[0].shape[1] // tensors[2].shape[1]
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v = tensors
    if group > 1:
        mean_k, cov_k, mean_v, cov_v = (x.repeat_interleave(group, 1) for x in (mean_k, cov_k, mean_v, cov_v))
    length, dtype = mean_q.shape[2], mean_q.dtype
    mask = torch.full((length, length), -(2.0**32), device=mean_q.device).triu(1)
    if lengths is not None:
        padding = torch.arange(length, device=mean_q.device) < length - lengths[:, None]
        mask = mask + padding[:, None, None] * -(2.0**32)

    def attend(weights: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.matmul(weights.to(dtype), x) for x in values)

    weights = first = (mask - squared_distance(mean_q, cov_q, mean_k, cov_k) * mean_q.shape[-1] ** -0.5).softmax(-1)
    if refinement != "none":
        q_a, k_a, *covs = attend(first, *tables)
        if refinement == "stochastic":
            q_cov, k_cov = (F.elu(x) + 1 for x in covs)
            scores = -squared_distance(q_a, q_cov, k_a, k_cov)
        else:
            scores = torch.matmul(q_a, k_a.transpose(-1, -2))
        weights = (scores * q_a.shape[-1] ** -0.5 + mask).softmax(-1)
    if refinement == "additive":
        weights = first + (gate if isinstance(gate, float) else gate[:, None, None]) * weights
    if refinement == "value":
        mean_v, cov_v = *attend(first, mean_v), *attend(first**2, cov_v)
    weights = F.dropout(weights, dropout_p)
    return *attend(weights, mean_v), *attend(weights**2, cov_v)  # type: ignore[return-value]
