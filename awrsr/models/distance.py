"""Distances as dot products, so that the STOSA backbone uses the same losses, ranking and export as other backbones.

N(m, diag c) is the point x = [m | sqrt(c)]: the squared 2-Wasserstein distance of two Gaussians is |x - y|^2. The score of an item
is its negative, -|x - y|^2 = 2 x.y - |y|^2 - |x|^2, a product of the row [x | 1 | -|x|^2] of a state and the row [2 y | -|y|^2 | 1]
of the item.

E means and E deviations of a point, S = 2 E + 2 features of what is multiplied.
"""

import torch
from torch import Tensor

from .attention import points, positive


def gaussian_points(x: Tensor) -> Tensor:
    """(..., 2 E) [mean | a] -> (..., 2 E) [mean | sqrt(ELU(a) + 1) - 1].

    Deviations are counted from 1, where training begins: no distance changes, and points stay near 0, where their squares round
    little.
    """
    mean, a = x.chunk(2, -1)
    mean, deviation = points(mean, positive(a)).chunk(2, -1)
    return torch.cat([mean, deviation - 1], -1)


def distance_rows(x: Tensor) -> Tensor:
    """(..., 2 E) points -> (..., S): their products with `distance_columns` of others are negative squared distances."""
    square = x.square().sum(-1, keepdim=True)
    return torch.cat([x, torch.ones_like(square), -square], -1)


def distance_columns(x: Tensor) -> Tensor:
    """(..., 2 E) points -> (..., S): the factors that `distance_rows` are multiplied by."""
    square = x.square().sum(-1, keepdim=True)
    return torch.cat([2 * x, -square, torch.ones_like(square)], -1)


def rows_of_columns(columns: Tensor) -> Tensor:
    """(..., S) `distance_columns` of points -> (..., S) their `distance_rows`, for distances between items."""
    return torch.cat([columns[..., :-2] / 2, columns[..., -1:], columns[..., -2:-1]], -1)
