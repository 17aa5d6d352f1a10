"""The torch backend as operators for torch.compile, whose fakes know every shape without reading a length.

H query heads, T rows, B sequences.

What the backward needs depends on how lengths fall into chunks. So it goes into one tensor with room for what they come to in all
but odd cases: memory that nothing is written to is not taken from the system. A chunk that finds no room is computed again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..call import Call, Inputs
from ..checks import one_gradient
from ..operators import define_operators
from ..torch_state import without_autocast
from .chunks import Plan
from .passes import backward_pass, forward_pass, items_of, kinds_of, saved_shapes, values_of, weights_kept, widths_of
from .selection import LANES
from .sweeps import Named

_last: dict[tuple[Any, ...], Plan] = {}  # one at most


def _room(given: Inputs, call: Call) -> int:
    """Numbers that the forward may hand to the backward: those of rows of windows, each a row for the products and the weights."""
    _, heads, rows, _ = given.q.shape
    if not call.varlen or given.bounds is None:
        windows = given.q.shape[0] * rows
    else:
        count = given.bounds.shape[0] - 1
        windows = count * call.max_len
        if given.q.device.type == "cpu":  # where lengths are read
            windows = torch.sym_min(windows, rows + 2 * LANES * count)
    features = sum(x.shape[-1] for x in items_of(given).values())  # more than weights take, where they are kept
    return windows * heads * (features + sum(widths_of(given, call).values()) + (call.refinement == "stochastic"))


def _parts(state: Tensor, plan: Plan, given: Inputs) -> Iterator[Named]:
    """Where in `state` each chunk has what the backward needs of it; nothing for one that does not fit in any more."""
    used = 0
    for place, keep in zip(plan.places, weights_kept(plan, given), strict=True):
        count, shapes = place.count * place.heads, saved_shapes(place, given, keep)
        sizes = [count * rows * columns for rows, columns in shapes.values()]
        if used + sum(sizes) > state.numel():
            yield {}
            continue
        parts = state[used : used + sum(sizes)].split(sizes)
        used += sum(sizes)
        yield {name: part.view(count, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _plan(given: Inputs, call: Call) -> Plan:
    """As in eager mode: packed rows are read for the longest sequence, which could not be done while tracing.

    Forward and backward, and the layers of a model, ask for the same plan one after another: the last one is kept. Under dropout
    it holds masks, and is made anew.
    """
    bounds = given.bounds
    if bounds is None or bounds.device.type != "cpu":
        return Plan(given, call)
    read = bounds.tolist()
    if call.varlen:
        longest = max((end - begin for begin, end in zip(read, read[1:], strict=False)), default=1)
        call = call._replace(max_len=max(1, min(longest, call.max_len)))
    if call.dropout_p:
        return Plan(given, call)
    key = call, tuple(read), given.q.dtype, *(x.shape for x in items_of(given).values()), torch.get_num_threads()
    plan = _last.get(key)
    if plan is None:
        plan = Plan(given, call)
        _last.clear()
        _last[key] = plan
    return plan


def _forward(given: Inputs, call: Call, keep: bool) -> list[Tensor]:
    plan = _plan(given, call)
    loaded = plan.load_inputs(given)
    if not keep:
        return list(forward_pass(plan, loaded, given.v.dtype))
    state = given.q.new_empty(_room(given, call), dtype=plan.dtype)
    return [*forward_pass(plan, loaded, given.v.dtype, rooms=_parts(state, plan, given)), state]


def _rows(given: Inputs, call: Call, like: Tensor, heads: int) -> Tensor:
    """Without contents, rows of all heads as the passes lay them out."""
    entries, rows, features = given.q.shape[0], given.q.shape[2], like.shape[-1]
    if call.varlen:
        return like.new_empty(entries, rows, heads, features).transpose(1, 2)
    return like.new_empty(entries, heads, rows, features)


def _fake_forward(given: Inputs, call: Call, keep: bool) -> list[Tensor]:
    outs = [_rows(given, call, x, given.q.shape[1]) for x in values_of(given)]
    dtype = torch.float64 if given.q.dtype == torch.float64 else torch.float32
    return [*outs, given.q.new_empty(_room(given, call), dtype=dtype)] if keep else outs


def _backward(douts: list[Tensor], saved: list[Tensor], given: Inputs, call: Call) -> list[Tensor]:
    plan = _plan(given, call)
    found = backward_pass(plan, kinds_of(given, call), plan.load_inputs(given), douts, _parts(saved[0], plan, given))
    return [found[name] for name in Inputs._fields if name in found]


def _fake_backward(douts: list[Tensor], saved: list[Tensor], given: Inputs, call: Call) -> list[Tensor]:
    found = {name: _rows(given, call, x, x.shape[1]) for name, x in items_of(given).items()}
    for name, w in (("w_q", given.w_q), ("w_k", given.w_k)):
        if w is not None:
            found[name] = _rows(given, call, w, w.shape[1]) if call.per_entry else w.new_empty(w.shape)
    if given.gate is not None:
        found["gate"] = given.gate.new_empty(given.gate.shape)
    return [found[name] for name in Inputs._fields if name in found]


_forward_op, _backward_op = define_operators("refined_attention_torch", _forward, _fake_forward, _backward, _fake_backward)


class OperatorAttention(torch.autograd.Function):
    """The tensors of `Inputs` one by one, then the call, to the outputs; differentiable once."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.call = arguments
        *outs, state = _forward_op(*tensors, *ctx.call, True)
        ctx.save_for_backward(*tensors, state)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        one_gradient("torch", douts)
        *tensors, state = ctx.saved_tensors  # read once: a checkpoint gives them once
        inputs = Inputs(*tensors)
        with without_autocast(inputs.q.device):
            gradients = iter(_backward_op(list(douts), [state], *inputs, *ctx.call))
        differentiable = inputs._replace(bounds=None, seed=None)
        return *(None if x is None else next(gradients) for x in differentiable), None


def operator_attention(given: Inputs, call: Call) -> tuple[Tensor, ...]:
    """As `fallback_attention`, for torch.compile."""
    if given.need_gradient():
        outs: tuple[Tensor, ...] = OperatorAttention.apply(*given, call)
        return outs
    return tuple(_forward_op(*given, *call, False))
