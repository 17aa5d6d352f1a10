"""The tiled regime, backward: weights are recomputed from the saved log-sum-exps, every sum has one owner, no atomics.

L positions, D, DV, R features of q, v and the tables; `# [BLOCK_M, BLOCK_D]` is the shape of a tile: BLOCK_M queries, BLOCK_N
keys.

A stage recomputes its weights p from its q and k (in stage 2 Q_A and K_A). Their gradient is a sum of outer products,
g = [dQ_A W_q^T + dK_A W_k^T] + [Z*(dO V^T), in stage 1 of "value" dY V^T]. Then

    delta = rowsum(p*g), taken from what the forward saved: rowsum(dQ_A*Q_A) + rowsum(dK_A*K_A) + rowsum(dO*O)
    ds    = scale p*(g - delta)         dq = ds k         dk = ds^T q         dv = (p*Z)^T dO        dW = p^T [dQ_A | dK_A]

and in stochastic attention, where squared weights multiply covariances and M is the sum that is squared (M = p but in "additive"),

    g += 2 Z*M*Z*(dC V_cov^T)    delta += 2 rowsum(dC*C), C the share of p in it    dv_cov = ((M*Z)^2)^T dC    dk -= k colsum(ds)

in three kernels: one owns rows (dq and delta), one owns columns (dk, dv), and one, in `tiled_tables.py`, owns rows of the tables.
Rows and columns run for stage 2 first (where "additive" multiplies p by its gate), then for stage 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from .lags import launch_gather
from .launch import NO_VIEW, RUNTIME, allocate, ceil_div, flat, launch
from .primitives import (
    before_points,
    dot,
    keep_tile,
    key_seats,
    known_softmax_tile,
    load_gate,
    load_lse,
    load_rows,
    load_table,
    load_tile,
    locate_long,
    padded_seats,
    row_index,
    score_factor,
    seats,
    slope_of_points,
    step_of,
    store_tile,
    store_zeros,
    table_start,
)
from .problem import Problem
from .reduce import Gradients
from .tiled import other_stage_arguments, stage_arguments, tiled_widths
from .tiled_tables import launch_tables


@triton.jit(do_not_specialize=RUNTIME)
def _tiled_bwd_rows_kernel(
    q_ptr, q_entry, q_head, q_row, k_ptr, k_entry, k_head, k_row, v_ptr, v_entry, v_head, v_row,
    v_cov_ptr, v_cov_entry, v_cov_head, v_cov_row, w_q_ptr, w_q_entry, w_q_head, w_q_row,
    w_k_ptr, w_k_entry, w_k_head, w_k_row, q_a_ptr, q_a_entry, q_a_head, q_a_row, k_a_ptr, k_a_entry, k_a_head, k_a_row,
    weighted_ptr, weighted_entry, weighted_head, weighted_row,
    weighted_cov_ptr, weighted_cov_entry, weighted_cov_head, weighted_cov_row, dq_a_ptr, dq_a_entry, dq_a_head, dq_a_row,
    dk_a_ptr, dk_a_entry, dk_a_head, dk_a_row, dout_ptr, dout_entry, dout_head, dout_row,
    dout_cov_ptr, dout_cov_entry, dout_cov_head, dout_cov_row, dq_ptr, dq_entry, dq_head, dq_row,
    other_q_ptr, other_q_entry, other_q_head, other_q_row, other_k_ptr, other_k_entry, other_k_head, other_k_row,
    other_lse_ptr, other_gate_ptr, other_scale, lse_ptr, delta_ptr, dgate_ptr, gate_ptr, gate_stride, bounds_ptr, seed_ptr,
    rows_total, max_len, least, table_rows, batch, heads,
    score_scale, drop_threshold, drop_scale, plain_heads,
    TABLES: tl.constexpr, VALUES: tl.constexpr, SHIFT: tl.constexpr, SKIP: tl.constexpr,
    DISTANCE: tl.constexpr, POINTS: tl.constexpr, OTHER_DISTANCE: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, OTHER_GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, OTHER_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OTHER_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q, k = (q_ptr, q_entry, q_head, q_row), (k_ptr, k_entry, k_head, k_row)
    v, v_cov = (v_ptr, v_entry, v_head, v_row), (v_cov_ptr, v_cov_entry, v_cov_head, v_cov_row)
    w_q, w_k = (w_q_ptr, w_q_entry, w_q_head, w_q_row), (w_k_ptr, w_k_entry, w_k_head, w_k_row)
    q_a, k_a = (q_a_ptr, q_a_entry, q_a_head, q_a_row), (k_a_ptr, k_a_entry, k_a_head, k_a_row)
    weighted = weighted_ptr, weighted_entry, weighted_head, weighted_row
    weighted_cov = weighted_cov_ptr, weighted_cov_entry, weighted_cov_head, weighted_cov_row
    dq_a, dk_a = (dq_a_ptr, dq_a_entry, dq_a_head, dq_a_row), (dk_a_ptr, dk_a_entry, dk_a_head, dk_a_row)
    dout, dout_cov = (dout_ptr, dout_entry, dout_head, dout_row), (dout_cov_ptr, dout_cov_entry, dout_cov_head, dout_cov_row)
    dq, other_q = (dq_ptr, dq_entry, dq_head, dq_row), (other_q_ptr, other_q_entry, other_q_head, other_q_row)
    other_k = other_k_ptr, other_k_entry, other_k_head, other_k_row
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    pair = tl.program_id(0) % (batch * heads)
    entry, head = pair // heads, pair % heads
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // (batch * heads)
    first_row = tile * BLOCK_M
    start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
    rows = first_row + tl.arange(0, BLOCK_M)
    seat = seats(entry, start, rows, length)
    at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)

    q_tile = load_tile(q, head, seat, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    w_start = table_start(start, length, table_rows, VARLEN, ALIGN_RIGHT, PER_ENTRY)
    delta = tl.zeros((BLOCK_M,), ACC)
    if TABLES:
        dq_a_tile = load_tile(dq_a, head, seat, R, BLOCK_R)  # [BLOCK_M, BLOCK_R]
        dk_a_tile = load_tile(dk_a, head, seat, R, BLOCK_R)
        space = load_tile(q_a, head, seat, R, BLOCK_R).to(ACC)
        if POINTS:
            space = before_points(space, R, BLOCK_R)
        delta += tl.sum(dq_a_tile.to(ACC) * space, 1)
        space = load_tile(k_a, head, seat, R, BLOCK_R).to(ACC)
        if POINTS:
            space = before_points(space, R, BLOCK_R)
        delta += tl.sum(dk_a_tile.to(ACC) * space, 1)
    if VALUES:
        dout_tile = load_tile(dout, head, seat, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
        saved = load_tile(weighted, head, seat, DV, BLOCK_DV).to(ACC)
        delta += tl.sum(dout_tile.to(ACC) * saved, 1)
    if v_cov_ptr is not None:
        dcov_tile = load_tile(dout_cov, head, seat, DV, BLOCK_DV)
        saved = load_tile(weighted_cov, head, seat, DV, BLOCK_DV).to(ACC)
        delta += 2 * tl.sum(dcov_tile.to(ACC) * saved, 1)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + tile.to(tl.int64) * (batch * heads) + pair, tl.sum(delta, 0))
    tl.store(delta_ptr + at, delta, mask=rows < length)
    lse = load_lse(lse_ptr, at, rows, length)
    if other_q_ptr is not None:
        gate = load_gate(gate_ptr, gate_stride, head, ACC)
        other_gate = load_gate(other_gate_ptr, gate_stride, head, ACC)
        other_q_tile = load_tile(other_q, head, seat, OTHER_D, BLOCK_OTHER_D)  # [BLOCK_M, BLOCK_OTHER_D]
        other_lse = load_lse(other_lse_ptr, at, rows, length)

    dq_sum = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    # First the tiles that need no mask; with dropout or covariances two loops would spill registers
    SPLIT: tl.constexpr = seed_ptr is None and v_cov_ptr is None
    end = tl.where(first_row < length, tl.minimum(length, first_row + BLOCK_M) if CAUSAL else length, 0)
    if SKIP:
        end = tl.where(head < plain_heads, 0, end)
    diagonal = tl.minimum(first_row if CAUSAL else length, end) // BLOCK_N * BLOCK_N if SPLIT else 0
    for MASKED in tl.static_range(0 if SPLIT else 1, 2):
        for low in range(diagonal if MASKED else 0, end if MASKED else diagonal, BLOCK_N):
            columns = low + tl.arange(0, BLOCK_N)
            column_seat, table_seat = key_seats(entry, start, w_start, columns, length)
            k_tile = load_tile(k, head // K_GROUP, column_seat, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            weights = known_softmax_tile(
                q_tile, k_tile, lse, rows, columns, length, score_scale, DISTANCE, MASKED, CAUSAL, PRECISION
            )
            dweights = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            if VALUES:
                v_seat = column_seat
                if SHIFT:
                    step = step_of(head, plain_heads)
                    v_seat = seats(entry, start, columns + step, length)
                v_tile = load_tile(v, head // V_GROUP, v_seat, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
                dweights = dot(dout_tile, tl.trans(v_tile), PRECISION)
                if SHIFT and MASKED:
                    dweights = tl.where(columns[None, :] + step <= rows[:, None], dweights, 0.0)
                if v_cov_ptr is not None:
                    mixed = weights
                    if other_q_ptr is not None:
                        other_k_tile = load_tile(other_k, head // OTHER_GROUP, column_seat, OTHER_D, BLOCK_OTHER_D)
                        other = known_softmax_tile(
                            other_q_tile, other_k_tile, other_lse, rows, columns, length, other_scale,
                            OTHER_DISTANCE, MASKED, CAUSAL, PRECISION,
                        )  # fmt: skip
                        mixed = gate * weights + other_gate * other
                    cov_tile = load_tile(v_cov, head // V_GROUP, column_seat, DV, BLOCK_DV)
                    dweights += mixed * dot(dcov_tile, tl.trans(cov_tile), PRECISION) * (2 * drop_scale)
                if seed_ptr is not None:
                    kept = keep_tile(seed_ptr, entry, head, rows, low, drop_threshold, BLOCK_N)
                    dweights = tl.where(kept, dweights * drop_scale, 0.0)
            if TABLES:
                w_tile = load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R)  # [BLOCK_N, BLOCK_R]
                dweights += dot(dq_a_tile, tl.trans(w_tile), PRECISION)
                w_tile = load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R)
                dweights += dot(dk_a_tile, tl.trans(w_tile), PRECISION)
            dscores = weights * (dweights - delta[:, None])
            dq_sum += dot(dscores.to(DTYPE), k_tile, PRECISION)

    dq_sum = dq_sum * score_factor(rows, length, score_scale * load_gate(gate_ptr, gate_stride, head, ACC), CAUSAL)
    if POINTS and not TABLES:
        dq_sum = dq_sum * slope_of_points(q_tile.to(ACC), R, BLOCK_R)
    store_tile(dq, head, padded_seats(entry, start, rows, length, rows_total, not VARLEN), dq_sum, D, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def _tiled_bwd_columns_kernel(
    q_ptr, q_entry, q_head, q_row, k_ptr, k_entry, k_head, k_row, v_ptr, v_entry, v_head, v_row,
    v_cov_ptr, v_cov_entry, v_cov_head, v_cov_row, w_q_ptr, w_q_entry, w_q_head, w_q_row,
    w_k_ptr, w_k_entry, w_k_head, w_k_row, dq_a_ptr, dq_a_entry, dq_a_head, dq_a_row,
    dk_a_ptr, dk_a_entry, dk_a_head, dk_a_row, dout_ptr, dout_entry, dout_head, dout_row,
    dout_cov_ptr, dout_cov_entry, dout_cov_head, dout_cov_row, dv_added_ptr, dv_added_entry, dv_added_head, dv_added_row,
    dk_ptr, dk_entry, dk_head, dk_row, dv_ptr, dv_entry, dv_head, dv_row, dv_cov_ptr, dv_cov_entry, dv_cov_head, dv_cov_row,
    other_q_ptr, other_q_entry, other_q_head, other_q_row, other_k_ptr, other_k_entry, other_k_head, other_k_row,
    other_lse_ptr, other_gate_ptr, other_scale, lse_ptr, delta_ptr, gate_ptr, gate_stride, bounds_ptr, seed_ptr,
    rows_total, max_len, least, table_rows, batch, heads,
    score_scale, drop_threshold, drop_scale, plain_heads,
    TABLES: tl.constexpr, VALUES: tl.constexpr, ADDED: tl.constexpr, SHIFT: tl.constexpr, SKIP: tl.constexpr,
    DISTANCE: tl.constexpr, POINTS: tl.constexpr, OTHER_DISTANCE: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, OTHER_GROUP: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, OTHER_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OTHER_D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q, k = (q_ptr, q_entry, q_head, q_row), (k_ptr, k_entry, k_head, k_row)
    v, v_cov = (v_ptr, v_entry, v_head, v_row), (v_cov_ptr, v_cov_entry, v_cov_head, v_cov_row)
    w_q, w_k = (w_q_ptr, w_q_entry, w_q_head, w_q_row), (w_k_ptr, w_k_entry, w_k_head, w_k_row)
    dq_a, dk_a = (dq_a_ptr, dq_a_entry, dq_a_head, dq_a_row), (dk_a_ptr, dk_a_entry, dk_a_head, dk_a_row)
    dout, dout_cov = (dout_ptr, dout_entry, dout_head, dout_row), (dout_cov_ptr, dout_cov_entry, dout_cov_head, dout_cov_row)
    dv_added, dk = (dv_added_ptr, dv_added_entry, dv_added_head, dv_added_row), (dk_ptr, dk_entry, dk_head, dk_row)
    dv, dv_cov = (dv_ptr, dv_entry, dv_head, dv_row), (dv_cov_ptr, dv_cov_entry, dv_cov_head, dv_cov_row)
    other_q = other_q_ptr, other_q_entry, other_q_head, other_q_row
    other_k = other_k_ptr, other_k_entry, other_k_head, other_k_row
    owners = heads // GROUP  # a program owns columns of GROUP query heads, which share k (if K_GROUP > 1), v or both
    pair = tl.program_id(0) % (batch * owners)
    entry, owner = pair // owners, pair % owners
    v_head = owner * GROUP // V_GROUP
    first_column = (tl.program_id(0) // (batch * owners)) * BLOCK_N
    start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
    columns = first_column + tl.arange(0, BLOCK_N)
    w_start = table_start(start, length, table_rows, VARLEN, ALIGN_RIGHT, PER_ENTRY)
    column_seat, table_seat = key_seats(entry, start, w_start, columns, length)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    first_row = (first_column // BLOCK_M) * BLOCK_M if CAUSAL else first_column * 0

    dk_sum = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    step = 0
    v_seat = column_seat
    if SHIFT:  # alike for all heads that share the values
        step = step_of(owner * GROUP, plain_heads)
        v_seat = seats(entry, start, columns + step, length)
    if VALUES:
        dv_sum = tl.zeros((BLOCK_N, BLOCK_DV), ACC)
        v_tile = load_tile(v, v_head, v_seat, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
        if ADDED:
            dv_sum += load_tile(dv_added, owner, v_seat, DV, BLOCK_DV)
    if DISTANCE:
        dscore_sums = tl.zeros((BLOCK_N,), ACC)
    if v_cov_ptr is not None:
        dv_cov_sum = tl.zeros((BLOCK_N, BLOCK_DV), ACC)
        cov_tile = load_tile(v_cov, v_head, column_seat, DV, BLOCK_DV)
    for member in tl.range(GROUP):
        head = owner * GROUP + member
        k_tile = load_tile(k, head // K_GROUP, column_seat, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        gate = load_gate(gate_ptr, gate_stride, head, ACC)
        if TABLES:
            w_q_tile = load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R)  # [BLOCK_N, BLOCK_R]
            w_k_tile = load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R)
        if other_q_ptr is not None:
            other_gate = load_gate(other_gate_ptr, gate_stride, head, ACC)
            other_k_tile = load_tile(other_k, head // OTHER_GROUP, column_seat, OTHER_D, BLOCK_OTHER_D)  # [BLOCK_N, BLOCK_OTHER_D]
        if K_GROUP == 1:
            dk_sum = tl.zeros((BLOCK_N, BLOCK_D), ACC)
            if DISTANCE:
                dscore_sums = tl.zeros((BLOCK_N,), ACC)
        end = tl.where(first_column < length, length, 0)
        if SKIP:
            end = tl.where(head < plain_heads, 0, end)
        for low in range(first_row, end, BLOCK_M):
            rows = low + tl.arange(0, BLOCK_M)
            seat = seats(entry, start, rows, length)
            at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)
            q_tile = load_tile(q, head, seat, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            lse = load_lse(lse_ptr, at, rows, length)
            weights = known_softmax_tile(
                q_tile, k_tile, lse, rows, columns, length, score_scale, DISTANCE, True, CAUSAL, PRECISION
            )
            dweights = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            if VALUES:
                dout_tile = load_tile(dout, head, seat, DV, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
                dweights = dot(dout_tile, tl.trans(v_tile), PRECISION)
                met = weights
                if SHIFT:
                    before = columns[None, :] + step <= rows[:, None]
                    dweights = tl.where(before, dweights, 0.0)
                    met = tl.where(before, weights, 0.0)
                if v_cov_ptr is not None:
                    mixed = weights
                    if other_q_ptr is not None:
                        other_q_tile = load_tile(other_q, head, seat, OTHER_D, BLOCK_OTHER_D)  # [BLOCK_M, BLOCK_OTHER_D]
                        other_lse = load_lse(other_lse_ptr, at, rows, length)
                        other = known_softmax_tile(
                            other_q_tile, other_k_tile, other_lse, rows, columns, length, other_scale,
                            OTHER_DISTANCE, True, CAUSAL, PRECISION,
                        )  # fmt: skip
                        mixed = gate * weights + other_gate * other
                    dcov_tile = load_tile(dout_cov, head, seat, DV, BLOCK_DV)
                    dweights += mixed * dot(dcov_tile, tl.trans(cov_tile), PRECISION) * (2 * drop_scale)
                if seed_ptr is not None:
                    kept = keep_tile(seed_ptr, entry, head, rows, first_column, drop_threshold, BLOCK_N)
                    dweights = tl.where(kept, dweights * drop_scale, 0.0)
                    met = tl.where(kept, met * drop_scale, 0.0)
                    if dv_cov_ptr is not None:
                        mixed = tl.where(kept, mixed * drop_scale, 0.0)
                dv_sum += dot(tl.trans((met * gate).to(DTYPE)), dout_tile, PRECISION)
                if dv_cov_ptr is not None:
                    dv_cov_sum += dot(tl.trans((mixed * mixed).to(DTYPE)), dcov_tile, PRECISION)
            if TABLES:
                dweights += dot(load_tile(dq_a, head, seat, R, BLOCK_R), tl.trans(w_q_tile), PRECISION)
                dweights += dot(load_tile(dk_a, head, seat, R, BLOCK_R), tl.trans(w_k_tile), PRECISION)
            delta = load_rows(delta_ptr, at, rows, length)
            dscores = (weights * (dweights - delta[:, None]) * score_factor(rows, length, score_scale * gate, CAUSAL)).to(DTYPE)
            dk_sum += dot(tl.trans(dscores), q_tile, PRECISION)
            if DISTANCE:
                dscore_sums += tl.sum(dscores.to(ACC), 0)
        if K_GROUP == 1:
            if DISTANCE:
                dk_sum -= k_tile.to(ACC) * dscore_sums[:, None]
            if POINTS and not TABLES:
                dk_sum = dk_sum * slope_of_points(k_tile.to(ACC), R, BLOCK_R)
            store_tile(dk, head, padded_seats(entry, start, columns, length, rows_total, not VARLEN), dk_sum, D, BLOCK_D)
    padded_seat = padded_seats(entry, start, columns, length, rows_total, not VARLEN)
    if K_GROUP > 1:
        if DISTANCE:
            k_tile = load_tile(k, owner, column_seat, D, BLOCK_D)
            dk_sum -= k_tile.to(ACC) * dscore_sums[:, None]
        store_tile(dk, owner, padded_seat, dk_sum, D, BLOCK_D)
    if VALUES:
        if SHIFT:
            padded_seat = padded_seats(entry, start, columns + step, length, rows_total, not VARLEN)
            if first_column == 0:  # no weight falls on the first item
                entry_, start_, none, at, filled = padded_seats(entry, start, columns, length, rows_total, not VARLEN)
                store_zeros(dv, owner, (entry_, start_, none, at, filled & (columns < step)), DV, BLOCK_DV)
        store_tile(dv, owner, padded_seat, dv_sum, DV, BLOCK_DV)
    if dv_cov_ptr is not None:
        store_tile(dv_cov, owner, padded_seat, dv_cov_sum, DV, BLOCK_DV)


class TiledBackward:
    """The launches of one backward and the tensors between them."""

    def __init__(self, problem: Problem, saved: list[Tensor]) -> None:
        p = self.problem = problem
        self.saved = dict(zip(tiled_widths(p), saved, strict=True))
        self.delta = p.row_numbers()
        g = self.gradients = Gradients(p)
        self.dq_a, self.dk_a = (self.space(p.compared * p.rank) for _ in range(2)) if p.w_q is not None else (g.dq, g.dq)

    def space(self, features: int) -> Tensor:
        return allocate(self.problem.q, self.problem.heads, features, self.problem.call.varlen)

    def launch_stage(self, higher: bool, douts: list[Tensor], dvs: list[Tensor | None], dv_added: Tensor | None = None) -> None:
        """Compute a stage's dq and dk (in stage 2 dQ_A and dK_A) and dvs, of values and covariances. douts: of the outputs."""
        p, saved = self.problem, self.saved
        needed = p.call.stochastic and p.call.refinement == "additive"
        arguments = stage_arguments(p, saved, higher)
        arguments |= other_stage_arguments(p, saved, higher, arguments, needed=needed)
        arguments |= {"delta_ptr": self.delta, "dout": p.view(douts[0]), "dout_cov": p.covariance_view(douts[-1])}
        arguments |= {"dq_a": p.view(self.dq_a), "dk_a": p.view(self.dk_a)}
        dq, dk = (self.dq_a, self.dk_a) if higher else (self.gradients.dq, self.gradients.dk)

        tile = p.config("tiled_bwd_rows")
        tiles = ceil_div(p.call.max_len, tile.block_m)
        kept = "higher" if higher else "first"
        weighted, weighted_cov = saved.get(f"{kept}_values", saved["out"]), saved.get(f"{kept}_cov", saved.get("out_cov"))
        spaces = {name: p.view(saved.get(name, dq)) for name in ("q_a", "k_a")}
        launch(
            _tiled_bwd_rows_kernel, (tiles * p.batch * p.heads,), tile, p.q.device,
            **flat(
                weighted=p.view(weighted), weighted_cov=p.covariance_view(weighted_cov), dq=p.view(dq),
                dgate_ptr=self.gradients.gate_parts(tiles * p.batch) if higher else None,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **spaces, **arguments,
            ),
        )  # fmt: skip

        tile = p.config("tiled_bwd_columns")
        group = max(arguments["K_GROUP"], arguments["V_GROUP"] if arguments["VALUES"] else 1)
        tiles = ceil_div(p.call.max_len, tile.block_n)
        dv, dv_cov = dvs
        assert dv is not None
        launch(
            _tiled_bwd_columns_kernel, (tiles * p.batch * p.heads // group,), tile, p.q.device,
            **flat(
                dk=p.view(dk), dv=p.view(dv), dv_cov=p.covariance_view(dv_cov) if arguments["VALUES"] else NO_VIEW,
                dv_added=p.view(dv if dv_added is None else dv_added), ADDED=dv_added is not None,
                GROUP=group, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **arguments,
            ),
        )  # fmt: skip

    def gather_lags(self) -> None:
        """Add to the gradients of rows those of their copies beside later rows."""
        if self.problem.lags is not None:
            launch_gather(self.problem, self.saved["q_a"], self.dq_a, self.dk_a, self.gradients)


def launch_tiled_backward(problem: Problem, douts: list[Tensor], saved: list[Tensor]) -> Gradients:
    """saved: what `launch_tiled_forward` returned."""
    p, refinement = problem, problem.call.refinement
    step = TiledBackward(p, saved)
    dvs = [step.gradients.dv, step.gradients.dv_cov]
    if refinement == "none":
        step.launch_stage(False, douts, dvs)
    elif refinement == "value":
        between = [step.space(p.v.shape[-1]) for _ in douts]
        step.launch_stage(True, douts, [between[0], between[-1]])
        step.gather_lags()
        step.launch_stage(False, between, dvs)
    elif refinement == "additive":  # stage 1 computes dv_cov of both stages, as their sum is squared
        from_higher = p.v.new_empty(p.v.shape, dtype=p.accumulator)
        step.launch_stage(True, douts, [from_higher, None])
        step.gather_lags()
        step.launch_stage(False, douts, dvs, dv_added=from_higher)
    else:
        step.launch_stage(True, douts, dvs)
        step.gather_lags()
        step.launch_stage(False, douts, dvs)
    if p.w_q is not None:
        launch_tables(p, step.saved, (step.dq_a, step.dk_a), step.gradients)
    return step.gradients
