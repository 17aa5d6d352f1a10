"""The tiled regime, backward: weights are recomputed from the saved log-sum-exps, every sum has one owner, no atomics.

L positions, D, DV, R features of q, v and the tables. A stage recomputes its weights p from what plays q and k in it, and what
reaches them is a sum of outer products, g = [dQ_A W_q^T + dK_A W_k^T] + [Z*(dO V^T), in stage 1 of "value" dY V^T]. Then

    delta = rowsum(p*g), taken from what the forward saved: rowsum(dQ_A*Q_A) + rowsum(dK_A*K_A) + rowsum(dO*O)
    ds    = scale p*(g - delta)         dq = ds k         dk = ds^T q         dv = (p*Z)^T dO        dW = p^T [dQ_A | dK_A]

in three kernels: one owns rows (dq and delta), one owns columns (dk, dv), and one owns rows of the tables (dW) and walks over the
sequences that share them. Rows and columns run for stage 2 first (where "additive" multiplies p by its gate), then for stage 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import RUNTIME, Problem, allocate, ceil_div, launch
from .primitives import (
    LOG2E,
    dot,
    keep_tile,
    load_gate,
    load_rows,
    load_tile,
    locate_long,
    padded_seats,
    row_index,
    seats,
    store_tile,
    table_start,
    visible_tile,
)
from .tiled import stage, tiled_buffers


@triton.jit
def _weights(q_tile, k_tile, lse, rows, columns, length, score_scale, CAUSAL: tl.constexpr, PRECISION: tl.constexpr):
    """p for rows whose log-sum-exp is known, zero where nothing is visible."""
    scores = dot(q_tile, tl.trans(k_tile), PRECISION) * (score_scale * LOG2E) - lse[:, None]
    return tl.exp2(tl.where(visible_tile(rows, columns, length, CAUSAL), scores, float("-inf")))


@triton.jit(do_not_specialize=RUNTIME)
def _tiled_bwd_rows_kernel(
    q, k, v, w_q, w_k, q_a, k_a, weighted, rest, dq_a, dk_a, dout, dq,
    lse_ptr, delta_ptr, dgate_ptr, gate_ptr, gate_stride, bounds_ptr, seed_ptr,
    rows_total, max_len, least, table_rows, batch, heads,
    score_scale, drop_threshold, drop_scale,
    TABLES: tl.constexpr, VALUES: tl.constexpr, HALF: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) % (batch * heads)
    entry, head = pair // heads, pair % heads
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // (batch * heads)
    first_row = tile * BLOCK_M
    start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
    rows = first_row + tl.arange(0, BLOCK_M)
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32

    q_tile = load_tile(q, head, seats(entry, start, rows, length), D, BLOCK_D)
    w_start = table_start(start, length, table_rows, VARLEN, ALIGN_RIGHT, PER_ENTRY)
    delta = tl.zeros((BLOCK_M,), ACC)
    if TABLES:
        dq_a_tile = load_tile(dq_a, head, seats(entry, start, rows, length), R, BLOCK_R)
        dk_a_tile = load_tile(dk_a, head, seats(entry, start, rows, length), R, BLOCK_R)
        space = load_tile(q_a, head, seats(entry, start, rows, length), R, BLOCK_R).to(ACC)
        if HALF:
            space += load_tile(rest, head, seats(entry, start, rows, length), R, BLOCK_R).to(ACC)
        delta += tl.sum(dq_a_tile.to(ACC) * space, 1)
        space = load_tile(k_a, head, seats(entry, start, rows, length), R, BLOCK_R).to(ACC)
        if HALF:
            space += load_tile(rest, head, seats(entry, start, rows, length), R, BLOCK_R, R).to(ACC)
        delta += tl.sum(dk_a_tile.to(ACC) * space, 1)
    if VALUES:
        dout_tile = load_tile(dout, head, seats(entry, start, rows, length), DV, BLOCK_DV)
        saved = load_tile(weighted, head, seats(entry, start, rows, length), DV, BLOCK_DV).to(ACC)
        if HALF:
            saved += load_tile(rest, head, seats(entry, start, rows, length), DV, BLOCK_DV, 2 * R if TABLES else 0).to(ACC)
        delta += tl.sum(dout_tile.to(ACC) * saved, 1)
    if dgate_ptr is not None:
        tiles = tl.num_programs(0) // (batch * heads)
        tl.store(dgate_ptr + pair.to(tl.int64) * tiles + tile, tl.sum(delta, 0))
    at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)
    tl.store(delta_ptr + at, delta, mask=rows < length)
    lse = load_rows(lse_ptr, at, rows, length)

    dq_sum = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    end = tl.minimum(length, first_row + BLOCK_M) if CAUSAL else length
    for low in range(0, tl.where(first_row < length, end, 0), BLOCK_N):
        columns = low + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, head // K_GROUP, seats(entry, start, columns, length), D, BLOCK_D)
        weights = _weights(q_tile, k_tile, lse, rows, columns, length, score_scale, CAUSAL, PRECISION)
        dweights = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        if VALUES:
            v_tile = load_tile(v, head // V_GROUP, seats(entry, start, columns, length), DV, BLOCK_DV)
            dweights = dot(dout_tile, tl.trans(v_tile), PRECISION)
            if seed_ptr is not None:
                kept = keep_tile(seed_ptr, entry, head, rows, low, drop_threshold, BLOCK_N)
                dweights = tl.where(kept, dweights * drop_scale, 0.0)
        if TABLES:
            w_tile = load_tile(w_q, head, seats(entry, w_start, columns, length), R, BLOCK_R).to(DTYPE)
            dweights += dot(dq_a_tile, tl.trans(w_tile), PRECISION)
            w_tile = load_tile(w_k, head, seats(entry, w_start, columns, length), R, BLOCK_R).to(DTYPE)
            dweights += dot(dk_a_tile, tl.trans(w_tile), PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq_sum += dot(dscores.to(DTYPE), k_tile, PRECISION)

    dq_sum = dq_sum * (score_scale * load_gate(gate_ptr, gate_stride, head, ACC))
    store_tile(dq, head, padded_seats(entry, start, rows, length, rows_total, not VARLEN), dq_sum, D, BLOCK_D)


@triton.jit(do_not_specialize=RUNTIME)
def _tiled_bwd_columns_kernel(
    q, k, v, w_q, w_k, dq_a, dk_a, dout, dv_added, dk, dv,
    lse_ptr, delta_ptr, gate_ptr, gate_stride, bounds_ptr, seed_ptr,
    rows_total, max_len, least, table_rows, batch, heads,
    score_scale, drop_threshold, drop_scale,
    TABLES: tl.constexpr, VALUES: tl.constexpr, ADDED: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    owners = heads // GROUP  # a program owns columns of GROUP query heads, which share k (if K_GROUP > 1), v, or both
    pair = tl.program_id(0) % (batch * owners)
    entry, owner = pair // owners, pair % owners
    first_column = (tl.program_id(0) // (batch * owners)) * BLOCK_N
    start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
    columns = first_column + tl.arange(0, BLOCK_N)
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    w_start = table_start(start, length, table_rows, VARLEN, ALIGN_RIGHT, PER_ENTRY)
    first_row = (first_column // BLOCK_M) * BLOCK_M if CAUSAL else first_column * 0

    dk_sum = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if VALUES:
        dv_sum = tl.zeros((BLOCK_N, BLOCK_DV), ACC)
        v_tile = load_tile(v, owner * GROUP // V_GROUP, seats(entry, start, columns, length), DV, BLOCK_DV)
        if ADDED:
            dv_sum += load_tile(dv_added, owner, seats(entry, start, columns, length), DV, BLOCK_DV)
    for member in tl.range(GROUP):
        head = owner * GROUP + member
        k_tile = load_tile(k, head // K_GROUP, seats(entry, start, columns, length), D, BLOCK_D)
        gate = load_gate(gate_ptr, gate_stride, head, ACC)
        if TABLES:
            w_q_tile = load_tile(w_q, head, seats(entry, w_start, columns, length), R, BLOCK_R).to(DTYPE)
            w_k_tile = load_tile(w_k, head, seats(entry, w_start, columns, length), R, BLOCK_R).to(DTYPE)
        if K_GROUP == 1:
            dk_sum = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        for low in range(first_row, tl.where(first_column < length, length, 0), BLOCK_M):
            rows = low + tl.arange(0, BLOCK_M)
            at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)
            q_tile = load_tile(q, head, seats(entry, start, rows, length), D, BLOCK_D)
            lse = load_rows(lse_ptr, at, rows, length)
            weights = _weights(q_tile, k_tile, lse, rows, columns, length, score_scale, CAUSAL, PRECISION)
            dweights = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            if VALUES:
                dout_tile = load_tile(dout, head, seats(entry, start, rows, length), DV, BLOCK_DV)
                dweights = dot(dout_tile, tl.trans(v_tile), PRECISION)
                met = weights
                if seed_ptr is not None:
                    kept = keep_tile(seed_ptr, entry, head, rows, first_column, drop_threshold, BLOCK_N)
                    dweights = tl.where(kept, dweights * drop_scale, 0.0)
                    met = tl.where(kept, weights * drop_scale, 0.0)
                dv_sum += dot(tl.trans((met * gate).to(DTYPE)), dout_tile, PRECISION)
            if TABLES:
                rows_tile = load_tile(dq_a, head, seats(entry, start, rows, length), R, BLOCK_R)
                dweights += dot(rows_tile, tl.trans(w_q_tile), PRECISION)
                rows_tile = load_tile(dk_a, head, seats(entry, start, rows, length), R, BLOCK_R)
                dweights += dot(rows_tile, tl.trans(w_k_tile), PRECISION)
            delta = load_rows(delta_ptr, at, rows, length)
            dscores = weights * (dweights - delta[:, None]) * (score_scale * gate)
            dk_sum += dot(tl.trans(dscores.to(DTYPE)), q_tile, PRECISION)
        if K_GROUP == 1:
            store_tile(dk, head, padded_seats(entry, start, columns, length, rows_total, not VARLEN), dk_sum, D, BLOCK_D)
    if K_GROUP > 1:
        store_tile(dk, owner, padded_seats(entry, start, columns, length, rows_total, not VARLEN), dk_sum, D, BLOCK_D)
    if VALUES:
        store_tile(dv, owner, padded_seats(entry, start, columns, length, rows_total, not VARLEN), dv_sum, DV, BLOCK_DV)


@triton.jit(do_not_specialize=RUNTIME)
def _tiled_bwd_tables_kernel(
    q, k, dq_a, dk_a, dw_q, dw_k, lse_ptr, bounds_ptr,
    rows_total, max_len, least, batch, heads, splits, score_scale,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    K_GROUP: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) % (splits * heads)
    split, head = pair // heads, pair % heads
    first_column = (tl.program_id(0) // (splits * heads)) * BLOCK_N
    window = first_column + tl.arange(0, BLOCK_N)  # rows of the table, counted in the window
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    SHIFTED: tl.constexpr = ALIGN_RIGHT and not PER_ENTRY and (VARLEN or bounds_ptr is not None)
    dw_q_sum = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    dw_k_sum = tl.zeros((BLOCK_N, BLOCK_R), ACC)

    for step in range(split, batch, splits):
        entry = tl.full((), step, tl.int32)
        start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
        offset = max_len - length if SHIFTED else length * 0
        columns = tl.where(window < offset, length, window - offset)  # before the first item: as good as after the last
        k_tile = load_tile(k, head // K_GROUP, seats(entry, start, columns, length), D, BLOCK_D)
        first_row = tl.maximum(first_column - offset, 0) // BLOCK_M * BLOCK_M if CAUSAL else length * 0
        reached = (first_column < offset + length) & (first_column + BLOCK_N > offset)
        for low in range(first_row, tl.where(reached, length, 0), BLOCK_M):
            rows = low + tl.arange(0, BLOCK_M)
            q_tile = load_tile(q, head, seats(entry, start, rows, length), D, BLOCK_D)
            at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)
            lse = load_rows(lse_ptr, at, rows, length)
            weights = _weights(q_tile, k_tile, lse, rows, columns, length, score_scale, CAUSAL, PRECISION)
            at_columns = tl.trans(weights.to(DTYPE))
            rows_tile = load_tile(dq_a, head, seats(entry, start, rows, length), R, BLOCK_R)
            dw_q_sum += dot(at_columns, rows_tile, PRECISION)
            rows_tile = load_tile(dk_a, head, seats(entry, start, rows, length), R, BLOCK_R)
            dw_k_sum += dot(at_columns, rows_tile, PRECISION)

    if PER_ENTRY:  # one sequence per program
        start, length = locate_long(bounds_ptr, split, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
        store_tile(dw_q, head, padded_seats(split, start, window, length, rows_total, not VARLEN), dw_q_sum, R, BLOCK_R)
        store_tile(dw_k, head, padded_seats(split, start, window, length, rows_total, not VARLEN), dw_k_sum, R, BLOCK_R)
    else:
        store_tile(dw_q, head, seats(split, split * 0, window, max_len), dw_q_sum, R, BLOCK_R)
        store_tile(dw_k, head, seats(split, split * 0, window, max_len), dw_k_sum, R, BLOCK_R)


class _Backward:
    """The launches of one backward and the tensors between them."""

    def __init__(self, problem: Problem, dout: Tensor, saved: list[Tensor]) -> None:
        p = self.problem = problem
        self.saved = dict(zip(tiled_buffers(p), saved, strict=True))
        self.delta = p.row_numbers()
        self.dq, self.dk, self.dv = p.gradients()
        self.dq_a, self.dk_a = (self.space() for _ in range(2)) if p.w_q is not None else (self.dq, self.dq)
        self.dgate = None

    def space(self) -> Tensor:
        return allocate(self.problem.q, self.problem.heads, self.problem.rank, self.problem.call.varlen)

    def stage(self, higher: bool, dout: Tensor, dv: Tensor, dv_added: Tensor | None = None) -> None:
        """dq (or dQ_A), dk (or dK_A) and dv of a stage from the gradient of what its values became."""
        p, saved = self.problem, self.saved
        arguments = stage(p, saved, higher)
        rest, half = arguments.pop("rest"), arguments.pop("HALF")
        arguments |= {"delta_ptr": self.delta, "dout": p.view(dout)}
        arguments |= {"dq_a": p.view(self.dq_a), "dk_a": p.view(self.dk_a)}
        dq, dk = (self.dq_a, self.dk_a) if higher else (self.dq, self.dk)

        tile = p.config("tiled_bwd_rows")
        tiles = ceil_div(p.call.max_len, tile.block_m)
        if higher and p.gate is not None:
            self.dgate = p.q.new_empty(p.batch, p.heads, tiles, dtype=p.accumulator)
        weighted = saved.get("higher_values" if higher else "first_values", saved["out"])
        spaces = {name: p.view(saved.get(name, dq)) for name in ("q_a", "k_a")}
        launch(
            _tiled_bwd_rows_kernel, (tiles * p.batch * p.heads,), tile, p.q.device,
            weighted=p.view(weighted), rest=rest, HALF=half, dq=p.view(dq), dgate_ptr=self.dgate if higher else None,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **spaces, **arguments,
        )  # fmt: skip

        tile = p.config("tiled_bwd_columns")
        group = max(arguments["K_GROUP"], arguments["V_GROUP"] if arguments["VALUES"] else 1)
        tiles = ceil_div(p.call.max_len, tile.block_n)
        launch(
            _tiled_bwd_columns_kernel, (tiles * p.batch * p.heads // group,), tile, p.q.device,
            dk=p.view(dk), dv=p.view(dv), dv_added=p.view(dv if dv_added is None else dv_added), ADDED=dv_added is not None,
            GROUP=group, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **arguments,
        )  # fmt: skip

    def tables(self) -> list[Tensor]:
        """dW_q and dW_k: per entry as they are, shared ones as partials over splits of the batch, summed in order."""
        p, per_entry = self.problem, self.problem.call.per_entry
        tile = p.config("tiled_bwd_tables")
        tiles = ceil_div(p.call.max_len, tile.block_n)
        splits = p.batch if per_entry else p.splits(tiles * p.heads)
        if per_entry:
            dw_q, dw_k = p.table_gradients()
        else:
            partials = p.partial_tables(splits, p.call.max_len)
            dw_q, dw_k = partials
        packed = per_entry and p.call.varlen
        used = _tiled_bwd_tables_kernel.arg_names
        shared = {name: value for name, value in stage(p, self.saved, higher=False).items() if name in used}
        launch(
            _tiled_bwd_tables_kernel, (tiles * splits * p.heads,), tile, p.q.device,
            dq_a=p.view(self.dq_a), dk_a=p.view(self.dk_a), dw_q=p.view(dw_q, packed), dw_k=p.view(dw_k, packed),
            splits=splits, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **shared,
        )  # fmt: skip
        return [dw_q, dw_k] if per_entry else p.sum_tables(partials)


def tiled_backward(problem: Problem, douts: list[Tensor], saved: list[Tensor]) -> list[Tensor]:
    """Gradients of q, k, v and, where the call has them, of w_q, w_k, gate; saved: what `tiled_forward` returned."""
    p, dout, refinement = problem, douts[0], problem.call.refinement
    step = _Backward(p, dout, saved)
    if refinement == "none":
        step.stage(False, dout, step.dv)
    elif refinement == "simple":
        step.stage(True, dout, step.dv)
        step.stage(False, dout, step.dv)
    elif refinement == "value":
        dy = allocate(p.q, p.heads, p.v.shape[-1], p.call.varlen)
        step.stage(True, dout, dy)
        step.stage(False, dy, step.dv)
    else:
        from_higher = p.v.new_empty(p.v.shape, dtype=p.accumulator)
        step.stage(True, dout, from_higher)
        step.stage(False, dout, step.dv, dv_added=from_higher)
    dw_q, dw_k = step.tables() if p.w_q is not None else [step.dq, step.dq]
    dgate = None if step.dgate is None else step.dgate.sum((0, 2))
    return p.results(step.dq, step.dk, step.dv, dw_q, dw_k, dgate)
