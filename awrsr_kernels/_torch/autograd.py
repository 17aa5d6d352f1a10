"""The autograd Functions of the torch backend: in eager mode, and of the operators that torch.compile sees."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..call import Call, Inputs
from ..checks import one_gradient
from ..operators import joined
from ..torch_state import own_tensor, without_autocast
from .backward import backward_pass
from .chunks import Products
from .forward import forward_pass
from .operator import backward_op, forward_op
from .plan import Plan

_SIZE = len(Inputs._fields)


class RefinedAttention(torch.autograd.Function):
    """The tensors of `Inputs` one by one, and the call -> the outputs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, call = arguments
        inputs = Inputs(*tensors)
        plan = Plan(inputs, call)
        loaded = plan.load_inputs(inputs)
        outs, products = forward_pass(plan, inputs, loaded, keep=True, keep_weights=True)
        # Rows once brought into windows stay; of the caller's tensors shapes and dtypes are enough
        ctx.plan, ctx.like = plan, Inputs._make(None if x is None else torch.empty_like(x, device="meta") for x in inputs)
        ctx.save_for_backward(*loaded, *products)
        return tuple(map(own_tensor, outs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        one_gradient("torch", douts)
        tensors = ctx.saved_tensors  # read once: a checkpoint gives them once
        loaded, products = Inputs(*tensors[:_SIZE]), Products(*tensors[_SIZE:])
        with without_autocast(loaded.q.device):
            return *backward_pass(ctx.plan, ctx.like, loaded, douts, products), None


class RefinedAttentionOperator(torch.autograd.Function):
    """The fields of `Inputs` and of `Call` one by one -> the outputs."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        inputs, ctx.call = Inputs(*arguments[:_SIZE]), Call(*arguments[_SIZE:])
        results, count = forward_op(*joined(inputs, ctx.call, True)), 1 + ctx.call.stochastic
        ctx.save_for_backward(*inputs, *results[count:])
        return tuple(results[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        one_gradient("torch", douts)
        tensors = ctx.saved_tensors
        inputs, saved = Inputs(*tensors[:_SIZE]), list(tensors[_SIZE:])
        with without_autocast(inputs.q.device):
            gradients = iter(backward_op(list(douts), saved, *joined(inputs, ctx.call)))
        has_gradient = inputs._replace(bounds=None, seed=None)
        return *(None if x is None else next(gradients) for x in has_gradient), *(None for _ in ctx.call)
