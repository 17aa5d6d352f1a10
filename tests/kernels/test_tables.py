"""The learned parts of a layer: how its tables, their scale and its gate start."""

from typing import Any

import pytest
import torch
from torch import nn

from awrsr_kernels import RefinedMultiheadAttention

from ..conftest import DEVICE
from .test_module import B, E, H, L, draw, make


def test_tables_start_with_the_scale_they_are_given() -> None:
    torch.manual_seed(0)
    position = RefinedMultiheadAttention(64, 2, max_len=100, table_std=0.5)
    content = RefinedMultiheadAttention(64, 2, tables="content", table_std=0.5)
    assert position.w_q is not None and content.to_tables is not None
    assert abs(position.w_q.std() - 0.5) < 0.03 and abs((torch.randn(500, 64) @ content.to_tables).std() - 0.5) < 0.03


@pytest.mark.parametrize("size, rank", [(9, 4), (4, 9)])
@pytest.mark.parametrize("start", ["orthogonal", "identity", "shifted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_tables_start_as_they_are_asked_to(start: str, size: int, rank: int, dtype: torch.dtype) -> None:
    module = RefinedMultiheadAttention(
        E, H, max_len=size, rank=rank, table_init=start, table_std=0.5, per_head=True, dtype=dtype, device=DEVICE
    )
    assert module.w_q is not None and module.w_k is not None
    w_q, w_k = module.w_q.detach().float(), module.w_k.detach().float()
    if start == "orthogonal":
        for table in (*w_q, *w_k):
            table = table if size > rank else table.T
            torch.testing.assert_close(
                table.T @ table, torch.eye(table.shape[1], device=DEVICE) * len(table) / 4, atol=0.05, rtol=0
            )
        assert not torch.equal(w_q, w_k)
    elif start == "identity":  # its columns are of positions counted from the end
        expected = torch.eye(rank, device=DEVICE)[torch.arange(size, device=DEVICE) % rank].flip(0) * rank**0.5 / 2
        torch.testing.assert_close(w_q, expected.expand_as(w_q), atol=0.01, rtol=0)
        assert torch.equal(w_q, w_k)
    else:
        assert torch.equal(w_k[:, 1:], w_q[:, :-1]) and not torch.equal(w_k[:, 0], w_q[:, 0])
        if rank >= size:  # exact: a row matches the next one alone, at full score
            wanted = torch.eye(size, device=DEVICE).roll(1, 1).tril(1).triu(1) * rank / 4
            torch.testing.assert_close(w_q @ w_k.transpose(1, 2), wanted.expand(H, -1, -1), atol=0.05, rtol=0)


@pytest.mark.parametrize("options", [{}, {"refine_scale": 0.5}, {"tables": "content"}], ids=str)
def test_sharpness_is_the_score_of_a_match_before_training(options: dict[str, Any]) -> None:
    module = RefinedMultiheadAttention(E, H, max_len=9, rank=9, table_init="shifted", sharpness=25.0, **options)
    assert (module.refine_scale or 1 / 3) * module.table_std**2 * 9 == pytest.approx(25)
    if module.w_q is not None:
        factor = module.refine_scale or 1 / 3
        assert (factor * module.w_q[:-1] * module.w_k[1:]).sum(-1).tolist() == pytest.approx([25.0] * 8, rel=1e-4)
    for other, message in (({"table_std": 1.0}, "table_std is 1.0; it must be left out if sharpness is given"),
                           ({"refine_scale": 0.0}, "refine_scale is 0.0; it must be above 0 if sharpness")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            RefinedMultiheadAttention(E, H, max_len=9, sharpness=25.0, **other)


@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"tables": "content"}], ids=str)
def test_a_learned_scale_is_a_factor_of_the_fixed_one_for_each_head(options: dict[str, Any]) -> None:
    x = draw(B, L, E)
    learned = make(refinement="simple", refine_scale=0.5, learned_scale=True, **options)
    fixed = [make(refinement="simple", refine_scale=scale, **options) for scale in (0.5, 1.5)]
    assert learned.state_dict()["scale"].shape == (H, 1, 1)
    for other in fixed:
        other.load_state_dict({name: value for name, value in learned.state_dict().items() if name != "scale"})
    factors = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64, device=DEVICE)
    learned.scale = nn.Parameter(factors[:, None, None])
    usual, sharper = (each.weights(x)[1] for each in fixed)
    torch.testing.assert_close(learned.weights(x)[1], torch.where(factors[:, None, None] == 3, sharper, usual))
    assert not torch.allclose(usual, sharper)
    learned(x).square().sum().backward()
    assert learned.scale.grad is not None and learned.scale.grad.all()
    fresh = RefinedMultiheadAttention(E, H, max_len=L, learned_scale=True, **options)
    assert fresh.scale is not None and fresh.scale.flatten().tolist() == [1.0] * H


@pytest.mark.parametrize("tables", ["position", "content"])
def test_a_learned_scale_serves_under_autocast(tables: str) -> None:
    module = make(tables=tables, learned_scale=True, dtype=torch.float32).eval()
    x = draw(B, L, E).float()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = module(x)
    torch.testing.assert_close(found.float(), module(x), rtol=0.1, atol=0.1)
