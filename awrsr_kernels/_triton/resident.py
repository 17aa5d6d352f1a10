"""The resident regime, forward: one program walks over all rows of a causal head of 65 to 256 items, in one launch.

L positions, D, DV, R features of q, v and the tables; `# [BLOCK, BLOCK_D]` is the shape of a tile: BLOCK rows or columns.

Row i of the higher-order weights needs K_A of rows up to i alone, so both stages of a block of rows follow each other. Q_A never
leaves the registers before its use; K_A, and in "value" Y = P V, go to memory and come back from the cache. Within a block the
tile on the diagonal comes first: from then on the peak is finite, and no other tile needs a mask. Rows beyond the sequence load
zeros and are not stored; columns beyond it are seen by such rows only.

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
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    VALUE: tl.constexpr = REFINEMENT == "value"
    ADDED: tl.constexpr = REFINEMENT == "additive" or REFINEMENT == "none"  # P meets the values itself, under dropout
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

    for low in tl.range(0, length, BLOCK, disable_licm=True):  # what it would hoist takes more registers than there are
        rows = low + tl.arange(0, BLOCK)
        seat = block_seats(entry, start, rows, length, OFFSET)
        at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)
        q_tile = load_tile(q, head, seat, D, BLOCK_D)  # [BLOCK, BLOCK_D]
        if FIRST_SIGN != 1:
            q_tile = (q_tile * FIRST_SIGN).to(DTYPE)
        v_tile = load_tile(v, kv_head, seat, DV, BLOCK_DV)  # [BLOCK, BLOCK_DV]
        scores = dot(q_tile, tl.trans(load_tile(k, kv_head, seat, D, BLOCK_D)), PRECISION)  # [BLOCK, BLOCK], as all weights
        peak, total, weights = begin_softmax(diagonal(scores, float("-inf"), BLOCK), softmax_scale * LOG2E)
        if REFINEMENT != "none":
            table_seat = block_seats(entry, w_start, rows, length, OFFSET)
            half = weights.to(DTYPE)
            q_a_sum = dot(half, load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R), PRECISION)  # [BLOCK, BLOCK_R]
            k_a_sum = dot(half, load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R), PRECISION)
        if ADDED and seed_ptr is not None:
            weights = tl.where(keep_tile(seed_ptr, entry, head, rows, low, drop_threshold, BLOCK), weights, 0.0)
        if ADDED or VALUE:
            values = dot(weights.to(DTYPE), v_tile, PRECISION)  # [BLOCK, BLOCK_DV]
        for before in tl.range(0, low, BLOCK, disable_licm=True):
            columns = before + tl.arange(0, BLOCK)
            column_seat = block_seats(entry, start, columns, length, OFFSET)
            scores = dot(q_tile, tl.trans(load_tile(k, kv_head, column_seat, D, BLOCK_D)), PRECISION)
            peak, total, weights, decay = continue_softmax(scores, softmax_scale * LOG2E, peak, total)
            if REFINEMENT != "none":
                table_seat = block_seats(entry, w_start, columns, length, OFFSET)
                half = weights.to(DTYPE)
                w_tile = load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R)
                q_a_sum = dot(half, w_tile, PRECISION, q_a_sum * decay[:, None])
                w_tile = load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R)
                k_a_sum = dot(half, w_tile, PRECISION, k_a_sum * decay[:, None])
            if ADDED and seed_ptr is not None:
                weights = tl.where(keep_tile(seed_ptr, entry, head, rows, before, drop_threshold, BLOCK), weights, 0.0)
            if ADDED or VALUE:
                earlier = load_tile(v, kv_head, column_seat, DV, BLOCK_DV)
                values = dot(weights.to(DTYPE), earlier, PRECISION, values * decay[:, None])
        share = (1.0 / total)[:, None]
        if KEEP:
            tl.store(first_lse_ptr + at, peak + tl.log2(total), mask=rows < length)
        if ADDED:
            values = values * (share * drop_scale)  # applied to weights, the scale would be rounded with them
        if VALUE:
            v_tile = (values * share).to(DTYPE)
            store_tile(first_values, head, seat, v_tile, DV, BLOCK_DV)
        if REFINEMENT == "additive" and KEEP:
            store_tile(first_values, head, seat, values, DV, BLOCK_DV)

        if REFINEMENT != "none":
            q_a_tile = (q_a_sum * share).to(DTYPE)  # [BLOCK, BLOCK_R]
            k_a_tile = (k_a_sum * share).to(DTYPE)
            store_tile(k_a, head, seat, k_a_tile, R, BLOCK_R)
            if KEEP:
                store_tile(q_a, head, seat, q_a_tile, R, BLOCK_R)
            if HIGHER_SIGN != 1:
                q_a_tile = (q_a_tile * HIGHER_SIGN).to(DTYPE)
            scores = dot(q_a_tile, tl.trans(k_a_tile), PRECISION)
            peak, total, weights = begin_softmax(diagonal(scores, float("-inf"), BLOCK), refine_scale * LOG2E)
            if seed_ptr is not None:
                weights = tl.where(keep_tile(seed_ptr, entry, head, rows, low, drop_threshold, BLOCK), weights, 0.0)
            sums = dot(weights.to(DTYPE), v_tile, PRECISION)  # [BLOCK, BLOCK_DV]
            for before in tl.range(0, low, BLOCK, disable_licm=True):
                column_seat = block_seats(entry, start, before + tl.arange(0, BLOCK), length, OFFSET)
                scores = dot(q_a_tile, tl.trans(load_tile(k_a, head, column_seat, R, BLOCK_R)), PRECISION)
                peak, total, weights, decay = continue_softmax(scores, refine_scale * LOG2E, peak, total)
                if seed_ptr is not None:
                    weights = tl.where(keep_tile(seed_ptr, entry, head, rows, before, drop_threshold, BLOCK), weights, 0.0)
                if VALUE:
                    earlier = load_tile(first_values, head, column_seat, DV, BLOCK_DV)
                else:
                    earlier = load_tile(v, kv_head, column_seat, DV, BLOCK_DV)
                sums = dot(weights.to(DTYPE), earlier, PRECISION, sums * decay[:, None])
            if KEEP:
                tl.store(higher_lse_ptr + at, peak + tl.log2(total), mask=rows < length)
            sums = sums * ((1.0 / total)[:, None] * drop_scale)
            if REFINEMENT == "additive":
                if KEEP:
                    store_tile(higher_values, head, seat, sums, DV, BLOCK_DV)
                sums = values + load_gate(gate_ptr, gate_stride, head, ACC) * sums
            values = sums
        store_tile(out, head, seat, values, DV, BLOCK_DV)
        tl.debug_barrier()  # K_A and Y of these rows are there for the whole program from here on
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
        **resident_arguments(p, buffers) | scales, KEEP=keep, BLOCK=config.block_m, OFFSET=p.offset_type(p.call.max_len),
    )  # fmt: skip
    return list(buffers.values()) if keep else [buffers["out"]]


def split_sign(scale: float) -> tuple[float, int]:
    """A scale as a positive one and what queries are multiplied by: the largest score, scaled, is then the largest scaled score."""
    return abs(scale) or 1.0, (scale > 0) - (scale < 0)
