"""The kernels as torch operators. Imported only where Triton is wanted."""

from torch import Tensor

from ..call import Call, Inputs
from ..operators import register
from .launch import Problem, with_rows
from .ptxas import take_newer_assembler
from .short import short_backward, short_buffers, short_forward
from .tiled import tiled_buffers, tiled_forward
from .tiled_bwd import tiled_backward

take_newer_assembler()


def _forward(given: Inputs, call: Call, keep: bool) -> list[Tensor]:
    """The backward needs, besides the inputs, in the short regime nothing."""
    problem, outputs = Problem(given, call), 1 + call.gaussian
    if problem.is_short():
        return short_forward(problem)
    found = tiled_forward(problem, keep)
    if problem.short_reach():
        short_forward(problem, found[:outputs])
    return found


def _fake_forward(given: Inputs, call: Call, keep: bool) -> list[Tensor]:
    problem = Problem(given, call)
    buffers = short_buffers(problem) if problem.is_short() or not keep else tiled_buffers(problem)
    return list(buffers.values())


def _backward(douts: list[Tensor], saved: list[Tensor], given: Inputs, call: Call) -> list[Tensor]:
    problem = Problem(given, call)
    douts = [with_rows(dout) for dout in douts]
    if problem.is_short():
        return short_backward(problem, douts, saved)
    found = tiled_backward(problem, douts, saved)
    return short_backward(problem, douts, [], found) if problem.short_reach() else found


def _fake_backward(douts: list[Tensor], saved: list[Tensor], given: Inputs, call: Call) -> list[Tensor]:
    problem, (w_q, w_k) = Problem(given, call), (given.w_q, given.w_k)
    found = list(problem.gradients())
    if w_q is not None and w_k is not None:
        found += problem.table_gradients() if call.per_entry else (w.new_empty(w.shape) for w in (w_q, w_k))
    return found + [x.new_empty(x.shape) for x in (given.gate, given.v_cov) if x is not None]


_forward_op, _backward_op, triton_attention = register(
    "refined_attention", _forward, _fake_forward, _backward, _fake_backward, reads_outputs=True
)
