"""`padding_side` and `align` are two names of one choice: every call that has one of them takes the other as well."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import awrsr_kernels
from awrsr_kernels import RefinedMultiheadAttention

L, N = 4, 6
OPPOSITE = {"left": "right", "right": "left"}
OWN = {  # the name that a call is documented by
    "refined_attention": "padding_side",
    "attention_weights": "padding_side",
    "stochastic_refined_attention": "padding_side",
    "stochastic_attention_weights": "padding_side",
    "refined_attention_varlen": "align",
    "stochastic_refined_attention_varlen": "align",
    "RefinedMultiheadAttention": "align",
}


def outputs(name: str, **sides: str | None) -> tuple[torch.Tensor, ...]:
    """What a call returns for sequences shorter than its tables, so that sides matter."""
    torch.manual_seed(0)
    lengths = torch.tensor([2, 3])
    if name == "RefinedMultiheadAttention":
        module = RefinedMultiheadAttention(8, 2, max_len=N, refinement="simple", **sides)  # type: ignore[arg-type]
        return module(torch.randn(2, L, 8), lengths=lengths), *module.weights(torch.randn(2, L, 8), lengths=lengths)
    call, packed = getattr(awrsr_kernels, name), "varlen" in name
    names = [each for each in inspect.signature(call).parameters if each.startswith(("q", "k", "v"))]
    items = {each: torch.rand((5, 2, 8) if packed else (2, 2, L, 8)) for each in names}
    tables = {each: torch.randn(N if packed else L, 3) for each in ("w_q", "w_k")}
    where = {"cu_seqlens": torch.tensor([0, 2, 5])} if packed else {"lengths": lengths}
    out = call(**items, **tables, **where, **sides)
    return out if isinstance(out, tuple) else (out,)


def equal(mine: tuple[torch.Tensor, ...], its: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


@pytest.mark.parametrize("name", OWN)
def test_each_name_is_the_opposite_of_the_other(name: str) -> None:
    own, other = OWN[name], {"align": "padding_side", "padding_side": "align"}[OWN[name]]
    for side, opposite in OPPOSITE.items():
        expected = outputs(name, **{own: side})
        assert equal(outputs(name, **{other: opposite}), expected)
        assert equal(outputs(name, **{own: side, other: opposite}), expected)
    default = {"align": "right", "padding_side": "left"}
    assert equal(outputs(name), outputs(name, **{own: default[own]}))
    assert not equal(outputs(name), outputs(name, **{own: OPPOSITE[default[own]]}))


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("side", OPPOSITE)
def test_two_sides_that_contradict_each_other_are_refused(name: str, side: str) -> None:
    with pytest.raises(ValueError, match=f'="{side}" contradicts .*="{side}": it means .*="{OPPOSITE[side]}"; give only one'):
        outputs(name, align=side, padding_side=side)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("word", ["align", "padding_side"])
def test_a_side_that_there_is_not_is_refused_by_the_name_it_was_given(name: str, word: str) -> None:
    with pytest.raises(ValueError, match=f'^{word} is \'top\'; it must be one of "left", "right"'):
        outputs(name, **{word: "top"})


def test_a_compiled_call_takes_either_name() -> None:
    x, w, lengths = torch.randn(2, 2, L, 8), torch.randn(L, 3), torch.tensor([2, 3])

    def attend(**side: Any) -> torch.Tensor:
        return awrsr_kernels.refined_attention(x, x, x, w, w, lengths=lengths, backend="torch", **side)

    compiled: Callable[..., torch.Tensor] = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(align="left"), attend(padding_side="right"))


def test_when_decoding_they_are_two_things() -> None:
    """`align` is of rows of tables, and `padding_side` of a prompt: all their pairs are allowed."""
    module = RefinedMultiheadAttention(8, 2, tables="content", align="left", backend="torch").eval()
    x, lengths = torch.randn(2, L, 8), torch.tensor([2, 3])
    with torch.no_grad():
        for side in OPPOSITE:
            module.prefill(x, module.make_cache(2, L), lengths=lengths, padding_side=side)
