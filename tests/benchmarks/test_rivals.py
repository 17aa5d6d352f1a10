"""The rivals compute the definition, each in its own way, or say why they cannot."""

import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks.operator.measure import Entrant, Gate
from benchmarks.operator.providers import PROVIDERS, ours, stock, two_stage
from benchmarks.operator.workloads import DOT, OPERATOR, STOCHASTIC, Shape, build

from .tasks import PROBLEMS, same, task, users_task


def eager_flex(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def causal(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i >= j, score, -torch.inf)

    return flex_attention(q, k, v, score_mod=causal, scale=scale, enable_gqa=True)


FORMS = {DOT: ("sdpa2", "sdpa2-split", "textbook"), STOCHASTIC: ("stosa", "sdpa2-squares")}


@pytest.mark.parametrize("form,backbone,refinement", [(form, *problem) for problem in PROBLEMS for form in FORMS[problem[0]]])
def test_rivals_compute_the_definition(form: str, backbone: str, refinement: str) -> None:
    batch = build(task(refinement, "float64", backbone=backbone), "padded")[0]
    same(batch, PROVIDERS[form].call(batch), ours(batch, "reference"))


@pytest.mark.parametrize("refinement", OPERATOR[STOCHASTIC])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rivals_between_gaussians_hold_in_half_precision(dtype: str, refinement: str) -> None:
    gate, batches = Gate(), build(task(refinement, dtype, backbone=STOCHASTIC), "padded")
    for form in FORMS[STOCHASTIC]:
        gate.check(Entrant(PROVIDERS[form], "padded", batches))


def test_stosa_drops_weights_and_squares_what_is_left() -> None:
    """With values that name their column a row of means shows the dropped weights, and covariances must be their squares."""
    shape = Shape(B=2, H=2, H_kv=2, L=6, D=4, D_v=6, R=3)
    batch = build(task("none", "float64", 0.5, shape, STOCHASTIC), "padded")[0]
    columns = torch.eye(6, dtype=torch.float64).expand(2, 2, 6, 6)
    mean, cov = PROVIDERS["stosa"].call(dataclasses.replace(batch, v=columns, v_cov=columns))
    torch.testing.assert_close(cov, mean**2)
    visible = mean[..., torch.ones(6, 6).tril().bool()]
    assert 0 < (visible == 0).sum() < visible.numel() and not mean.triu(1).any()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_composition_in_flex() -> None:
    batch = build(task("value", "float64"), "padded")[0]
    leaves = {name: x.detach() for name, x in batch.leaves.items()}  # FlexAttention has no backward on a CPU
    batch = dataclasses.replace(batch, **leaves)
    torch.testing.assert_close(two_stage(batch, eager_flex), ours(batch, "reference"), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("refinement", OPERATOR[STOCHASTIC])
def test_squares_in_flex(refinement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch = build(task(refinement, "float64", backbone=STOCHASTIC), "padded")[0]
    batch = dataclasses.replace(batch, **{name: x.detach() for name, x in batch.leaves.items()})
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 9, 9, device="cpu")
    monkeypatch.setattr("benchmarks.operator.providers._flex_tools", lambda *_: (flex_attention, mask))
    torch.testing.assert_close(PROVIDERS["flex2-squares"].call(batch), ours(batch, "reference"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("refinement", OPERATOR[DOT])
def test_the_packed_composition_computes_the_definition(refinement: str) -> None:
    for batch in build(users_task(refinement, "float64"), "packed"):
        bounds = batch.bounds.tolist()  # type: ignore[union-attr]

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0, b: list[int] = bounds) -> Tensor:
            parts = []
            for lo, hi in zip(b, b[1:], strict=False):
                rows = [x[lo:hi].transpose(0, 1)[None] for x in (q, k, v)]
                parts.append(stock(*rows, scale)[0].transpose(0, 1))
            return torch.cat(parts)

        same(batch, two_stage(batch, attend, split=True), ours(batch, "reference"))


def test_stock_calls_say_what_they_cannot_express() -> None:
    dropped = build(task("additive", dropout_p=0.1), "padded")[0]
    assert "two masks" in (PROVIDERS["sdpa2"].refusal(dropped) or "")
    assert PROVIDERS["sdpa2"].refusal(build(task("value", dropout_p=0.1), "padded")[0]) is None
    assert "GPU" in (PROVIDERS["flex2"].refusal(dropped) or "")
    gaussian = build(task("none", dropout_p=0.1, backbone=STOCHASTIC), "padded")[0]
    assert "mask" in (PROVIDERS["sdpa2-squares"].refusal(gaussian) or "") and PROVIDERS["stosa"].refusal(gaussian) is None
    assert "GPU" in (PROVIDERS["flex2-squares"].refusal(gaussian) or "")
