"""The tiled regime, forward: any length, in flash-attention's manner, with the tables as values.

L positions, D, DV, R features of q, v and the tables. One kernel, launched once per stage:

    "none"    out = P V
    stage 1   Q_A = P W_q, K_A = P W_k            and, at once, Y = P V (value) or O_P = (P*Z) V (additive)
    stage 2   O_R = (R*Z) V (value: Y for V)      and, at once, out = O_P + gate * O_R (additive)

What the backward needs is O(L): Q_A, K_A, Y or O_P, O_R and a log-sum-exp per row and stage, in units of log 2. In half precision
each of them comes with what rounding lost, [Q_A | K_A | Y or O_P] and O_R side by side: the backward subtracts sums over them from
sums over exact weights, and where a row sees one column alone the difference must vanish.

In a batch with lengths the short kernels run after these and write what belongs to short sequences; padding is written here.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import RUNTIME, Problem, allocate, ceil_div, launch
from .primitives import (
    LOG2E,
    dot,
    keep_tile,
    load_gate,
    load_tile,
    locate_long,
    padded_seats,
    rounding_rest,
    row_index,
    seats,
    store_tile,
    table_start,
    visible_tile,
)


@triton.jit(do_not_specialize=RUNTIME)
def _tiled_fwd_kernel(
    q, k, v, w_q, w_k, added, q_a, k_a, weighted, rest, out, lse_ptr,
    gate_ptr, gate_stride, bounds_ptr, seed_ptr,
    rows_total, max_len, least, table_rows, batch, heads,
    score_scale, drop_threshold, drop_scale,
    TABLES: tl.constexpr, VALUES: tl.constexpr, ADDED: tl.constexpr, HALF: tl.constexpr,
    CAUSAL: tl.constexpr, VARLEN: tl.constexpr, ALIGN_RIGHT: tl.constexpr, PER_ENTRY: tl.constexpr,
    K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) % (batch * heads)
    entry, head = pair // heads, pair % heads
    # The last rows of a causal sequence have the most to do, so they start first.
    first_row = ((tl.num_programs(0) - 1 - tl.program_id(0)) // (batch * heads)) * BLOCK_M
    start, length = locate_long(bounds_ptr, entry, rows_total, max_len, least, VARLEN, ALIGN_RIGHT)
    rows = first_row + tl.arange(0, BLOCK_M)
    DTYPE: tl.constexpr = q[0].dtype.element_ty
    ACC: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32

    q_tile = load_tile(q, head, seats(entry, start, rows, length), D, BLOCK_D)
    w_start = table_start(start, length, table_rows, VARLEN, ALIGN_RIGHT, PER_ENTRY)
    peak = tl.full((BLOCK_M,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    if TABLES:
        q_a_sum = tl.zeros((BLOCK_M, BLOCK_R), ACC)
        k_a_sum = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    if VALUES:
        sums = tl.zeros((BLOCK_M, BLOCK_DV), ACC)

    end = tl.minimum(length, first_row + BLOCK_M) if CAUSAL else length
    for low in range(0, tl.where(first_row < length, end, 0), BLOCK_N):
        columns = low + tl.arange(0, BLOCK_N)
        k_tile = load_tile(k, head // K_GROUP, seats(entry, start, columns, length), D, BLOCK_D)
        scores = dot(q_tile, tl.trans(k_tile), PRECISION) * (score_scale * LOG2E)
        scores = tl.where(visible_tile(rows, columns, length, CAUSAL), scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak
        if TABLES:
            w_tile = load_tile(w_q, head, seats(entry, w_start, columns, length), R, BLOCK_R).to(DTYPE)
            q_a_sum = q_a_sum * decay[:, None] + dot(weights.to(DTYPE), w_tile, PRECISION)
            w_tile = load_tile(w_k, head, seats(entry, w_start, columns, length), R, BLOCK_R).to(DTYPE)
            k_a_sum = k_a_sum * decay[:, None] + dot(weights.to(DTYPE), w_tile, PRECISION)
        if VALUES:
            if seed_ptr is not None:
                weights = tl.where(keep_tile(seed_ptr, entry, head, rows, low, drop_threshold, BLOCK_N), weights, 0.0)
            v_tile = load_tile(v, head // V_GROUP, seats(entry, start, columns, length), DV, BLOCK_DV)
            sums = sums * decay[:, None] + dot(weights.to(DTYPE), v_tile, PRECISION)

    total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing: sums of zero, and a finite log-sum-exp
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    at = row_index(entry, head, heads, start, rows, rows_total, VARLEN)
    tl.store(lse_ptr + at, shift + tl.log2(total), mask=rows < length)
    share = (1.0 / total)[:, None]
    REST: tl.constexpr = 2 * R if TABLES else 0  # where what the values lost begins
    if TABLES:
        q_a_sum, k_a_sum = q_a_sum * share, k_a_sum * share
        store_tile(q_a, head, padded_seats(entry, start, rows, length, rows_total, not VARLEN), q_a_sum, R, BLOCK_R)
        store_tile(k_a, head, padded_seats(entry, start, rows, length, rows_total, not VARLEN), k_a_sum, R, BLOCK_R)
        if HALF:
            lost = rounding_rest(q_a_sum, DTYPE)
            store_tile(rest, head, padded_seats(entry, start, rows, length, rows_total, False), lost, R, BLOCK_R)
            lost = rounding_rest(k_a_sum, DTYPE)
            store_tile(rest, head, padded_seats(entry, start, rows, length, rows_total, False), lost, R, BLOCK_R, R)
    if VALUES:
        sums = sums * (share * drop_scale)  # applied to weights, the scale would be rounded with them
        store_tile(weighted, head, padded_seats(entry, start, rows, length, rows_total, not VARLEN), sums, DV, BLOCK_DV)
        if HALF:
            lost = rounding_rest(sums, DTYPE)
            store_tile(rest, head, padded_seats(entry, start, rows, length, rows_total, False), lost, DV, BLOCK_DV, REST)
        if ADDED:
            other = load_tile(added, head, seats(entry, start, rows, length), DV, BLOCK_DV).to(ACC)
            sums = other + load_gate(gate_ptr, gate_stride, head, ACC) * sums
            store_tile(out, head, padded_seats(entry, start, rows, length, rows_total, not VARLEN), sums, DV, BLOCK_DV)


def tiled_buffers(problem: Problem) -> dict[str, Tensor]:
    """Uninitialised memory for the output, "out", and for all that the backward needs besides; the keys depend on the call."""
    p, refinement = problem, problem.call.refinement

    def new(features: int) -> Tensor:
        return allocate(p.q, p.heads, features, p.call.varlen)

    d_v = p.v.shape[-1]
    found = {"out": new(d_v), "first_lse": p.row_numbers()}
    if refinement != "none":
        found |= {"q_a": new(p.rank), "k_a": new(p.rank), "higher_lse": p.row_numbers()}
    if refinement in ("value", "additive"):
        found["first_values"] = new(d_v)  # Y or O_P
    if refinement == "additive":
        found["higher_values"] = new(d_v)  # O_R; otherwise that is the output
    if p.q.dtype.itemsize == 2:
        if refinement != "none":
            found["higher_rest"] = new(d_v)
        found["first_rest"] = new(d_v * (refinement != "simple") + 2 * p.rank * (refinement != "none"))
    return found


def stage(problem: Problem, buffers: dict[str, Tensor], higher: bool) -> dict[str, Any]:
    """Arguments that forward and backward of a stage share: what plays q, k, v, their widths, the scale and the dropout."""
    p, refinement = problem, problem.call.refinement
    dropped = refinement in ("none", "additive") or higher
    arguments = p.sequences() | p.widths() | p.dropout() | {"batch": p.batch, "heads": p.heads, "least": p.least()}
    if not dropped:
        arguments |= {"seed_ptr": None, "drop_scale": 1.0}
    arguments |= {"gate_ptr": p.gate if higher else None, "gate_stride": p.gate_stride()}
    arguments |= {
        "TABLES": refinement != "none" and not higher,
        "VALUES": higher or refinement != "simple",
        "score_scale": p.call.refine_scale if higher else p.call.softmax_scale,
        "lse_ptr": buffers["higher_lse" if higher else "first_lse"],
    }
    views = p.inputs()
    rest = buffers.get("higher_rest" if higher else "first_rest")
    views |= {"rest": views["q"] if rest is None else p.view(rest)}
    arguments["HALF"] = rest is not None
    groups = {"K_GROUP": p.group, "V_GROUP": p.group}
    if higher:
        views |= {"q": p.view(buffers["q_a"]), "k": p.view(buffers["k_a"])}
        arguments |= {"D": arguments["R"], "BLOCK_D": arguments["BLOCK_R"]}
        groups["K_GROUP"] = 1
        if refinement == "value":
            views["v"] = p.view(buffers["first_values"])
            groups["V_GROUP"] = 1
    return arguments | views | groups


def tiled_forward(problem: Problem) -> list[Tensor]:
    """The output (entries, H, rows, D_v) and what the backward needs, in the order of `tiled_buffers`."""
    p = problem
    buffers = tiled_buffers(p)
    unused = p.view(buffers["out"])
    tile = p.config("tiled_fwd")
    programs = ceil_div(p.call.max_len, tile.block_m) * p.batch * p.heads
    stages = [False] if p.call.refinement == "none" else [False, True]
    for higher in stages:
        ADDED = higher and p.call.refinement == "additive"
        weighted = buffers.get("higher_values" if higher else "first_values", buffers["out"])
        spaces = {name: p.view(buffers.get(name, buffers["out"])) for name in ("q_a", "k_a")}
        launch(
            _tiled_fwd_kernel, (programs,), tile, p.q.device,
            added=p.view(buffers["first_values"]) if ADDED else unused,
            weighted=p.view(weighted), out=unused, ADDED=ADDED,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **spaces, **stage(p, buffers, higher),
        )  # fmt: skip
    return list(buffers.values())
