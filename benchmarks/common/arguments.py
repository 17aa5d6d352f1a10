"""Types of command line arguments, with complaints that say what was given and what it must be."""

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
