"""What the tests of the adapters share: synthetic histories, what each must do, and the examples of the page about them.

Imports no library.
"""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ITEMS, WINDOW = 30, 16
PAGE = Path(__file__).parents[2] / "docs/recommenders.md"


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


def check_nothing_to_encode(encoder: nn.Module, call: Callable[[Tensor, Tensor], Tensor], window: int = WINDOW) -> None:
    """Batches without items, or without histories, give zeros, and every parameter a gradient, 0: otherwise DDP would wait.

    call: from embeddings (B, L, 32) and bool (B, L), True at items, to what the encoder gives.
    """
    encoder.train()
    for entries in (3, 0):
        encoder.zero_grad(set_to_none=True)
        out = call(torch.randn(entries, window, 32), torch.zeros(entries, window, dtype=torch.bool))
        assert out.shape == (entries, window, 32) and not out.any()
        out.sum().backward()
        for name, value in encoder.named_parameters():
            assert value.grad is not None and not value.grad.any(), name


def check_autocast(network: nn.Module, attention: nn.Module, call: Callable[[], Tensor]) -> None:
    """In bfloat16 by autocast, results and gradients are nearly those in float32, and parameters stay float32."""
    network.eval()
    seen, found = [], []
    hook = attention.out.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    for half in (False, True):
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = call()
        out.float().square().sum().backward()
        grads = [value.grad.flatten() for value in network.parameters() if value.grad is not None]
        assert all(grad.dtype == torch.float32 for grad in grads)
        found.append((out.detach().float().flatten(), torch.cat(grads)))
    hook.remove()
    assert seen == [torch.float32, torch.bfloat16]
    for single, half_precision in zip(*found, strict=True):
        assert torch.nn.functional.cosine_similarity(single, half_precision, 0) > 0.999
