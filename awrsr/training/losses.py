"""Training losses, which compare the item that followed with other items.

T events with a target, N items, S features of what is multiplied for scores, K negatives. Scores are dot products of hidden states
(T, S) and the item table (N, S), or those of its rows that are needed. Each loss returns (T,), one value per event, for the caller
to average.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..models.distance import rows_of_columns

CATALOGUE_BLOCK = 1 << 22  # scores held at a time by a loss over the whole catalogue
PAIR_BLOCK = 1 << 22  # numbers of item embeddings held at a time by a loss of pairs


def bce(hidden: Tensor, targets: Tensor, table: Tensor, negatives: Tensor, **_: float) -> Tensor:
    """Binary cross-entropy of the target against its own K negatives, (T, K), averaged over these. With K = 1 that of
    SASRec, whose negatives exclude all items of the user; here they exclude the target alone (see `draw_negatives`)."""
    positive, negative = pair_scores(hidden, targets, table, negatives)
    return F.softplus(-positive) + F.softplus(negative).mean(1)


def bpr(hidden: Tensor, targets: Tensor, table: Tensor, negatives: Tensor, pvn_weight: float = 0.0, **_: float) -> Tensor:
    """Bayesian personalised ranking (Rendle et al. 2009): the target should score above each of its K negatives.

    pvn_weight: weight of STOSA's positive-versus-negative penalty max(d(h, target) - d(target, negative), 0), averaged over the
        negatives: the state should be closer to its target than the negative is. For scores that are negative distances d alone.
    """
    positive, negative = pair_scores(hidden, targets, table, negatives)
    ranked = F.softplus(negative - positive[:, None]).mean(1)
    if not pvn_weight:
        return ranked
    between = pair_scores(rows_of_columns(F.embedding(targets, table)), targets, table, negatives)[1]
    return ranked + pvn_weight * (between - positive[:, None]).clamp(min=0).mean(1)


def gbce(
    hidden: Tensor,
    targets: Tensor,
    table: Tensor,
    negatives: Tensor,
    calibration: float = 0.75,
    num_items: int = 0,
    **_: float,
) -> Tensor:
    """Generalised binary cross-entropy (Petrov and Macdonald, gSASRec, 2023): reduces the overconfidence of sampling.

    calibration: their t, 0 (binary cross-entropy, negatives summed) to 1 (probabilities fully calibrated). num_items: N, where the
        table does not hold all.
    """
    rate = min(negatives.shape[1] / max((num_items or len(table)) - 1, 1), 1.0)
    power = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    positive, negative = pair_scores(hidden, targets, table, negatives)
    return power * F.softplus(-positive) + F.softplus(negative).sum(1)


def sampled_softmax(hidden: Tensor, targets: Tensor, table: Tensor, negatives: Tensor, **_: float) -> Tensor:
    """Cross-entropy of the target against a pool of K items, (K,), shared by the batch, without the event's own target.

    Nothing corrects for how the pool was drawn (uniformly), and other items of the history may be in it. A pool of the whole
    catalogue makes it the cross-entropy over all items."""
    positive = (hidden * F.embedding(targets, table)).sum(1)
    negative = hidden @ F.embedding(negatives, table).T
    negative = negative.masked_fill(negatives == targets[:, None], -math.inf)
    return torch.logsumexp(torch.cat([positive[:, None], negative], 1), 1) - positive


def cross_entropy(hidden: Tensor, targets: Tensor, table: Tensor, negatives: Tensor, **_: float) -> Tensor:
    """Cross-entropy over the whole catalogue, block by block, so that memory does not grow with T x N."""
    positive = (hidden * F.embedding(targets, table)).sum(1)
    normaliser: Tensor = _LogNormaliser.apply(hidden, table)
    return normaliser - positive


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sampled_softmax": sampled_softmax,
    "cross_entropy": cross_entropy,
    "bce": bce,
    "bpr": bpr,
    "gbce": gbce,
}


def draw_negatives(loss: str, targets: Tensor, num_items: int, k: int, generator: torch.Generator) -> Tensor:
    """Items that a loss compares the targets with: for "sampled_softmax" a pool (K,), uniform with replacement, or the catalogue
    where that is no larger; nothing, (T, 0), for "cross_entropy"; otherwise (T, K), uniform over all items but the target.

    Raises:
        ValueError: a catalogue of one item, which has no negatives to draw.
    """
    if loss == "sampled_softmax" and k >= num_items:
        return torch.arange(num_items, device=targets.device)
    if loss == "sampled_softmax":
        return torch.randint(num_items, (k,), generator=generator, device=targets.device)
    if loss == "cross_entropy":
        return targets.new_empty(len(targets), 0)
    if num_items < 2:
        raise ValueError(f"num_items is {num_items}, must be 2 or more: loss {loss!r} compares a target with other items")
    drawn = torch.randint(num_items - 1, (len(targets), k), generator=generator, device=targets.device)
    return drawn + (drawn >= targets[:, None])


def pair_scores(hidden: Tensor, targets: Tensor, table: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the targets (T,) and of their negatives (T, K); with many negatives, in parts that the backward recomputes."""
    items = torch.cat([targets[:, None], negatives], 1)
    size = max(1, PAIR_BLOCK // (items.shape[1] * hidden.shape[1]))
    if len(items) <= size:
        scores = score_items(hidden, items, table)
    else:
        parts = zip(hidden.split(size), items.split(size), strict=True)
        scores = torch.cat([checkpoint(score_items, *part, table, use_reentrant=False) for part in parts])
    return scores[:, 0], scores[:, 1:]


def score_items(hidden: Tensor, items: Tensor, table: Tensor) -> Tensor:
    """(T, S), (T, K), (N, S) -> (T, K) scores of each event's items."""
    return (F.embedding(items, table) * hidden[:, None]).sum(-1)


class _LogNormaliser(torch.autograd.Function):
    """(T, S), (N, S) -> (T,) log of the sum over items of exp(score); the backward recomputes the scores."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor) -> Tensor:
        kind = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype  # of products, both ways
        rows = hidden.to(ctx.dtype)
        total = hidden.new_full((len(hidden),), -math.inf, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for block in table.split(_block(hidden)):
            total = torch.logaddexp(total, torch.logsumexp((rows @ block.to(ctx.dtype).T).to(total.dtype), 1))
        ctx.save_for_backward(hidden, table, total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, table, total = ctx.saved_tensors
        d_hidden, d_table = torch.zeros_like(hidden), torch.empty_like(table)
        rows, size = hidden.to(ctx.dtype), _block(hidden)
        for whole, d_block in zip(table.split(size), d_table.split(size), strict=True):
            block = whole.to(ctx.dtype)
            weights = (rows @ block.T).to(total.dtype).sub_(total[:, None]).exp_().mul_(grad[:, None]).to(ctx.dtype)
            d_hidden += weights @ block
            d_block.copy_(weights.T @ rows)
        return d_hidden, d_table


def _block(hidden: Tensor) -> int:
    return max(256, CATALOGUE_BLOCK // max(len(hidden), 1))
