"""The current state of torch: tracing, exporting, transforming functions, casting by autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Kinds of devices that autocast knows, found here because torch 2.11 cannot trace the question.
AUTOCASTS = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))

_BATCHED = torch._C._dispatch_key_parse("Batched")


def readable(x: Tensor) -> bool:
    """Whether reading the values of a tensor costs nothing."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


def transformed() -> bool:
    """Whether a transform of torch.func is active, outside torch.compile, which reports that itself."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def batched(x: Tensor | None) -> bool:
    """Whether a gradient is a batch of them, of torch.func.vmap or autograd's is_grads_batched, which maps in a way of its own."""
    if x is None or torch.compiler.is_compiling():
        return False
    return torch._C._dispatch_keys(x).has(_BATCHED) or torch._C._functorch.is_batchedtensor(x)


def exports_any_size(q: Tensor, bounds: Tensor | None) -> bool:
    """Whether torch.export traces dynamic sizes. In strict mode these look like any others."""
    if not torch.compiler.is_exporting():
        return False
    sizes = [*q.shape, *(() if bounds is None else bounds.shape)]
    return torch.compiler.is_dynamo_compiling() or any(isinstance(size, torch.SymInt) for size in sizes)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Switch autocast off, so that arithmetic follows the dtypes; the arguments were cast already."""
    casts = device.type in AUTOCASTS and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if casts else nullcontext()


def autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype if autocast is on. float64 does not change, as in autocast itself."""
    kind = x.device.type
    if kind not in AUTOCASTS or not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))
