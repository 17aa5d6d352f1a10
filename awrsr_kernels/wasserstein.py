"""Gaussians as points, so that the Wasserstein distance between them is a distance of vectors.

N(m, diag c) becomes x = [m | sqrt(c)], D means and D deviations side by side. The squared 2-Wasserstein distance of two Gaussians
with diagonal covariances is then |x_i - x_j|^2 (Dowson and Landau 1982), so that scores -scale |x_i - x_j|^2 are, up to a number
per row that softmax ignores, dot products less a number per key: 2 scale (x_i.x_j - |x_j|^2 / 2). Every backend builds on that.
"""

from typing import Any

import torch
from torch import Tensor

from .torch_state import transformed

# Smaller covariances are read as this one and get no gradient, so that the root's stays finite: at most 512. Its own root, 2^-10,
# is exact in every dtype. ELU + 1 reaches 0 in float32 for inputs below about -17.
SMALLEST = 2.0**-20


class _Points(torch.autograd.Function):
    """The backward uses differentiable operations, so that any number of derivatives can be taken."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(mean: Tensor, cov: Tensor) -> Tensor:
        return torch.cat([mean, cov.clamp(min=SMALLEST).sqrt()], -1)  # NaN stays NaN

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        cov, output = ctx.saved_tensors
        d_mean, d_root = grad.chunk(2, -1)
        above = cov > SMALLEST  # NaN is not: padding, whose gradient is 0, may hold it
        return d_mean, torch.where(above, 0.5 * d_root / output.chunk(2, -1)[1], 0)


class _PlainPoints(torch.autograd.Function):
    """`_Points` in the form that torch.func cannot transform. A call takes a fraction of the time: no names are bound."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, cov: Tensor) -> Tensor:
        output = _Points.forward(mean, cov)
        _Points.setup_context(ctx, (mean, cov), output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _Points.backward(ctx, grad)


def points(mean: Tensor, cov: Tensor) -> Tensor:
    """(..., D) means and covariances -> (..., 2 D) [mean | deviation]; covariances are read as at least `SMALLEST`."""
    plain = not torch.compiler.is_compiling() and not transformed()
    return _PlainPoints.apply(mean, cov) if plain else _Points.apply(mean, cov)


def side_by_side(w: Tensor, w_cov: Tensor) -> Tensor:
    """Tables of means and of covariances, (..., R) each, as one (..., 2 R), in the form that `correlation_points` takes."""
    return torch.cat([w, w_cov], -1)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(..., n, F), (..., m, F) -> (..., n, m) squared distances.

    From differences in float64, in which everything else is measured; otherwise from products, in float32 and rounded once.
    """
    if x.dtype == torch.float64:
        return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    a, b = x.float(), y.float()
    squares = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :] - 2 * a @ b.transpose(-1, -2)
    return squares.to(x.dtype)


def correlation_points(x: Tensor) -> Tensor:
    """(..., 2 R) [mean | a] -> (..., 2 R) [mean | sqrt(ELU(a) + 1)]: points of the "stochastic" correlation space.

    The root of exp(a) is taken as exp(a / 2), which no a brings to 0 before -170, and whose gradient is finite everywhere.
    """
    mean, a = x.chunk(2, -1)
    return torch.cat([mean, torch.where(a > 0, (a.clamp(min=0) + 1).sqrt(), (a.clamp(max=0) / 2).exp())], -1)
