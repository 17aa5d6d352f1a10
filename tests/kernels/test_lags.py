"""Lagged correlations, shifted weights and plain heads: what they mean, and that none of them looks ahead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from awrsr_kernels import attention_weights, refined_attention

from ..conftest import DEVICE, ENGINES
from .problems import Kind

every_engine = pytest.mark.parametrize("engine", ENGINES)
Choose = Callable[[str], str]


@every_engine
@pytest.mark.parametrize("refinement", ["none", "simple", "additive"])
def test_with_lags_and_shift_no_edit_of_later_items_reaches_earlier_ones(engine: str, refinement: str, choose: Choose) -> None:
    """Values, too, are edited to other numbers, as large as they come: a weight that falls on what follows must not fall on what is
    to come, not even by a rounding error."""
    backend, kind = choose(engine), Kind(refinement)
    given = kind.draw((2, 2, 20, 8), (20, 5))
    options: dict[str, Any] = {"shift": True, "backend": backend}
    options |= {"lags": [0.5, -0.2]} if kind.tables else {}
    options |= {"plain_heads": 1} if refinement != "simple" else {}
    expected = kind.call(**given, **options)["out"]
    for edited in (1, 9, 19):
        for name in kind.items:
            changed = {n: x.clone() for n, x in given.items()}
            changed[name][:, :, edited:] = 1e4 * torch.randn_like(changed[name][:, :, edited:])
            found = kind.call(**changed, **options)["out"]
            assert torch.equal(found[:, :, :edited], expected[:, :, :edited])
            assert not torch.equal(found[:, :, edited:], expected[:, :, edited:]) or name != "v"


def test_shifted_weights_fall_on_what_followed() -> None:
    """Worked by hand: every item matches itself alone, so that "b" in a b a b points to what followed the "b" before."""
    items = torch.tensor([0, 1, 0, 1], device=DEVICE)
    q = torch.nn.functional.one_hot(items).to(torch.float32)[None, None]
    v = torch.tensor([1.0, 2.0, 4.0, 8.0], device=DEVICE).view(1, 1, 4, 1)
    _, weights = attention_weights(q, q, None, None, refinement="none", shift=True, softmax_scale=100.0)
    expected = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0.5, 0]], device=DEVICE)
    torch.testing.assert_close(weights[0, 0], expected)
    out = refined_attention(q, q, v, None, None, refinement="none", shift=True, softmax_scale=100.0)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0.0, 1.0, 2.0], device=DEVICE))


def test_lags_tell_apart_what_came_before() -> None:
    """Worked by hand: in a x b x a x, both earlier x match the last one, but only the first followed an a, as the last does."""
    items = torch.tensor([0, 1, 2, 1, 0, 1], device=DEVICE)
    q, table = torch.nn.functional.one_hot(items).to(torch.float32)[None, None], torch.eye(6, device=DEVICE)
    options: dict[str, Any] = {"softmax_scale": 100.0, "refine_scale": 100.0}
    _, alone = attention_weights(q, q, table, table, **options)
    _, lagged = attention_weights(q, q, table, table, lags=[1.0], **options)
    assert alone[0, 0, 5, [1, 3]].min() > 0.01 * alone[0, 0, 5].max() and lagged[0, 0, 5, 1] > 1000 * lagged[0, 0, 5, 3]


@every_engine
def test_plain_heads_are_plain_attention(engine: str, choose: Choose) -> None:
    """Whatever gate, tables and lags say; the other heads are as in a call without them."""
    backend, kind = choose(engine), Kind("additive")
    given = kind.draw((2, 4, 20, 8), (4, 20, 5))
    options: dict[str, Any] = {"shift": True, "lags": [0.5], "gate": 3.0, "dropout_p": 0.3, "dropout_seed": 1, "backend": backend}
    out = kind.call(**given, **options, plain_heads=1)["out"]
    items = {name: given[name] for name in kind.items}
    plain = Kind("none").call(**items, dropout_p=0.3, dropout_seed=1, backend=backend)["out"]
    torch.testing.assert_close(out[:, :1], plain[:, :1])
    torch.testing.assert_close(out[:, 1:], kind.call(**given, **options)["out"][:, 1:])
