"""What the tests of the adapters share: made-up histories, and the examples of the page about them. Imports no library."""

import re
from pathlib import Path

import numpy as np

ITEMS, WINDOW = 30, 16
PAGE = Path(__file__).parents[1] / "docs/recommenders.md"


def histories(users: int = 150) -> list[list[int]]:
    """Items of each user, 3 to 11 of them: each item is followed by the next, the last by the first."""
    rng = np.random.default_rng(0)
    return [[int(start + t) % ITEMS for t in range(rng.integers(3, 12))] for start in rng.integers(ITEMS, size=users)]


def following(past: list[list[int]]) -> list[int]:
    return [(one[-1] + 1) % ITEMS for one in past]


def run_example(heading: str) -> None:
    """Run the page's block of Python under that heading."""
    (block,) = re.findall(rf"^## {heading}$.*?```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    exec(block, {})


def as_refined(name: str) -> str:
    """Name of a parameter of torch.nn.MultiheadAttention in the module that refines it."""
    return name.replace("in_proj_", "qkv.").replace("out_proj", "out")
