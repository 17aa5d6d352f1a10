"""The torch backend as operators for torch.compile, whose fakes know every shape without reading a length.

What the backward needs is handed over in rows form, whose shapes do not depend on how lengths fall into windows.
"""

import torch
from torch import Tensor

from ..call import Call, Inputs
from ..operators import define_operators
from .backward import backward_pass
from .chunks import Products, make_products
from .forward import forward_pass
from .plan import Plan


def _values(inputs: Inputs) -> list[Tensor]:
    return [x for x in (inputs.v, inputs.v_cov) if x is not None]


def with_gradient(gradients: Inputs) -> list[Tensor]:
    """The tensors that have a gradient, in the order of `Inputs`."""
    return [x for x in gradients._replace(bounds=None, seed=None) if x is not None]


def _forward(inputs: Inputs, call: Call, keep: bool) -> list[Tensor]:
    plan = Plan(inputs, call)
    outs, products = forward_pass(plan, inputs, plan.load_inputs(inputs), keep=keep)
    return [*outs, *(plan.collect(x, plan.dtype) for x in products if x is not None)]


def _backward(douts: list[Tensor], saved: list[Tensor], inputs: Inputs, call: Call) -> list[Tensor]:
    plan, rows = Plan(inputs, call), iter(saved)
    products = make_products(inputs, call, lambda _: plan.load(next(rows)))
    return with_gradient(backward_pass(plan, inputs, plan.load_inputs(inputs), douts, products))


def _rows(inputs: Inputs, call: Call, heads: int, features: int, dtype: torch.dtype) -> Tensor:
    """Without contents, rows of all heads as the passes lay them out."""
    entries, _, rows, _ = inputs.q.shape
    if call.varlen:
        return inputs.q.new_empty(entries, rows, heads, features, dtype=dtype).transpose(1, 2)
    return inputs.q.new_empty(entries, heads, rows, features, dtype=dtype)


def _fake_forward(inputs: Inputs, call: Call, keep: bool) -> list[Tensor]:
    heads, dtype = inputs.q.shape[1], torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    outs = [_rows(inputs, call, heads, x.shape[-1], x.dtype) for x in _values(inputs)]
    products = make_products(inputs, call, lambda features: _rows(inputs, call, heads, features, dtype)) if keep else Products()
    return [*outs, *(x for x in products if x is not None)]


def _fake_backward(douts: list[Tensor], saved: list[Tensor], inputs: Inputs, call: Call) -> list[Tensor]:
    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else _rows(inputs, call, x.shape[1], x.shape[-1], x.dtype)

    def table(w: Tensor | None) -> Tensor | None:
        return like(w) if w is None or call.per_entry else w.new_empty(w.shape)

    q, k, v, w_q, w_k, gate, _, _, v_cov, lags = inputs
    gate, lags = (None if x is None else x.new_empty(x.shape) for x in (gate, lags))
    gradients = Inputs(like(q), like(k), like(v), table(w_q), table(w_k), gate, None, None, like(v_cov), lags)  # type: ignore[arg-type]
    return with_gradient(gradients)


forward_op, backward_op = define_operators("refined_attention_torch", _forward, _fake_forward, _backward, _fake_backward)
