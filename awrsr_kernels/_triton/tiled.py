"""The tiled regime, forward: any length, as in FlashAttention, where the tables are further values.

L positions, D, DV, R features of q, v and the tables; `# [BLOCK_M, BLOCK_D]` is the shape of a tile: BLOCK_M queries, BLOCK_N
keys.

One kernel, launched once per stage:

    "none"    out = P V
    stage 1   Q_A = P W_q, K_A = P W_k            and in the same pass Y = P V (value) or O_P = (P*Z) V (additive)
    stage 2   O_R = (R*Z) V (value: Y for V)      and in the same pass out = O_P + gate * O_R (additive)

In stochastic attention scores are distances (DISTANCE), and the same passes multiply squared weights by covariances (v_cov is not
None): C_1 = (P*Z)^2 V_cov in stage 1 (value: without Z), C_2 = (R*Z)^2 V_cov in stage 2. "additive" squares a sum, so its stage 2
recomputes P's tile next to R's (other_q is not None) for X = (P*Z*R*Z) V_cov. C_P = C_1 + gate X then replaces C_1, C_R = X +
gate C_2 is kept as well, and out_cov = C_P + gate C_R. Refinement "stochastic" turns Q_A and K_A into points before it stores them
(POINTS).

The backward needs O(L): Q_A, K_A, Y or O_P, O_R, their counterparts for covariances, and a log-sum-exp per row and stage, in units
of log 2.

With lags, Q_A and K_A are as wide as all the rows that T compares: stage 1 writes the row's own, and `lags.py` copies those before
beside it. With SHIFT, a head that is not plain meets the value after each column, but for the last. SKIP: stage 2 of "additive",
which plain heads do without.

If a batch with lengths also has short sequences, the short kernels run after these and write their rows; padding is written here.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .lags import launch_widen
from .launch import NO_VIEW, RUNTIME, ceil_div, flat, launch
from .primitives import (
    LOG2E,
    correlation_points,
    dot,
    keep_tile,
    key_seats,
    known_softmax_tile,
    load_gate,
    load_lse,
    load_table,
    load_tile,
    locate_long,
    padded_seats,
    row_index,
    score_tile,
    seats,
    step_of,
    store_tile,
    table_start,
    visible_tile,
)
from .problem import Problem, block_of


@triton.jit(do_not_specialize=RUNTIME)
def _tiled_fwd_kernel(
    q_ptr, q_entry, q_head, q_row, k_ptr, k_entry, k_head, k_row, v_ptr, v_entry, v_head, v_row,
    v_cov_ptr, v_cov_entry, v_cov_head, v_cov_row, w_q_ptr, w_q_entry, w_q_head, w_q_row,
    w_k_ptr, w_k_entry, w_k_head, w_k_row, added_ptr, added_entry, added_head, added_row,
    added_cov_ptr, added_cov_entry, added_cov_head, added_cov_row, q_a_ptr, q_a_entry, q_a_head, q_a_row,
    k_a_ptr, k_a_entry, k_a_head, k_a_row, weighted_ptr, weighted_entry, weighted_head, weighted_row,
    weighted_cov_ptr, weighted_cov_entry, weighted_cov_head, weighted_cov_row, out_ptr, out_entry, out_head, out_row,
    out_cov_ptr, out_cov_entry, out_cov_head, out_cov_row, other_q_ptr, other_q_entry, other_q_head, other_q_row,
    other_k_ptr, other_k_entry, other_k_head, other_k_row,
    lse_ptr, other_lse_ptr, other_scale,
    gate_ptr, gate_stride, bounds_ptr, seed_ptr,
    rows_total, max_len, least, table_rows, batch, heads,
    score_scale, drop_threshold, drop_scale, plain_heads,
    TABLES: tl.constexpr, VALUES: tl.constexpr, ADDED: tl.constexpr, SHIFT: tl.constexpr, SKIP: tl.constexpr,
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
    added = added_ptr, added_entry, added_head, added_row
    added_cov, q_a = (added_cov_ptr, added_cov_entry, added_cov_head, added_cov_row), (q_a_ptr, q_a_entry, q_a_head, q_a_row)
    k_a, weighted = (k_a_ptr, k_a_entry, k_a_head, k_a_row), (weighted_ptr, weighted_entry, weighted_head, weighted_row)
    weighted_cov = weighted_cov_ptr, weighted_cov_entry, weighted_cov_head, weighted_cov_row
    out, out_cov = (out_ptr, out_entry, out_head, out_row), (out_cov_ptr, out_cov_entry, out_cov_head, out_cov_row)
    other_q = other_q_ptr, other_q_entry, other_q_head, other_q_row
    other_k = other_k_ptr, other_k_entry, other_k_head, other_k_row
    pair = tl.program_id(0) % (batch * heads)
    entry, head = pair // heads, pair % heads
    # In the causal case the last rows have the most columns, so they start first.
    first_row = ((tl.num_programs(0) - 1 - tl.program_id(0)) // (batch * heads)) * BLOCK_M
    start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
    rows = first_row + tl.arange(0, BLOCK_M)
    seat = seats(entry, start, rows, length)
    at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32

    q_tile = load_tile(q, head, seat, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    w_start = table_start(start, length, table_rows, VARLEN, ALIGN_RIGHT, PER_ENTRY)
    peak = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    if TABLES:
        q_a_sum = tl.zeros((BLOCK_M, BLOCK_R), ACC)
        k_a_sum = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    if VALUES:
        sums = tl.zeros((BLOCK_M, BLOCK_DV), ACC)
    if v_cov_ptr is not None:
        cov_sums = tl.zeros((BLOCK_M, BLOCK_DV), ACC)
    if other_q_ptr is not None:
        cross_sums = tl.zeros((BLOCK_M, BLOCK_DV), ACC)
        other_q_tile = load_tile(other_q, head, seat, OTHER_D, BLOCK_OTHER_D)  # [BLOCK_M, BLOCK_OTHER_D]
        other_lse = load_lse(other_lse_ptr, at, rows, length)

    end = tl.where(first_row < length, tl.minimum(length, first_row + BLOCK_M) if CAUSAL else length, 0)
    if SKIP:
        end = tl.where(head < plain_heads, 0, end)
    # First the tiles that need no mask; with dropout or covariances two loops would spill registers
    SPLIT: tl.constexpr = seed_ptr is None and v_cov_ptr is None
    diagonal = tl.minimum(first_row if CAUSAL else length, end) // BLOCK_N * BLOCK_N if SPLIT else 0
    for MASKED in tl.static_range(0 if SPLIT else 1, 2):
        for low in range(diagonal if MASKED else 0, end if MASKED else diagonal, BLOCK_N):
            columns = low + tl.arange(0, BLOCK_N)
            column_seat, table_seat = key_seats(entry, start, w_start, columns, length)
            k_tile = load_tile(k, head // K_GROUP, column_seat, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            scores = score_tile(q_tile, k_tile, DISTANCE, PRECISION) * (score_scale * LOG2E)  # [BLOCK_M, BLOCK_N], like all weights
            if MASKED:
                scores = tl.where(visible_tile(rows, columns, length, CAUSAL), scores, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(scores, 1))  # finite: every row of a tile sees a column of it
            weights = tl.exp2(scores - new_peak[:, None])
            decay = tl.exp2(peak - new_peak)
            total = total * decay + tl.sum(weights, 1)
            peak = new_peak
            if TABLES:
                w_tile = load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R)  # [BLOCK_N, BLOCK_R]
                q_a_sum = q_a_sum * decay[:, None] + dot(weights.to(DTYPE), w_tile, PRECISION)
                w_tile = load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R)
                k_a_sum = k_a_sum * decay[:, None] + dot(weights.to(DTYPE), w_tile, PRECISION)
            v_seat = column_seat
            if SHIFT:
                step = step_of(head, plain_heads)
                v_seat = seats(entry, start, columns + step, length)
                if MASKED:
                    weights = tl.where(columns[None, :] + step <= rows[:, None], weights, 0.0)
            if VALUES and seed_ptr is not None:
                weights = tl.where(keep_tile(seed_ptr, entry, head, rows, low, drop_threshold, BLOCK_N), weights, 0.0)
            if other_q_ptr is not None:  # before the other products, so that the tile of the other weights is soon free again
                cov_tile = load_tile(v_cov, head // V_GROUP, column_seat, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
                other_k_tile = load_tile(other_k, head // OTHER_GROUP, column_seat, OTHER_D, BLOCK_OTHER_D)
                other = known_softmax_tile(
                    other_q_tile, other_k_tile, other_lse, rows, columns, length, other_scale,
                    OTHER_DISTANCE, MASKED, CAUSAL, PRECISION,
                )  # fmt: skip
                cross_sums = cross_sums * decay[:, None] + dot((weights * other).to(DTYPE), cov_tile, PRECISION)
            if VALUES:
                v_tile = load_tile(v, head // V_GROUP, v_seat, DV, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
                sums = sums * decay[:, None] + dot(weights.to(DTYPE), v_tile, PRECISION)
            if v_cov_ptr is not None:
                if other_q_ptr is None:
                    cov_tile = load_tile(v_cov, head // V_GROUP, column_seat, DV, BLOCK_DV)
                cov_sums = cov_sums * (decay * decay)[:, None] + dot((weights * weights).to(DTYPE), cov_tile, PRECISION)

    total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing gets zeros and a finite log-sum-exp
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(lse_ptr + at, shift + tl.log2(total), mask=rows < length)
    share = tl.where(rows < length, 1.0 / total, 0.0)[:, None]  # zeros for the padding
    padded_seat = padded_seats(entry, start, rows, length, rows_total, not VARLEN)
    if TABLES:
        q_a_sum, k_a_sum = q_a_sum * share, k_a_sum * share
        if POINTS:
            q_a_sum = correlation_points(q_a_sum, R, BLOCK_R)
            k_a_sum = correlation_points(k_a_sum, R, BLOCK_R)
        store_tile(q_a, head, padded_seat, q_a_sum, R, BLOCK_R)
        store_tile(k_a, head, padded_seat, k_a_sum, R, BLOCK_R)
    if VALUES:
        sums = sums * (share * drop_scale)  # not applied to weights, which are rounded before the product
        store_tile(weighted, head, padded_seat, sums, DV, BLOCK_DV)
        if ADDED:
            gate = load_gate(gate_ptr, gate_stride, head, ACC)
            sums = load_tile(added, head, seat, DV, BLOCK_DV).to(ACC) + gate * sums
            store_tile(out, head, padded_seat, sums, DV, BLOCK_DV)
    if v_cov_ptr is not None:
        share = share * drop_scale
        cov_sums = cov_sums * (share * share)
        if other_q_ptr is not None:
            cross_sums = cross_sums * (share * drop_scale)
            cov_sums = cross_sums + gate * cov_sums
            first_sums = load_tile(added_cov, head, seat, DV, BLOCK_DV).to(ACC)
            first_sums += gate * cross_sums
            store_tile(added_cov, head, seat, first_sums, DV, BLOCK_DV)
            first_sums += gate * cov_sums
            store_tile(out_cov, head, padded_seat, first_sums, DV, BLOCK_DV)
        store_tile(weighted_cov, head, padded_seat, cov_sums, DV, BLOCK_DV)


def tiled_widths(problem: Problem) -> dict[str, int | None]:
    """Features of the outputs, "out" and "out_cov", and of all that the backward needs; None: a number per row."""
    p, refinement = problem, problem.call.refinement
    d_v = p.v.shape[-1]
    widths: dict[str, int | None] = {"out": d_v} | ({"out_cov": d_v} if p.call.stochastic else {})
    widths["first_lse"] = None
    if refinement != "none":
        widths |= {"q_a": p.compared * p.rank, "k_a": p.compared * p.rank, "higher_lse": None}
    kinds = ("values", "cov") if p.call.stochastic else ("values",)
    if refinement in ("value", "additive"):
        widths |= {f"first_{kind}": d_v for kind in kinds}  # Y or O_P; P^2 V_cov or C_P
    if refinement == "additive":
        widths |= {f"higher_{kind}": d_v for kind in kinds}  # O_R, C_R; in other refinements these are the outputs
    return widths


def stage_arguments(problem: Problem, buffers: dict[str, Tensor], higher: bool) -> dict[str, Any]:
    """Arguments that forward and backward of a stage share: the tensors it uses as q, k, v, their widths, its scale and dropout."""
    p, refinement = problem, problem.call.refinement
    dropped = refinement in ("none", "additive") or higher
    arguments = p.sequences | p.widths | p.dropout | {"batch": p.batch, "heads": p.heads, "least": p.least()}
    if not dropped:
        arguments |= {"seed_ptr": None, "drop_scale": 1.0}
    arguments |= {"gate_ptr": p.gate if higher else None, "gate_stride": p.gate_stride()}
    arguments |= {"plain_heads": p.call.plain_heads, "SHIFT": p.call.shift, "SKIP": higher and p.call.plain_heads > 0}
    values = higher or refinement in ("none", "value", "additive")
    arguments |= {
        "TABLES": refinement != "none" and not higher,
        "VALUES": values,
        "DISTANCE": refinement == "stochastic" if higher else p.call.stochastic,
        "POINTS": refinement == "stochastic",
        "score_scale": p.scales()[higher],
        "lse_ptr": buffers["higher_lse" if higher else "first_lse"],
    }
    views = dict(p.tensors)
    if not values:
        views["v_cov"] = NO_VIEW
    groups = {"K_GROUP": p.group, "V_GROUP": p.group}
    if higher:
        views |= {"q": p.view(buffers["q_a"]), "k": p.view(buffers["k_a"])}
        width = p.compared * p.rank
        arguments |= {"D": width, "BLOCK_D": block_of(width)}
        groups["K_GROUP"] = 1
        if refinement == "value":
            views |= {"v": p.view(buffers["first_values"]), "v_cov": p.covariance_view(buffers.get("first_cov"))}
            groups["V_GROUP"] = 1
    return arguments | views | groups


def other_stage_arguments(
    problem: Problem, buffers: dict[str, Tensor], higher: bool, here: dict[str, Any], needed: bool
) -> dict[str, Any]:
    """Arguments to recompute the other stage's weights, if `needed`: where the sum of both stages is squared. Otherwise None.

    higher, here: the stage itself and its arguments.
    """
    there = stage_arguments(problem, buffers, not higher) if needed else here
    views = {"other_q": "q", "other_k": "k"}
    other = {"other_lse_ptr": "lse_ptr", "other_gate_ptr": "gate_ptr", "other_scale": "score_scale"}
    widths = {"OTHER_GROUP": "K_GROUP", "OTHER_D": "D", "BLOCK_OTHER_D": "BLOCK_D", "OTHER_DISTANCE": "DISTANCE"}
    arguments = {name: there[x] if needed else NO_VIEW for name, x in views.items()}
    arguments |= {name: there[x] if needed else None for name, x in other.items()}
    return arguments | {name: there[x] for name, x in widths.items()}


def launch_tiled_forward(problem: Problem, keep: bool = True) -> list[Tensor]:
    """The outputs (entries, H, rows, D_v) and, if `keep`, what the backward needs, in the order of `tiled_widths`."""
    p = problem
    buffers = p.buffers(tiled_widths(p))
    unused, out_cov = p.view(buffers["out"]), p.covariance_view(buffers.get("out_cov"))
    tile = p.config("tiled_fwd")
    programs = ceil_div(p.call.max_len, tile.block_m) * p.batch * p.heads
    stages = [False] if p.call.refinement == "none" else [False, True]
    for higher in stages:
        if higher and p.lags is not None:
            launch_widen(p, buffers["q_a"], buffers["k_a"])
        ADDED = higher and p.call.refinement == "additive"
        kept = "higher" if higher else "first"
        weighted, weighted_cov = buffers.get(f"{kept}_values", buffers["out"]), buffers.get(f"{kept}_cov", buffers.get("out_cov"))
        spaces = {name: p.view(buffers.get(name, buffers["out"])) for name in ("q_a", "k_a")}
        arguments = stage_arguments(p, buffers, higher)
        arguments |= other_stage_arguments(p, buffers, higher, arguments, needed=ADDED and p.call.stochastic)
        del arguments["other_gate_ptr"]  # the gate of stage 1 is 1
        launch(
            _tiled_fwd_kernel, (programs,), tile, p.q.device,
            **flat(
                added=p.view(buffers["first_values"]) if ADDED else unused,
                added_cov=p.covariance_view(buffers.get("first_cov")) if ADDED else NO_VIEW,
                weighted=p.view(weighted), weighted_cov=p.covariance_view(weighted_cov), out=unused, out_cov=out_cov, ADDED=ADDED,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **spaces, **arguments,
            ),
        )  # fmt: skip
    return list(buffers.values()) if keep else [buffers[name] for name in ("out", "out_cov") if name in buffers]
