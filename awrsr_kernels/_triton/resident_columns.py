"""Blocks of columns of the resident backward, device functions of `resident_bwd.py`: P and R, from what they meet to what it gets.

Shapes as there. Sequences are cut into blocks of COLUMNS items; a remainder of at most NARROW is a block of its own, the last one.
"""

import triton
import triton.language as tl

from .primitives import (
    LOG2E,
    block_seats,
    diagonal,
    dot,
    keep_tile,
    load_rows,
    load_table,
    load_tile,
    row_index,
    store_tile,
)


@triton.jit
def zero_first_row(tile, rows):
    """A tile [columns, rows] of score gradients, zero in a sequence's first row, which sees itself alone: what dropout's scale
    makes of a value is rounded when the output is saved, and would not cancel. Without dropout nothing is rounded there."""
    return tl.where((rows == 0)[None, :], 0.0, tile)


@triton.jit
def higher_tile(
    k_a_tile, values, q_a_tile, dout_tile, lse, delta, factor, seed_ptr, entry, head, rows, low, drop_threshold, drop_scale,
    DIAGONAL: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[columns, rows] in the dtype of the products: what multiplies dO for the gradient of `values`, without drop_scale, and dT
    without its scales. factor: that of T with log2(e)."""
    weights = tl.exp2(dot(k_a_tile, tl.trans(q_a_tile), PRECISION) * factor - lse[None, :])
    if DIAGONAL:
        weights = diagonal(weights, 0.0, COLUMNS, True)
    dweights = dot(values, tl.trans(dout_tile), PRECISION)
    met = weights
    if seed_ptr is not None:
        kept = tl.trans(keep_tile(seed_ptr, entry, head, rows, low, drop_threshold, COLUMNS))
        dweights = tl.where(kept, dweights * drop_scale, 0.0)
        met = tl.where(kept, weights, 0.0)
    dscores = weights * (dweights - delta[None, :])
    if DIAGONAL and seed_ptr is not None:
        dscores = zero_first_row(dscores, rows)
    return met.to(k_a_tile.dtype), dscores.to(k_a_tile.dtype)


@triton.jit
def first_tile(
    k_tile, w_q_tile, w_k_tile, v_tile, q_tile, dq_a_tile, dk_a_tile, through_tile, lse, delta, factor,
    seed_ptr, entry, head, rows, low, drop_threshold, drop_scale,
    REFINEMENT: tl.constexpr, DIAGONAL: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[columns, rows] in the dtype of the products: P, what multiplies `through_tile` for dV, without drop_scale, and dS without
    its scale. through_tile: dO, in "value" dY; factor: that of S with log2(e)."""
    weights = tl.exp2(dot(k_tile, tl.trans(q_tile), PRECISION) * factor - lse[None, :])
    if DIAGONAL:
        weights = diagonal(weights, 0.0, COLUMNS, True)
    met = weights
    if REFINEMENT == "simple":
        dweights = dot(w_q_tile, tl.trans(dq_a_tile), PRECISION)
    else:
        dweights = dot(v_tile, tl.trans(through_tile), PRECISION)
        if REFINEMENT != "value" and seed_ptr is not None:
            kept = tl.trans(keep_tile(seed_ptr, entry, head, rows, low, drop_threshold, COLUMNS))
            dweights = tl.where(kept, dweights * drop_scale, 0.0)
            met = tl.where(kept, weights, 0.0)
        if REFINEMENT != "none":
            dweights = dot(w_q_tile, tl.trans(dq_a_tile), PRECISION, dweights)
    if REFINEMENT != "none":
        dweights = dot(w_k_tile, tl.trans(dk_a_tile), PRECISION, dweights)
    dscores = weights * (dweights - delta[None, :])
    if DIAGONAL and seed_ptr is not None:
        dscores = zero_first_row(dscores, rows)
    return weights.to(k_tile.dtype), met.to(k_tile.dtype), dscores.to(k_tile.dtype)


@triton.jit
def load_through(dv, dout, head, seat, REFINEMENT: tl.constexpr, DTYPE: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """What reaches the values through P: dY in "value", otherwise dO."""
    if REFINEMENT == "value":
        return load_tile(dv, head, seat, DV, BLOCK_DV).to(DTYPE)
    else:
        return load_tile(dout, head, seat, DV, BLOCK_DV)


@triton.jit
def load_scratch(pointer, rows, known, WIDTH: tl.constexpr, ROOM: tl.constexpr):
    """[BLOCK, WIDTH]: rows of a program's scratch, ROOM numbers each; zero from row `known` on."""
    pointers = pointer + (rows[:, None] * ROOM + tl.arange(0, WIDTH)[None, :])
    return tl.load(pointers, mask=(rows < known)[:, None], other=0.0)


@triton.jit
def store_scratch(pointer, rows, tile, WIDTH: tl.constexpr, ROOM: tl.constexpr):
    tl.store(pointer + (rows[:, None] * ROOM + tl.arange(0, WIDTH)[None, :]), tile)


@triton.jit
def higher_rows(
    k_a_tile, values, q_a, dout, dvalues, dk_a_sum, higher_lse_ptr, sums_ptr, delta_ptr, known,
    entry, head, heads, start, length, rows_total, factor, seed_ptr, drop_threshold, drop_scale, low, later,
    VARLEN: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, ROOM: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What ROWS rows from `later` on, below a block of columns, add to its sums, and the block to theirs in the scratch."""
    rows = later + tl.arange(0, ROWS)
    seat = block_seats(entry, start, rows, length, OFFSET)
    at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)
    q_a_tile, dout_tile = load_tile(q_a, head, seat, R, BLOCK_R), load_tile(dout, head, seat, DV, BLOCK_DV)
    met, dscores = higher_tile(
        k_a_tile, values, q_a_tile, dout_tile, load_rows(higher_lse_ptr, at, rows, length), tl.load(delta_ptr + rows),
        factor, seed_ptr, entry, head, rows, low, drop_threshold, drop_scale, False, COLUMNS, PRECISION,
    )  # fmt: skip
    dvalues = dot(met, dout_tile, PRECISION, dvalues)
    dk_a_sum = dot(dscores, q_a_tile, PRECISION, dk_a_sum)
    passed = dot(tl.trans(dscores), k_a_tile, PRECISION, load_scratch(sums_ptr, rows, known, BLOCK_R, ROOM))
    store_scratch(sums_ptr, rows, passed, BLOCK_R, ROOM)
    return dvalues, dk_a_sum


@triton.jit
def higher_columns(
    v, q_a, k_a, first_values, dout, dv, dq_a, dk_a, higher_lse_ptr, sums_ptr, delta_ptr, dvalues_ptr, height,
    entry, head, kv_head, heads, start, length, whole, rows_total, refine_scale, gate, seed_ptr, drop_threshold, drop_scale, low,
    REFINEMENT: tl.constexpr, VARLEN: tl.constexpr, DTYPE: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    COLUMNS: tl.constexpr, NARROW: tl.constexpr, ALONE: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
    ROOM: tl.constexpr, OFFSET: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the higher-order weights of COLUMNS columns from `low` on to the correlation space and the values, and delta of the
    first-order weights of these rows. Later blocks have as many rows, but for a narrow one at `whole`. ALONE: none come later."""
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    columns = low + tl.arange(0, COLUMNS)
    seat = block_seats(entry, start, columns, length, OFFSET)
    at = row_index(entry, head, heads, start, columns, rows_total, VARLEN)
    known, factor = tl.where(low == 0, 0, height), refine_scale * LOG2E  # known: rows that the scratch has sums of
    k_a_tile = load_tile(k_a, head, seat, R, BLOCK_R)  # [COLUMNS, BLOCK_R]
    if REFINEMENT == "value":
        values = load_tile(first_values, head, seat, DV, BLOCK_DV)  # [COLUMNS, BLOCK_DV]
    else:
        values = load_tile(v, kv_head, seat, DV, BLOCK_DV)
    q_a_tile, dout_tile = load_tile(q_a, head, seat, R, BLOCK_R), load_tile(dout, head, seat, DV, BLOCK_DV)
    met, dscores = higher_tile(
        k_a_tile, values, q_a_tile, dout_tile, load_rows(higher_lse_ptr, at, columns, length), tl.load(delta_ptr + columns),
        factor, seed_ptr, entry, head, columns, low, drop_threshold, drop_scale, True, COLUMNS, PRECISION,
    )  # fmt: skip
    dvalues = dot(met, dout_tile, PRECISION)
    dk_a_sum = dot(dscores, q_a_tile, PRECISION)
    dq_a_sum = dot(tl.trans(dscores), k_a_tile, PRECISION, load_scratch(sums_ptr, columns, known, BLOCK_R, ROOM))
    if not ALONE:
        for later in tl.range(low + COLUMNS, whole, COLUMNS, num_stages=STAGES, disable_licm=True):
            dvalues, dk_a_sum = higher_rows(
                k_a_tile, values, q_a, dout, dvalues, dk_a_sum, higher_lse_ptr, sums_ptr, delta_ptr, known,
                entry, head, heads, start, length, rows_total, factor, seed_ptr, drop_threshold, drop_scale, low, later,
                VARLEN, DV, R, COLUMNS, COLUMNS, BLOCK_DV, BLOCK_R, ROOM, OFFSET, PRECISION,
            )  # fmt: skip
        if NARROW < COLUMNS:
            if whole < length:
                dvalues, dk_a_sum = higher_rows(
                    k_a_tile, values, q_a, dout, dvalues, dk_a_sum, higher_lse_ptr, sums_ptr, delta_ptr, known,
                    entry, head, heads, start, length, rows_total, factor, seed_ptr, drop_threshold, drop_scale, low, whole,
                    VARLEN, DV, R, COLUMNS, NARROW, BLOCK_DV, BLOCK_R, ROOM, OFFSET, PRECISION,
                )  # fmt: skip
    dq_a_tile = (dq_a_sum * (refine_scale * gate)).to(DTYPE)
    dk_a_tile = (dk_a_sum * (refine_scale * gate)).to(DTYPE)
    delta = tl.sum(dq_a_tile.to(ACC) * load_tile(q_a, head, seat, R, BLOCK_R).to(ACC), 1)
    delta += tl.sum(dk_a_tile.to(ACC) * k_a_tile.to(ACC), 1)
    dvalues = dvalues * (drop_scale * gate)
    if REFINEMENT == "value":
        delta += tl.sum(dvalues.to(DTYPE).to(ACC) * values.to(ACC), 1)
    if REFINEMENT == "additive":
        saved = load_tile(first_values, head, seat, DV, BLOCK_DV)
        delta += tl.sum(load_tile(dout, head, seat, DV, BLOCK_DV).to(ACC) * saved.to(ACC), 1)
        store_scratch(dvalues_ptr, columns, dvalues, BLOCK_DV, BLOCK_DV)
    else:
        store_tile(dv, head, seat, dvalues, DV, BLOCK_DV)
    store_tile(dq_a, head, seat, dq_a_tile, R, BLOCK_R)
    store_tile(dk_a, head, seat, dk_a_tile, R, BLOCK_R)
    tl.debug_barrier()  # all have read the former delta of these rows, and sums are there for all
    tl.store(delta_ptr + columns, delta)


@triton.jit
def first_rows(
    k_tile, w_q_tile, w_k_tile, v_tile, q, dout, dv, dq_a, dk_a, dk_sum, dw_q_sum, dw_k_sum, dv_sum,
    first_lse_ptr, sums_ptr, delta_ptr, known, entry, head, heads, start, length, rows_total, factor,
    seed_ptr, drop_threshold, drop_scale, low, later,
    REFINEMENT: tl.constexpr, VARLEN: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
    ROOM: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What ROWS rows from `later` on, below a block of columns, add to its sums, and the block to theirs in the scratch."""
    rows = later + tl.arange(0, ROWS)
    seat = block_seats(entry, start, rows, length, OFFSET)
    at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)
    q_tile = load_tile(q, head, seat, D, BLOCK_D)
    dq_a_tile, dk_a_tile, through_tile = q_tile, q_tile, q_tile  # what a refinement does not have
    if REFINEMENT != "none":
        dq_a_tile = load_tile(dq_a, head, seat, R, BLOCK_R).to(DTYPE)
        dk_a_tile = load_tile(dk_a, head, seat, R, BLOCK_R).to(DTYPE)
    if REFINEMENT != "simple":
        through_tile = load_through(dv, dout, head, seat, REFINEMENT, DTYPE, DV, BLOCK_DV)
    first, met, dscores = first_tile(
        k_tile, w_q_tile, w_k_tile, v_tile, q_tile, dq_a_tile, dk_a_tile, through_tile,
        load_rows(first_lse_ptr, at, rows, length), tl.load(delta_ptr + rows), factor,
        seed_ptr, entry, head, rows, low, drop_threshold, drop_scale, REFINEMENT, False, COLUMNS, PRECISION,
    )  # fmt: skip
    dk_sum = dot(dscores, q_tile, PRECISION, dk_sum)
    if REFINEMENT != "none":
        dw_q_sum = dot(first, dq_a_tile, PRECISION, dw_q_sum)
        dw_k_sum = dot(first, dk_a_tile, PRECISION, dw_k_sum)
    if REFINEMENT != "simple":
        dv_sum = dot(met, through_tile, PRECISION, dv_sum)
    passed = dot(tl.trans(dscores), k_tile, PRECISION, load_scratch(sums_ptr, rows, known, BLOCK_D, ROOM))
    store_scratch(sums_ptr, rows, passed, BLOCK_D, ROOM)
    return dk_sum, dw_q_sum, dw_k_sum, dv_sum


@triton.jit
def first_columns(
    q, k, v, w_q, w_k, dout, dq, dk, dv, dq_a, dk_a, dw_q, dw_k, first_lse_ptr, sums_ptr, delta_ptr, dvalues_ptr, height,
    entry, head, kv_head, heads, split, fresh, start, w_start, shift, length, whole, rows_total, softmax_scale,
    seed_ptr, drop_threshold, drop_scale, low,
    REFINEMENT: tl.constexpr, PARTIAL: tl.constexpr, VARLEN: tl.constexpr, DTYPE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, NARROW: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, ROOM: tl.constexpr, OFFSET: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the first-order weights of COLUMNS columns from `low` on to queries, keys, tables and the values; blocks as in
    `higher_columns`. fresh: a partial of the tables holds nothing yet; its rows for this sequence begin at `shift`."""
    columns = low + tl.arange(0, COLUMNS)
    seat = block_seats(entry, start, columns, length, OFFSET)
    at = row_index(entry, head, heads, start, columns, rows_total, VARLEN)
    known, factor = tl.where(low == 0, 0, height), softmax_scale * LOG2E
    k_tile, q_tile = load_tile(k, kv_head, seat, D, BLOCK_D), load_tile(q, head, seat, D, BLOCK_D)  # [COLUMNS, BLOCK_D]
    w_q_tile, w_k_tile, dq_a_tile, dk_a_tile, v_tile, through_tile = k_tile, k_tile, k_tile, k_tile, k_tile, k_tile
    if REFINEMENT != "none":
        table_seat = block_seats(entry, w_start, columns, length, OFFSET)
        w_q_tile = load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R)  # [COLUMNS, BLOCK_R]
        w_k_tile = load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R)
        dq_a_tile = load_tile(dq_a, head, seat, R, BLOCK_R).to(DTYPE)
        dk_a_tile = load_tile(dk_a, head, seat, R, BLOCK_R).to(DTYPE)
    if REFINEMENT != "simple":
        v_tile = load_tile(v, kv_head, seat, DV, BLOCK_DV)
        through_tile = load_through(dv, dout, head, seat, REFINEMENT, DTYPE, DV, BLOCK_DV)
    first, met, dscores = first_tile(
        k_tile, w_q_tile, w_k_tile, v_tile, q_tile, dq_a_tile, dk_a_tile, through_tile,
        load_rows(first_lse_ptr, at, columns, length), tl.load(delta_ptr + columns), factor,
        seed_ptr, entry, head, columns, low, drop_threshold, drop_scale, REFINEMENT, True, COLUMNS, PRECISION,
    )  # fmt: skip
    dk_sum = dot(dscores, q_tile, PRECISION)
    dq_sum = dot(tl.trans(dscores), k_tile, PRECISION, load_scratch(sums_ptr, columns, known, BLOCK_D, ROOM))
    dw_q_sum, dw_k_sum, dv_sum = dk_sum, dk_sum, dk_sum  # what a refinement does not have
    if REFINEMENT != "none":
        if PARTIAL:
            built = columns < tl.where(fresh, 0, length)
            partial_seat = split, shift, 0, columns.to(OFFSET), built
            dw_q_sum = dot(first, dq_a_tile, PRECISION, load_tile(dw_q, head, partial_seat, R, BLOCK_R))
            dw_k_sum = dot(first, dk_a_tile, PRECISION, load_tile(dw_k, head, partial_seat, R, BLOCK_R))
        else:
            dw_q_sum, dw_k_sum = dot(first, dq_a_tile, PRECISION), dot(first, dk_a_tile, PRECISION)
    if REFINEMENT != "simple":
        dv_sum = dot(met, through_tile, PRECISION)
    if not ALONE:
        for later in tl.range(low + COLUMNS, whole, COLUMNS, num_stages=STAGES, disable_licm=True):
            dk_sum, dw_q_sum, dw_k_sum, dv_sum = first_rows(
                k_tile, w_q_tile, w_k_tile, v_tile, q, dout, dv, dq_a, dk_a, dk_sum, dw_q_sum, dw_k_sum, dv_sum,
                first_lse_ptr, sums_ptr, delta_ptr, known, entry, head, heads, start, length, rows_total, factor,
                seed_ptr, drop_threshold, drop_scale, low, later, REFINEMENT, VARLEN, DTYPE, D, DV, R,
                COLUMNS, COLUMNS, BLOCK_D, BLOCK_DV, BLOCK_R, ROOM, OFFSET, PRECISION,
            )  # fmt: skip
        if NARROW < COLUMNS:
            if whole < length:
                dk_sum, dw_q_sum, dw_k_sum, dv_sum = first_rows(
                    k_tile, w_q_tile, w_k_tile, v_tile, q, dout, dv, dq_a, dk_a, dk_sum, dw_q_sum, dw_k_sum, dv_sum,
                    first_lse_ptr, sums_ptr, delta_ptr, known, entry, head, heads, start, length, rows_total, factor,
                    seed_ptr, drop_threshold, drop_scale, low, whole, REFINEMENT, VARLEN, DTYPE, D, DV, R,
                    COLUMNS, NARROW, BLOCK_D, BLOCK_DV, BLOCK_R, ROOM, OFFSET, PRECISION,
                )  # fmt: skip
    tl.debug_barrier()  # nobody reads dQ_A, dK_A and dY of these columns any more
    store_tile(dq, head, seat, dq_sum * softmax_scale, D, BLOCK_D)
    store_tile(dk, head, seat, dk_sum * softmax_scale, D, BLOCK_D)
    if REFINEMENT != "none":
        if PARTIAL:
            table_seat = split, shift, 0, columns.to(OFFSET), columns < length
        else:
            table_seat = seat
        store_tile(dw_q, head, table_seat, dw_q_sum, R, BLOCK_R)
        store_tile(dw_k, head, table_seat, dw_k_sum, R, BLOCK_R)
    if REFINEMENT != "simple":
        if REFINEMENT != "value":
            dv_sum = dv_sum * drop_scale
        if REFINEMENT == "additive":
            dv_sum += load_scratch(dvalues_ptr, columns, height, BLOCK_DV, BLOCK_DV)
        store_tile(dv, head, seat, dv_sum, DV, BLOCK_DV)
