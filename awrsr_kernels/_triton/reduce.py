"""Gradients that are sums of parts: memory for the parts, and their sums in a fixed order, within and across regimes.

H query heads, H_kv key heads, N table rows, R refinement rank. A part is what one program, or one query head of a key head, adds.
"""

from typing import overload

import torch.nn.functional as F
from torch import Tensor

from .launch import allocate
from .problem import Problem


@overload
def per_query_head(problem: Problem, gradient: Tensor) -> Tensor: ...
@overload
def per_query_head(problem: Problem, gradient: Tensor | None) -> Tensor | None: ...
def per_query_head(problem: Problem, gradient: Tensor | None) -> Tensor | None:
    """Uninitialised memory for the gradient of a key head as parts, one per query head; with one query head the gradient itself."""
    if problem.group == 1 or gradient is None:
        return gradient
    return allocate(gradient, problem.heads, gradient.shape[-1], problem.call.varlen, problem.accumulator)


@overload
def sum_query_heads(problem: Problem, parts: Tensor, gradient: Tensor) -> Tensor: ...
@overload
def sum_query_heads(problem: Problem, parts: Tensor | None, gradient: Tensor | None) -> Tensor | None: ...
def sum_query_heads(problem: Problem, parts: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The gradient from what `per_query_head` allocated."""
    if parts is None or gradient is None or parts is gradient:
        return gradient
    return gradient.copy_(parts.unflatten(1, (problem.kv_heads, problem.group)).sum(2))


def partial_tables(problem: Problem, splits: int, rows: int) -> Tensor:
    """Uninitialised memory for the parts of both tables' gradients, one per program and head: (2, splits, H, rows, R)."""
    return problem.q.new_empty(2, splits, problem.heads, rows, problem.rank, dtype=problem.accumulator)


def sum_tables(problem: Problem, partials: Tensor) -> list[Tensor]:
    """The gradients of both tables, (1, 1 or H, N, R) each, from what `partial_tables` allocated."""
    w, call = problem.w_q, problem.call
    assert w is not None
    total = partials.sum(1 if w.shape[1] > 1 else (1, 2)).view(2, 1, w.shape[1], *partials.shape[3:])
    # Rows that no sequence reaches; negative if the tile has surplus rows.
    missing, dtype = w.shape[2] - partials.shape[3], problem.sum_dtype(w)
    if call.align_right and (call.varlen or problem.bounds is not None):
        total, pads = total[:, :, :, max(0, -missing) :], (0, 0, missing, 0)
    else:
        total, pads = total[:, :, :, : w.shape[2]], (0, 0, 0, missing)
    return [F.pad(x, pads).to(dtype) if missing > 0 else x.to(dtype, copy=True) for x in total.unbind()]


def in_order(
    problem: Problem, items: list[Tensor], tables: list[Tensor], dgate: Tensor | None, dv_cov: Tensor | None
) -> list[Tensor]:
    """Gradients in the order of the inputs that the call has: q, k, v, W_q, W_k, gate, v_cov; dgate comes per head."""
    gradients, gate = items + tables, problem.gate
    if gate is not None and dgate is not None:
        dgate = dgate if gate.numel() == problem.heads else dgate.sum(0, keepdim=True)
        gradients.append(dgate.to(problem.sum_dtype(gate)))
    return gradients if dv_cov is None else [*gradients, dv_cov]


def add_regimes(problem: Problem, tiled: list[Tensor], short: list[Tensor]) -> list[Tensor]:
    """The gradients of a call that ran in both regimes. They share all memory except that of sums over sequences, added here."""
    first = 5 if problem.w_q is not None and problem.call.per_entry else 3
    tables = [] if first == 5 or problem.w_q is None else [problem.w_q, problem.w_k]
    sums = tables + ([] if problem.gate is None else [problem.gate])
    both = zip(tiled[first:], short[first:], sums, strict=False)
    added = [(a + b).to(x.dtype) for a, b, x in both if x is not None]
    return short[:first] + added + short[first + len(sums) :]
