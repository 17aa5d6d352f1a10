"""Packed rows: several sequences one after another in a row, without padding between them, as for padding-free training.

B batch, L positions, T = B L packed positions, S sequences.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import checks

BOUNDS, LONGEST = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")  # transformers' names, for flash attention


class Packing(NamedTuple):
    """Where the sequences of packed rows begin and end. No sequence is in two rows."""

    bounds: Tensor  # (S + 1,) int32, increasing from 0 to T
    longest: int

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> "Packing | None":
        """What `unpack` put into the arguments of a model, as its layers get them."""
        bounds = arguments.get(BOUNDS[0])
        return None if bounds is None else cls(bounds, arguments[LONGEST[0]])

    def sequences(self, batch: int) -> Tensor:
        """(B, L): the number of each position's sequence."""
        at = torch.arange(int(self.bounds[-1]), dtype=self.bounds.dtype, device=self.bounds.device)
        return torch.searchsorted(self.bounds, at, right=True).view(batch, -1)


def unpack(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a decoder runs: if its rows are packed, say so in the one way that all its layers understand.

    Sequences are told by cu_seq_lens_q, by seq_idx, or by position_ids that restart. The decoder gets cu_seq_lens_q, position_ids
    and no mask, since a sequence sees itself alone, and no cache.
    """
    parameters = _parameters(type(decoder)) if args else []
    given = dict(zip(parameters, args, strict=False)) | kwargs
    ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if not isinstance(ids, Tensor):
        return None
    cache = given.get("cache") if given.get("cache") is not None else given.get("past_key_values")
    use_cache = given.get("use_cache")
    bounds = next((given[name] for name in BOUNDS if given.get(name) is not None), None)
    if bounds is None and ids.shape[1] == 1 and cache is not None:
        return None
    shape, mask = (ids.shape[0], ids.shape[1]), _plain_mask(given.get("attention_mask"))
    if bounds is None:
        packing = _find(given.get("seq_idx"), given.get("position_ids"), mask, shape)
    else:
        packing = _check(bounds, given, shape)
    if packing is None:
        caches = cache is not None or (decoder.config.use_cache if use_cache is None else use_cache)
        if not torch.compiler.is_compiling() or caches or given.get("attention_mask") is not None:
            return None
        # without a mask or a cache, transformers prepares for packed rows while compiling
        real = torch.ones(shape, dtype=torch.bool, device=ids.device)
        return _changed(parameters, args, kwargs, {"attention_mask": real})
    if cache is not None or use_cache:
        was = "given" if cache is not None else "True"
        must = "None" if cache is not None else "False or left out"
        rows = f"{must} for packed rows (position_ids that restart, cu_seq_lens_q or seq_idx), which no token can follow"
        checks.refuse("cache" if cache is not None else "use_cache", was, rows)
    if given.get("attention_mask") is not None and mask is None:
        checks.refuse("attention_mask", "of more than two dimensions", "None or (B, L) for packed rows")
    changes: dict[str, Any] = {"use_cache": False, "attention_mask": None}
    changes |= dict.fromkeys(BOUNDS, packing.bounds) | dict.fromkeys(LONGEST, packing.longest)
    if given.get("position_ids") is None:
        sequence = packing.sequences(shape[0])
        at = torch.arange(sequence.numel(), device=sequence.device).view(shape)
        changes["position_ids"] = at - packing.bounds[sequence - 1]
    return _changed(parameters, args, kwargs, changes)


@torch.compiler.assume_constant_result
def _parameters(kind: type) -> list[str]:
    """The names of the arguments of `forward`."""
    return list(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


def _changed(
    parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any], changes: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with `changes`, wherever they were."""
    args = tuple(changes.pop(name, value) for name, value in zip(parameters, args, strict=False))
    return args, kwargs | changes


def _plain_mask(mask: Any) -> Tensor | None:
    """The (B, L) mask in what a model gets as its mask: itself, or inside what `generate` made of it in advance."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    mask = mask.arguments["attention_mask"] if hasattr(mask, "arguments") else mask
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _find(seq_idx: Any, position_ids: Any, mask: Tensor | None, shape: tuple[int, int]) -> Packing | None:
    """Where seq_idx changes, or position_ids restart between real tokens."""
    told: list[tuple[str, Any]] = [("seq_idx", seq_idx), ("position_ids", position_ids)]
    name, x = next(((name, x) for name, x in told if isinstance(x, Tensor) and x.dim() == 2), ("", None))
    if x is None or shape[1] < 2 or x.shape[1] != shape[1] or x.shape[0] not in (1, shape[0]):
        return None
    return _read(name, x.expand(shape[0], -1), mask)


@torch.compiler.disable
def _read(name: str, x: Tensor, mask: Tensor | None) -> Packing | None:
    """The packing that x (B, L) tells. On a GPU this waits for the device, and compiled code calls it."""
    batch, length = x.shape
    step = x.diff(dim=1)
    breaks = step != (0 if name == "seq_idx" else 1)
    starts = breaks
    if mask is not None and mask.shape[1] >= length and mask.shape[0] == batch:
        real = mask[:, -length:].to(x.device).bool()
        between = real[:, 1:] & real[:, :-1]
        starts, breaks = breaks | (real[:, 1:] != real[:, :-1]), breaks & between
    jumps = (step > 1) & breaks if name == "position_ids" else breaks & False
    if jumps.any():
        row, at = jumps.nonzero()[0].tolist()
        was = f"{x[row, at].item()}, then {x[row, at + 1].item()} in row {row}"
        checks.refuse("position_ids", was, "rising by 1 within a sequence, and restarting at the next one; or pass cu_seq_lens_q")
    if not breaks.any():
        return None
    first = torch.ones(batch, 1, dtype=torch.bool, device=x.device)
    starts = torch.cat([first, starts], 1).flatten()
    bounds = torch.cat([starts.nonzero()[:, 0], torch.tensor([batch * length], device=x.device)]).int()
    return Packing(bounds, int(bounds.diff().max()))


def _check(bounds: Any, given: dict[str, Any], shape: tuple[int, int]) -> Packing:
    """The packing that the caller gave, checked where tensors can be read."""
    name = next(name for name in BOUNDS if given.get(name) is not None)
    longest = next((given[each] for each in LONGEST if given.get(each) is not None), None)
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or bounds.dtype not in (torch.int32, torch.int64):
        checks.refuse(name, str(getattr(bounds, "shape", type(bounds).__name__)), "(S + 1,) int32 for S packed sequences")
    if torch.compiler.is_compiling():
        return Packing(bounds, shape[0] * shape[1] if longest is None else int(longest))
    other = given.get(BOUNDS[1])
    if other is not None and (other.shape != bounds.shape or not other.equal(bounds)):
        checks.refuse(BOUNDS[1], "another tensor than cu_seq_lens_q", "the same one: a sequence attends to itself")
    batch, length = shape
    values = bounds.tolist()
    if not values or values[0] != 0 or values[-1] != batch * length:
        checks.refuse(name, f"from {values[:1]} to {values[-1:]}", f"from 0 to {batch * length}, all positions of the rows")
    if any(row * length not in values for row in range(batch)):
        checks.refuse(name, str(values), f"with a boundary at every multiple of {length}, where a row begins")
    found = max((b - a for a, b in zip(values, values[1:], strict=False)), default=0)
    if min((b - a for a, b in zip(values, values[1:], strict=False)), default=0) < 0:
        checks.refuse(name, str(values), "nowhere falling")
    if longest is not None and int(longest) < found:
        checks.refuse(LONGEST[0], str(int(longest)), f"at least {found}, the longest sequence that {name} tells")
    return Packing(bounds, found)
