"""Lagged correlations: Q_A and K_A widened by rows before, so that one product compares them all.

n windows of a chunk, H query heads, L window length, A lags, R refinement rank.

With A lags, Q_A and K_A are (n * H, L, (A + 1) * R): slot 0 holds P W, slot a the row a before, in Q_A times the factor of the
lag, zero where that row is not of the same sequence. T is then their product as ever, and the gradient of P W gathers those of its
copies.
"""

import torch
from torch import Tensor

from .chunks import Chunk
from .packing import Block


class Lags:
    """The slots of a chunk. factors: (n * H, A); rank: R."""

    def __init__(self, chunk: Chunk, factors: Tensor, rank: int) -> None:
        self.chunk, self.factors, self.rank = chunk, factors, rank
        self.dfactors = torch.zeros_like(factors)

    def slot(self, x: Tensor, lag: int) -> Tensor:
        return x[..., lag * self.rank : (lag + 1) * self.rank]

    def _foreign(self, lag: int, rows: slice) -> Tensor | None:
        """(n * H, rows, 1): whether the row so far before belongs to another sequence of the window; None if none does."""
        windows = self.chunk.windows
        if windows is None or not windows.shared:
            return None
        return (windows.position[:, rows] < lag).repeat_interleave(self.chunk.heads, 0)[..., None]

    def widen(self, block: Block, q_a: Tensor, k_a: Tensor) -> None:
        """Fill the other slots of a block from slot 0 of its rows and of those before."""
        for x, factors in ((q_a, self.factors), (k_a, None)):
            for lag in range(1, self.factors.shape[1] + 1):
                first, slot = min(max(block.first, lag), block.end), self.slot(x, lag)
                slot[:, block.first : first] = 0
                rows, before = slice(first, block.end), x[:, max(first - lag, 0) : block.end - lag, : self.rank]
                if first == block.end:
                    continue
                slot[:, rows] = before if factors is None else before * factors[:, lag - 1, None, None]
                foreign = self._foreign(lag, rows)
                if foreign is not None:
                    slot[:, rows].masked_fill_(foreign, 0)

    def gather(self, block: Block, q_a: Tensor, dq_a: Tensor, dk_a: Tensor) -> list[Tensor]:
        """The gradients of a block's P W_q and P W_k, contiguous, once those of all copies are complete; adds to `dfactors`."""
        rows = slice(block.first, block.end)
        sums = [self.slot(x, 0)[:, rows].clone(memory_format=torch.contiguous_format) for x in (dq_a, dk_a)]
        for lag in range(1, self.factors.shape[1] + 1):
            after = slice(block.first + lag, min(block.end + lag, self.chunk.length))
            size = after.stop - after.start
            if size <= 0:
                continue
            of_query, of_key = (self.slot(x, lag)[:, after] for x in (dq_a, dk_a))
            foreign = self._foreign(lag, after)
            if foreign is not None:
                of_query, of_key = (x.masked_fill(foreign, 0) for x in (of_query, of_key))
            own = self.slot(q_a, 0)[:, block.first : block.first + size]
            self.dfactors[:, lag - 1] += torch.linalg.vecdot(own.flatten(1), of_query.flatten(1))
            sums[0][:, :size].addcmul_(of_query, self.factors[:, lag - 1, None, None])
            sums[1][:, :size] += of_key
        return sums
