"""Device helpers that every kernel shares: where a sequence lies, tiles in and out, softmax, dropout bits.

L length of a sequence, D features of a tile. A *view* is the tuple (pointer, entry stride, head stride, row stride) of a tensor
(entries, heads, rows, D) whose last dimension is contiguous; for packed batches the entry stride is 0. Rows count from the
sequence's first real item ("local"), on both sides of every tile.
"""

import triton
import triton.language as tl

from ..dropout import ROUNDS as _ROUNDS
from ..dropout import WEIGHTS_PER_CALL as _WEIGHTS_PER_CALL

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(_ROUNDS)
WEIGHTS_PER_CALL: tl.constexpr = tl.constexpr(_WEIGHTS_PER_CALL)


@triton.jit
def locate(bounds_ptr, entry, rows, max_len, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr):
    """(first row, number of items) of a sequence; bounds out of range are clamped into the tensor."""
    if VARLEN:
        start = tl.minimum(tl.maximum(tl.load(bounds_ptr + entry), 0), rows)
        end = tl.minimum(tl.maximum(tl.load(bounds_ptr + entry + 1), start), rows)
        return start.to(tl.int32), tl.minimum(end - start, max_len).to(tl.int32)
    elif bounds_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(bounds_ptr + entry), 0), rows).to(tl.int32)
        return (rows - length if ALIGN_RIGHT else length * 0), length
    else:
        return rows * 0, rows


@triton.jit
def table_start(start, length, table_rows, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr):
    """Row of the tables that meets the sequence's first item."""
    if VARLEN and not PER_ENTRY:
        return table_rows - length if ALIGN_RIGHT else length * 0
    else:
        return start


@triton.jit
def tile_pointers(view, entry, head, rows, columns):
    base = view[0] + entry.to(tl.int64) * view[1] + head.to(tl.int64) * view[2]
    return base + rows.to(tl.int64)[:, None] * view[3] + columns[None, :]


@triton.jit
def load_tile(view, entry, head, start, rows, length, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr = 0):
    """[len(rows), BLOCK]: local rows of one head and WIDTH features from FIRST, zero beyond the sequence and those features."""
    columns = tl.arange(0, BLOCK)
    mask = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(tile_pointers(view, entry, head, start + rows, FIRST + columns), mask=mask, other=0.0)


@triton.jit
def store_tile(
    view, entry, head, start, rows, length, total, tile,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Store local rows. With PADDED the rows from `length` to `total` are those of the padding, which wraps around `total`."""
    columns = tl.arange(0, BLOCK)
    physical = start + rows
    if PADDED:
        physical = tl.where(physical >= total, physical - total, physical)
    mask = (rows < (total if PADDED else length))[:, None] & (columns < WIDTH)[None, :]
    tl.store(tile_pointers(view, entry, head, physical, FIRST + columns), tile.to(view[0].dtype.element_ty), mask=mask)


@triton.jit
def rounding_rest(tile, DTYPE: tl.constexpr):
    """What rounding to half precision loses."""
    return tile - tile.to(DTYPE).to(tile.dtype)


@triton.jit
def row_index(entry, head, heads, start, rows, rows_total, VARLEN: tl.constexpr):
    """Where local rows lie in a contiguous (entries, heads, rows_total) tensor of a number per row."""
    outer = head if VARLEN else entry * heads + head
    return outer.to(tl.int64) * rows_total + start + rows


@triton.jit
def load_rows(pointer, index, rows, length):
    """[len(rows)]: a number per local row, zero beyond the sequence."""
    return tl.load(pointer + index, mask=rows < length, other=0.0)


@triton.jit
def visible_tile(rows, columns, length, CAUSAL: tl.constexpr):
    """[len(rows), len(columns)] bool: whether a row may attend to a column."""
    visible = (rows < length)[:, None] & (columns < length)[None, :]
    if CAUSAL:
        visible = visible & (columns[None, :] <= rows[:, None])
    return visible


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Matrix product, accumulated in float32 (float64 for float64)."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def softmax_tile(scores, visible):
    """Softmax of whole rows whose scores are in units of log 2; a row that sees nothing is zero."""
    scores = tl.where(visible, scores, float("-inf"))
    peak = tl.max(scores, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(scores - peak[:, None])
    total = tl.sum(weights, 1)
    return weights * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit
def dropout_tile(seed_ptr, entry, head, rows, column, threshold, scale, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Z for local rows and the BLOCK columns from `column`, a multiple of 8: the bits that `awrsr_kernels/dropout.py` defines."""
    seed = tl.load(seed_ptr)
    groups = column // WEIGHTS_PER_CALL + tl.arange(0, BLOCK // WEIGHTS_PER_CALL)
    zero = rows[:, None] * 0 + groups[None, :] * 0
    w0, w1, w2, w3 = tl.philox(
        seed, zero + groups[None, :], zero + head.to(tl.int32), zero + rows[:, None], zero + entry.to(tl.int32), PHILOX_ROUNDS
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    bits = tl.reshape(halves, (rows.shape[0], BLOCK)).to(tl.int32)
    return (bits >= threshold).to(DTYPE) * scale


@triton.jit
def load_gate(gate_ptr, gate_stride, head, DTYPE: tl.constexpr):
    """The gate of a head; 1 where there is none."""
    if gate_ptr is None:
        return tl.full((), 1.0, DTYPE)
    else:
        return tl.load(gate_ptr + head * gate_stride).to(DTYPE)
