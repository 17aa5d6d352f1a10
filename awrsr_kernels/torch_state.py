"""The current state of torch: tracing, exporting, transforming functions, casting by autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

# Kinds of devices that autocast knows, found here because torch 2.11 cannot trace the question.
AUTOCASTS = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))

_TRACERS = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL)
_BATCHED = torch._C._dispatch_key_parse("Batched")


def readable(x: Tensor) -> bool:
    """Whether the values of a tensor are there, and reading them costs nothing and ties no recorded program to them."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed() and not traced(x)


def jit_tracing() -> bool:
    """Whether torch.jit.trace records."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def watched() -> bool:
    """Whether a dispatch mode sees the operations of eager code."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def traced(x: Tensor) -> bool:
    """Whether an operation on x is recorded (make_fx, torch.jit.trace) or has no values to work on (FakeTensorMode)."""
    if isinstance(x, FakeTensor) or jit_tracing():
        return True
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACERS)


def materialised(x: Tensor) -> Tensor:
    """x with its values in memory: torch negates some tensors, and fills some with zeros, only when its operations read them."""
    if x._is_zerotensor():
        return torch.zeros_like(x)
    return x.resolve_neg() if x.is_neg() else x


def own_tensor(x: Tensor) -> Tensor:
    """x over the same memory, but not as a view. Autograd refuses to change results in place that are views made in a Function or
    under no_grad."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x._base is None:
        return x
    if watched() or transformed() or traced(x):
        return x
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())


def saveable(x: Tensor | None) -> Tensor | None:
    """A tensor of integers that a backward can keep, also if torch.inference_mode made it."""
    return x.clone() if x is not None and not torch.compiler.is_compiling() and x.is_inference() else x


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
