"""One new position per entry against the rows that a cache holds: one launch, a program per entry and query head.

H query heads, D, D_v, R features of q, v and the tables, N rows of the cache. Shapes in comments are those of tiles.

The row of `decoding.py` in two sweeps over the earlier items: the first multiplies softmax(q K^T) by the tables and, if needed, V;
the second multiplies softmax(q_a K_A^T) by V or Y. The new item stays in registers between the two, so no program waits for rows
that another one appends. The kernel is bound by loads: every number of the cache is read once and used once, without a matrix
product. So that no load waits for a reduction, each of the BLOCK_N rows of a tile has its own running softmax (peak, total, sums,
in float32); they are combined after the sweep.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ..launch_config import step_config
from .launch import RUNTIME, View, flat, launch, view_of, with_rows
from .primitives import LOG2E, load_factor, load_gate, load_table, load_tile, seats, step_of, store_tile


@triton.jit
def row_seat(entry, row, present):
    """The seat of one row; empty if `present` is 0."""
    return seats(entry, row, tl.zeros((1,), tl.int32), present)


@triton.jit
def together(sums, own, share, mine):
    """[1, BLOCK]: the sums of all rows of a tile and of the new item, combined. share, mine: the weights of each."""
    return tl.sum(sums * share[:, None], 0)[None, :] + mine * own


@triton.jit
def sweep(
    query, own_key, own_value, own_w_q, own_w_k, keys, values, w_q, w_k, scale,
    entry, key_head, value_head, head, first, end, table_first, table_rows, step, q_a, lags_ptr, lags_head,
    LAGS: tl.constexpr, SHIFT: tl.constexpr, TABLES: tl.constexpr, VALUES: tl.constexpr, DTYPE: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """softmax(query keys^T) of the rows from `first` to `end` and the new item, times the tables and the values.

    Row j uses row j - table_first of the tables, and with SHIFT the value `step` rows after it. LAGS: how many rows of q_a before
    the new one scores compare as well, with keys as many rows before. Returns [1, BLOCK_R] twice and [1, BLOCK_DV]: without TABLES
    own_w_q and own_w_k, without VALUES own_value, as they came.
    """
    ACC: tl.constexpr = query.dtype
    own = tl.sum(query * own_key)
    for lag in tl.static_range(1, LAGS + 1):
        before = row_seat(entry, end - lag, tl.where(end - lag >= first, 1, 0))
        earlier = load_tile(q_a, head, before, D, BLOCK_D).to(ACC)  # [1, BLOCK_D]
        own += load_factor(lags_ptr, lags_head, head, lag, ACC) * tl.sum(
            earlier * load_tile(keys, key_head, before, D, BLOCK_D).to(ACC)
        )
    own = own * (scale * LOG2E)
    peak = tl.zeros((BLOCK_N,), ACC) + own
    total = tl.zeros((BLOCK_N,), ACC)
    if TABLES:
        q_sums = tl.zeros((BLOCK_N, BLOCK_R), ACC)
        k_sums = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    if VALUES:
        sums = tl.zeros((BLOCK_N, BLOCK_DV), ACC)
    for low in range(first, end, BLOCK_N):
        rows = low + tl.arange(0, BLOCK_N)
        seat = seats(entry, first * 0, rows, end)
        key_tile = load_tile(keys, key_head, seat, D, BLOCK_D).to(ACC)  # [BLOCK_N, BLOCK_D]
        scores = tl.sum(key_tile * query, 1)
        for lag in tl.static_range(1, LAGS + 1):
            before = row_seat(entry, end - lag, tl.where(end - lag >= first, 1, 0))
            earlier = load_tile(q_a, head, before, D, BLOCK_D).to(ACC) * load_factor(lags_ptr, lags_head, head, lag, ACC)
            at = entry, first * 0, 0, (rows - lag).to(tl.int64), (rows - lag >= first) & (rows < end)
            scores += tl.sum(load_tile(keys, key_head, at, D, BLOCK_D).to(ACC) * earlier, 1)
        scores = tl.where(rows < end, scores * (scale * LOG2E), float("-inf"))
        new_peak = tl.maximum(peak, scores)
        weights = tl.exp2(scores - new_peak)
        decay = tl.exp2(peak - new_peak)
        total = total * decay + weights
        peak = new_peak
        if TABLES:
            table_seat = seats(entry, first * 0, rows - table_first, tl.minimum(end - table_first, table_rows))
            tile = load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R).to(ACC)  # [BLOCK_N, BLOCK_R]
            q_sums = q_sums * decay[:, None] + weights[:, None] * tile
            tile = load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R).to(ACC)
            k_sums = k_sums * decay[:, None] + weights[:, None] * tile
        if VALUES:
            value_seat = seats(entry, first * 0, rows + step, end)
            tile = load_tile(values, value_head, value_seat, DV, BLOCK_DV).to(ACC)  # [BLOCK_N, BLOCK_DV]
            if SHIFT:  # the row before the new one has its value, which may not be in the cache yet
                tile = tl.where((rows + step == end)[:, None] & (step > 0), own_value, tile)
            sums = sums * decay[:, None] + weights[:, None] * tile
    top = tl.max(peak, 0)
    share = tl.exp2(peak - top)
    mine = tl.exp2(own - top)
    whole = 1.0 / (tl.sum(total * share, 0) + mine)
    share, mine = share * whole, mine * whole
    if TABLES:
        own_w_q = together(q_sums, own_w_q, share, mine)
        own_w_k = together(k_sums, own_w_k, share, mine)
    if VALUES:
        if SHIFT:
            mine = tl.where(step > 0, 0.0, mine)
        own_value = together(sums, own_value, share, mine)
    return own_w_q, own_w_k, own_value


@triton.jit(do_not_specialize=RUNTIME)
def _decode_step_kernel(
    q_ptr, q_entry, q_head, q_row, new_k_ptr, new_k_entry, new_k_head, new_k_row,
    new_v_ptr, new_v_entry, new_v_head, new_v_row, new_w_q_ptr, new_w_q_entry, new_w_q_head, new_w_q_row,
    new_w_k_ptr, new_w_k_entry, new_w_k_head, new_w_k_row, k_ptr, k_entry, k_head, k_row, v_ptr, v_entry, v_head, v_row,
    k_a_ptr, k_a_entry, k_a_head, k_a_row, y_ptr, y_entry, y_head, y_row, w_q_ptr, w_q_entry, w_q_head, w_q_row,
    w_k_ptr, w_k_entry, w_k_head, w_k_row, q_a_ptr, q_a_entry, q_a_head, q_a_row, out_ptr, out_entry, out_head, out_row,
    gate_ptr, gate_stride, lags_ptr, lags_head, first_ptr, end_ptr,
    heads, capacity, table_rows, softmax_scale, refine_scale, plain_heads,
    REFINEMENT: tl.constexpr, LAGS: tl.constexpr, SHIFT: tl.constexpr, PLAIN: tl.constexpr,
    CONTENT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    q, new_k = (q_ptr, q_entry, q_head, q_row), (new_k_ptr, new_k_entry, new_k_head, new_k_row)
    new_v, new_w_q = (new_v_ptr, new_v_entry, new_v_head, new_v_row), (new_w_q_ptr, new_w_q_entry, new_w_q_head, new_w_q_row)
    new_w_k, k = (new_w_k_ptr, new_w_k_entry, new_w_k_head, new_w_k_row), (k_ptr, k_entry, k_head, k_row)
    v, k_a = (v_ptr, v_entry, v_head, v_row), (k_a_ptr, k_a_entry, k_a_head, k_a_row)
    y, w_q = (y_ptr, y_entry, y_head, y_row), (w_q_ptr, w_q_entry, w_q_head, w_q_row)
    w_k, out = (w_k_ptr, w_k_entry, w_k_head, w_k_row), (out_ptr, out_entry, out_head, out_row)
    kept_q_a = q_a_ptr, q_a_entry, q_a_head, q_a_row
    entry, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    kv_head = head // GROUP
    end = tl.minimum(tl.maximum(tl.load(end_ptr + entry), 0), capacity).to(tl.int32)
    first = tl.minimum(tl.maximum(tl.load(first_ptr + entry), 0), end).to(tl.int32)
    room = tl.where(end < capacity, 1, 0)  # a full cache is left as it is
    lead = room * tl.where(head % GROUP == 0, 1, 0)  # one query head of each group appends the key head's rows
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32

    step = step_of(head, plain_heads) if SHIFT else 0
    new_seat = row_seat(entry, end * 0, 1)
    seat = row_seat(entry, end, room)
    lead_seat = row_seat(entry, end, lead)
    query = load_tile(q, head, new_seat, D, BLOCK_D).to(ACC)  # [1, BLOCK_D]
    own_k = load_tile(new_k, kv_head, new_seat, D, BLOCK_D).to(ACC)
    own_v = load_tile(new_v, kv_head, new_seat, DV, BLOCK_DV).to(ACC)  # [1, BLOCK_DV]
    store_tile(k, kv_head, lead_seat, own_k, D, BLOCK_D)
    store_tile(v, kv_head, lead_seat, own_v, DV, BLOCK_DV)
    if REFINEMENT == "none":
        _, _, result = sweep(
            query, own_k, own_v, own_v, own_v, k, v, k, k, softmax_scale, entry, kv_head, kv_head, head, first, end, 0, 0,
            step, kept_q_a, lags_ptr, lags_head, 0, SHIFT, False, True, DTYPE, D, DV, R, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_R,
        )  # fmt: skip
    else:
        if CONTENT:
            own_q_a = load_table(new_w_q, head, new_seat, DTYPE, R, BLOCK_R)  # [1, BLOCK_R]
            own_k_a = load_table(new_w_k, head, new_seat, DTYPE, R, BLOCK_R)
            store_tile(w_q, head, seat, own_q_a, R, BLOCK_R)
            store_tile(w_k, head, seat, own_k_a, R, BLOCK_R)
            table_first = end * 0
        else:
            table_seat = row_seat(entry, end - first, tl.where(end - first < table_rows, 1, 0))
            own_q_a = load_table(w_q, head, table_seat, DTYPE, R, BLOCK_R)
            own_k_a = load_table(w_k, head, table_seat, DTYPE, R, BLOCK_R)
            table_first = first
        q_a, own_k_a, weighted = sweep(
            query, own_k, own_v, own_q_a.to(ACC), own_k_a.to(ACC), k, v, w_q, w_k, softmax_scale,
            entry, kv_head, kv_head, head, first, end, table_first, table_rows, step, kept_q_a, lags_ptr, lags_head,
            0, SHIFT and REFINEMENT != "value", True, REFINEMENT != "simple", DTYPE, D, DV, R, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_R,
        )  # fmt: skip
        store_tile(k_a, head, seat, own_k_a, R, BLOCK_R)
        if LAGS > 0:
            store_tile(kept_q_a, head, seat, q_a, R, BLOCK_R)
        if REFINEMENT == "value":
            store_tile(y, head, seat, weighted, DV, BLOCK_DV)
            _, _, result = sweep(
                q_a, own_k_a, weighted, own_v, own_v, k_a, y, k, k, refine_scale, entry, head, head, head, first, end, 0, 0,
                step, kept_q_a, lags_ptr, lags_head, LAGS, SHIFT, False, True, DTYPE, R, DV, R, BLOCK_N, BLOCK_R, BLOCK_DV, BLOCK_R,
            )  # fmt: skip
        else:
            _, _, result = sweep(
                q_a, own_k_a, own_v, own_v, own_v, k_a, v, k, k, refine_scale, entry, head, kv_head, head, first, end, 0, 0,
                step, kept_q_a, lags_ptr, lags_head, LAGS, SHIFT, False, True, DTYPE, R, DV, R, BLOCK_N, BLOCK_R, BLOCK_DV, BLOCK_R,
            )  # fmt: skip
        if REFINEMENT == "additive":
            gate = load_gate(gate_ptr, gate_stride, head, ACC)
            if PLAIN:
                gate = tl.where(head < plain_heads, 0.0, gate)
            result = weighted + gate * result
    store_tile(out, head, new_seat, result, DV, BLOCK_DV)


def launch_step(
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    new_w_q: Tensor | None,
    new_w_k: Tensor | None,
    gate: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_a: Tensor | None,
    y: Tensor | None,
    w_q: Tensor | None,
    w_k: Tensor | None,
    first: Tensor,
    end: Tensor,
    refinement: str,
    softmax_scale: float,
    refine_scale: float,
    q_a: Tensor | None = None,
    lags: Tensor | None = None,
    shift: bool = False,
    plain_heads: int = 0,
) -> Tensor:
    """(B, H, 1, D_v); appends to the cache's k, v, k_a, y, w_q, w_k and q_a. Position tables come whole, as new_w_q and new_w_k."""
    q, new_k, new_v = (with_rows(x) for x in (q, new_k, new_v))
    batch, heads, _, d = q.shape
    d_v, rank = v.shape[-1], 1 if new_w_q is None else new_w_q.shape[-1]
    out = q.new_empty(batch, heads, 1, d_v)
    content = w_q is not None
    tile = step_config((d, d_v, rank), q.dtype.itemsize)

    def view(x: Tensor | None) -> View:
        return view_of(q if x is None else x)

    lags = None if lags is None else with_rows(lags)
    new_tables = [view(None if x is None else with_rows(x)) for x in (new_w_q, new_w_k)]
    launch(
        _decode_step_kernel, (batch * heads,), tile, q.device,
        **flat(
            q=view(q), new_k=view(new_k), new_v=view(new_v), new_w_q=new_tables[0], new_w_k=new_tables[1],
            gate_ptr=gate, gate_stride=0 if gate is None or gate.numel() == 1 else gate.stride(0),
            k=view(k), v=view(v), k_a=view(k_a), y=view(y),
            w_q=view(w_q) if content else new_tables[0], w_k=view(w_k) if content else new_tables[1], q_a=view(q_a), out=view(out),
            lags_ptr=lags, lags_head=0 if lags is None or lags.shape[0] == 1 else lags.stride(0), plain_heads=plain_heads,
            LAGS=0 if lags is None else lags.shape[1], SHIFT=shift, PLAIN=plain_heads > 0,
            first_ptr=first, end_ptr=end, heads=heads, capacity=k.shape[2],
            table_rows=k.shape[2] if content or new_w_q is None else new_w_q.shape[2],
            softmax_scale=softmax_scale, refine_scale=refine_scale,
            REFINEMENT=refinement, CONTENT=content, GROUP=heads // k.shape[1], D=d, DV=d_v, R=rank, BLOCK_N=tile.block_n,
            BLOCK_D=triton.next_power_of_2(d), BLOCK_DV=triton.next_power_of_2(d_v), BLOCK_R=triton.next_power_of_2(rank),
        ),
    )  # fmt: skip
    return out


CHANGED = ("k", "v", "k_a", "y", "w_q", "w_k", "q_a")  # of a step's tensors, in place
triton_step = custom_op("awrsr_kernels::refined_attention_step", launch_step, mutates_args=CHANGED)


@triton_step.register_fake
def _(q, new_k, new_v, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], new_v.shape[-1])
