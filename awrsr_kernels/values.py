"""Checks of numbers and flags, as people pass them: Python's own, NumPy's, and tensors without dimensions on the CPU.

A check returns the value as Python's own. Every message names the argument, what it was and what it must be.
"""

import math
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .torch_state import jit_tracing, readable


def refuse(name: str, was: str, must: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{name} is {was}; it must be {must}")


def plain(name: str, value: Any) -> Any:
    """A number or flag of NumPy's or in a tensor without dimensions as Python's own; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, Tensor) or value.dim():
        return value
    if value.requires_grad:
        was = "a tensor that requires a gradient"
        refuse(name, was, "a number, as it would get none here (multiply q or w_q by a learned scale)", TypeError)
    if not readable(value) and not jit_tracing():  # torch.jit.trace has sizes as tensors
        was = f"a tensor on {value.device}" if value.device.type != "cpu" else "a tensor that cannot be read while tracing"
        refuse(name, was, "a number, or a tensor on the CPU outside torch.compile: its value decides what runs", TypeError)
    return value.item()


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    value = plain(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        refuse(name, type(value).__name__, "an int", TypeError)
    if value < low or (high is not None and value > high):
        refuse(name, str(value), f"{low} or more" if high is None else f"in {low}..{high}")
    return value  # type: ignore[return-value]  # torch.SymInt stands for an int


def divisor(name: str, value: Any, of: int) -> int:
    whole_value = whole(name, value, 1)
    if of % whole_value:
        refuse(name, str(value), f"a divisor of {of} heads")
    return whole_value


def number(name: str, value: Any) -> float:
    value = plain(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(name, type(value).__name__, "a number", TypeError)
    if not -math.inf < value < math.inf:
        refuse(name, str(value), "finite")
    return float(value)


def scale(name: str, value: Any, features: int) -> float:
    return features**-0.5 if value is None else number(name, value)


def probability(name: str, value: Any) -> float:
    """The probability, or 0 where it rounds to 0."""
    p = number(name, value)
    if not 0 <= p < 1:
        refuse(name, str(value), "in [0, 1)")
    return p if p * 65536 > 0.5 else 0.0  # as `dropout.quantise` rounds, and torch.compile can follow


def flag(name: str, value: Any) -> bool:
    value = plain(name, value)
    if not isinstance(value, bool):
        refuse(name, repr(value), "True or False", TypeError)
    return value
