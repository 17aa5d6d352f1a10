"""A backend as torch operators: a forward and a backward that torch.compile puts into its graph as they are, a node each.

Each comes with a fake, which says what the results look like and computes nothing, and is therefore the same for any length.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .call import Call, Inputs
from .checks import one_gradient
from .torch_state import without_autocast

PLAIN = (Tensor, torch.nn.Parameter)
Attention = Callable[[Inputs, Call], tuple[Tensor, ...]]
Forward = Callable[[Inputs, Call, bool], list[Tensor]]
Backward = Callable[[list[Tensor], list[Tensor], Inputs, Call], list[Tensor]]

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? w_q, Tensor? w_k, Tensor? gate, Tensor? bounds, Tensor? seed, Tensor? v_cov"
_CALL = "str refinement, bool causal, bool varlen, bool align_right, SymInt max_len, bool per_entry"
_CALL += ", float softmax_scale, float refine_scale, float dropout_p, bool gaussian"
_SIZE = len(Inputs._fields)


def watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody must see the operator: torch.compile, a dispatch mode, a subclass of Tensor. In eager mode nobody does,
    and its implementation is called as it is, which takes a fraction of the dispatcher's time."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return not all(x is None or type(x) in PLAIN for x in tensors)


def must_dispatch(tensors: Iterable[Tensor | None]) -> bool:
    """Whether somebody must see the operator: torch.compile, a dispatch mode, a subclass of Tensor."""
    return watched(tensors)


def split_arguments(arguments: tuple[Any, ...]) -> tuple[Inputs, Call]:
    """The fields of both, one by one, as `Inputs` and `Call`."""
    return Inputs(*arguments[:_SIZE]), Call(*arguments[_SIZE:])


def define_operators(
    name: str, forward: Forward, fake_forward: Forward, backward: Backward, fake_backward: Backward
) -> tuple[Any, Any]:
    """`awrsr_kernels::NAME` and `awrsr_kernels::NAME_backward`, with fakes; arguments as in `register`."""

    def run_forward(*arguments: Any) -> list[Tensor]:
        return forward(*split_arguments(arguments[:-1]), arguments[-1])

    def run_backward(douts: list[Tensor], saved: list[Tensor], *arguments: Any) -> list[Tensor]:
        return backward(douts, saved, *split_arguments(arguments))

    new = torch.library.custom_op
    forward_op = new(f"awrsr_kernels::{name}", run_forward, mutates_args=(), schema=f"({_INPUTS}, {_CALL}, bool keep) -> Tensor[]")
    schema = f"(Tensor[] douts, Tensor[] saved, {_INPUTS}, {_CALL}) -> Tensor[]"
    backward_op = new(f"awrsr_kernels::{name}_backward", run_backward, mutates_args=(), schema=schema)
    forward_op.register_fake(lambda *arguments: fake_forward(*split_arguments(arguments[:-1]), arguments[-1]))
    backward_op.register_fake(lambda douts, saved, *arguments: fake_backward(douts, saved, *split_arguments(arguments)))
    return forward_op, backward_op


def register(
    name: str, forward: Forward, fake_forward: Forward, backward: Backward, fake_backward: Backward, *, reads_outputs: bool
) -> tuple[Any, Any, Attention]:
    """Register `awrsr_kernels::NAME` and `awrsr_kernels::NAME_backward`.

    Args:
        forward: (inputs, call, keep) -> the outputs, (entries, H, rows, D_v), one or between Gaussians two, and if `keep` what the
            backward needs besides the inputs. fake_forward: the same without contents.
        backward: (gradients of the outputs, what was kept, inputs, call) -> gradients of q, k, v and, where given, of w_q, w_k,
            gate, v_cov. fake_backward: the same without contents.
        reads_outputs: whether what was kept begins with the outputs, where anything is.

    Returns:
        Both operators, which take the fields of `Inputs` and `Call` one by one (the backward after its two lists, the forward
        before `keep`), and the call: inputs and call to outputs, differentiable once.
    """

    forward_op, backward_op = define_operators(name, forward, fake_forward, backward, fake_backward)
    backend = "torch" if name.endswith("_torch") else "triton"

    def forward_of(given: Inputs, call: Call, keep: bool) -> list[Tensor]:
        found: list[Tensor] = forward_op(*given, *call, keep) if watched(given) else forward(given, call, keep)
        return found

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
            *tensors, ctx.call = arguments
            found, outputs = forward_of(Inputs(*tensors), ctx.call, True), 1 + ctx.call.gaussian
            first = 0 if reads_outputs and len(found) > outputs else outputs
            ctx.save_for_backward(*tensors, *found[first:])
            return tuple(found[:outputs])

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
            one_gradient(backend, douts)
            tensors = ctx.saved_tensors  # read once: a checkpoint gives them once
            given, saved = Inputs(*tensors[:_SIZE]), list(tensors[_SIZE:])
            with without_autocast(given.q.device):
                if watched(given) or watched(douts):
                    found = iter(backward_op(list(douts), saved, *given, *ctx.call))
                else:
                    found = iter(backward(list(douts), saved, given, ctx.call))
            has_gradient = given._replace(bounds=None, seed=None)
            return *(None if x is None else next(found) for x in has_gradient), None

    def attention(given: Inputs, call: Call) -> tuple[Tensor, ...]:
        if given.need_gradient():
            found: tuple[Tensor, ...] = Operator.apply(*given, call)
            return found
        return tuple(forward_of(given, call, False))

    return forward_op, backward_op, attention
