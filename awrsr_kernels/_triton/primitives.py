"""Device helpers that every kernel shares: where a sequence lies, tiles in and out, softmax, dropout bits.

L length of a sequence, D features of a tile, R refinement rank. Shapes in comments and docstrings are those of tiles.

A *view* is the tuple (pointer, entry_stride, head_stride, row_stride) of a tensor (entries, heads, rows, D) whose last dimension is
contiguous; for packed batches the entry stride is 0. Rows and columns of weights are "local": they count from the sequence's first
real item. A *seat* says where the rows of a tile lie in such a tensor, as a tuple (first_entry, first_row, entries, rows, filled):
entry and row of the tile's origin, then for each row of the tile its offset from there in entries and in rows, and whether it holds
an item. The origin is a 64-bit offset, so that those within a tile may be 32-bit.
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
def locate_long(bounds_ptr, entry, rows, max_len, least, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr):
    """`locate` for the tiled kernels: sequences of fewer than `least` items, which the short kernels compute, count as empty."""
    start, length = locate(bounds_ptr, entry, rows, max_len, VARLEN, ALIGN_RIGHT)
    if bounds_ptr is None:
        return start, length
    else:
        return start, tl.where(length < least, 0, length)


@triton.jit
def table_start(start, length, table_rows, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr):
    """Row of the tables that belongs to the sequence's first item."""
    if VARLEN and not PER_ENTRY:
        return table_rows - length if ALIGN_RIGHT else length * 0
    else:
        return start


@triton.jit
def seats(entry, start, rows, length):
    """Seats of local rows of one sequence."""
    return entry, start, 0, rows.to(tl.int64), rows < length


@triton.jit
def block_seats(entry, start, rows, length, OFFSET: tl.constexpr):
    """The same of a sequence whose rows lie no further apart than OFFSET, int32 or int64, can count."""
    return entry, start, 0, rows.to(OFFSET), rows < length


@triton.jit
def own_strides(q_entry, q_head, q_row, entry, head, row, WIDTH: tl.constexpr, ALIKE: tl.constexpr):
    """Strides of a tensor that a launcher allocated, from those of one feature; with ALIKE they are q's."""
    if ALIKE:
        return q_entry, q_head, q_row
    else:
        return entry * WIDTH, head * WIDTH, row * WIDTH


@triton.jit
def key_seats(entry, start, w_start, columns, length):
    """Seats of the keys of one sequence: in the inputs and in the tables."""
    return seats(entry, start, columns, length), seats(entry, w_start, columns, length)


@triton.jit
def padded_seats(entry, start, rows, length, total, PADDED: tl.constexpr):
    """Seats to store at. With PADDED, rows from `length` to `total` are the padding, which wraps around to the entry's start."""
    if PADDED:
        physical = (start + rows).to(tl.int64)
        return entry, start * 0, 0, tl.where(physical >= total, physical - total, physical), rows < total
    else:
        return seats(entry, start, rows, length)


@triton.jit
def shared_seats(
    bounds_ptr, sequence, last, rows_total, max_len, reach, table_rows,
    VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Pack whole sequences, from number `sequence` and below `last`, into the rows of one tile: as many as fit, at least one.

    Sequences of more than `reach` items (at most BLOCK), which the tiled kernels compute, count as empty.

    Returns how many fit, then for each row its sequence, the row of the tile where that sequence begins, and its length (0
    if the row stays empty), then seats in the inputs and in the tables. OFFSET: int64 if offsets within a tile may exceed int32.
    """
    candidate = sequence + tl.arange(0, CANDIDATES)
    start, length = locate(bounds_ptr, tl.minimum(candidate, last - 1), rows_total, max_len, VARLEN, ALIGN_RIGHT)
    length = tl.where((candidate < last) & (length <= reach), length, 0)
    end = tl.cumsum(length, 0)
    fits = (end <= BLOCK) & (candidate < last)
    fitting = tl.sum(fits.to(tl.int32), 0)

    rows = tl.arange(0, BLOCK)
    passed = end[None, :] <= rows[:, None]  # [BLOCK, CANDIDATES]
    owner = tl.sum(passed.to(tl.int32), 1)  # counts empty sequences as well
    first = tl.max(tl.where(passed, end[None, :], 0), 1)
    mine = (owner[:, None] == tl.arange(0, CANDIDATES)[None, :]) & fits[None, :]
    length = tl.sum(tl.where(mine, length[None, :], 0), 1)
    local = rows - first
    if VARLEN:
        origin = tl.minimum(tl.maximum(tl.load(bounds_ptr + sequence), 0), rows_total).to(tl.int32)
        steps = tl.sum(tl.where(mine, start[None, :] - origin, 0), 1) + local
    else:
        origin = sequence * 0
        steps = local + (rows_total - length if ALIGN_RIGHT and bounds_ptr is not None else 0)
    filled = local < length
    seat = sequence, origin, owner.to(OFFSET), steps.to(OFFSET), filled
    if VARLEN and not PER_ENTRY:
        steps = local + (table_rows - length if ALIGN_RIGHT else 0)
        table_seat = sequence, sequence * 0, owner.to(OFFSET), steps.to(OFFSET), filled
        return fitting, sequence + owner, first, length, seat, table_seat
    else:
        return fitting, sequence + owner, first, length, seat, seat


@triton.jit
def tile_pointers(view, head, seat, columns):
    """[rows of the seat, len(columns)]: pointers to the elements of a tile."""
    pointer, entry_stride, head_stride, row_stride = view
    first_entry, first_row, entries, rows, _ = seat
    origin = first_entry.to(tl.int64) * entry_stride + head.to(tl.int64) * head_stride + first_row.to(tl.int64) * row_stride
    return pointer + origin + ((entries * entry_stride + rows * row_stride)[:, None] + columns[None, :])


@triton.jit
def tile_mask(seat, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows of the seat, BLOCK] bool: rows that hold an item, and the first WIDTH columns."""
    _, _, _, _, filled = seat
    return filled[:, None] & (tl.arange(0, BLOCK) < WIDTH)[None, :]


@triton.jit
def load_tile(view, head, seat, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[rows of the seat, BLOCK]: a head's WIDTH features; zero in empty rows and further columns."""
    pointers = tile_pointers(view, head, seat, tl.arange(0, BLOCK))
    return tl.load(pointers, mask=tile_mask(seat, WIDTH, BLOCK), other=0.0)


@triton.jit
def load_table(view, head, seat, DTYPE: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """[rows of the seat, BLOCK_R]: rows of W_q or W_k in DTYPE; the tables may be float32 where q is half precision."""
    return load_tile(view, head, seat, R, BLOCK_R).to(DTYPE)


@triton.jit
def store_tile(view, head, seat, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile where `load_tile` would find it, in the dtype of the tensor."""
    tl.store(tile_pointers(view, head, seat, tl.arange(0, BLOCK)), tile, mask=tile_mask(seat, WIDTH, BLOCK))


@triton.jit
def padding_seats(
    bounds_ptr, entry, total, max_len, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Seats of the rows of an entry that hold no item; BLOCK is a bound on `total`."""
    start, length = locate(bounds_ptr, entry, total, max_len, VARLEN, ALIGN_RIGHT)
    rows = tl.arange(0, BLOCK)
    padding = (rows < total) & ((rows < start) | (rows >= start + length))
    return entry, start * 0, 0, rows.to(tl.int64), padding


@triton.jit
def store_zeros(view, head, seat, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(tile_pointers(view, head, seat, tl.arange(0, BLOCK)), 0.0, mask=tile_mask(seat, WIDTH, BLOCK))


@triton.jit
def store_padding(
    view, head, entry, start, length, total, WIDTH: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Zeros in the rows of an entry that hold no item: `total` less the `length` ones from `start` on."""
    for low in tl.range(length, total, BLOCK_L):
        rows = low + tl.arange(0, BLOCK_L)
        store_zeros(view, head, padded_seats(entry, start, rows, length, total, True), WIDTH, BLOCK)


@triton.jit
def row_index(entry, head, heads, start, rows, rows_total, VARLEN: tl.constexpr):
    """Offsets of local rows in a contiguous (entries, heads, rows_total) tensor with a number per row."""
    outer = head if VARLEN else entry * heads + head
    return outer.to(tl.int64) * rows_total + start + rows


@triton.jit
def load_rows(pointer, index, rows, length):
    """[len(rows)]: a number per local row, zero beyond the sequence."""
    return tl.load(pointer + index, mask=rows < length, other=0.0)


@triton.jit
def load_lse(pointer, index, rows, length):
    """[len(rows)]: log-sum-exps per local row, infinite beyond the sequence, so that softmax is zero there."""
    return tl.load(pointer + index, mask=rows < length, other=float("inf"))


@triton.jit
def visible_tile(rows, columns, length, CAUSAL: tl.constexpr):
    """[len(rows), len(columns)] bool: whether a row of the sequence may attend to a column. Rows beyond it do not count: what they
    see is thrown away, and `load_lse` gives them no weight. In the causal case only they see columns beyond it."""
    if CAUSAL:
        return columns[None, :] <= rows[:, None]
    else:
        return (columns < length)[None, :]


@triton.jit
def visible_in_shared_tile(first, length, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK, BLOCK] bool: `visible_tile` for a tile that several sequences share."""
    rows = tl.arange(0, BLOCK)
    end = tl.minimum(first + length, rows + 1) if CAUSAL else first + length
    return (rows[None, :] >= first[:, None]) & (rows[None, :] < end[:, None])


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, total=None):
    """Matrix product, added to `total` if there is one, accumulated in float32 (float64 for float64)."""
    ACC: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    return tl.dot(a, b, acc=total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def score_tile(q_tile, k_tile, DISTANCE: tl.constexpr, PRECISION: tl.constexpr):
    """q.k; with DISTANCE q.k - |k|^2 / 2, which is -|q - k|^2 / 2 up to a number per row, to which softmax is invariant."""
    scores = dot(q_tile, tl.trans(k_tile), PRECISION)
    if DISTANCE:
        wide = k_tile.to(scores.dtype)
        scores = scores - (0.5 * tl.sum(wide * wide, 1))[None, :]
    return scores


@triton.jit
def softmax_tile(q_tile, k_tile, visible, scale, DISTANCE: tl.constexpr, PRECISION: tl.constexpr):
    """Softmax of whole rows; a row that sees nothing is zero."""
    return softmax_of(score_tile(q_tile, k_tile, DISTANCE, PRECISION), visible, scale)


@triton.jit
def softmax_of(scores, visible, scale):
    """Softmax of whole rows of scores times `scale`; a row that sees nothing is zero."""
    scores = tl.where(visible, scores * (scale * LOG2E), float("-inf"))
    peak = tl.max(scores, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(scores - peak[:, None])
    total = tl.sum(weights, 1)
    return weights * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit
def diagonal(tile, fill, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """A tile [rows, columns], or with TRANSPOSED [columns, rows], of a block of rows and the same columns: `fill` where the column
    comes after the row."""
    index = tl.arange(0, BLOCK)
    if TRANSPOSED:
        return tl.where(index[:, None] <= index[None, :], tile, fill)
    else:
        return tl.where(index[None, :] <= index[:, None], tile, fill)


@triton.jit
def begin_softmax(scores, factor):
    """The peak and the sum of each row, in units of log 2, and the weights before the division. factor > 0; rows see something."""
    peak = tl.max(scores, 1) * factor
    weights = tl.exp2(scores * factor - peak[:, None])
    return peak, tl.sum(weights, 1), weights


@triton.jit
def continue_softmax(scores, factor, peak, total):
    """The same with more columns; the last result is what former sums are to be multiplied by."""
    higher = tl.maximum(peak, tl.max(scores, 1) * factor)
    decay = tl.exp2(peak - higher)
    weights = tl.exp2(scores * factor - higher[:, None])
    return higher, total * decay + tl.sum(weights, 1), weights, decay


@triton.jit
def score_factor(rows, length, factor, CAUSAL: tl.constexpr):
    """[len(rows), 1]: what the gradient of a row's scores is multiplied by; zero for a row that sees one column, whose softmax is
    constant: there the rounding of a saved output would not cancel."""
    return tl.where((rows == 0) & (CAUSAL | (length == 1)), 0.0, factor)[:, None]


@triton.jit
def known_softmax_tile(
    q_tile, k_tile, lse, rows, columns, length, scale,
    DISTANCE: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of softmax, from the rows' log-sum-exps in units of log 2; with MASKED zero where a row may not attend."""
    scores = score_tile(q_tile, k_tile, DISTANCE, PRECISION) * (scale * LOG2E) - lse[:, None]
    if MASKED:
        scores = tl.where(visible_tile(rows, columns, length, CAUSAL), scores, float("-inf"))
    return tl.exp2(scores)


@triton.jit
def correlation_points(tile, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """[rows, BLOCK_R] [mean | a] -> [mean | sqrt(ELU(a) + 1)], R / 2 columns each: points of refinement "stochastic"."""
    columns = tl.arange(0, BLOCK_R)[None, :]
    root = tl.where(tile > 0, tl.sqrt(tl.maximum(tile, 0.0) + 1), tl.exp2(tl.minimum(tile, 0.0) * (0.5 * LOG2E)))
    return tl.where((columns >= R // 2) & (columns < R), root, tile)


@triton.jit
def before_points(points, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The inverse of `correlation_points`."""
    columns = tl.arange(0, BLOCK_R)[None, :]
    below = tl.log2(tl.where(points > 0, points, 1)) * (2 / LOG2E)
    return tl.where((columns >= R // 2) & (columns < R), tl.where(points >= 1, points * points - 1, below), points)


@triton.jit
def slope_of_points(points, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """The derivative of `correlation_points`, from its result."""
    columns = tl.arange(0, BLOCK_R)[None, :]
    slope = tl.where(points >= 1, 0.5 / tl.where(points >= 1, points, 1), 0.5 * points)
    return tl.where((columns >= R // 2) & (columns < R), slope, 1)


@triton.jit
def draw(seed_ptr, entry, head, rows, column, BLOCK: tl.constexpr):
    """The four random words, each [len(rows), BLOCK // 8], for local rows and the BLOCK columns from `column`, a multiple of 8.

    As `awrsr_kernels/dropout.py` defines: column 8g + 2w + u uses half u of word w in column g.
    """
    groups = column // WEIGHTS_PER_CALL + tl.arange(0, BLOCK // WEIGHTS_PER_CALL)
    zero = rows[:, None] * 0 + groups[None, :] * 0
    counters = zero + groups[None, :], zero + head.to(tl.int32), zero + rows[:, None], zero + entry.to(tl.int32)
    return tl.philox(tl.load(seed_ptr), counters[0], counters[1], counters[2], counters[3], PHILOX_ROUNDS)


@triton.jit
def keep_tile(seed_ptr, entry, head, rows, column, threshold, BLOCK: tl.constexpr):
    """[len(rows), BLOCK] bool: which weights dropout keeps, of local rows and the BLOCK columns from `column`, a multiple of 8."""
    w0, w1, w2, w3 = draw(seed_ptr, entry, head, rows, column, BLOCK)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (rows.shape[0], BLOCK)).to(tl.int32) >= threshold


@triton.jit
def keep_word(seed_ptr, entry, head, local, first, threshold, BLOCK: tl.constexpr):
    """[BLOCK] int64: bit c of a row says whether dropout keeps its column c, in a tile of up to 64 rows that sequences share.

    Masks are defined on local columns, so each row's bits are shifted to column `first`, where its sequence begins in the tile. As
    bits they take two registers per row.
    """
    words = draw(seed_ptr, entry[:, None], head, local, 0, BLOCK)
    bits = tl.zeros((BLOCK, BLOCK // WEIGHTS_PER_CALL), tl.int64)
    for i in tl.static_range(4):
        bits |= ((words[i] & 0xFFFF).to(tl.int32) >= threshold).to(tl.int64) << (2 * i)
        bits |= ((words[i] >> 16).to(tl.int32) >= threshold).to(tl.int64) << (2 * i + 1)
    groups = tl.arange(0, BLOCK // WEIGHTS_PER_CALL).to(tl.int64) * WEIGHTS_PER_CALL
    return tl.sum(bits << groups[None, :], 1) << first.to(tl.int64)


@triton.jit
def drop_by_word(weights, word, scale, BLOCK: tl.constexpr):
    """Z * weights. word: of `keep_word`."""
    kept = (word[:, None] >> tl.arange(0, BLOCK)[None, :].to(tl.int64)) & 1
    return tl.where(kept != 0, weights * scale, 0.0)


@triton.jit
def next_seats(seat, rows, length, step):
    """Seats of the rows `step` after those of a seat; rows: local."""
    first_entry, first_row, entries, at, filled = seat
    return first_entry, first_row, entries, at + step, filled & (rows + step < length)


@triton.jit
def step_of(head, plain_heads):
    """How far the weights of a head are shifted: not at all in plain heads."""
    return tl.where(head >= plain_heads, 1, 0)


@triton.jit
def load_gate(gate_ptr, gate_stride, head, DTYPE: tl.constexpr):
    """The gate of a head; 1 where there is none."""
    if gate_ptr is None:
        return tl.full((), 1.0, DTYPE)
    else:
        return tl.load(gate_ptr + head * gate_stride).to(DTYPE)


@triton.jit
def load_factor(lags_ptr, lags_head, head, lag, DTYPE: tl.constexpr):
    """The factor of a lag, 1 or more."""
    return tl.load(lags_ptr + head * lags_head + (lag - 1)).to(DTYPE)
