"""Types of command-line arguments for the tuner and the benchmarks; their errors say what a value must be."""

import argparse
from collections.abc import Callable


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers within bounds."""

    def parse(text: str) -> int:
        allowed = f"a whole number of at least {low}" if high is None else f"a whole number in {low}..{high}"
        if not text.isascii() or not text.isdigit() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"was {text!r}, must be {allowed}")
        return int(text)

    return parse


def number(low: float, high: float, what: str) -> Callable[[str], float]:
    """A parser of numbers in [low, high)."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"was {text!r}, must be {what}")
        return value

    return parse


def sizes(text: str) -> tuple[int, ...]:
    """A parser of B,H,L,D or B,H,L,D,R."""
    parts = text.split(",")
    try:
        if len(parts) not in (4, 5):
            raise argparse.ArgumentTypeError("")
        return (*(whole(1)(x) for x in parts[:3]), *(whole(1, 256)(x) for x in parts[3:]))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"was {text!r}, must be B,H,L,D or B,H,L,D,R: whole numbers of at least 1, D and R up to 256, such as 128,2,50,32"
        ) from None
