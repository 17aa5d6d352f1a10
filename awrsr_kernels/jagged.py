"""Jagged tensors of torch.nested as packed rows, and back, without padding or copies.

B sequences, j their ragged length, T items of all, H heads, F features, N rows of a position table.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor

from .checks import absent, choice, refuse
from .torch_state import readable


def is_nested(x: Any) -> TypeGuard[Tensor]:
    """Whether x is a nested tensor, of any layout; all except the jagged layout are refused later."""
    return isinstance(x, Tensor) and x.is_nested


def packed(items: dict[str, Tensor], tables: dict[str, Tensor | None], lengths: Tensor | None, padding_side: str) -> dict[str, Any]:
    """Arguments of the packed call, from those of the padded call: jagged (B, H, j, F) items, and tables of any form."""
    (first, like), *_ = items.items()
    absent(f"None: {first} is jagged and knows its lengths", lengths=lengths)
    choice("padding_side", padding_side, ("left", "right"))
    arguments: dict[str, Any] = {name: rows(name, x, first, like) for name, x in items.items()}
    for name, w in tables.items():
        arguments[name] = rows(name, w, first, like) if is_nested(w) else w[None] if isinstance(w, Tensor) and w.dim() == 3 else w
    align = "right" if padding_side == "left" else "left"
    return arguments | bounds(like) | {"align": align}


def bounds(x: Tensor) -> dict[str, Any]:
    """The bounds of the sequences of a jagged tensor in its rows. `max_seqlen` is None if the tensor does not know it."""
    return {"cu_seqlens": x.offsets(), "max_seqlen": x._maybe_max_seqlen}  # type: ignore[attr-defined]


def rows(name: str, x: Any, first: str, like: Tensor, ragged: int = 2) -> Tensor:
    """(B, H, j, F) as (T, H, F), or with ragged=1 (B, j, F) as (T, F): views. x must have the structure of `like`."""
    form = {1: "(B, j, E), jagged in dimension 1", 2: "(B, H, j, F), jagged in dimension 2"}[ragged]
    if not is_nested(x) or x.layout != torch.jagged:
        was = type(x).__name__ if not isinstance(x, Tensor) else f"nested, of layout {x.layout}" if x.is_nested else "not nested"
        refuse(name, was, "jagged, of layout torch.jagged" + ("" if x is like else f", as {first} is"), TypeError)
    if x.dim() != 2 + ragged or x._ragged_idx != ragged:  # type: ignore[attr-defined]
        refuse(name, f"of {x.dim()} dimensions, jagged in dimension {x._ragged_idx}", form)  # type: ignore[attr-defined]
    if x.lengths() is not None:  # type: ignore[attr-defined]
        refuse(name, "jagged with holes between sequences", "without: call .contiguous()")
    offsets, expected = x.offsets(), like.offsets()  # type: ignore[attr-defined]
    if offsets is not expected and not (readable(offsets) and torch.equal(offsets, expected)):
        refuse(name, "of sequences of other lengths", f"made with the offsets of {first}")
    values: Tensor = x.values()
    return values.transpose(0, 1) if ragged == 2 else values


def unpacked(out: Tensor, like: Tensor) -> Tensor:
    """Packed (T, ...) as jagged (B, j, ...) with the ragged structure of `like`, so that the two can be added."""
    known = {"min_seqlen": like._maybe_min_seqlen, "max_seqlen": like._maybe_max_seqlen}  # type: ignore[attr-defined]
    return torch.nested.nested_tensor_from_jagged(out, bounds(like)["cu_seqlens"], **known)
