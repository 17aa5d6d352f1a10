"""Windows of rows, each with one sequence or several short ones, and the blocks of rows that are visited one after another.

B sequences, n windows, L window length.

Sequences that share a window lie one after another, and none of them sees another: then padding costs little, and one window
length serves many. A training step on real histories takes 1.2 to 1.4 times as long where each has a window of its own.
"""

import bisect
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_state import readable

LANES = 16  # floats of a vector: torch is slow over rows that do not fill whole ones
_SHARED_ITEMS = 64  # sequences of at most so many share windows; longer ones rarely fit together
_BLOCK_ROWS = (3 * LANES, 8 * LANES)  # fewest and most rows whose weights exist at a time


class Block(NamedTuple):
    """Rows first .. end - 1 of every window of a chunk; they see no column from `columns` on."""

    first: int
    end: int
    columns: int


def row_blocks(length: int, causal: bool) -> list[Block]:
    """The blocks of windows of `length` rows.

    Causal blocks leave out the columns of later ones. The more blocks, the nearer that comes to half of all weights, but small
    products are slow: three blocks is the compromise, as far as the bounds allow it.
    """
    fewest, most = _BLOCK_ROWS
    if causal:
        step = min(max(length // 3 // LANES * LANES, fewest), most)
        count = max(1, (length + step - LANES) // step)  # what would be a block of a few rows joins the one before
    else:
        count = -(-length // most)
        step = -(-length // count)
    ends = [*(step * i for i in range(1, count)), length]
    return [Block(step * i, end, end if causal else length) for i, end in enumerate(ends)]


@dataclass
class Windows:
    """n windows of L rows, which hold sequences one after another and padding at the end; (n, L) int64 tensors."""

    sequence: Tensor  # number of the sequence in the batch; padding counts to the one before it
    position: Tensor  # in the sequence
    items: Tensor  # of the sequence
    shared: bool  # whether some window holds several sequences
    read: bool  # whether lengths could be read, so that every sequence here has an item

    @property
    def valid(self) -> Tensor:
        """Whether a row is an item."""
        return self.position < self.items

    @property
    def item(self) -> Tensor:
        """The position; at padding that of the last item."""
        return self.position.minimum((self.items - 1).clamp_(min=0))

    def part(self, windows: slice) -> "Windows":
        return Windows(self.sequence[windows], self.position[windows], self.items[windows], self.shared, self.read)


def _classes(lengths: list[int]) -> list[tuple[int, int, int]]:
    """(first, end, window length) of each class of ascending lengths: what shares windows, and longer ones alike."""
    classes, end = [], len(lengths)
    while end:
        longest = lengths[end - 1]
        first = 0 if longest <= _SHARED_ITEMS else bisect.bisect_right(lengths, max(3 * longest // 4, _SHARED_ITEMS))
        classes.append((first, end, max(longest, LANES)))
        end = first
    return classes


def _pack(lengths: list[int], length: int) -> list[list[int]]:
    """Windows of `length` rows for ascending lengths: the numbers of the sequences in each, long ones joined by short ones."""
    windows, low, high = [], 0, len(lengths) - 1
    while low <= high:
        window, room = [], length
        while low <= high and lengths[high] <= room:
            window.append(high)
            room -= lengths[high]
            high -= 1
        while low <= high and lengths[low] <= room:
            window.append(low)
            room -= lengths[low]
            low += 1
        windows.append(window)
    return windows


def find_windows(items: Tensor, max_len: int) -> list[Windows]:
    """Windows for sequences of so many items, (B,), none longer than max_len: a `Windows` for each window length."""
    device = items.device
    if not readable(items):  # every sequence has a window
        position = torch.arange(max_len, device=device).expand(items.shape[0], -1)
        sequence = torch.arange(items.shape[0], device=device)[:, None].expand_as(position)
        return [Windows(sequence, position, items[:, None].expand_as(position), shared=False, read=False)]
    ascending, order = items.sort()
    lengths, kinds = ascending.tolist(), []
    empty = bisect.bisect_right(lengths, 0)
    lengths, order = lengths[empty:], order[empty:]
    for first, end, length in _classes(lengths):
        packed = _pack(lengths[first:end], length)
        begins, spans = [], []  # rows of a sequence, with the padding behind it
        for window in packed:
            row = 0
            for number in window:
                begins.append(row)
                spans.append(lengths[first + number])
                row += spans[-1]
            spans[-1] += length - row
        sequence = order[first:end][torch.tensor([number for window in packed for number in window])]
        each = torch.stack([sequence, torch.tensor(begins), items[sequence]])
        rows = each.repeat_interleave(torch.tensor(spans), 1, output_size=len(packed) * length).view(3, -1, length)
        position = torch.arange(length) - rows[1]
        kinds.append(Windows(rows[0], position, rows[2], shared=len(packed) < end - first, read=True))
    return kinds
