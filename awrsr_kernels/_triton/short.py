"""The short regime: a tile holds whole heads, every matrix stays on chip, one launch forward and one backward.

L positions, D, DV, R features of q, v and the tables; `# [BLOCK_L, BLOCK_D]` is the shape of a tile.

A program owns one head of `run` consecutive sequences. It packs as many of them as fit into the BLOCK_L rows of a tile, tile after
tile, so that short histories fill it and padding is never loaded; sequences in one tile do not see each other. A batch may also
hold sequences of more than `reach` items: these kernels skip them, the tiled kernels compute them and skip the others. The formulas
are those of `awrsr_kernels/reference.py`; gradients, with Z the dropout mask and softmax'(g; p) = p * (g - rowsum(g * p)):

    simple, additive   dM = Z*(dO V^T)     dR = gate dM               dV = (M*Z)^T dO        dgate = sum(R*dM)
    value              dR = Z*(dO Y^T)     dY = (R*Z)^T dO            dV = P^T dY            Y = P V
    dT = refine_scale softmax'(dR; R)      dQ_A = dT K_A              dK_A = dT^T Q_A
    dP = dQ_A W_q^T + dK_A W_k^T + (value: dY V^T) + (additive: dM)   dW_q = P^T dQ_A        dW_k = P^T dK_A
    dS = softmax_scale softmax'(dP; P)     dQ = dS K                  dK = dS^T Q

The backward needs only the inputs. Gradients of shared tables accumulate on chip; each program stores one partial sum, and these
are added in a fixed order afterwards, without atomics. Under grouped-query attention dK and dV are stored per query head.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import RUNTIME, allocate, ceil_div, flat, launch
from .primitives import (
    correlation_points,
    dot,
    drop_by_word,
    keep_word,
    load_factor,
    load_gate,
    load_table,
    load_tile,
    next_seats,
    padding_seats,
    score_tile,
    seats,
    shared_seats,
    slope_of_points,
    softmax_of,
    softmax_tile,
    step_of,
    store_tile,
    store_zeros,
    visible_in_shared_tile,
)
from .problem import Problem
from .reduce import Gradients


@triton.jit
def correlation_tile(first, w_tile, POINTS: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr):
    """[BLOCK_L, BLOCK_R]: Q_A or K_A, P times a table; with POINTS as points. In the dtype of `first`, which is P."""
    tile = dot(first, w_tile, PRECISION)
    if POINTS:
        tile = correlation_points(tile, R, BLOCK_R)
    return tile.to(first.dtype)


@triton.jit
def move_down(first_row, lag, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """[BLOCK, BLOCK]: what a tile is multiplied by, exactly, so that each row becomes that `lag` rows before in its sequence."""
    rows = tl.arange(0, BLOCK)
    return ((rows[None, :] + lag == rows[:, None]) & (rows[None, :] >= first_row[:, None])).to(DTYPE)


@triton.jit
def higher_weights(
    first, visible, v_tile, v_cov_tile, w_q, w_k, head, table_seat, scale, first_row, lags_ptr, lags_head,
    LAGS: tl.constexpr, POINTS: tl.constexpr, VALUES: tl.constexpr, STOCHASTIC: tl.constexpr, DTYPE: tl.constexpr,
    R: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R [BLOCK_L, BLOCK_L]; Q_A, K_A, W_q and W_k [BLOCK_L, BLOCK_R]; the values and covariances that R multiplies [BLOCK_L,
    BLOCK_DV]: with VALUES P V and P^2 V_cov, otherwise those given. first: P."""
    w_q_tile = load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R)
    w_k_tile = load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R)
    first_half = first.to(DTYPE)
    q_a = correlation_tile(first_half, w_q_tile, POINTS, R, BLOCK_R, PRECISION)
    k_a = correlation_tile(first_half, w_k_tile, POINTS, R, BLOCK_R, PRECISION)
    if VALUES:
        v_tile = dot(first_half, v_tile, PRECISION).to(DTYPE)
        if STOCHASTIC:
            v_cov_tile = dot((first * first).to(DTYPE), v_cov_tile, PRECISION).to(DTYPE)
    scores = score_tile(q_a, k_a, POINTS, PRECISION)
    if LAGS > 0:
        for lag in tl.range(1, LAGS + 1):  # unrolled, the backward would spill more
            move = move_down(first_row, lag, first.shape[0], DTYPE)
            q_before, k_before = dot(move, q_a, PRECISION).to(DTYPE), dot(move, k_a, PRECISION).to(DTYPE)
            factor = load_factor(lags_ptr, lags_head, head, lag, scores.dtype)
            scores += factor * dot(q_before, tl.trans(k_before), PRECISION)
    higher = softmax_of(scores, visible, scale)
    return higher, q_a, k_a, w_q_tile, w_k_tile, v_tile, v_cov_tile


@triton.jit
def correlation_gradients(
    higher, q_a, k_a, dweights, inner, scale, head, first_row, lags_ptr, lags_head, dlags,
    LAGS: tl.constexpr, POINTS: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ_A and dK_A, [BLOCK_L, BLOCK_R] in the dtype of the products, and dlags [BLOCK_L, 8] with their parts added.

    inner: rowsum(R * dR); scale: refine_scale times the gate. Of lags, products on both sides bring dT to the rows before.
    """
    ACC: tl.constexpr = higher.dtype
    dhigher = (higher * (dweights - inner[:, None]) * scale).to(q_a.dtype)
    if LAGS > 0:
        scores = score_tile(q_a, k_a, POINTS, PRECISION)
        total = dhigher.to(ACC)
        for lag in tl.range(1, LAGS + 1):
            move = move_down(first_row, lag, higher.shape[0], q_a.dtype)
            moved = dot(dot(tl.trans(move), dhigher, PRECISION).to(q_a.dtype), move, PRECISION)
            dlags += tl.sum(moved * scores, 1)[:, None] * (tl.arange(0, 8) == lag - 1)[None, :].to(ACC)
            total += load_factor(lags_ptr, lags_head, head, lag, ACC) * moved
        dhigher = total.to(q_a.dtype)
    dq_a = dot(dhigher, k_a, PRECISION)
    if POINTS:
        dq_a *= slope_of_points(q_a.to(ACC), R, BLOCK_R)
    dq_a = dq_a.to(q_a.dtype)
    dk_a = dot(tl.trans(dhigher), q_a, PRECISION)
    if POINTS:
        dk_a -= k_a.to(ACC) * tl.sum(dhigher.to(ACC), 0)[:, None]
        dk_a *= slope_of_points(k_a.to(ACC), R, BLOCK_R)
    return dq_a, dk_a.to(q_a.dtype), dlags


@triton.jit
def before_step(step, BLOCK: tl.constexpr):
    """[BLOCK, BLOCK] bool: columns whose value, `step` rows after them, is not to come yet."""
    rows = tl.arange(0, BLOCK)
    return rows[None, :] + step <= rows[:, None]


@triton.jit
def zero_gradients(
    dq, dk, dv, dv_cov, dw_q, dw_k, head, padding, STOCHASTIC: tl.constexpr, PER_ENTRY: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Store zeros at padding, in every gradient that has a row per item."""
    store_zeros(dq, head, padding, D, BLOCK_D)
    store_zeros(dk, head, padding, D, BLOCK_D)
    store_zeros(dv, head, padding, DV, BLOCK_DV)
    if STOCHASTIC:
        store_zeros(dv_cov, head, padding, DV, BLOCK_DV)
    if PER_ENTRY:
        store_zeros(dw_q, head, padding, R, BLOCK_R)
        store_zeros(dw_k, head, padding, R, BLOCK_R)


@triton.jit(do_not_specialize=RUNTIME)
def _short_fwd_kernel(
    q_ptr, q_entry, q_head, q_row, k_ptr, k_entry, k_head, k_row, v_ptr, v_entry, v_head, v_row,
    v_cov_ptr, v_cov_entry, v_cov_head, v_cov_row, w_q_ptr, w_q_entry, w_q_head, w_q_row,
    w_k_ptr, w_k_entry, w_k_head, w_k_row, out_ptr, out_entry, out_head, out_row,
    out_cov_ptr, out_cov_entry, out_cov_head, out_cov_row,
    gate_ptr, gate_stride, lags_ptr, lags_head, bounds_ptr, seed_ptr,
    rows_total, max_len, reach, table_rows, batch, heads, run,
    softmax_scale, refine_scale, drop_threshold, drop_scale, plain_heads,
    REFINEMENT: tl.constexpr, STOCHASTIC: tl.constexpr, LAGS: tl.constexpr, SHIFT: tl.constexpr, PLAIN: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, kv_head = tl.program_id(0) % heads, tl.program_id(0) % heads // GROUP
    begin = (tl.program_id(0) // heads) * run
    last = tl.minimum(begin + run, batch)
    q, k = (q_ptr, q_entry, q_head, q_row), (k_ptr, k_entry, k_head, k_row)
    v, v_cov = (v_ptr, v_entry, v_head, v_row), (v_cov_ptr, v_cov_entry, v_cov_head, v_cov_row)
    w_q, w_k = (w_q_ptr, w_q_entry, w_q_head, w_q_row), (w_k_ptr, w_k_entry, w_k_head, w_k_row)
    out, out_cov = (out_ptr, out_entry, out_head, out_row), (out_cov_ptr, out_cov_entry, out_cov_head, out_cov_row)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty

    sequence = begin
    for _step in tl.range(run, disable_licm=True):  # hoisted loop invariants would spill
        if sequence < last:
            fitting, entry, first_row, length, seat, table_seat = shared_seats(
                bounds_ptr, sequence, last, rows_total, max_len, reach, table_rows,
                VARLEN, ALIGN_RIGHT, PER_ENTRY, BLOCK_L, BLOCK_L // 4, OFFSET,
            )  # fmt: skip
            sequence += fitting
            rows = tl.arange(0, BLOCK_L) - first_row
            visible = visible_in_shared_tile(first_row, length, CAUSAL, BLOCK_L)  # [BLOCK_L, BLOCK_L], like all weights
            q_tile = load_tile(q, head, seat, D, BLOCK_D)  # [BLOCK_L, BLOCK_D]
            k_tile = load_tile(k, kv_head, seat, D, BLOCK_D)
            first = softmax_tile(q_tile, k_tile, visible, softmax_scale, STOCHASTIC, PRECISION)
            weights = first
            v_seat = seat
            if SHIFT:
                v_seat = next_seats(seat, rows, length, step_of(head, plain_heads))
            values = load_tile(v, kv_head, v_seat, DV, BLOCK_DV)  # [BLOCK_L, BLOCK_DV]
            values_cov = values
            if STOCHASTIC:
                values_cov = load_tile(v_cov, kv_head, seat, DV, BLOCK_DV)
            if REFINEMENT != "none":
                weights, _q_a, _k_a, _w_q_tile, _w_k_tile, values, values_cov = higher_weights(
                    first, visible, values, values_cov, w_q, w_k, head, table_seat, refine_scale, first_row, lags_ptr, lags_head,
                    LAGS, REFINEMENT == "stochastic", False, STOCHASTIC, DTYPE, R, BLOCK_R, PRECISION,
                )  # fmt: skip
                if REFINEMENT == "value":  # after R: three registers less than before it
                    values = dot(first.to(DTYPE), values, PRECISION).to(DTYPE)
                    if STOCHASTIC:
                        values_cov = dot((first * first).to(DTYPE), values_cov, PRECISION).to(DTYPE)
                if REFINEMENT == "additive":
                    gate = load_gate(gate_ptr, gate_stride, head, first.dtype)
                    if PLAIN:
                        gate = tl.where(head < plain_heads, 0.0, gate)
                    weights = first + gate * weights

            if seed_ptr is not None:
                kept = keep_word(seed_ptr, entry, head, rows, first_row, drop_threshold, BLOCK_L)
                weights = drop_by_word(weights, kept, drop_scale, BLOCK_L)
            if SHIFT:
                weights = tl.where(before_step(step_of(head, plain_heads), BLOCK_L), weights, 0.0)
            store_tile(out, head, seat, dot(weights.to(DTYPE), values, PRECISION), DV, BLOCK_DV)
            if STOCHASTIC:
                tile = dot((weights * weights).to(DTYPE), values_cov, PRECISION)  # [BLOCK_L, BLOCK_DV]
                store_tile(out_cov, head, seat, tile, DV, BLOCK_DV)

    if bounds_ptr is not None and not VARLEN:  # in longer windows the tiled kernels write the padding
        for number in range(begin, tl.where(rows_total <= reach, last, begin)):
            padded = tl.full((), number, tl.int32)
            padding = padding_seats(bounds_ptr, padded, rows_total, max_len, VARLEN, ALIGN_RIGHT, BLOCK_L)
            store_zeros(out, head, padding, DV, BLOCK_DV)
            if STOCHASTIC:
                store_zeros(out_cov, head, padding, DV, BLOCK_DV)


@triton.jit(do_not_specialize=RUNTIME)
def _short_bwd_kernel(
    q_ptr, q_entry, q_head, q_row, k_ptr, k_entry, k_head, k_row, v_ptr, v_entry, v_head, v_row,
    v_cov_ptr, v_cov_entry, v_cov_head, v_cov_row, w_q_ptr, w_q_entry, w_q_head, w_q_row,
    w_k_ptr, w_k_entry, w_k_head, w_k_row, dout_ptr, dout_entry, dout_head, dout_row,
    dout_cov_ptr, dout_cov_entry, dout_cov_head, dout_cov_row, dq_ptr, dq_entry, dq_head, dq_row,
    dk_ptr, dk_entry, dk_head, dk_row, dv_ptr, dv_entry, dv_head, dv_row, dv_cov_ptr, dv_cov_entry, dv_cov_head, dv_cov_row,
    dw_q_ptr, dw_q_entry, dw_q_head, dw_q_row, dw_k_ptr, dw_k_entry, dw_k_head, dw_k_row,
    dgate_ptr, gate_ptr, gate_stride, dlags_ptr, lags_ptr, lags_head, bounds_ptr, seed_ptr,
    rows_total, max_len, reach, table_rows, batch, heads, run,
    softmax_scale, refine_scale, drop_threshold, drop_scale, plain_heads,
    REFINEMENT: tl.constexpr, STOCHASTIC: tl.constexpr, LAGS: tl.constexpr, SHIFT: tl.constexpr, PLAIN: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    GROUP: tl.constexpr, SHIFTED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, kv_head, split = tl.program_id(0) % heads, tl.program_id(0) % heads // GROUP, tl.program_id(0) // heads
    begin = split * run
    last = tl.minimum(begin + run, batch)
    q, k = (q_ptr, q_entry, q_head, q_row), (k_ptr, k_entry, k_head, k_row)
    v, v_cov = (v_ptr, v_entry, v_head, v_row), (v_cov_ptr, v_cov_entry, v_cov_head, v_cov_row)
    w_q, w_k = (w_q_ptr, w_q_entry, w_q_head, w_q_row), (w_k_ptr, w_k_entry, w_k_head, w_k_row)
    dout, dout_cov = (dout_ptr, dout_entry, dout_head, dout_row), (dout_cov_ptr, dout_cov_entry, dout_cov_head, dout_cov_row)
    dq, dk = (dq_ptr, dq_entry, dq_head, dq_row), (dk_ptr, dk_entry, dk_head, dk_row)
    dv, dv_cov = (dv_ptr, dv_entry, dv_head, dv_row), (dv_cov_ptr, dv_cov_entry, dv_cov_head, dv_cov_row)
    dw_q, dw_k = (dw_q_ptr, dw_q_entry, dw_q_head, dw_q_row), (dw_k_ptr, dw_k_entry, dw_k_head, dw_k_row)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    POINTS: tl.constexpr = REFINEMENT == "stochastic"
    gate = load_gate(gate_ptr, gate_stride, head, ACC)
    if PLAIN:
        gate = tl.where(head < plain_heads, 0.0, gate)
    dgate = tl.zeros((BLOCK_L,), ACC)
    dlags = tl.zeros((BLOCK_L, 8), ACC)
    dw_q_sum = tl.zeros((BLOCK_L, BLOCK_R), ACC)
    dw_k_sum = tl.zeros((BLOCK_L, BLOCK_R), ACC)

    sequence = begin
    for _step in tl.range(run, disable_licm=True):  # hoisted loop invariants would spill
        if sequence < last:
            fitting, entry, first_row, length, seat, table_seat = shared_seats(
                bounds_ptr, sequence, last, rows_total, max_len, reach, table_rows,
                VARLEN, ALIGN_RIGHT, PER_ENTRY, BLOCK_L, BLOCK_L // 4, OFFSET,
            )  # fmt: skip
            sequence += fitting
            rows = tl.arange(0, BLOCK_L) - first_row
            visible = visible_in_shared_tile(first_row, length, CAUSAL, BLOCK_L)  # [BLOCK_L, BLOCK_L], like all weights
            q_tile = load_tile(q, head, seat, D, BLOCK_D)  # [BLOCK_L, BLOCK_D]
            k_tile = load_tile(k, kv_head, seat, D, BLOCK_D)
            v_seat = seat
            if SHIFT:
                v_seat = next_seats(seat, rows, length, step_of(head, plain_heads))
            v_tile = load_tile(v, kv_head, v_seat, DV, BLOCK_DV)  # [BLOCK_L, BLOCK_DV]
            dout_tile = load_tile(dout, head, seat, DV, BLOCK_DV)
            first = softmax_tile(q_tile, k_tile, visible, softmax_scale, STOCHASTIC, PRECISION)

            first_half = first.to(DTYPE)
            weights = first
            v_cov_tile = v_tile
            if STOCHASTIC:
                v_cov_tile = load_tile(v_cov, kv_head, seat, DV, BLOCK_DV)
                dcov_tile = load_tile(dout_cov, head, seat, DV, BLOCK_DV)
            values, values_cov = v_tile, v_cov_tile
            if REFINEMENT != "none":
                higher, q_a, k_a, w_q_tile, w_k_tile, values, values_cov = higher_weights(
                    first, visible, v_tile, v_cov_tile, w_q, w_k, head, table_seat, refine_scale, first_row, lags_ptr, lags_head,
                    LAGS, POINTS, REFINEMENT == "value", STOCHASTIC, DTYPE, R, BLOCK_R, PRECISION,
                )  # fmt: skip
                weights = higher
                if REFINEMENT == "additive":
                    weights = first + gate * higher
            if seed_ptr is not None:
                kept = keep_word(seed_ptr, entry, head, rows, first_row, drop_threshold, BLOCK_L)
                weights = drop_by_word(weights, kept, drop_scale, BLOCK_L)
            if SHIFT:
                weights = tl.where(before_step(step_of(head, plain_heads), BLOCK_L), weights, 0.0)

            # From the outputs to the weights
            if STOCHASTIC:
                squares = tl.trans((weights * weights).to(DTYPE))
                through_squares = 2 * weights * dot(dcov_tile, tl.trans(values_cov), PRECISION)
            weights = tl.trans(weights.to(DTYPE))
            dweights = dot(dout_tile, tl.trans(values), PRECISION)
            if STOCHASTIC:
                dweights += through_squares
            if seed_ptr is not None:
                dweights = drop_by_word(dweights, kept, drop_scale, BLOCK_L)
            if SHIFT:
                dweights = tl.where(before_step(step_of(head, plain_heads), BLOCK_L), dweights, 0.0)

            # From the higher-order weights to the correlation space
            if REFINEMENT != "none":
                inner = tl.sum(higher * dweights, 1)
                if dgate_ptr is not None:
                    if PLAIN:
                        dgate += tl.where(head < plain_heads, 0.0, inner)
                    else:
                        dgate += inner
                scale = gate * refine_scale
                dq_a, dk_a, dlags = correlation_gradients(
                    higher, q_a, k_a, dweights, inner, scale, head, first_row, lags_ptr, lags_head, dlags,
                    LAGS, POINTS, R, BLOCK_R, PRECISION,
                )  # fmt: skip

            # To the values
            dvalues = dot(weights, dout_tile, PRECISION)  # [BLOCK_L, BLOCK_DV]
            if REFINEMENT == "value":
                dvalues_half = dvalues.to(DTYPE)
                dvalues = dot(tl.trans(first_half), dvalues_half, PRECISION)
            store_tile(dv, head, v_seat, dvalues, DV, BLOCK_DV)
            if SHIFT:  # no weight falls on the first item
                first_entry, origin, entries, at, filled = seat
                unmet = first_entry, origin, entries, at, filled & (rows < step_of(head, plain_heads))
                store_zeros(dv, head, unmet, DV, BLOCK_DV)
            if STOCHASTIC:
                dvalues_cov = dot(squares, dcov_tile, PRECISION)
                if REFINEMENT == "value":
                    dvalues_cov_half = dvalues_cov.to(DTYPE)
                    dvalues_cov = dot(tl.trans((first * first).to(DTYPE)), dvalues_cov_half, PRECISION)
                store_tile(dv_cov, head, seat, dvalues_cov, DV, BLOCK_DV)

            # To the first-order weights
            if REFINEMENT == "none":
                dfirst = dweights
            else:
                dfirst = dot(dk_a, tl.trans(w_k_tile), PRECISION, dot(dq_a, tl.trans(w_q_tile), PRECISION))
            if REFINEMENT == "value":
                dfirst = dot(dvalues_half, tl.trans(v_tile), PRECISION, dfirst)
                if STOCHASTIC:
                    dfirst += 2 * first * dot(dvalues_cov_half, tl.trans(v_cov_tile), PRECISION)
            if REFINEMENT == "additive":
                if seed_ptr is None and not STOCHASTIC and not SHIFT:  # recomputing dM takes fewer registers than keeping it
                    dfirst = dot(dout_tile, tl.trans(v_tile), PRECISION, dfirst)
                else:
                    dfirst += dweights

            # To queries, keys and tables
            dscores = (first * (dfirst - tl.sum(first * dfirst, 1)[:, None]) * softmax_scale).to(DTYPE)
            dkeys = dot(tl.trans(dscores), q_tile, PRECISION)  # [BLOCK_L, BLOCK_D]
            if STOCHASTIC:
                dkeys -= k_tile.to(ACC) * tl.sum(dscores.to(ACC), 0)[:, None]
            store_tile(dk, head, seat, dkeys, D, BLOCK_D)
            store_tile(dq, head, seat, dot(dscores, k_tile, PRECISION), D, BLOCK_D)
            if REFINEMENT != "none":
                at_rows = tl.trans(first_half)
                if PER_ENTRY:
                    store_tile(dw_q, head, seat, dot(at_rows, dq_a, PRECISION), R, BLOCK_R)
                    store_tile(dw_k, head, seat, dot(at_rows, dk_a, PRECISION), R, BLOCK_R)
                else:
                    if SHIFTED:  # each sequence has other rows of the table: move its P there, by a product
                        row = rows + BLOCK_L - length if ALIGN_RIGHT and bounds_ptr is not None else rows
                        move = (tl.arange(0, BLOCK_L)[:, None] == row[None, :]).to(DTYPE)
                        at_rows = dot(move, at_rows, PRECISION).to(DTYPE)
                    dw_q_sum = dot(at_rows, dq_a, PRECISION, dw_q_sum)
                    dw_k_sum = dot(at_rows, dk_a, PRECISION, dw_k_sum)

    if bounds_ptr is not None and not VARLEN:  # in longer windows the tiled kernels write the padding
        for number in range(begin, tl.where(rows_total <= reach, last, begin)):
            padded = tl.full((), number, tl.int32)
            padding = padding_seats(bounds_ptr, padded, rows_total, max_len, VARLEN, ALIGN_RIGHT, BLOCK_L)
            zero_gradients(
                dq, dk, dv, dv_cov, dw_q, dw_k, head, padding, STOCHASTIC, PER_ENTRY, D, DV, R, BLOCK_D, BLOCK_DV, BLOCK_R
            )
    if REFINEMENT != "none" and not PER_ENTRY:
        partial = seats(split, begin * 0, tl.arange(0, BLOCK_L), BLOCK_L)
        store_tile(dw_q, head, partial, dw_q_sum, R, BLOCK_R)
        store_tile(dw_k, head, partial, dw_k_sum, R, BLOCK_R)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + split * heads + head, tl.sum(dgate, 0))
    if dlags_ptr is not None:
        lag = tl.arange(0, 8)
        tl.store(dlags_ptr + (split * heads + head) * LAGS + lag, tl.sum(dlags, 0), mask=lag < LAGS)


def short_buffers(problem: Problem) -> dict[str, Tensor]:
    """Uninitialised memory for the outputs; the backward needs only the inputs."""
    p = problem
    names = ("out", "out_cov") if p.call.stochastic else ("out",)
    return {name: allocate(p.q, p.heads, p.v.shape[-1], p.call.varlen) for name in names}


def launch_short_forward(problem: Problem, outs: list[Tensor] | None = None) -> list[Tensor]:
    """The outputs (entries, H, rows, D_v); outs: those in which the tiled kernels have written longer sequences."""
    p = problem
    outs = list(short_buffers(p).values()) if outs is None else outs
    config = p.config("short_fwd")
    run = p.run(config.programs)
    launch(
        _short_fwd_kernel, (p.heads * ceil_div(p.batch, run),), config, p.q.device,
        **flat(
            out=p.view(outs[0]), out_cov=p.covariance_view(outs[-1]),
            reach=p.short_reach(), batch=p.batch, heads=p.heads, run=run, GROUP=p.group,
            BLOCK_L=config.block_m, OFFSET=p.offset_type(config.block_m, *outs),
            **p.tensors, **p.sequences, **p.dropout, **p.refinement(), **p.followed(), **p.widths,
        ),
    )  # fmt: skip
    return outs


def launch_short_backward(problem: Problem, douts: list[Tensor], gradients: Gradients | None = None) -> Gradients:
    """gradients: those in which the kernels of the other regime have written longer sequences."""
    p, gradients = problem, gradients or Gradients(problem)
    config = p.config("short_bwd")
    run, block = p.run(config.programs), config.block_m
    splits = ceil_div(p.batch, run)
    dk, dv, dv_cov = gradients.per_query_head()
    dw_q, dw_k = gradients.table_parts(splits, block)
    packed_tables = p.call.per_entry and p.call.varlen
    assert dk is not None and dv is not None
    launch(
        _short_bwd_kernel, (p.heads * splits,), config, p.q.device,
        **flat(
            dout=p.view(douts[0]), dout_cov=p.covariance_view(douts[-1]),
            dq=p.view(gradients.dq), dk=p.view(dk), dv=p.view(dv), dv_cov=p.covariance_view(dv_cov),
            dw_q=p.view(dw_q, packed_tables), dw_k=p.view(dw_k, packed_tables),
            dgate_ptr=gradients.gate_parts(splits), dlags_ptr=gradients.lag_parts(splits), reach=p.short_reach(),
            batch=p.batch, heads=p.heads, run=run, GROUP=p.group,
            SHIFTED=p.bounds is not None or 2 * p.call.max_len <= block, BLOCK_L=block, OFFSET=p.offset_type(block, *douts),
            **p.tensors, **p.sequences, **p.dropout, **p.refinement(), **p.followed(), **p.widths,
        ),
    )  # fmt: skip
    return gradients
