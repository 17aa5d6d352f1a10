"""Gradients that are sums of parts: memory for the parts, and the kernels that sum them in a fixed order and store them.

H query heads, H_kv key heads, N table rows, R refinement rank. A part is what one program, or one query head of a key head, adds.
Shapes in comments are those of tiles.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch_config import Config
from .launch import NO_VIEW, allocate, ceil_div, flat, launch
from .problem import Problem

SUMS = Config(32, 64, 4, 1)  # block_m parts of block_n numbers are added at once
# Not specialised for: other batch sizes and lengths must not compile again.
NUMBERS = ["splits", "rows", "more_splits", "more_rows", "gate_splits", "more_gate_splits"]
NUMBERS += ["heads", "table_rows", "blocks", "lines"]


@triton.jit
def sum_parts(
    pointer, splits, rows, table, head, row, column, inside, heads, table_rows,
    SHARED: tl.constexpr, ALIGN_RIGHT: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[BLOCK]: sums over the parts (2, splits, heads, rows, R) of elements of a table; zero in rows that the parts lack.

    SHARED: over the heads as well. ALIGN_RIGHT: the last row of the parts is the table's last.
    """
    at = row + rows - table_rows if ALIGN_RIGHT else row
    present = inside & (at >= 0) & (at < rows)
    step = rows.to(tl.int64) * R  # from one head to the next
    origin = pointer + table * (splits * heads) * step + at * R + column
    count = splits * heads
    if not SHARED:
        origin += head * step
        step *= heads
        count = splits
    sums = tl.zeros((PARTS, BLOCK), ACC)
    for low in range(0, count, PARTS):
        part = low + tl.arange(0, PARTS)
        sums += tl.load(origin[None, :] + (part * step)[:, None], mask=(part < count)[:, None] & present[None, :], other=0.0)
    return tl.sum(sums, 0)


@triton.jit
def sum_gate(pointer, splits, head, heads, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The sum of the parts (splits, heads) of one head, or of all."""
    count = splits if PER_HEAD else splits * heads
    sums = tl.zeros((BLOCK,), ACC)
    for low in range(0, count, BLOCK):
        part = low + tl.arange(0, BLOCK)
        offset = part.to(tl.int64) * heads + head if PER_HEAD else part.to(tl.int64)
        sums += tl.load(pointer + offset, mask=part < count, other=0.0)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=NUMBERS)
def _sum_partials_kernel(
    parts_ptr, splits, rows, more_ptr, more_splits, more_rows, dw_q_ptr, dw_k_ptr,
    gate_parts_ptr, gate_splits, more_gate_ptr, more_gate_splits, dgate_ptr,
    heads, table_rows, blocks,
    SHARED: tl.constexpr, PER_HEAD: tl.constexpr, ALIGN_RIGHT: tl.constexpr, DOUBLE: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    program = tl.program_id(0)
    if parts_ptr is not None:
        if program < 2 * blocks:
            table = program % 2
            element = (program // 2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            line, column = element // R, element % R
            head, row = line // table_rows, line % table_rows
            inside = line < (table_rows if SHARED else table_rows * heads)
            sums = sum_parts(
                parts_ptr, splits, rows, table, head, row, column, inside, heads, table_rows,
                SHARED, ALIGN_RIGHT, R, PARTS, BLOCK, ACC,
            )  # fmt: skip
            if more_ptr is not None:
                sums += sum_parts(
                    more_ptr, more_splits, more_rows, table, head, row, column, inside, heads, table_rows,
                    SHARED, ALIGN_RIGHT, R, PARTS, BLOCK, ACC,
                )  # fmt: skip
            if table == 0:
                tl.store(dw_q_ptr + element, sums, mask=inside)
            else:
                tl.store(dw_k_ptr + element, sums, mask=inside)
    if dgate_ptr is not None:
        if program >= 2 * blocks:
            head = program - 2 * blocks
            total = sum_gate(gate_parts_ptr, gate_splits, head, heads, PER_HEAD, PARTS * BLOCK, ACC)
            if more_gate_ptr is not None:
                total += sum_gate(more_gate_ptr, more_gate_splits, head, heads, PER_HEAD, PARTS * BLOCK, ACC)
            tl.store(dgate_ptr + head, total)


@triton.jit
def sum_group(parts, gradient, line, lines, kv_heads, rows, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Store sums over the query heads of each key head, for some lines of (entries, kv_heads, rows, WIDTH)."""
    parts_ptr, parts_entry, parts_head, parts_row = parts
    ptr, entry_stride, head_stride, row_stride = gradient
    entry, head, row = line // rows // kv_heads, line // rows % kv_heads, line % rows
    column = tl.arange(0, BLOCK_WIDTH)
    mask = (line < lines)[:, None] & (column < WIDTH)[None, :]
    origin = entry * parts_entry + head * GROUP * parts_head + row * parts_row
    sums = tl.load(parts_ptr + origin[:, None] + column[None, :], mask=mask, other=0.0)  # [lines of the tile, BLOCK_WIDTH]
    for member in tl.static_range(1, GROUP):
        sums += tl.load(parts_ptr + (origin + member * parts_head)[:, None] + column[None, :], mask=mask, other=0.0)
    offset = entry * entry_stride + head * head_stride + row * row_stride
    tl.store(ptr + offset[:, None] + column[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def _sum_query_heads_kernel(
    dk_parts_ptr, dk_parts_entry, dk_parts_head, dk_parts_row, dk_ptr, dk_entry, dk_head, dk_row,
    dv_parts_ptr, dv_parts_entry, dv_parts_head, dv_parts_row, dv_ptr, dv_entry, dv_head, dv_row,
    dv_cov_parts_ptr, dv_cov_parts_entry, dv_cov_parts_head, dv_cov_parts_row,
    dv_cov_ptr, dv_cov_entry, dv_cov_head, dv_cov_row,
    heads, rows, lines,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kv_heads = heads // GROUP
    dk_parts, dk = (dk_parts_ptr, dk_parts_entry, dk_parts_head, dk_parts_row), (dk_ptr, dk_entry, dk_head, dk_row)
    sum_group(dk_parts, dk, line, lines, kv_heads, rows, GROUP, D, BLOCK_D)
    dv_parts, dv = (dv_parts_ptr, dv_parts_entry, dv_parts_head, dv_parts_row), (dv_ptr, dv_entry, dv_head, dv_row)
    sum_group(dv_parts, dv, line, lines, kv_heads, rows, GROUP, DV, BLOCK_DV)
    if dv_cov_ptr is not None:
        dv_cov = dv_cov_ptr, dv_cov_entry, dv_cov_head, dv_cov_row
        dv_cov_parts = dv_cov_parts_ptr, dv_cov_parts_entry, dv_cov_parts_head, dv_cov_parts_row
        sum_group(dv_cov_parts, dv_cov, line, lines, kv_heads, rows, GROUP, DV, BLOCK_DV)


class Gradients:
    """The gradients of a backward: those that its launches complete, and the parts of the others, of one regime or of two."""

    def __init__(self, problem: Problem) -> None:
        p = self.problem = problem
        self.dq, self.dk, self.dv = p.gradients()
        self.dv_cov = p.covariance_gradient()
        self.of_heads: list[Tensor | None] = [self.dk, self.dv, self.dv_cov]  # written per query head, if they are not these
        per_entry = p.w_q is not None and p.call.per_entry
        self.tables = list(p.table_gradients()) if per_entry else []
        self.partials: list[Tensor] = []  # of shared tables: (2, splits, H, rows, R)
        self.gates: list[Tensor] = []  # (splits, H)
        self.lags: list[Tensor] = []  # (splits, H, A)

    def per_query_head(self) -> list[Tensor | None]:
        """Memory for the gradients of k, v, v_cov, for kernels that own query heads: with grouped queries, parts of them."""
        p = self.problem
        if p.group > 1:
            made = (self.dk, self.dv, self.dv_cov)
            self.of_heads = [x if x is None else allocate(x, p.heads, x.shape[-1], p.call.varlen, p.accumulator) for x in made]
        return self.of_heads

    def table_parts(self, splits: int, rows: int) -> tuple[Tensor, Tensor]:
        """Memory for the gradients of both tables: shared ones as parts of `splits` programs, each (splits, H, rows, R)."""
        p = self.problem
        if p.w_q is None:
            return self.dq, self.dq
        if not p.call.per_entry:
            self.partials.append(p.q.new_empty(2, splits, p.heads, rows, p.rank, dtype=p.accumulator))
            return self.partials[-1][0], self.partials[-1][1]
        return self.tables[0], self.tables[1]

    def gate_parts(self, splits: int) -> Tensor | None:
        """Memory for parts of the gate's gradient, if there is one."""
        p = self.problem
        if p.gate is None:
            return None
        self.gates.append(p.q.new_empty(splits, p.heads, dtype=p.accumulator))
        return self.gates[-1]

    def lag_parts(self, splits: int) -> Tensor | None:
        """Memory for parts of the gradient of the factors of lags, if there are any."""
        p = self.problem
        if p.lags is None:
            return None
        self.lags.append(p.q.new_empty(splits, p.heads, p.compared - 1, dtype=p.accumulator))
        return self.lags[-1]

    def summed(self) -> list[Tensor]:
        """Gradients of q, k, v and, where the call has them, of w_q, w_k, gate, v_cov, lags."""
        p, (w_q, w_k), gate = self.problem, (self.problem.w_q, self.problem.w_k), self.problem.gate
        if p.group > 1 and self.of_heads[0] is not self.dk:
            self.sum_query_heads()
        if w_q is not None and w_k is not None and not p.call.per_entry:
            self.tables = [w_q.new_empty(w_q.shape), w_k.new_empty(w_k.shape)]
        dgate = None if gate is None else gate.new_empty(gate.shape)
        if self.partials or dgate is not None:
            self.sum_partials(dgate)
        dlags = None if p.lags is None else self.sum_lags(p.lags)
        found = [self.dq, self.dk, self.dv, *self.tables, dgate, self.dv_cov, dlags]
        return [x for x in found if x is not None]

    def sum_partials(self, dgate: Tensor | None) -> None:
        """Sum the parts of shared tables and of the gate, of one regime or two, in one launch."""
        p, shared = self.problem, shares_tables(self.problem)
        parts, more = [*self.partials, None, None][:2]
        gates, more_gates = [*self.gates, None, None][:2]
        rows = p.sequences["table_rows"]
        blocks = 0 if parts is None else ceil_div((1 if shared else p.heads) * rows * p.rank, SUMS.block_n)
        per_head = dgate is not None and dgate.numel() == p.heads
        launch(
            _sum_partials_kernel, (2 * blocks + (0 if dgate is None else dgate.numel()),), SUMS, p.q.device,
            parts_ptr=parts, splits=0 if parts is None else parts.shape[1], rows=0 if parts is None else parts.shape[3],
            more_ptr=more, more_splits=0 if more is None else more.shape[1], more_rows=0 if more is None else more.shape[3],
            dw_q_ptr=self.tables[0] if parts is not None else None, dw_k_ptr=self.tables[1] if parts is not None else None,
            gate_parts_ptr=gates, gate_splits=0 if gates is None else gates.shape[0],
            more_gate_ptr=more_gates, more_gate_splits=0 if more_gates is None else more_gates.shape[0], dgate_ptr=dgate,
            heads=p.heads, table_rows=rows, blocks=blocks, SHARED=shared, PER_HEAD=per_head,
            ALIGN_RIGHT=p.call.align_right and (p.call.varlen or p.bounds is not None),
            DOUBLE=p.q.dtype.itemsize == 8, R=p.rank, PARTS=SUMS.block_m, BLOCK=SUMS.block_n,
        )  # fmt: skip

    def sum_lags(self, lags: Tensor) -> Tensor:
        """The gradient of the factors, summed as gates are: a column for each factor of each head, or for each factor of all."""
        p, dlags = self.problem, lags.new_empty(lags.shape)
        columns = dlags.numel()
        parts, more = [*self.lags, None][:2]
        counts = [0 if x is None else x.numel() // columns for x in (parts, more)]
        launch(
            _sum_partials_kernel, (columns,), SUMS, p.q.device,
            parts_ptr=None, splits=0, rows=0, more_ptr=None, more_splits=0, more_rows=0, dw_q_ptr=None, dw_k_ptr=None,
            gate_parts_ptr=parts, gate_splits=counts[0], more_gate_ptr=more, more_gate_splits=counts[1], dgate_ptr=dlags,
            heads=columns, table_rows=0, blocks=0, SHARED=False, PER_HEAD=True, ALIGN_RIGHT=False,
            DOUBLE=p.q.dtype.itemsize == 8, R=1, PARTS=SUMS.block_m, BLOCK=SUMS.block_n,
        )  # fmt: skip
        return dlags

    def sum_query_heads(self) -> None:
        p, (dk, dv, dv_cov) = self.problem, self.of_heads
        assert dk is not None and dv is not None
        lines, block = self.dk.shape[0] * p.kv_heads * p.rows, 16
        launch(
            _sum_query_heads_kernel, (ceil_div(lines, block),), SUMS, p.q.device,
            **flat(
                dk_parts=p.view(dk), dk=p.view(self.dk), dv_parts=p.view(dv), dv=p.view(self.dv),
                dv_cov_parts=NO_VIEW if dv_cov is None else p.view(dv_cov), dv_cov=p.covariance_view(self.dv_cov),
            ),
            heads=p.heads, rows=p.rows, lines=lines, GROUP=p.group, BLOCK=block,
            **{name: p.widths[name] for name in ("D", "DV", "BLOCK_D", "BLOCK_DV")},
        )  # fmt: skip


def shares_tables(problem: Problem) -> bool:
    """Whether all heads share the position tables."""
    return problem.w_q is None or problem.w_q.shape[1] == 1
