"""Options as dataclass fields: the meaning and the range of each are said once, for `--help`, for checks and for readers."""

import math
from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any


def option(default: Any, help: str, *, choices: Sequence[str] = (), least: float | None = None, below: float | None = None) -> Any:
    """A dataclass field with its help text and its range: one of `choices`; at least `least` and below `below`."""
    return field(default=default, metadata={"help": help, "choices": tuple(choices), "least": least, "below": below})


def check(options: Any) -> None:
    """Raise ValueError, naming the option, for a value out of its range, and TypeError for one of another type."""
    for each in fields(options):
        value, default, may = getattr(options, each.name), each.default, each.metadata
        if hasattr(value, "item"):  # a number of numpy's
            value = value.item()
            object.__setattr__(options, each.name, value)
        kinds = (int, float) if isinstance(default, float) else type(default)
        if default is not None and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)):
            raise TypeError(f"{each.name} is {value!r}, must be of type {type(default).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{each.name} is {value!r}, must be a finite number")
        if may["choices"] and value not in may["choices"]:
            raise ValueError(f"{each.name} is {value!r}, must be one of {', '.join(may['choices'])}")
        least, below = may["least"], may["below"]
        if value is not None and (least is not None and not value >= least or below is not None and not value < below):
            upper = "" if below is None else f" and below {below:g}"
            raise ValueError(f"{each.name} is {value!r}, must be at least {least:g}{upper}")
