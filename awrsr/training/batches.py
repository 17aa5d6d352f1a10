"""Training batches: packed windows of histories, in an order that depends only on seed and epoch.

B histories of a batch, T events of it with a target.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.histories import spans
from ..data.splits import Split


class Batch(NamedTuple):
    """One process's part of one training step."""

    items: Tensor  # (T,) events
    targets: Tensor  # (T,) what followed each
    cu_seqlens: Tensor  # (B + 1,)
    max_seqlen: int
    first: int  # index of this process's first event among those of the whole step
    events: int  # of the whole step, over all processes


class Windows:
    """The training sequences: each has `length` events from `start` on, and its targets are one event later."""

    def __init__(self, split: Split, max_len: int, windows: str = "last") -> None:
        """windows: "last": the end of each training history (SASRec); "all": all of it, cut into windows from the end."""
        if windows not in ("last", "all"):
            raise ValueError(f"windows is {windows!r}, must be last or all")
        self.items = split.histories.items
        pairs = split.train_end - 1  # events that have a target
        begins = split.histories.offsets[:-1]
        if windows == "last":
            users = np.flatnonzero(pairs > 0)
            self.length = np.minimum(pairs[users], max_len)
            self.start = begins[users] + pairs[users] - self.length
        else:
            counts = np.maximum(-(-pairs // max_len), 0)
            users = np.repeat(np.arange(len(pairs)), counts)
            nth, _ = spans(np.zeros_like(counts), counts)
            end = pairs[users] - nth * max_len
            self.length = np.minimum(end, max_len)
            self.start = begins[users] + end - self.length
        if not len(self.start):
            raise ValueError("no history has two events for training; hold out fewer events for validation and test")

    def __len__(self) -> int:
        return len(self.start)

    def batches(self, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1) -> "Batches":
        """The batches of an epoch: of each, the part of this process."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self))
        count = max(1, round(len(self) / batch_size))
        if len(self) // count < world:
            raise ValueError(
                f"batch_size is {batch_size} for {len(self)} training sequences, must leave one for each of {world} processes"
            )
        return Batches(self, np.array_split(order, count), rank, world)


class Batches:
    """The batches of an epoch, to iterate over."""

    def __init__(self, windows: Windows, parts: list[np.ndarray], rank: int, world: int) -> None:
        self.windows, self.parts, self.rank, self.world = windows, parts, rank, world

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        for part in self.parts:
            shares = np.array_split(part, self.world)
            before = np.concatenate(shares[: self.rank]) if self.rank else part[:0]
            yield self.pack(shares[self.rank], int(self.windows.length[before].sum()), int(self.windows.length[part].sum()))

    def pack(self, chosen: np.ndarray, first: int, events: int) -> Batch:
        start, length = self.windows.start[chosen], self.windows.length[chosen]
        places, cu_seqlens = spans(start, length)
        items, targets = self.windows.items[places], self.windows.items[places + 1]
        return Batch(
            torch.from_numpy(items), torch.from_numpy(targets), torch.from_numpy(cu_seqlens), int(length.max()), first, events
        )
