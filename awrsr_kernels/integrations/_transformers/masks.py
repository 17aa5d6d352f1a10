"""What one pass of a transformers model says of visibility: where padding is, and a dense mask for the layers that are plain.

B batch, L positions of the pass, N positions of the whole window, n of them before the pass's tokens in a prefix.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

from ... import checks
from . import IMPLEMENTATION
from .packing import Packing


class Padding(NamedTuple):
    """Where real tokens are in a batch of windows."""

    lengths: Tensor | None  # (B,) int64; None: everything is real
    side: str
    first: Tensor | None  # (B,) int64, position of the first real token; None: 0
    longest: int  # of lengths
    empty: bool = False  # whether a row has no real token

    def on(self, device: torch.device) -> "Padding":
        """The same on the device of a layer; a model may be spread over several."""
        lengths, first = (None if x is None else x.to(device) for x in (self.lengths, self.first))
        return self._replace(lengths=lengths, first=first)


class LazyMask:
    """The visibility of positions in one pass of a model: padding is read if a refined layer asks, a dense mask is made if a plain
    one does. transformers gets it from `lazy_mask`."""

    ndim = 4  # so that transformers passes it on: `generate` makes it in advance for static caches

    def __init__(self, **arguments: Any) -> None:
        if isinstance(offset := arguments.get("q_offset"), Tensor):
            arguments["q_offset"] = offset.clone()  # a static cache counts in it, before a layer asks for a mask
        self.arguments = arguments
        self._padding: dict[tuple[bool, int], Padding | None] = {}
        self._dense: tuple[Any] | None = None
        if isinstance(offset, Tensor) and arguments["q_length"] == 1 and not _all_refined(arguments["config"]):
            self.dense()  # outside of the compiled step, for which the mask would have a new length each time
        self._look_ahead(offset)

    def _look_ahead(self, offset: Any) -> None:
        """Read the padding that refined layers will ask for, once and outside of compiled layers."""
        started = isinstance(offset, Tensor) or bool(offset)
        if torch.compiler.is_compiling():
            if not started and self._plain():
                self.padding(self.arguments["q_length"], started)
            return
        try:
            self.padding(None if isinstance(offset, Tensor) else (offset or 0) + self.arguments["q_length"], started)
        except ValueError:
            pass  # what is wrong is said to the layer that asks, if one does: there may be a prefix, or plain layers alone

    def _plain(self) -> bool:
        return self.arguments["mask_function"] is causal_mask_function and not self.arguments["kv_offset"]

    def padding(self, window: int | None, started: bool, prefix: int = 0) -> Padding | None:
        """The padding of the pass's window, without the n = `prefix` positions before its first token.

        window: N, if it is known. started: whether a cache holds positions of the window; on a GPU the mask is then not read, as
        the cache knows the padding: None.
        """
        if not self._plain():
            raise ValueError(
                "attention_mask is not plainly causal (a sliding window, packed sequences, bidirectional or custom); "
                "refined layers must see all earlier tokens of one sequence"
            )
        if (started, prefix) not in self._padding:
            self._padding[started, prefix] = _read_padding(self.arguments, window, started, prefix)
        return self._padding[started, prefix]

    def dim(self) -> int:
        """PEFT asks, to put its prefix before a mask."""
        checks.refuse("cache_implementation", "that of a static cache", "left out where PEFT tunes a prefix")

    def __getitem__(self, _: Any) -> Any:
        raise ValueError("attention_mask is indexed by this model; refined layers need the whole mask")

    def dense(self, packing: Packing | None = None) -> Any:
        """The mask of the plain layers, which hides other packed sequences as well."""
        if self._dense is None:
            arguments = self.arguments
            if packing is not None:
                sequence = packing.sequences(arguments["batch_size"])
                function = and_masks(arguments["mask_function"], packed_sequence_mask_function(sequence))
                arguments = arguments | {"mask_function": function, "allow_is_causal_skip": False}
            self._dense = (AttentionMaskInterface()["sdpa"](**arguments),)
        return self._dense[0]


def _all_refined(config: Any) -> bool:
    return len(getattr(config, IMPLEMENTATION)["layers"]) == config.num_hidden_layers


def lazy_mask(**arguments: Any) -> LazyMask:
    """The mask function that transformers calls once per pass, or twice where `generate` makes the mask in advance."""
    made = arguments["attention_mask"]
    return made if isinstance(made, LazyMask) else LazyMask(**arguments)


def read_padding(mask: Any, window: int | None, started: bool, prefix: int = 0) -> Padding | None:
    """`LazyMask.padding` of what the model passes as its mask; None if only the cache knows it."""
    if mask is None:
        return None if started else Padding(None, "right", None, (window or 0) - prefix)
    if not isinstance(mask, LazyMask):
        raise ValueError(f"attention_mask is of shape {tuple(mask.shape)}; it must be (B, L) for refined layers, or None")
    return mask.padding(window, started, prefix)


def _read_padding(arguments: dict[str, Any], window: int | None, started: bool, prefix: int) -> Padding | None:
    """The padding of the whole window. On a GPU this waits for the device."""
    if started and window is None and torch.compiler.is_compiling():
        return None  # without a look at the mask, which is longer at each step
    mask = arguments["attention_mask"]
    if mask is None or not len(mask):
        return None if started else Padding(None, "right", None, (window or 0) - prefix)
    if mask.dim() != 2 or mask.shape[0] != arguments["batch_size"] or window not in (None, mask.shape[1]):
        must = "(B, L)" if window is None else f"(B, L) with L = {window}, the positions of input and cache"
        checks.refuse("attention_mask", f"of shape {tuple(mask.shape)}", must)
    if started and (mask.device.type != "cpu" or torch.compiler.is_compiling()):
        return None
    if prefix and not mask[:, :prefix].all():
        checks.refuse("attention_mask", f"0 in the first {prefix} columns", "1 there: they are the cache's prefix")
    mask = mask[:, prefix:]
    length = mask.shape[1]
    lengths = mask.sum(1)
    first, last = mask.int().argmax(1), mask.flip(1).int().argmax(1)  # `last` counts from the end
    empty = lengths == 0
    runs = [lengths == length, empty | (first + lengths + last == length), first == 0, empty | (last == 0), ~empty]
    full, one_run, right, left, filled, longest = torch.stack([*torch.stack(runs).all(1).long(), lengths.amax()]).tolist()
    if full:
        return Padding(None, "right", None, length)
    if not one_run or not (left or (right and not started)):
        side = "on the left, as tokens follow" if started else "on one side of the batch"
        checks.refuse("attention_mask", "irregular", f"one run of real tokens per row for refined layers, padded {side}")
    first = length - lengths if left else None
    return Padding(lengths, "left" if left else "right", first, longest, not filled)
