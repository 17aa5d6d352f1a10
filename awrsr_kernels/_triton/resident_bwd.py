"""The resident regime, backward: one program walks over the columns of a run of heads and computes each tile of P and R once.

L positions, D, DV, R features of q, v and the tables; `# [BLOCK, BLOCK_D]` is the shape of a tile: BLOCK rows or columns.

Tiles of weights are [columns, rows], from the saved log-sum-exps:

    dM = Z*(V dO^T), in "value" of Y     delta = rowsum(dO*O_R)     dT = gate R*(dM - delta)
    dV += (R*Z gate)^T dO, "value": dY   dQ_A += refine_scale dT K_A    dK_A += refine_scale dT^T Q_A
    dP = W_q dQ_A^T + W_k dK_A^T + (value: V dY^T) + (additive, none: dM)
    delta = rowsum(dQ_A*Q_A) + rowsum(dK_A*K_A) + (value: rowsum(dY*Y)) + (additive, none: rowsum(dO*O_P))
    dS = P*(dP - delta)                  dQ += softmax_scale dS K       dK += softmax_scale dS^T Q
    dW_q += P^T dQ_A                     dW_k += P^T dK_A               dV += P^T dY (value), (P*Z)^T dO (additive, none)

Columns go from the first block to the last. Sums over rows stay in registers; dQ_A and dQ, which are sums over columns, pass
through a scratch of the program, and a block of them is complete when the columns reach its diagonal. From then on nobody reads
dQ_A, dK_A (and dY) of that block, which may therefore lie in the memory of dQ, dK (and dV). The gradients of shared tables build
up in a partial per program, which stays in the cache; partials are summed in a fixed order afterwards: no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import RUNTIME, allocate, ceil_div, flat, launch
from .primitives import block_seats, load_gate, load_tile, locate_long, own_strides, store_padding, store_tile, table_start
from .problem import Problem
from .reduce import Gradients
from .resident import resident_arguments, resident_widths
from .resident_columns import first_columns, higher_columns


@triton.jit(do_not_specialize=RUNTIME)
def _resident_bwd_kernel(
    q_ptr, q_entry, q_head, q_row, k_ptr, k_entry, k_head, k_row, v_ptr, v_entry, v_head, v_row,
    w_q_ptr, w_q_entry, w_q_head, w_q_row, w_k_ptr, w_k_entry, w_k_head, w_k_row,
    out_ptr, q_a_ptr, k_a_ptr, first_values_ptr, higher_values_ptr, own_entry, own_head, own_row, first_lse_ptr, higher_lse_ptr,
    dout_ptr, dout_entry, dout_head, dout_row, dq_ptr, dq_entry, dq_head, dq_row,
    dk_ptr, dk_entry, dk_head, dk_row, dv_ptr, dv_entry, dv_head, dv_row,
    dq_a_ptr, dq_a_entry, dq_a_head, dq_a_row, dk_a_ptr, dk_a_entry, dk_a_head, dk_a_row,
    dw_q_ptr, dw_q_entry, dw_q_head, dw_q_row, dw_k_ptr, dw_k_entry, dw_k_head, dw_k_row,
    scratch_ptr, dgate_ptr, gate_ptr, gate_stride, bounds_ptr, seed_ptr,
    rows_total, max_len, least, table_rows, batch, heads, run,
    softmax_scale, refine_scale, drop_threshold, drop_scale,
    REFINEMENT: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    GROUP: tl.constexpr, ALIKE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, NARROW: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
    OFFSET: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    ADDITIVE: tl.constexpr = REFINEMENT == "additive"
    PARTIAL: tl.constexpr = REFINEMENT != "none" and not PER_ENTRY
    if ALIKE:
        k_entry, k_head, k_row, v_entry, v_head, v_row = q_entry, q_head, q_row, q_entry, q_head, q_row
        dq_entry, dq_head, dq_row, dk_entry, dk_head, dk_row = q_entry, q_head, q_row, q_entry, q_head, q_row
        dv_entry, dv_head, dv_row, dout_entry, dout_head, dout_row = q_entry, q_head, q_row, q_entry, q_head, q_row
        dq_a_entry, dq_a_head, dq_a_row, dk_a_entry, dk_a_head, dk_a_row = q_entry, q_head, q_row, q_entry, q_head, q_row
        w_k_entry, w_k_head, w_k_row = w_q_entry, w_q_head, w_q_row
        dw_k_entry, dw_k_head, dw_k_row = dw_q_entry, dw_q_head, dw_q_row
    q, k, v = (q_ptr, q_entry, q_head, q_row), (k_ptr, k_entry, k_head, k_row), (v_ptr, v_entry, v_head, v_row)
    w_q, w_k = (w_q_ptr, w_q_entry, w_q_head, w_q_row), (w_k_ptr, w_k_entry, w_k_head, w_k_row)
    dq, dk = (dq_ptr, dq_entry, dq_head, dq_row), (dk_ptr, dk_entry, dk_head, dk_row)
    dv, dout = (dv_ptr, dv_entry, dv_head, dv_row), (dout_ptr, dout_entry, dout_head, dout_row)
    dq_a, dk_a = (dq_a_ptr, dq_a_entry, dq_a_head, dq_a_row), (dk_a_ptr, dk_a_entry, dk_a_head, dk_a_row)
    dw_q, dw_k = (dw_q_ptr, dw_q_entry, dw_q_head, dw_q_row), (dw_k_ptr, dw_k_entry, dw_k_head, dw_k_row)
    r_entry, r_head, r_row = own_strides(q_entry, q_head, q_row, own_entry, own_head, own_row, R, ALIKE)
    out_entry, out_head, out_row = own_strides(q_entry, q_head, q_row, own_entry, own_head, own_row, DV, ALIKE)
    q_a, k_a = (q_a_ptr, r_entry, r_head, r_row), (k_a_ptr, r_entry, r_head, r_row)
    first_values = first_values_ptr, out_entry, out_head, out_row  # Y or O_P
    higher_values = higher_values_ptr, out_entry, out_head, out_row  # O_R, or the output
    split, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    kv_head = head // GROUP
    # The program's scratch: sums over columns (those of the first block of rows never leave the registers), a number per row, and
    # in "additive" what the higher-order weights give dV
    ROOM: tl.constexpr = BLOCK_D if BLOCK_D > BLOCK_R else BLOCK_R
    height = tl.cdiv(max_len, BLOCK) * BLOCK
    size = height * (ROOM + 1 + (BLOCK_DV if ADDITIVE else 0)) - BLOCK * ROOM
    sums_ptr = scratch_ptr + (tl.program_id(0).to(tl.int64) * size - BLOCK * ROOM)
    delta_ptr = sums_ptr + height * ROOM
    dvalues_ptr = delta_ptr + height
    gate = load_gate(gate_ptr, gate_stride, head, ACC)
    dgate = tl.zeros((BLOCK,), ACC)
    begin = split * run
    if PARTIAL and bounds_ptr is not None:  # the first sequence may be a short one
        for low in tl.range(0, max_len, BLOCK):
            window = block_seats(split, split * 0, low + tl.arange(0, BLOCK), max_len, OFFSET)
            store_tile(dw_q, head, window, tl.zeros((BLOCK, BLOCK_R), ACC), R, BLOCK_R)
            store_tile(dw_k, head, window, tl.zeros((BLOCK, BLOCK_R), ACC), R, BLOCK_R)
        tl.debug_barrier()

    for number in tl.range(begin, tl.minimum(begin + run, batch), disable_licm=True):
        entry = tl.full((), number, tl.int32)
        start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
        w_start = table_start(start, length, table_rows, VARLEN, ALIGN_RIGHT, PER_ENTRY)
        for low in tl.range(0, length, BLOCK, disable_licm=True):
            rows = low + tl.arange(0, BLOCK)
            seat = block_seats(entry, start, rows, length, OFFSET)
            saved = load_tile(higher_values, head, seat, DV, BLOCK_DV)
            delta = tl.sum(load_tile(dout, head, seat, DV, BLOCK_DV).to(ACC) * saved.to(ACC), 1)
            tl.store(delta_ptr + rows, delta)
            if dgate_ptr is not None:
                dgate += delta
        tl.debug_barrier()

        whole = length  # where a narrow last block begins
        if NARROW < BLOCK:
            whole = tl.where(length % BLOCK <= NARROW, length - length % BLOCK, length)
        if REFINEMENT != "none":
            for low in tl.range(0, whole, BLOCK, disable_licm=True):
                higher_columns(
                    v, q_a, k_a, first_values, dout, dv, dq_a, dk_a, higher_lse_ptr, sums_ptr, delta_ptr, dvalues_ptr, height,
                    entry, head, kv_head, heads, start, length, whole, rows_total, refine_scale, gate,
                    seed_ptr, drop_threshold, drop_scale, low, REFINEMENT, VARLEN, DTYPE, DV, R, BLOCK, NARROW, False,
                    BLOCK_DV, BLOCK_R, ROOM, OFFSET, STAGES, PRECISION,
                )  # fmt: skip
            if NARROW < BLOCK:
                if whole < length:
                    higher_columns(
                        v, q_a, k_a, first_values, dout, dv, dq_a, dk_a, higher_lse_ptr, sums_ptr, delta_ptr, dvalues_ptr, height,
                        entry, head, kv_head, heads, start, length, whole, rows_total, refine_scale, gate,
                        seed_ptr, drop_threshold, drop_scale, whole, REFINEMENT, VARLEN, DTYPE, DV, R, NARROW, NARROW, True,
                        BLOCK_DV, BLOCK_R, ROOM, OFFSET, STAGES, PRECISION,
                    )  # fmt: skip
            tl.debug_barrier()
        fresh = (number == begin) & (bounds_ptr is None)
        shift = max_len - length if ALIGN_RIGHT and bounds_ptr is not None else length * 0
        for low in tl.range(0, whole, BLOCK, disable_licm=True):
            first_columns(
                q, k, v, w_q, w_k, dout, dq, dk, dv, dq_a, dk_a, dw_q, dw_k, first_lse_ptr, sums_ptr, delta_ptr, dvalues_ptr,
                height, entry, head, kv_head, heads, split, fresh, start, w_start, shift, length, whole, rows_total,
                softmax_scale, seed_ptr, drop_threshold, drop_scale, low, REFINEMENT, PARTIAL, VARLEN, DTYPE,
                D, DV, R, BLOCK, NARROW, False, BLOCK_D, BLOCK_DV, BLOCK_R, ROOM, OFFSET, STAGES, PRECISION,
            )  # fmt: skip
        if NARROW < BLOCK:
            if whole < length:
                first_columns(
                    q, k, v, w_q, w_k, dout, dq, dk, dv, dq_a, dk_a, dw_q, dw_k, first_lse_ptr, sums_ptr, delta_ptr, dvalues_ptr,
                    height, entry, head, kv_head, heads, split, fresh, start, w_start, shift, length, whole, rows_total,
                    softmax_scale, seed_ptr, drop_threshold, drop_scale, whole, REFINEMENT, PARTIAL, VARLEN, DTYPE,
                    D, DV, R, NARROW, NARROW, True, BLOCK_D, BLOCK_DV, BLOCK_R, ROOM, OFFSET, STAGES, PRECISION,
                )  # fmt: skip
        tl.debug_barrier()  # the next sequence writes the scratch anew
        if bounds_ptr is not None and not VARLEN:
            store_padding(dq, head, entry, start, length, rows_total, D, BLOCK, BLOCK_D)
            store_padding(dk, head, entry, start, length, rows_total, D, BLOCK, BLOCK_D)
            store_padding(dv, head, entry, start, length, rows_total, DV, BLOCK, BLOCK_DV)
            if PER_ENTRY and REFINEMENT != "none":
                store_padding(dw_q, head, entry, start, length, rows_total, R, BLOCK, BLOCK_R)
                store_padding(dw_k, head, entry, start, length, rows_total, R, BLOCK, BLOCK_R)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + tl.program_id(0), tl.sum(dgate, 0))


def launch_resident_backward(problem: Problem, douts: list[Tensor], saved: list[Tensor]) -> Gradients:
    """saved: what `launch_resident_forward` returned."""
    p, gradients, refined = problem, Gradients(problem), problem.call.refinement != "none"
    buffers = dict(zip(resident_widths(p), saved, strict=True))
    config = p.config("resident_bwd")
    block, run = config.block_m, p.run(config.programs)
    splits = ceil_div(p.batch, run)
    dq, (dk, dv, _) = gradients.dq, gradients.per_query_head()
    assert dk is not None and dv is not None
    fits = p.rank <= p.q.shape[-1]  # dQ_A and dK_A lie in the memory of dq and dk, which replace them
    dq_a, dk_a = (dq, dk) if fits or not refined else (allocate(p.q, p.heads, p.rank, p.call.varlen) for _ in range(2))
    dw_q, dw_k = gradients.table_parts(splits, p.call.max_len)
    height, room = ceil_div(p.call.max_len, block) * block, max(p.widths["BLOCK_D"], p.widths["BLOCK_R"])
    size = height * (room + 1 + p.widths["BLOCK_DV"] * (p.call.refinement == "additive")) - block * room
    scratch = p.q.new_empty(splits * p.heads, size, dtype=p.accumulator)
    rows = {"dout": douts[0], "dq": dq, "dk": dk, "dv": dv, "dq_a": dq_a, "dk_a": dk_a}
    views = {name: p.view(x) for name, x in rows.items()}
    views |= {name: p.view(x, p.call.per_entry and p.call.varlen) for name, x in (("dw_q", dw_q), ("dw_k", dw_k))}
    launch(
        _resident_bwd_kernel, (p.heads * splits,), config, p.q.device,
        **flat(**views), **resident_arguments(p, buffers, *rows.values()), scratch_ptr=scratch,
        dgate_ptr=gradients.gate_parts(splits), batch=p.batch, run=run, BLOCK=block, NARROW=config.block_n,
        OFFSET=p.offset_type(p.call.max_len, *rows.values()), STAGES=config.num_stages,
    )  # fmt: skip
    return gradients
