"""Options as dataclass fields, with their help text and range in one place, for `--help`, checks and readers."""

from collections.abc import Sequence
from dataclasses import field, fields
from math import inf, isfinite
from typing import Any

FALLBACKS = ("popular", "none")  # what users without any known item get


def option(
    default: Any, help: str, *, choices: Sequence[str] = (), least: float = -inf, below: float = inf, most: float = inf
) -> Any:
    """A dataclass field with a help text and a range: one of `choices`, or at least `least`, below `below` and at most `most`."""
    return field(default=default, metadata={"help": help, "choices": choices, "range": (least, below, most)})


def check(options: Any) -> None:
    """Raise ValueError for a value out of its range, and TypeError for a value of another type. The message names the option."""
    for each in fields(options):
        value, default, may = getattr(options, each.name), each.default, each.metadata
        if hasattr(value, "item"):  # a NumPy scalar
            value = value.item()
            object.__setattr__(options, each.name, value)
        kinds = (int, float) if isinstance(default, float) else type(default)
        if default is not None and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)):
            raise TypeError(f"{each.name} is {value!r}, must be of type {type(default).__name__}")
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{each.name} is {value!r}, must be a finite number")
        if may["choices"] and value not in may["choices"]:
            raise ValueError(f"{each.name} is {value!r}, must be one of {', '.join(may['choices'])}")
        least, below, most = may["range"]
        if isinstance(value, int | float) and not (least <= value < below and value <= most):
            bounds = f"at least {least:g}" + f" and below {below:g}" * (below < inf) + f" and at most {most:g}" * (most < inf)
            raise ValueError(f"{each.name} is {value!r}, must be {bounds}")
