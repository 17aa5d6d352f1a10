"""Which sequences of a batch the torch backend works on at a time: chunks of windows, each of one sequence or of several.

H query heads, L window length.

A window holds a sequence, or several short ones, one after another, none of which sees another: then padding costs little, and
one chunk serves many lengths.
"""

import bisect
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call, Inputs
from ..dropout import WEIGHTS_PER_CALL
from ..windows import sequence_lengths

LANES = 16  # floats of a vector: torch is slow over rows that do not fill whole ones
_BLOCK_ROWS = (3 * LANES, 8 * LANES)  # fewest and most rows whose weights exist at a time
# Weights that exist at a time: a share of the cache per thread, for four at most, or enough to fill a GPU. On one thread of a
# Xeon with 2 MiB of L2, "simple" at (128, 4, 100, 16), forward and backward, takes 64 ms with this share, 80 ms with four of them.
_CPU_BLOCK_WEIGHTS, _CUDA_BLOCK_WEIGHTS = 1 << 18, 1 << 24
_CHUNK_WEIGHTS = 1 << 15  # as many weights take about the time that a chunk takes beyond its weights
_SHARED_AT_MOST = 0.9  # windows per sequence at which sharing is worth what it costs: tables by row, and hiding the others;
_SHARING_WEIGHTS = 1 << 16  # and weights that it must save: 15.3 against 16.6 ms for four batches of 256 real histories


def row_blocks(length: int, causal: bool) -> list[tuple[int, int]]:
    """(first, end) of each block of rows of a window.

    Causal blocks leave out the columns of later ones. The more blocks, the nearer that comes to half of all weights, but small
    products are slow: three blocks is the compromise, as far as the bounds allow it.
    """
    fewest, most = _BLOCK_ROWS
    if causal:
        step = min(max(length // 3 // LANES * LANES, fewest), most)
        count = max(1, (length + step - LANES) // step)  # what would be a block of a few rows goes with the one before
    else:
        count = -(-length // most)
        step = -(-length // count)
    return [(i * step, (i + 1) * step if i + 1 < count else length) for i in range(count)]


def _classes(lengths: list[int], heads: int, max_len: int, shared: bool) -> list[tuple[int, int]]:
    """(sequences, window length) of the classes into which ascending lengths fall, shortest first.

    A class of its own must be worth its overhead: the weights that longer windows for its sequences would add.
    """
    classes: list[tuple[int, int]] = []
    begin = first = 0  # of the sequences not yet in a class, and of those in the last class
    while begin < len(lengths):
        span = min(-(-lengths[begin] // LANES) * LANES, max_len)
        end = bisect.bisect_right(lengths, span)
        if classes:
            members, before = classes[-1]
            added = sum(lengths[first:begin]) * (span - before) if shared else members * (span**2 - before**2)
            begin = first if heads * added < _CHUNK_WEIGHTS else begin
            del classes[len(classes) - (begin == first) :]
        classes.append((end - begin, span))
        first, begin = begin, end
    return classes


def _pack(lengths: list[int], span: int) -> list[list[int]]:
    """Windows of `span` rows for ascending lengths: the numbers of the sequences in each, long ones joined by short ones."""
    windows, low, high = [], 0, len(lengths) - 1
    while low <= high:
        window, room = [], span
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


class Selection(NamedTuple):
    """What a chunk is made of."""

    sequences: slice | Tensor  # in the order of windows; a slice of the entries, if every row is an item
    length: int  # of a window
    real: bool  # whether each sequence is known to have an item
    window: Tensor | None = None  # of each sequence, if windows are shared


def _can_share(given: Inputs, call: Call, lengths: Tensor) -> bool:
    """Whether windows may be shared: under dropout Z must exist for rows of items, which `Plan` draws if there are few."""
    if not call.dropout_p:
        return True
    groups = lengths.long() * ((lengths + WEIGHTS_PER_CALL - 1) // WEIGHTS_PER_CALL)
    return int(groups.sum()) * WEIGHTS_PER_CALL * given.q.shape[1] <= drawn_at_most(given)


def _block_weights(device: torch.device) -> int:
    if device.type == "cuda":
        return _CUDA_BLOCK_WEIGHTS
    return _CPU_BLOCK_WEIGHTS * (4 if torch.compiler.is_compiling() else min(torch.get_num_threads(), 4))


def drawn_at_most(given: Inputs) -> int:
    """Weights whose Z may exist at a time: no more than q, k and v have numbers."""
    return given.q.numel() + given.k.numel() + given.v.numel()


def selections(given: Inputs, call: Call) -> Iterator[Selection]:
    """The chunks, each with as many windows as `_block_weights` allows."""
    q, bounds = given.q, given.bounds
    budget = _block_weights(q.device)

    def steps(count: int, length: int) -> Iterator[slice]:
        """Equal parts of `count` windows of one length that fit the budget."""
        rows = max(hi - lo for lo, hi in row_blocks(length, call.causal))
        chunks = -(-count // max(1, budget // (q.shape[1] * rows * length)))
        step = -(-count // chunks)
        return (slice(lo, min(lo + step, count)) for lo in range(0, count, step))

    count = q.shape[0] if bounds is None else bounds.shape[0] - call.varlen
    if not count or not call.max_len or not q.shape[2]:
        return
    if bounds is None:
        yield from (Selection(chosen, call.max_len, True) for chosen in steps(count, call.max_len))
        return
    if bounds.device.type != "cpu" or torch.compiler.is_compiling():
        for chosen in steps(count, call.max_len):
            yield Selection(torch.arange(chosen.start, chosen.stop, device=q.device), call.max_len, False)
        return
    ascending, order = sequence_lengths(call, bounds).sort()
    shared, lengths = _can_share(given, call, ascending), ascending.tolist()
    begin = bisect.bisect_right(lengths, 0)
    for members, span in _classes(lengths[begin:], q.shape[1], call.max_len, shared):
        part = order[begin : begin + members]
        windows = _pack(lengths[begin : begin + members], span) if shared else []
        begin += members
        saved = q.shape[1] * (members - len(windows)) * span**2  # weights
        if not shared or len(windows) > _SHARED_AT_MOST * members or saved < _SHARING_WEIGHTS:
            for chosen in steps(members, span):
                yield Selection(part[chosen].sort().values, span, True)  # in the order of memory
            continue
        for chosen in steps(len(windows), span):
            found = windows[chosen]
            window = torch.tensor([number for number, x in enumerate(found) for _ in x], device=q.device)
            yield Selection(part[torch.tensor([i for x in found for i in x], device=q.device)], span, True, window)
