"""Rows of earlier positions: row i of a lagged tensor is row i - a of the same sequence, and 0 before its first item.

B sequences, H heads, L positions, T packed positions, F features, A + 1 positions that are put side by side.

Plain torch: differentiable any number of times, traced with dynamic sizes, and free of synchronisation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_places(cu_seqlens: Tensor, rows: int) -> Tensor:
    """(rows,) int64: how many items precede each packed row in its sequence. cu_seqlens (B + 1,), rising from 0; sequences may be
    empty, and rows after the last one count on from its end."""
    row = torch.arange(rows, device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    return row - bounds[torch.searchsorted(bounds, row, right=True) - 1]


def padded_places(lengths: Tensor | None, size: int, padding_side: str = "left", device: torch.device | None = None) -> Tensor:
    """(B, size), or without lengths (size,), int64: how many items precede each position. It is negative in padding on the left.

    lengths: (B,) integers in 0..size. padding_side: "left" or "right". device: that of the result, if there are no lengths.
    """
    position = torch.arange(size, device=device if lengths is None else lengths.device)
    if lengths is None or padding_side == "right":
        return position
    return position - (size - lengths.long())[:, None]


def lag(x: Tensor, steps: int, places: Tensor, *, dim: int = -2) -> Tensor:
    """Rows of `steps` positions before, of x's shape; 0, whatever x holds there, where a sequence has no such item.

    Args:
        x: rows along dimension `dim`, such as (B, H, L, F), (1, H, T, F) or, with dim=-3, (B, L, H, F) and (T, H, F).
        steps: 0 or more.
        places: how many items precede each row: (rows,), or (B, rows) if B is x's first dimension.
    """
    if steps == 0:
        return x
    dim = dim % x.dim()
    earlier = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [steps, 0]).narrow(dim, 0, x.shape[dim])
    form = [1] * x.dim()
    form[dim] = places.shape[-1]
    if places.dim() == 2:
        form[0] = places.shape[0]
    return torch.where((places >= steps).view(form), earlier, 0)


def lagged(x: Tensor, factors: Tensor | int, places: Tensor, *, dim: int = -2) -> Tensor:
    """Rows of 0, 1, ..., A positions before, side by side: (..., F) -> (..., (A + 1) F).

    The product of two such rows is the sum over a of factors[a] * x_(i-a) . y_(j-a), if one of the two has the factors.

    Args:
        x, places, dim: as for `lag`.
        factors: A + 1, how many rows are put side by side; or what they are multiplied by, (A + 1,), or (H, A + 1) for each head,
            which is the other dimension of x next to its rows.
    """
    count = factors if isinstance(factors, int) else factors.shape[-1]
    rows = torch.stack([lag(x, steps, places, dim=dim) for steps in range(count)], -2)  # (..., A + 1, F)
    if isinstance(factors, Tensor):
        heads_first = factors.dim() == 2 and dim % x.dim() == x.dim() - 2  # (H, rows) rather than (rows, H)
        rows = rows * (factors[:, None] if heads_first else factors)[..., None].to(x.dtype)
    return rows.flatten(-2)
