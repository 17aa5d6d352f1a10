"""Torch operators of both backends: their schemas, their definition with fakes, and when a call must go through the operator.

An operator is a node of its own in the graphs of torch.compile. Its fake says what the results look like, computes nothing, and is
therefore the same for any length.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .call import Call, Inputs
from .torch_state import watched

PLAIN = (Tensor, torch.nn.Parameter)
Forward = Callable[[Inputs, Call, bool], list[Tensor]]
Backward = Callable[[list[Tensor], list[Tensor], Inputs, Call], list[Tensor]]

_flops: dict[Any, Callable[..., int]] = {}  # formulas for `FlopCounterMode`, by operator

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? w_q, Tensor? w_k, Tensor? gate, Tensor? bounds, Tensor? seed, Tensor? v_cov"
_CALL = "str refinement, bool causal, bool varlen, bool align_right, SymInt max_len, bool per_entry"
# `Call.stochastic` is called "gaussian" here: programs that were exported earlier name it so.
_CALL += ", float softmax_scale, float refine_scale, float dropout_p, bool gaussian"
# Last and with defaults, as programs that were exported earlier do not have them.
_LATER = "Tensor? lags=None, bool shift=False, int plain_heads=0, int first_head=0"
_FIRST, _FIRST_OF_CALL = Inputs._fields.index("lags"), Call._fields.index("shift")
_KEEP = _FIRST + _FIRST_OF_CALL


def must_dispatch(tensors: Iterable[Tensor | None]) -> bool:
    """Whether torch.compile, a dispatch mode or a subclass of Tensor must see the operator. In eager mode this is not so, and a
    direct call of the implementation takes a fraction of the dispatcher's time."""
    if torch.compiler.is_compiling():
        return True
    if watched():
        _give_flops()
        return True
    return not all(x is None or type(x) in PLAIN for x in tensors)


def joined(inputs: Inputs, call: Call, *keep: bool) -> tuple[Any, ...]:
    """The arguments of an operator that runs a call: the fields of `Inputs` and `Call`, the later ones last. keep: of a forward."""
    return *inputs[:_FIRST], *call[:_FIRST_OF_CALL], *keep, *inputs[_FIRST:], *call[_FIRST_OF_CALL:]


def split_arguments(arguments: Sequence[Any], keep: int = 0) -> tuple[Inputs, Call]:
    """What `joined` was given; later arguments may be missing. keep: how many arguments lie in between, 1 of a forward."""
    end = _FIRST + _FIRST_OF_CALL
    first, later = arguments[:end], arguments[end + keep :]
    return Inputs(*first[:_FIRST], *later[:1]), Call(*first[_FIRST:], *later[1:])


def define_operators(
    name: str, forward: Forward, fake_forward: Forward, backward: Backward, fake_backward: Backward
) -> tuple[Any, Any]:
    """Define `awrsr_kernels::NAME` and `awrsr_kernels::NAME_backward`; returns both.

    They take what `joined` makes of a call; the backward takes two lists before it.

    Args:
        forward: (inputs, call, keep) -> one output (entries, H, rows, D_v), in stochastic attention two, and if `keep` what the
            backward needs besides the inputs. fake_forward: the same without contents.
        backward: (gradients of the outputs, what was kept, inputs, call) -> gradients of q, k, v and, where given, of w_q, w_k,
            gate, v_cov, lags. fake_backward: the same without contents.
    """

    def unpacked_forward(*arguments: Any) -> list[Tensor]:
        return forward(*split_arguments(arguments, 1), arguments[_KEEP])

    def unpacked_backward(douts: list[Tensor], saved: list[Tensor], *arguments: Any) -> list[Tensor]:
        return backward(douts, saved, *split_arguments(arguments))

    custom_op, short, name = torch.library.custom_op, name, f"awrsr_kernels::{name}"
    schema = f"({_INPUTS}, {_CALL}, bool keep, {_LATER}) -> Tensor[]"
    forward_op = custom_op(name, unpacked_forward, mutates_args=(), schema=schema)
    schema = f"(Tensor[] douts, Tensor[] saved, {_INPUTS}, {_CALL}, {_LATER}) -> Tensor[]"
    backward_op = custom_op(f"{name}_backward", unpacked_backward, mutates_args=(), schema=schema)
    forward_op.register_fake(lambda *arguments: fake_forward(*split_arguments(arguments, 1), arguments[_KEEP]))
    backward_op.register_fake(lambda douts, saved, *arguments: fake_backward(douts, saved, *split_arguments(arguments)))
    _flops[getattr(torch.ops.awrsr_kernels, short)] = _forward_flops
    _flops[getattr(torch.ops.awrsr_kernels, f"{short}_backward")] = _backward_flops
    return forward_op, backward_op


def _give_flops() -> None:
    """Give counters of floating-point operations the formulas. Their module is not imported for that, as it imports Triton."""
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    for packet in _flops.keys() - module.flop_registry.keys():
        module.register_flop_formula(packet)(_flops[packet])
    for mode in _get_current_dispatch_mode_stack():  # a counter that is active copied the formulas when it was made
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            counter.flop_registry.update({packet: module.flop_registry[packet] for packet in _flops})


def _forward_flops(*arguments: Any, **_: Any) -> int:
    """Floating-point operations of the definition's matrix products, as `FlopCounterMode` counts those of the reference.

    Like torch's formulas of attention it counts whole windows, whatever is masked or computed again. Tensors come as their shapes.
    """
    return _flops_of(*split_arguments(arguments, 1))


def _flops_of(inputs: Inputs, call: Call) -> int:
    """Of a forward, whose tensors are given by their shapes."""
    (entries, heads, rows, d), d_v = inputs.q, inputs.v[-1]
    rank = 0 if inputs.w_q is None else inputs.w_q[-1]
    compared = 1 if inputs.lags is None else 1 + inputs.lags[-1]  # type: ignore[operator]
    pairs = (inputs.bounds[0] - 1) * heads * call.max_len**2 if call.varlen else entries * heads * rows**2  # type: ignore[index]
    out = d_v * (1 + call.stochastic) * (1 + (call.refinement == "value"))
    return int(2 * pairs * (d + (2 + compared) * rank + out))


def _backward_flops(douts: Any, saved: Any, *arguments: Any, **_: Any) -> int:
    """Two products for each of the forward."""
    return 2 * _flops_of(*split_arguments(arguments))
