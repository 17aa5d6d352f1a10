"""Plain attention (refinement "none") by torch's own fused kernel, where it is correct and the fastest on a CPU.

It takes no padding, no packed rows and not our dropout; its double backward does not exist, hence a Function that says so.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..call import Call, Inputs

# Rows from which its backward beats products of blocks: 0.65 of their time at 100 rows, 0.78 at 50, 0.95 at 16 in float32;
# 37 against 91 ms at 2048, 26 against 28 ms at 200, 37 against 13 ms at 100 in bfloat16.
_FEWEST_ROWS = {torch.float64: 32, torch.float32: 32, torch.bfloat16: 256, torch.float16: 256}


def has_stock_kernel(inputs: Inputs, call: Call) -> bool:
    """Whether torch's kernel computes this call, and faster."""
    q, k, v = inputs.q, inputs.k, inputs.v
    fits = q.device.type == "cpu" and q.shape == k.shape == v.shape and q.numel() > 0
    plain = call.refinement == "none" and not (call.stochastic or call.dropout_p or call.shift) and inputs.bounds is None
    scales = call.softmax_scale > 0 or not call.causal  # it hides later keys by -inf before it scales
    return fits and plain and scales and (not inputs.need_gradient() or q.shape[2] >= _FEWEST_ROWS[q.dtype])


class _StockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, call):  # type: ignore[no-untyped-def]
        outputs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, call.causal, scale=call.softmax_scale)
        ctx.call = call
        ctx.save_for_backward(q, k, v, *outputs)
        return outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout):  # type: ignore[no-untyped-def]
        options = {"dropout_p": 0.0, "is_causal": ctx.call.causal, "scale": ctx.call.softmax_scale}
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return *backward(dout.contiguous(), *ctx.saved_tensors, **options), None


def stock_attention(inputs: Inputs, call: Call) -> Tensor:
    """The output, (entries, H, rows, D_v); no O(L^2) memory either way."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs[:3] if x is not None)
    if inputs.need_gradient():
        return _StockAttention.apply(q, k, v, call)
    return F.scaled_dot_product_attention(q, k, v, is_causal=call.causal, scale=call.softmax_scale)
