"""Lagged correlations in the tiled regime: rows before, copied beside each row of Q_A and K_A, and their gradients.

With A lags, a row of Q_A or K_A has A + 1 slots of R features: slot 0 is the row's own, slot a that of a rows before, in Q_A times
the factor of the lag, zero where the sequence has no such row. Stage 2 then sees wider rows, and nothing else changes.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch_config import Config
from .launch import RUNTIME, ceil_div, flat, launch
from .primitives import load_factor, load_tile, locate_long, seats, store_tile
from .problem import Problem
from .reduce import Gradients

ROWS = Config(16, 16, 4, 1)  # block_m rows at a time


@triton.jit
def slot_of(view, lag: tl.constexpr, R: tl.constexpr):
    """The view of a slot."""
    pointer, entry_stride, head_stride, row_stride = view
    return pointer + lag * R, entry_stride, head_stride, row_stride


@triton.jit(do_not_specialize=RUNTIME)
def _widen_kernel(
    q_a_ptr, q_a_entry, q_a_head, q_a_row, k_a_ptr, k_a_entry, k_a_head, k_a_row, lags_ptr, lags_head, bounds_ptr,
    rows_total, max_len, least, batch, heads,
    VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, LAGS: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    q_a, k_a = (q_a_ptr, q_a_entry, q_a_head, q_a_row), (k_a_ptr, k_a_entry, k_a_head, k_a_row)
    ACC: tl.constexpr = tl.float64 if q_a_ptr.dtype.element_ty == tl.float64 else tl.float32
    pair = tl.program_id(0) % (batch * heads)
    entry, head = pair // heads, pair % heads
    start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
    rows = (tl.program_id(0) // (batch * heads)) * BLOCK_M + tl.arange(0, BLOCK_M)
    seat = seats(entry, start, rows, length)
    for lag in tl.static_range(1, LAGS + 1):
        before = entry, start, 0, (rows - lag).to(tl.int64), (rows >= lag) & (rows < length)
        tile = load_tile(q_a, head, before, R, BLOCK_R).to(ACC) * load_factor(lags_ptr, lags_head, head, lag, ACC)
        store_tile(slot_of(q_a, lag, R), head, seat, tile, R, BLOCK_R)  # [BLOCK_M, BLOCK_R]
        store_tile(slot_of(k_a, lag, R), head, seat, load_tile(k_a, head, before, R, BLOCK_R), R, BLOCK_R)


@triton.jit(do_not_specialize=RUNTIME)
def _gather_kernel(
    q_a_ptr, q_a_entry, q_a_head, q_a_row, dq_a_ptr, dq_a_entry, dq_a_head, dq_a_row,
    dk_a_ptr, dk_a_entry, dk_a_head, dk_a_row, lags_ptr, lags_head, dlags_ptr, bounds_ptr,
    rows_total, max_len, least, batch, heads,
    VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, LAGS: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    q_a = q_a_ptr, q_a_entry, q_a_head, q_a_row
    dq_a, dk_a = (dq_a_ptr, dq_a_entry, dq_a_head, dq_a_row), (dk_a_ptr, dk_a_entry, dk_a_head, dk_a_row)
    ACC: tl.constexpr = tl.float64 if q_a_ptr.dtype.element_ty == tl.float64 else tl.float32
    pair = tl.program_id(0) % (batch * heads)
    entry, head = pair // heads, pair % heads
    start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
    rows = (tl.program_id(0) // (batch * heads)) * BLOCK_M + tl.arange(0, BLOCK_M)
    seat = seats(entry, start, rows, length)
    own = load_tile(q_a, head, seat, R, BLOCK_R).to(ACC)  # [BLOCK_M, BLOCK_R], like all tiles here
    dq_sum = load_tile(dq_a, head, seat, R, BLOCK_R).to(ACC)
    dk_sum = load_tile(dk_a, head, seat, R, BLOCK_R).to(ACC)
    part = dlags_ptr + tl.program_id(0).to(tl.int64) * LAGS
    for lag in tl.static_range(1, LAGS + 1):
        after = seats(entry, start, rows + lag, length)
        copied = load_tile(slot_of(dq_a, lag, R), head, after, R, BLOCK_R).to(ACC)
        tl.store(part + (lag - 1), tl.sum(tl.sum(copied * own, 1), 0))
        dq_sum += copied * load_factor(lags_ptr, lags_head, head, lag, ACC)
        dk_sum += load_tile(slot_of(dk_a, lag, R), head, after, R, BLOCK_R).to(ACC)
    store_tile(dq_a, head, seat, dq_sum, R, BLOCK_R)
    store_tile(dk_a, head, seat, dk_sum, R, BLOCK_R)


def _shared(problem: Problem) -> dict[str, object]:
    """Arguments of both kernels."""
    p = problem
    sequences = {name: p.sequences[name] for name in ("bounds_ptr", "rows_total", "max_len", "VARLEN", "ALIGN_RIGHT")}
    widths = {name: p.widths[name] for name in ("R", "BLOCK_R")}
    sizes = {"least": p.least(), "batch": p.batch, "heads": p.heads, "BLOCK_M": ROWS.block_m}
    return sequences | widths | p.lag_arguments() | sizes


def _tiles(problem: Problem) -> int:
    return ceil_div(problem.call.max_len, ROWS.block_m) * problem.batch


def launch_widen(problem: Problem, q_a: Tensor, k_a: Tensor) -> None:
    """Fill the other slots of Q_A and K_A from slot 0."""
    p = problem
    arguments = flat(q_a=p.view(q_a), k_a=p.view(k_a), **_shared(p))
    launch(_widen_kernel, (_tiles(p) * p.heads,), ROWS, p.q.device, **arguments)


def launch_gather(problem: Problem, q_a: Tensor, dq_a: Tensor, dk_a: Tensor, gradients: Gradients) -> None:
    """Add the gradients of copies to slot 0, and store parts of the gradient of the factors."""
    p = problem
    arguments = flat(q_a=p.view(q_a), dq_a=p.view(dq_a), dk_a=p.view(dk_a), dlags_ptr=gradients.lag_parts(_tiles(p)), **_shared(p))
    launch(_gather_kernel, (_tiles(p) * p.heads,), ROWS, p.q.device, **arguments)
