"""Plans of calls, remembered by signature: what a call's shapes, strides, dtypes and options decide is found once.

A plan (`_triton/plan.py`) holds the launches of a checked call, with slots where tensors go. The public calls `look` for one before
they check anything. A signature comes with a plan only after a call of it has passed all checks; its first call leaves the plan,
the second records the launches, all later ones repeat them.

A signature is everything that the checks and the launches depend on, apart from what tensors hold: for each tensor shape, strides,
dtype, device, alignment and whether it requires a gradient; the options with their types; whether gradients are recorded; the
generation of the tuner's results. Where the values of lengths can be read for nothing, which is on a CPU, they belong to it too.
Whatever else may change what a call means sends it along the slow path, without a look: torch.compile, autocast, modes and
subclasses that dispatch, transforms, forward-mode AD, tracing, tensors whose negation is pending or that have no memory.
"""

import os
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from . import tuned
from .call import Inputs

MOST = 512  # plans that are kept, and as many again that no second call has used
NUMBERS = (int, float)
GATE, BOUNDS, SEED = (Inputs._fields.index(name) for name in ("gate", "bounds", "seed"))
PLAIN = (Tensor, Parameter)

_autocast, _modes = torch._C._is_any_autocast_enabled, torch._C._len_torch_dispatch_stack
_transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state

_plans: dict[Any, Any] = {}  # by signature, of those that were used
_new: dict[Any, Any] = {}
_lock = threading.Lock()  # of insertions; a look needs none


class Sight(NamedTuple):
    """A call whose signature is known; plan: None where there is none yet."""

    signature: Any
    tensors: list[Any]  # as the caller gave them, by the fields of `Inputs` and then others: a gate may be a number, a seed too
    pointers: list[int]
    plan: Any


def look(tensors: list[Any], backend: str, options: tuple[Any, ...]) -> Sight | None:
    """The call as its plan takes it, None if it must take the slow path. options: hashable, all that decides beside the tensors."""
    q = tensors[0]
    if torch.compiler.is_compiling() or q.__class__ not in PLAIN or (backend != "triton" and not q.is_cuda):
        return None
    if _autocast() or _modes() or _tracing() or forward_ad._current_level >= 0 or _transforms() is not None:
        return None
    parts: list[Any] = [torch.is_grad_enabled(), *state(q.dtype), backend]
    parts += options
    pointers = []
    try:
        for x in tensors:
            if x is None:
                parts.append(None)
                pointers.append(0)
                continue
            kind = x.__class__
            if kind is Tensor or kind is Parameter:
                pointer = x.data_ptr()
                if not pointer or x.is_neg():
                    return None
                pointers.append(pointer)
                parts += (x.shape, x.stride(), x.dtype, x.get_device(), pointer & 15, x.requires_grad)
            elif kind in NUMBERS and len(pointers) in (GATE, SEED):
                parts += (kind, x if len(pointers) == GATE else 0)  # a seed differs from call to call
                pointers.append(0)
            else:
                return None
        bounds = tensors[BOUNDS]
        if bounds is not None and bounds.is_inference() and parts[0]:  # a backward cannot keep it
            return None
        if bounds is not None and bounds.device.type == "cpu":
            parts.append(tuple(bounds.tolist()))
        signature = tuple(parts)
        plan = _plans.get(signature) or _promoted(signature)
    except (RuntimeError, TypeError, ValueError):  # a tensor without memory, an option that cannot be hashed
        return None
    return Sight(signature, tensors, pointers, plan)


def state(dtype: torch.dtype) -> tuple[Any, ...]:
    """What decides launches beside the arguments, for queries of `dtype`: forward and backward each look at it when they run."""
    return tuned.generation(), torch.backends.cuda.matmul.fp32_precision if dtype is torch.float32 else None


def _promoted(signature: Any) -> Any:
    """The plan of a signature's first call, which moves to those that calls which never return cannot push out."""
    if signature not in _new:
        return None
    with _lock:
        plan = _new.pop(signature, None) or _plans.get(signature)
        if plan is not None:
            _insert(_plans, signature, plan)
        return plan


def remember(signature: Any, plan: Any) -> None:
    """Keep a plan for the next call of this signature. An option in a tensor, such as a scale, could change unseen: no plan."""
    if any(isinstance(part, Tensor) for part in signature):
        return
    with _lock:
        _insert(_new, signature, plan)


def _insert(plans: dict[Any, Any], signature: Any, plan: Any) -> None:
    while len(plans) >= MOST:
        del plans[next(iter(plans))]
    plans[signature] = plan


def forget() -> None:
    """Drop all plans: their kernels are not valid in a forked process, and tests change what a signature decides."""
    with _lock:
        _plans.clear()
        _new.clear()


def _forget_in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
