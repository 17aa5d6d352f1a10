"""The short regime: one program owns a head, every matrix stays on chip, one launch forward and one backward.

L positions (a tile of BLOCK_L holds them all), D, DV, R features of q, v and the tables. The formulas are those of
`awrsr_kernels/reference.py`; gradients, with Z the dropout mask and softmax'(g; p) = p * (g - rowsum(g * p)):

    simple, additive   dM = Z*(dO V^T)     dR = gate dM               dV = (M*Z)^T dO        dgate = sum(R*dM)
    value              dR = Z*(dO Y^T)     dY = (R*Z)^T dO            dV = P^T dY            Y = P V
    dT = refine_scale softmax'(dR; R)      dQ_A = dT K_A              dK_A = dT^T Q_A
    dP = dQ_A W_q^T + dK_A W_k^T + (value: dY V^T) + (additive: dM)   dW_q = P^T dQ_A        dW_k = P^T dK_A
    dS = softmax_scale softmax'(dP; P)     dQ = dS K                  dK = dS^T Q

Nothing is saved for the backward but the inputs. A backward program walks over the batch for one key head, so the gradients of
shared tables build up on chip and leave as one partial per program, summed in a fixed order afterwards: no atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch_config import short_tile
from .launch import RUNTIME, Problem, allocate, launch
from .primitives import (
    LOG2E,
    dot,
    dropout_tile,
    load_gate,
    load_tile,
    locate,
    softmax_tile,
    store_tile,
    table_start,
    visible_tile,
)


@triton.jit(do_not_specialize=RUNTIME)
def _short_fwd_kernel(
    q, k, v, w_q, w_k, out,
    gate_ptr, gate_stride, bounds_ptr, seed_ptr,
    rows_total, max_len, table_rows, heads,
    softmax_scale, refine_scale, drop_threshold, drop_scale,
    REFINEMENT: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    entry, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    start, length = locate(bounds_ptr, entry, rows_total, max_len, VARLEN, ALIGN_RIGHT)
    rows = tl.arange(0, BLOCK_L)
    visible = visible_tile(rows, rows, length, CAUSAL)
    DTYPE: tl.constexpr = q[0].dtype.element_ty

    q_tile = load_tile(q, entry, head, start, rows, length, D, BLOCK_D)
    k_tile = load_tile(k, entry, head // GROUP, start, rows, length, D, BLOCK_D)
    first = softmax_tile(dot(q_tile, tl.trans(k_tile), PRECISION) * (softmax_scale * LOG2E), visible)
    weights = first
    v_tile = load_tile(v, entry, head // GROUP, start, rows, length, DV, BLOCK_DV)

    if REFINEMENT != "none":
        w_start = table_start(start, length, table_rows, VARLEN, ALIGN_RIGHT, PER_ENTRY)
        w_q_tile = load_tile(w_q, entry, head, w_start, rows, length, R, BLOCK_R).to(DTYPE)
        w_k_tile = load_tile(w_k, entry, head, w_start, rows, length, R, BLOCK_R).to(DTYPE)
        q_a = dot(first.to(DTYPE), w_q_tile, PRECISION).to(DTYPE)
        k_a = dot(first.to(DTYPE), w_k_tile, PRECISION).to(DTYPE)
        weights = softmax_tile(dot(q_a, tl.trans(k_a), PRECISION) * (refine_scale * LOG2E), visible)
        if REFINEMENT == "value":
            v_tile = dot(first.to(DTYPE), v_tile, PRECISION).to(DTYPE)
        if REFINEMENT == "additive":
            weights = first + load_gate(gate_ptr, gate_stride, head, first.dtype) * weights

    if seed_ptr is not None:
        weights = weights * dropout_tile(
            seed_ptr, entry, head, rows, 0, drop_threshold, drop_scale, BLOCK_L, weights.dtype
        )
    tile = dot(weights.to(DTYPE), v_tile, PRECISION)
    store_tile(out, entry, head, start, rows, length, rows_total, tile, DV, BLOCK_DV, not VARLEN)


@triton.jit(do_not_specialize=RUNTIME)
def _short_bwd_kernel(
    q, k, v, w_q, w_k, dout, dq, dk, dv, dw_q, dw_k, dgate_ptr,
    gate_ptr, gate_stride, bounds_ptr, seed_ptr,
    rows_total, max_len, table_rows, batch, kv_heads, splits,
    softmax_scale, refine_scale, drop_threshold, drop_scale,
    REFINEMENT: tl.constexpr, CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_head, split = tl.program_id(0) % kv_heads, tl.program_id(0) // kv_heads
    rows = tl.arange(0, BLOCK_L)
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    # Right-aligned sequences of several lengths meet different rows of a shared table: their P is moved to those rows.
    SHIFTED: tl.constexpr = ALIGN_RIGHT and (VARLEN or bounds_ptr is not None)
    dw_q_sum = tl.zeros((BLOCK_L, BLOCK_R), ACC)
    dw_k_sum = tl.zeros((BLOCK_L, BLOCK_R), ACC)

    for step in range(split, batch, splits):
        entry = tl.full((), step, tl.int32)
        start, length = locate(bounds_ptr, entry, rows_total, max_len, VARLEN, ALIGN_RIGHT)
        visible = visible_tile(rows, rows, length, CAUSAL)
        dk_sum = tl.zeros((BLOCK_L, BLOCK_D), ACC)
        dv_sum = tl.zeros((BLOCK_L, BLOCK_DV), ACC)
        for member in tl.range(GROUP):
            head = kv_head * GROUP + member
            q_tile = load_tile(q, entry, head, start, rows, length, D, BLOCK_D)
            k_tile = load_tile(k, entry, kv_head, start, rows, length, D, BLOCK_D)
            v_tile = load_tile(v, entry, kv_head, start, rows, length, DV, BLOCK_DV)
            dout_tile = load_tile(dout, entry, head, start, rows, length, DV, BLOCK_DV)
            first = softmax_tile(dot(q_tile, tl.trans(k_tile), PRECISION) * (softmax_scale * LOG2E), visible)
            first_half = first.to(DTYPE)

            if REFINEMENT == "none":
                dfirst = dot(dout_tile, tl.trans(v_tile), PRECISION)
                weights = first
                if seed_ptr is not None:
                    mask = dropout_tile(seed_ptr, entry, head, rows, 0, drop_threshold, drop_scale, BLOCK_L, ACC)
                    dfirst = dfirst * mask
                    weights = weights * mask
                dv_sum += dot(tl.trans(weights.to(DTYPE)), dout_tile, PRECISION)
            else:
                w_start = table_start(start, length, table_rows, VARLEN, ALIGN_RIGHT, PER_ENTRY)
                w_q_tile = load_tile(w_q, entry, head, w_start, rows, length, R, BLOCK_R).to(DTYPE)
                w_k_tile = load_tile(w_k, entry, head, w_start, rows, length, R, BLOCK_R).to(DTYPE)
                q_a = dot(first_half, w_q_tile, PRECISION).to(DTYPE)
                k_a = dot(first_half, w_k_tile, PRECISION).to(DTYPE)
                higher = softmax_tile(dot(q_a, tl.trans(k_a), PRECISION) * (refine_scale * LOG2E), visible)

                values = v_tile
                if REFINEMENT == "value":
                    values = dot(first_half, v_tile, PRECISION).to(DTYPE)
                dmixed = dot(dout_tile, tl.trans(values), PRECISION)
                gate = load_gate(gate_ptr, gate_stride, head, ACC)
                weights = higher
                if REFINEMENT == "additive":
                    weights = first + gate * higher
                if seed_ptr is not None:
                    mask = dropout_tile(seed_ptr, entry, head, rows, 0, drop_threshold, drop_scale, BLOCK_L, ACC)
                    dmixed = dmixed * mask
                    weights = weights * mask
                dvalues = dot(tl.trans(weights.to(DTYPE)), dout_tile, PRECISION)

                inner = tl.sum(higher * dmixed, 1)
                if gate_ptr is not None:
                    tl.store(dgate_ptr + entry.to(tl.int64) * (kv_heads * GROUP) + head, tl.sum(inner, 0))
                dhigher = (higher * (dmixed - inner[:, None]) * (gate * refine_scale)).to(DTYPE)
                dq_a = dot(dhigher, k_a, PRECISION).to(DTYPE)
                dk_a = dot(tl.trans(dhigher), q_a, PRECISION).to(DTYPE)

                dfirst = dot(dq_a, tl.trans(w_q_tile), PRECISION) + dot(dk_a, tl.trans(w_k_tile), PRECISION)
                if REFINEMENT == "additive":
                    dfirst += dmixed
                if REFINEMENT == "value":
                    dfirst += dot(dvalues.to(DTYPE), tl.trans(v_tile), PRECISION)
                    dvalues = dot(tl.trans(first_half), dvalues.to(DTYPE), PRECISION)
                dv_sum += dvalues

                at_rows = tl.trans(first_half)
                if PER_ENTRY:
                    dw = dot(at_rows, dq_a, PRECISION)
                    store_tile(dw_q, entry, head, start, rows, length, rows_total, dw, R, BLOCK_R, not VARLEN)
                    dw = dot(at_rows, dk_a, PRECISION)
                    store_tile(dw_k, entry, head, start, rows, length, rows_total, dw, R, BLOCK_R, not VARLEN)
                else:
                    if SHIFTED:
                        shift = (rows[:, None] == rows[None, :] + (BLOCK_L - length)).to(DTYPE)
                        at_rows = dot(shift, at_rows, PRECISION).to(DTYPE)
                    dw_q_sum += dot(at_rows, dq_a, PRECISION)
                    dw_k_sum += dot(at_rows, dk_a, PRECISION)

            dscores = (first * (dfirst - tl.sum(first * dfirst, 1)[:, None]) * softmax_scale).to(DTYPE)
            tile = dot(dscores, k_tile, PRECISION)
            store_tile(dq, entry, head, start, rows, length, rows_total, tile, D, BLOCK_D, not VARLEN)
            dk_sum += dot(tl.trans(dscores), q_tile, PRECISION)
        store_tile(dk, entry, kv_head, start, rows, length, rows_total, dk_sum, D, BLOCK_D, not VARLEN)
        store_tile(dv, entry, kv_head, start, rows, length, rows_total, dv_sum, DV, BLOCK_DV, not VARLEN)

    if REFINEMENT != "none" and not PER_ENTRY:
        store_tile(dw_q, split, kv_head, 0, rows, BLOCK_L, BLOCK_L, dw_q_sum, R, BLOCK_R, False)
        store_tile(dw_k, split, kv_head, 0, rows, BLOCK_L, BLOCK_L, dw_k_sum, R, BLOCK_R, False)


def short_buffers(problem: Problem) -> dict[str, Tensor]:
    """Uninitialised memory for the output; the backward needs nothing but the inputs."""
    p = problem
    return {"out": allocate(p.q, p.heads, p.v.shape[-1], p.call.varlen)}


def short_forward(problem: Problem) -> list[Tensor]:
    """The output (entries, H, rows, D_v), alone in its list."""
    p = problem
    out = short_buffers(p)["out"]
    tile = short_tile(p.call.max_len)
    launch(
        _short_fwd_kernel, (p.batch * p.heads,), tile, p.q.device,
        out=p.view(out), heads=p.heads, GROUP=p.group, BLOCK_L=tile.block_m,
        **p.inputs(), **p.sequences(), **p.dropout(), **p.refinement(), **p.widths(),
    )  # fmt: skip
    return [out]


def short_backward(problem: Problem, dout: Tensor, saved: list[Tensor]) -> list[Tensor]:
    """Gradients of q, k, v and, where the call has them, of w_q, w_k, gate."""
    p = problem
    dq, dk, dv = p.gradients()
    tile = short_tile(p.call.max_len)
    splits = p.splits(p.kv_heads)
    if p.w_q is None:
        dw_q = dw_k = dq
    elif p.call.per_entry:
        dw_q, dw_k = p.table_gradients()
    else:
        dw_q, dw_k = (p.q.new_empty(splits, p.kv_heads, tile.block_m, p.rank, dtype=p.accumulator) for _ in range(2))
    dgate = p.q.new_empty(p.batch, p.heads, dtype=p.accumulator) if p.gate is not None else None
    launch(
        _short_bwd_kernel, (p.kv_heads * splits,), tile, p.q.device,
        dout=p.view(dout), dq=p.view(dq), dk=p.view(dk), dv=p.view(dv),
        dw_q=p.view(dw_q, p.call.per_entry and p.call.varlen), dw_k=p.view(dw_k, p.call.per_entry and p.call.varlen),
        dgate_ptr=dgate, batch=p.batch, kv_heads=p.kv_heads, splits=splits, GROUP=p.group, BLOCK_L=tile.block_m,
        **p.inputs(), **p.sequences(), **p.dropout(), **p.refinement(), **p.widths(),
    )  # fmt: skip
    if p.w_q is not None and not p.call.per_entry:
        dw_q, dw_k = p.sum_tables(dw_q), p.sum_tables(dw_k)
    return p.results(dq, dk, dv, dw_q, dw_k, None if dgate is None else dgate.sum(0))
