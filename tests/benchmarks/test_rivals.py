"""The rivals compute the definition, each in its own way, or say why they cannot."""

import dataclasses
from typing import TypedDict

import pytest
import torch
from torch import Tensor

from benchmarks.common.kernels import seen, short
from benchmarks.common.stock import FORMS, Form, by_stock
from benchmarks.operator.lagged import lagged_calls
from benchmarks.operator.measure import PASSES, Entrant, Gate, name_kernels
from benchmarks.operator.providers import PROVIDERS, flex, flex_lse, lacks_flash_flex, ours, stock, two_stage
from benchmarks.operator.workloads import DOT, LAGGED, OPERATOR, STOCHASTIC, Shape, build

from .tasks import PROBLEMS, same, task, users_task


def eager_flex(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def causal(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i >= j, score, -torch.inf)

    return flex_attention(q, k, v, score_mod=causal, scale=scale, enable_gqa=True)


STOCK = [name for name, form in FORMS.items() if form.on_cpu]
CHECKED = {DOT: (*STOCK, "textbook"), STOCHASTIC: ("stosa", "sdpa2-squares")}


@pytest.mark.parametrize("form,backbone,refinement", [(form, *problem) for problem in PROBLEMS for form in CHECKED[problem[0]]])
def test_rivals_compute_the_definition(form: str, backbone: str, refinement: str) -> None:
    batch = build(task(refinement, "float64", backbone=backbone), "padded")[0]
    same(batch, PROVIDERS[form].call(batch), ours(batch, "reference"))


def test_rivals_of_lagged_attention_compute_it_and_all_others_say_why_they_cannot() -> None:
    batches = build(task(LAGGED, "float64"), "padded")
    for name in ("lagged2", "textbook", "torch"):
        assert PROVIDERS[name].refusal(batches[0]) is None
        same(batches[0], PROVIDERS[name].call(batches[0]), ours(batches[0], "reference"))
        Gate().check(Entrant(PROVIDERS[name], "padded", batches))
    others = [
        p
        for p in PROVIDERS.values()
        if p.role == "rival" and DOT in p.backbones and p.name.split("+")[0] not in ("lagged2", "textbook")
    ]
    assert others and all(p.refusal(batches[0]) for p in others)
    assert PROVIDERS["lagged2"].refusal(build(task("additive"), "padded")[0]) == "for lagged attention only"


@pytest.mark.parametrize("refinement", OPERATOR[STOCHASTIC])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rivals_between_gaussians_hold_in_half_precision(dtype: str, refinement: str) -> None:
    gate, batches = Gate(), build(task(refinement, dtype, backbone=STOCHASTIC), "padded")
    for form in CHECKED[STOCHASTIC]:
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
    lagged = build(task(LAGGED, "float64"), "padded")[0]
    lagged = dataclasses.replace(lagged, **{name: x.detach() for name, x in lagged.leaves.items()})
    torch.testing.assert_close(lagged_calls(lagged, flex_lse), ours(lagged, "reference"), rtol=0, atol=1e-12)


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


FLASH, MATH = "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"


@pytest.mark.parametrize("refinement", OPERATOR[DOT])
@pytest.mark.parametrize("shape", [Shape(3, 4, 2, 9, 8, 6, 5), Shape(3, 2, 2, 9, 8, 8, 8)])
def test_a_pinned_kernel_alone_runs(shape: Shape, refinement: str) -> None:
    """With equal widths torch itself would mix: the joined call by math, the second one by flash."""
    forward = {"sdpa2-flash": [FLASH], "sdpa2-math": [MATH]}
    if refinement != "none" and shape.D == shape.R:
        forward["sdpa2"] = [MATH, FLASH]
    for name, kernels in forward.items():
        entrant = Entrant(PROVIDERS[name], "padded", build(task(refinement, shape=shape), "padded"))
        name_kernels(entrant, list(PASSES))
        backward = [f"{FLASH}_backward"] * (FLASH in kernels)  # math has the backwards of matrix products
        assert entrant.kernels == {p: k for p, k in zip(PASSES, (kernels, backward, kernels + backward), strict=True) if k}


def test_the_pin_ends_with_the_call() -> None:
    batch = build(task("simple", shape=Shape(1, 1, 1, 5, 8, 8, 8)), "padded")[0]
    PROVIDERS["sdpa2-math"].call(batch)
    assert seen(lambda: stock(batch.q, batch.k, batch.v, 1.0), torch.device("cpu")) == [FLASH]


@pytest.mark.filterwarnings("ignore:Flash attention")
def test_a_kernel_that_cannot_run_says_why() -> None:
    b = build(task("simple"), "padded")[0]
    joined = Form(split=False, kernel="FLASH_ATTENTION")
    with pytest.raises(RuntimeError, match="^Flash attention requires q,k,v to have the same last dimension. Got"):
        by_stock(joined, (b.q, b.k, b.v, b.w_q, b.w_k, b.gate), b.refinement)


def test_a_profiler_that_fails_costs_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUPTI is busy")

    monkeypatch.setattr(torch.profiler, "profile", broken)
    entrant = Entrant(PROVIDERS["sdpa2"], "padded", build(task(), "padded"))
    name_kernels(entrant, ["fwd"])
    assert entrant.kernels == {} and entrant.kernels_reason == "RuntimeError: CUPTI is busy"


@pytest.mark.parametrize(
    "name,expected",
    [
        ("void flash::flash_fwd_kernel<flash::Traits<32, 4, flash::Base<32> >, true>(flash::Params)", "flash_fwd_kernel"),
        ("void at::native::(anonymous namespace)::softmax_warp_forward<float, 6>(float*, int)", "softmax_warp_forward"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(Attention<true>::Params)", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80"),
        ("_short_fwd_kernel", "_short_fwd_kernel"),
        ("aten::_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math"),
    ],
)
def test_short_names_of_kernels(name: str, expected: str) -> None:
    assert short(name) == expected


def test_flex_at_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels take 16 features at least: narrower ones are padded. The backend is passed on."""
    widths: set[int] = set()
    options: list[dict[str, str] | None] = []

    def narrow(q: Tensor, k: Tensor, v: Tensor, *, scale: float, kernel_options: dict[str, str] | None, **_: object) -> Tensor:
        widths.update(x.shape[-1] for x in (q, k, v))
        options.append(kernel_options)
        return stock(q, k, v, scale)

    monkeypatch.setattr("benchmarks.operator.providers._flex_tools", lambda *_: (narrow, None))
    batch = build(task("value", "float64"), "padded")[0]
    same(batch, two_stage(batch, flex), ours(batch, "reference"))
    assert widths == {16} and not any(options)
    same(batch, PROVIDERS["flex2-flash"].call(batch), ours(batch, "reference"))
    assert options[-1] == {"BACKEND": "FLASH"}


class OldOptions(TypedDict):
    num_warps: int


def test_flex_without_its_flash_backend_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(flex_attention, "FlexKernelOptions", OldOptions, raising=False)
    assert lacks_flash_flex()
    monkeypatch.undo()
    assert lacks_flash_flex() == (not hasattr(flex_attention, "_Backend") or "FLASH" not in str(flex_attention._Backend))


def test_stock_calls_say_what_they_cannot_express() -> None:
    dropped = build(task("additive", dropout_p=0.1), "padded")[0]
    assert "two masks" in (PROVIDERS["sdpa2"].refusal(dropped) or "")
    assert PROVIDERS["sdpa2"].refusal(build(task("value", dropout_p=0.1), "padded")[0]) is None
    assert "GPU" in (PROVIDERS["flex2"].refusal(dropped) or "")
    for name in ("sdpa2-efficient", "sdpa2-cudnn", "sdpa2-split-cudnn", "flex2-flash"):
        assert "needs a GPU" in (PROVIDERS[name].refusal(build(task("simple"), "padded")[0]) or "")
    assert all("two masks" in (PROVIDERS[name].refusal(dropped) or "") for name in (*STOCK, "sdpa2+compile"))
    gaussian = build(task("none", dropout_p=0.1, backbone=STOCHASTIC), "padded")[0]
    assert "mask" in (PROVIDERS["sdpa2-squares"].refusal(gaussian) or "") and PROVIDERS["stosa"].refusal(gaussian) is None
    assert "GPU" in (PROVIDERS["flex2-squares"].refusal(gaussian) or "")
