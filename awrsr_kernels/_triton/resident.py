"""The resident regime, forward: one program walks over all rows of a causal head of 65 to 256 items, in one launch.

L positions, D, DV, R features of q, v and the tables; `# [BLOCK, BLOCK_D]` is the shape of a tile: BLOCK rows or columns.

Row i of the higher-order weights needs K_A of rows up to i alone, so both stages of a block of rows follow each other. Q_A never
leaves the registers before its use; K_A, and in "value" Y = P V, go to memory and come back from the cache. Within a block the
tile on the diagonal comes first: from then on the peak is finite, and no other tile needs a mask. Rows beyond the sequence load
zeros and are not stored; columns beyond it are seen by such rows only.

A length seldom is a multiple of BLOCK. If at most NARROW items are left over, the first NARROW are a block of their own, so that
the others need no further one: 200 items are a block of 16 and three of 64. It comes first because its columns then make narrow
tiles with all later rows, which keep the warps busy that 16 rows would not; in the backward, whose tiles lie on their side, it is
the rest itself, and comes last.

The backward needs Q_A, K_A, Y or O_P = (P*Z) V, O_R = (R*Z) V (where that is not the output) and a log-sum-exp per row and stage.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import RUNTIME, flat, launch, view_of
from .primitives import (
    LOG2E,
    begin_softmax,
    block_seats,
    continue_softmax,
    diagonal,
    dot,
    keep_tile,
    load_gate,
    load_table,
    load_tile,
    locate_long,
    own_strides,
    row_index,
    store_padding,
    store_tile,
    table_start,
)
from .problem import Problem


@triton.jit
def first_sums(
    q_tile, k, v, w_q, w_k, peak, total, q_a_sum, k_a_sum, values, entry, head, kv_head, start, w_start, length, rows, before,
    factor, seed_ptr, drop_threshold,
    REFINEMENT: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running sums of a block of rows over the first-order weights, with COLUMNS columns more, all before the rows."""
    columns = before + tl.arange(0, COLUMNS)
    seat = block_seats(entry, start, columns, length, OFFSET)
    scores = dot(q_tile, tl.trans(load_tile(k, kv_head, seat, D, BLOCK_D)), PRECISION)  # [rows, COLUMNS]
    peak, total, weights, decay = continue_softmax(scores, factor, peak, total)
    if REFINEMENT != "none":
        table_seat = block_seats(entry, w_start, columns, length, OFFSET)
        half = weights.to(DTYPE)
        w_tile = load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R)
        q_a_sum = dot(half, w_tile, PRECISION, q_a_sum * decay[:, None])
        w_tile = load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R)
        k_a_sum = dot(half, w_tile, PRECISION, k_a_sum * decay[:, None])
    if REFINEMENT != "simple":
        if REFINEMENT != "value" and seed_ptr is not None:
            weights = tl.where(keep_tile(seed_ptr, entry, head, rows, before, drop_threshold, COLUMNS), weights, 0.0)
        values = dot(weights.to(DTYPE), load_tile(v, kv_head, seat, DV, BLOCK_DV), PRECISION, values * decay[:, None])
    return peak, total, q_a_sum, k_a_sum, values


@triton.jit
def higher_sums(
    q_a_tile, k_a, higher, peak, total, sums, entry, head, value_head, start, length, rows, before,
    factor, seed_ptr, drop_threshold,
    DTYPE: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same over the higher-order weights, which attend to `higher`: v, in "value" Y."""
    seat = block_seats(entry, start, before + tl.arange(0, COLUMNS), length, OFFSET)
    scores = dot(q_a_tile, tl.trans(load_tile(k_a, head, seat, R, BLOCK_R)), PRECISION)
    peak, total, weights, decay = continue_softmax(scores, factor, peak, total)
    if seed_ptr is not None:
        weights = tl.where(keep_tile(seed_ptr, entry, head, rows, before, drop_threshold, COLUMNS), weights, 0.0)
    sums = dot(weights.to(DTYPE), load_tile(higher, value_head, seat, DV, BLOCK_DV), PRECISION, sums * decay[:, None])
    return peak, total, sums


@triton.jit
def attend_rows(
    q, k, v, w_q, w_k, out, q_a, k_a, first_values, higher_values, first_lse_ptr, higher_lse_ptr, gate,
    entry, head, kv_head, heads, start, w_start, length, rows_total, low, begin,
    softmax_scale, refine_scale, seed_ptr, drop_threshold, drop_scale,
    REFINEMENT: tl.constexpr, KEEP: tl.constexpr, FIRST_SIGN: tl.constexpr, HIGHER_SIGN: tl.constexpr, VARLEN: tl.constexpr,
    DTYPE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, NARROW: tl.constexpr,
    ALONE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, OFFSET: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Both stages of ROWS rows from `low` on; earlier blocks have ROWS columns but for a narrow one, if `begin` is not 0. ALONE: no
    rows lie before these."""
    rows = low + tl.arange(0, ROWS)
    seat = block_seats(entry, start, rows, length, OFFSET)
    at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)
    q_tile = load_tile(q, head, seat, D, BLOCK_D)  # [ROWS, BLOCK_D]
    if FIRST_SIGN != 1:
        q_tile = (q_tile * FIRST_SIGN).to(DTYPE)
    v_tile = load_tile(v, kv_head, seat, DV, BLOCK_DV)  # [ROWS, BLOCK_DV]
    scores = dot(q_tile, tl.trans(load_tile(k, kv_head, seat, D, BLOCK_D)), PRECISION)  # [ROWS, ROWS], as all weights
    peak, total, weights = begin_softmax(diagonal(scores, float("-inf"), ROWS), softmax_scale * LOG2E)
    q_a_sum, k_a_sum, values = total, total, total  # what a refinement does not have
    if REFINEMENT != "none":
        table_seat = block_seats(entry, w_start, rows, length, OFFSET)
        half = weights.to(DTYPE)
        q_a_sum = dot(half, load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R), PRECISION)  # [ROWS, BLOCK_R]
        k_a_sum = dot(half, load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R), PRECISION)
    if REFINEMENT != "simple":
        if REFINEMENT != "value" and seed_ptr is not None:
            weights = tl.where(keep_tile(seed_ptr, entry, head, rows, low, drop_threshold, ROWS), weights, 0.0)
        values = dot(weights.to(DTYPE), v_tile, PRECISION)  # [ROWS, BLOCK_DV]
    if not ALONE:
        if NARROW < ROWS:
            if begin > 0:
                peak, total, q_a_sum, k_a_sum, values = first_sums(
                    q_tile, k, v, w_q, w_k, peak, total, q_a_sum, k_a_sum, values, entry, head, kv_head, start, w_start, length,
                    rows, begin * 0, softmax_scale * LOG2E, seed_ptr, drop_threshold,
                    REFINEMENT, DTYPE, D, DV, R, NARROW, BLOCK_D, BLOCK_DV, BLOCK_R, OFFSET, PRECISION,
                )  # fmt: skip
        for before in tl.range(begin, low, ROWS, disable_licm=True):
            peak, total, q_a_sum, k_a_sum, values = first_sums(
                q_tile, k, v, w_q, w_k, peak, total, q_a_sum, k_a_sum, values, entry, head, kv_head, start, w_start, length,
                rows, before, softmax_scale * LOG2E, seed_ptr, drop_threshold,
                REFINEMENT, DTYPE, D, DV, R, ROWS, BLOCK_D, BLOCK_DV, BLOCK_R, OFFSET, PRECISION,
            )  # fmt: skip
    share = (1.0 / total)[:, None]
    if KEEP:
        tl.store(first_lse_ptr + at, peak + tl.log2(total), mask=rows < length)
    if REFINEMENT == "additive" or REFINEMENT == "none":
        values = values * (share * drop_scale)  # applied to weights, the scale would be rounded with them
    if REFINEMENT == "value":
        v_tile = (values * share).to(DTYPE)
        store_tile(first_values, head, seat, v_tile, DV, BLOCK_DV)
    if REFINEMENT == "additive" and KEEP:
        store_tile(first_values, head, seat, values, DV, BLOCK_DV)

    if REFINEMENT != "none":
        q_a_tile = (q_a_sum * share).to(DTYPE)  # [ROWS, BLOCK_R]
        k_a_tile = (k_a_sum * share).to(DTYPE)
        store_tile(k_a, head, seat, k_a_tile, R, BLOCK_R)
        if KEEP:
            store_tile(q_a, head, seat, q_a_tile, R, BLOCK_R)
        if HIGHER_SIGN != 1:
            q_a_tile = (q_a_tile * HIGHER_SIGN).to(DTYPE)
        scores = dot(q_a_tile, tl.trans(k_a_tile), PRECISION)
        peak, total, weights = begin_softmax(diagonal(scores, float("-inf"), ROWS), refine_scale * LOG2E)
        if seed_ptr is not None:
            weights = tl.where(keep_tile(seed_ptr, entry, head, rows, low, drop_threshold, ROWS), weights, 0.0)
        sums = dot(weights.to(DTYPE), v_tile, PRECISION)  # [ROWS, BLOCK_DV]
        if not ALONE:
            if REFINEMENT == "value":
                higher, value_head = first_values, head
            else:
                higher, value_head = v, kv_head
            if NARROW < ROWS:
                if begin > 0:
                    peak, total, sums = higher_sums(
                        q_a_tile, k_a, higher, peak, total, sums, entry, head, value_head, start, length, rows, begin * 0,
                        refine_scale * LOG2E, seed_ptr, drop_threshold,
                        DTYPE, DV, R, NARROW, BLOCK_DV, BLOCK_R, OFFSET, PRECISION,
                    )  # fmt: skip
            for before in tl.range(begin, low, ROWS, disable_licm=True):
                peak, total, sums = higher_sums(
                    q_a_tile, k_a, higher, peak, total, sums, entry, head, value_head, start, length, rows, before,
                    refine_scale * LOG2E, seed_ptr, drop_threshold,
                    DTYPE, DV, R, ROWS, BLOCK_DV, BLOCK_R, OFFSET, PRECISION,
                )  # fmt: skip
        if KEEP:
            tl.store(higher_lse_ptr + at, peak + tl.log2(total), mask=rows < length)
        values_r = sums * ((1.0 / total)[:, None] * drop_scale)
        if REFINEMENT == "additive":
            if KEEP:
                store_tile(higher_values, head, seat, values_r, DV, BLOCK_DV)
            values_r = values + gate * values_r
    else:
        values_r = values
    store_tile(out, head, seat, values_r, DV, BLOCK_DV)
    tl.debug_barrier()  # K_A and Y of these rows are there for the whole program from here on


@triton.jit(do_not_specialize=RUNTIME)
def _resident_fwd_kernel(
    q_ptr, q_entry, q_head, q_row, k_ptr, k_entry, k_head, k_row, v_ptr, v_entry, v_head, v_row,
    w_q_ptr, w_q_entry, w_q_head, w_q_row, w_k_ptr, w_k_entry, w_k_head, w_k_row,
    out_ptr, q_a_ptr, k_a_ptr, first_values_ptr, higher_values_ptr, own_entry, own_head, own_row,
    first_lse_ptr, higher_lse_ptr, gate_ptr, gate_stride, bounds_ptr, seed_ptr,
    rows_total, max_len, least, table_rows, heads,
    softmax_scale, refine_scale, drop_threshold, drop_scale,
    REFINEMENT: tl.constexpr, KEEP: tl.constexpr, FIRST_SIGN: tl.constexpr, HIGHER_SIGN: tl.constexpr,
    VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr, GROUP: tl.constexpr, ALIKE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    if ALIKE:  # addresses within a tile are computed once for all
        k_entry, k_head, k_row, v_entry, v_head, v_row = q_entry, q_head, q_row, q_entry, q_head, q_row
        w_k_entry, w_k_head, w_k_row = w_q_entry, w_q_head, w_q_row
    q, k, v = (q_ptr, q_entry, q_head, q_row), (k_ptr, k_entry, k_head, k_row), (v_ptr, v_entry, v_head, v_row)
    w_q, w_k = (w_q_ptr, w_q_entry, w_q_head, w_q_row), (w_k_ptr, w_k_entry, w_k_head, w_k_row)
    r_entry, r_head, r_row = own_strides(q_entry, q_head, q_row, own_entry, own_head, own_row, R, ALIKE)
    out_entry, out_head, out_row = own_strides(q_entry, q_head, q_row, own_entry, own_head, own_row, DV, ALIKE)
    q_a, k_a = (q_a_ptr, r_entry, r_head, r_row), (k_a_ptr, r_entry, r_head, r_row)
    out, first_values = (out_ptr, out_entry, out_head, out_row), (first_values_ptr, out_entry, out_head, out_row)
    higher_values = higher_values_ptr, out_entry, out_head, out_row
    entry, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    kv_head = head // GROUP
    start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
    w_start = table_start(start, length, table_rows, VARLEN, ALIGN_RIGHT, PER_ENTRY)

    gate = load_gate(gate_ptr, gate_stride, head, ACC)
    begin = length * 0
    if NARROW < BLOCK:
        begin = tl.where((length % BLOCK > 0) & (length % BLOCK <= NARROW), NARROW, 0)
        if begin > 0:
            attend_rows(
                q, k, v, w_q, w_k, out, q_a, k_a, first_values, higher_values, first_lse_ptr, higher_lse_ptr, gate,
                entry, head, kv_head, heads, start, w_start, length, rows_total, begin * 0, begin,
                softmax_scale, refine_scale, seed_ptr, drop_threshold, drop_scale,
                REFINEMENT, KEEP, FIRST_SIGN, HIGHER_SIGN, VARLEN, DTYPE, D, DV, R, NARROW, NARROW, True,
                BLOCK_D, BLOCK_DV, BLOCK_R, OFFSET, PRECISION,
            )  # fmt: skip
    for low in tl.range(begin, length, BLOCK, disable_licm=True):  # what it would hoist takes more registers than there are
        attend_rows(
            q, k, v, w_q, w_k, out, q_a, k_a, first_values, higher_values, first_lse_ptr, higher_lse_ptr, gate,
            entry, head, kv_head, heads, start, w_start, length, rows_total, low, begin,
            softmax_scale, refine_scale, seed_ptr, drop_threshold, drop_scale,
            REFINEMENT, KEEP, FIRST_SIGN, HIGHER_SIGN, VARLEN, DTYPE, D, DV, R, BLOCK, NARROW, False,
            BLOCK_D, BLOCK_DV, BLOCK_R, OFFSET, PRECISION,
        )  # fmt: skip
    if bounds_ptr is not None and not VARLEN:
        store_padding(out, head, entry, start, length, rows_total, DV, BLOCK, BLOCK_DV)


def resident_widths(problem: Problem, keep: bool = True) -> dict[str, int | None]:
    """Features of the output and of all else that leaves the chip: without `keep` only K_A and Y, which come back."""
    p, refinement = problem, problem.call.refinement
    d_v, refined = p.v.shape[-1], problem.call.refinement != "none"
    widths: dict[str, int | None] = {"out": d_v}
    if refined:
        widths["k_a"] = p.rank
    if refinement == "value" or (refinement == "additive" and keep):
        widths["first_values"] = d_v  # Y or O_P
    if refinement == "additive" and keep:
        widths["higher_values"] = d_v  # O_R
    if keep:
        widths["first_lse"] = None
        widths |= {"q_a": p.rank, "higher_lse": None} if refined else {}
    return widths


def alike(tensors: list[Tensor], w_q: Tensor | None, w_k: Tensor | None) -> bool:
    """Whether all tensors with features lie as the first one does, and the tables as each other."""
    strides = {view_of(x)[1:] for x in tensors if x.dim() == 4}
    return len(strides) == 1 and (w_q is None or w_k is None or w_q.stride() == w_k.stride())


def resident_arguments(problem: Problem, buffers: dict[str, Tensor], *more: Tensor) -> dict[str, Any]:
    """Arguments that forward and backward share; more: the backward's tensors that have features."""
    p, out = problem, buffers["out"]
    sequences = {name: x for name, x in p.sequences.items() if name != "CAUSAL"}
    own = {f"{name}_ptr": buffers.get(name) for name in ("out", "q_a", "k_a", "first_lse", "higher_lse")}
    own |= {f"{name}_ptr": buffers.get(name, out) for name in ("first_values", "higher_values")}
    units = dict(zip(("own_entry", "own_head", "own_row"), (x // out.shape[-1] for x in p.view(out)[1:]), strict=True))
    names = ("q", "k", "v", "w_q", "w_k")
    refinement = {name: x for name, x in p.refinement().items() if name != "STOCHASTIC"}
    shared = {"heads": p.heads, "least": p.least(), "GROUP": p.group}
    shared["ALIKE"] = alike([p.q, p.k, p.v, *buffers.values(), *more], p.w_q, p.w_k)
    return own | units | flat(**{name: p.tensors[name] for name in names}) | sequences | p.dropout | refinement | p.widths | shared


def launch_resident_forward(problem: Problem, keep: bool = True) -> list[Tensor]:
    """The output (entries, H, rows, D_v) and, if `keep`, what the backward needs, in the order of `resident_widths`."""
    p = problem
    buffers, config = p.buffers(resident_widths(p, keep)), p.config("resident_fwd")
    (first_scale, first_sign), (refine_scale, higher_sign) = map(split_sign, p.scales())
    scales = {"softmax_scale": first_scale, "FIRST_SIGN": first_sign, "refine_scale": refine_scale, "HIGHER_SIGN": higher_sign}
    launch(
        _resident_fwd_kernel, (p.batch * p.heads,), config, p.q.device,
        **resident_arguments(p, buffers) | scales, KEEP=keep, BLOCK=config.block_m, NARROW=config.block_n,
        OFFSET=p.offset_type(p.call.max_len),
    )  # fmt: skip
    return list(buffers.values()) if keep else [buffers["out"]]


def split_sign(scale: float) -> tuple[float, int]:
    """A scale as a positive one and what queries are multiplied by: the largest score, scaled, is then the largest scaled score."""
    return abs(scale) or 1.0, (scale > 0) - (scale < 0)
