"""The tiled regime, backward: the gradients of the tables.

The kernel owns rows of the tables, dW = p^T [dQ_A | dK_A], and walks over the sequences that share them; otherwise as
`tiled_bwd.py`, which has the formulas.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import RUNTIME, ceil_div, flat, launch
from .primitives import dot, known_softmax_tile, load_lse, load_tile, locate_long, padded_seats, row_index, seats, store_tile
from .problem import Problem
from .reduce import Gradients
from .tiled import stage_arguments


@triton.jit(do_not_specialize=RUNTIME)
def _tiled_bwd_tables_kernel(
    q_ptr, q_entry, q_head, q_row, k_ptr, k_entry, k_head, k_row, dq_a_ptr, dq_a_entry, dq_a_head, dq_a_row,
    dk_a_ptr, dk_a_entry, dk_a_head, dk_a_row, dw_q_ptr, dw_q_entry, dw_q_head, dw_q_row,
    dw_k_ptr, dw_k_entry, dw_k_head, dw_k_row,
    lse_ptr, bounds_ptr,
    rows_total, max_len, least, batch, heads, splits, score_scale,
    DISTANCE: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    K_GROUP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q, k = (q_ptr, q_entry, q_head, q_row), (k_ptr, k_entry, k_head, k_row)
    dq_a, dk_a = (dq_a_ptr, dq_a_entry, dq_a_head, dq_a_row), (dk_a_ptr, dk_a_entry, dk_a_head, dk_a_row)
    dw_q, dw_k = (dw_q_ptr, dw_q_entry, dw_q_head, dw_q_row), (dw_k_ptr, dw_k_entry, dw_k_head, dw_k_row)
    pair = tl.program_id(0) % (splits * heads)
    split, head = pair // heads, pair % heads
    first_column = (tl.program_id(0) // (splits * heads)) * BLOCK_N
    window = first_column + tl.arange(0, BLOCK_N)  # rows of the table, from the window's first
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    SHIFTED: tl.constexpr = ALIGN_RIGHT and not PER_ENTRY and (VARLEN or bounds_ptr is not None)
    dw_q_sum = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    dw_k_sum = tl.zeros((BLOCK_N, BLOCK_R), ACC)

    for step in range(split, batch, splits):
        entry = tl.full((), step, tl.int32)
        start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
        offset = max_len - length if SHIFTED else length * 0
        columns = tl.where(window < offset, length, window - offset)  # rows before the first item: masked like those after the last
        k_tile = load_tile(k, head // K_GROUP, seats(entry, start, columns, length), D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        first_row = tl.maximum(first_column - offset, 0) // BLOCK_M * BLOCK_M if CAUSAL else length * 0
        reached = (first_column < offset + length) & (first_column + BLOCK_N > offset)
        # Hoisted, |k|^2 would be spilled next to tiles of that height
        for low in tl.range(first_row, tl.where(reached, length, 0), BLOCK_M, disable_licm=DISTANCE and BLOCK_M > 64):
            rows = low + tl.arange(0, BLOCK_M)
            seat = seats(entry, start, rows, length)
            q_tile = load_tile(q, head, seat, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            lse = load_lse(lse_ptr, row_index(entry, head, heads, start, rows, rows_total, VARLEN), rows, length)
            weights = known_softmax_tile(q_tile, k_tile, lse, rows, columns, length, score_scale, DISTANCE, True, CAUSAL, PRECISION)
            at_columns = tl.trans(weights.to(DTYPE))  # [BLOCK_N, BLOCK_M]
            dw_q_sum += dot(at_columns, load_tile(dq_a, head, seat, R, BLOCK_R), PRECISION)  # [BLOCK_N, BLOCK_R]
            dw_k_sum += dot(at_columns, load_tile(dk_a, head, seat, R, BLOCK_R), PRECISION)

    if PER_ENTRY:  # a program has one sequence
        start, length = locate_long(bounds_ptr, split, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
        table_seat = padded_seats(split, start, window, length, rows_total, not VARLEN)
    else:
        table_seat = seats(split, split * 0, window, max_len)
    store_tile(dw_q, head, table_seat, dw_q_sum, R, BLOCK_R)
    store_tile(dw_k, head, table_seat, dw_k_sum, R, BLOCK_R)


def launch_tables(problem: Problem, saved: dict[str, Tensor], between: tuple[Tensor, Tensor], gradients: Gradients) -> None:
    """dW_q and dW_k from dQ_A and dK_A: per entry directly, shared ones as parts of splits of the batch."""
    p, per_entry = problem, problem.call.per_entry
    tile = p.config("tiled_bwd_tables")
    tiles = ceil_div(p.call.max_len, tile.block_n)
    splits = p.batch if per_entry else p.splits(tiles * p.heads)
    dw_q, dw_k = gradients.table_parts(splits, p.call.max_len)
    packed = per_entry and p.call.varlen
    used = _tiled_bwd_tables_kernel.arg_names
    shared = {name: value for name, value in flat(**stage_arguments(p, saved, higher=False)).items() if name in used}
    launch(
        _tiled_bwd_tables_kernel, (tiles * splits * p.heads,), tile, p.q.device,
        **flat(
            dq_a=p.view(between[0]), dk_a=p.view(between[1]), dw_q=p.view(dw_q, packed), dw_k=p.view(dw_k, packed),
            splits=splits, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **shared,
        ),
    )  # fmt: skip
