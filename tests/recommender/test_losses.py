"""Losses against their formulas, negatives, memory over a large catalogue, precision."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from awrsr.models.distance import distance_columns, distance_rows
from awrsr.training import losses
from awrsr.training.losses import LOSSES, draw_negatives

pytestmark = pytest.mark.usefixtures("one_thread")

T, N, E, K = 7, 11, 5, 4
SAMPLED = ("bce", "bpr", "gbce", "sampled_softmax")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(loss: str, dtype: torch.dtype = torch.float64, items: int = N, k: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of a loss: hidden, targets, table, negatives."""
    hidden = torch.randn(T, E, dtype=dtype, requires_grad=True)
    table = torch.randn(items, E, dtype=dtype, requires_grad=True)
    targets = torch.randint(items, (T,), generator=generator())
    return hidden, targets, table, draw_negatives(loss, targets, items, k, generator())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(loss: str, t: int, scores: list[list[float]], targets: list[int], negatives: Any, calibration: float) -> float:
    """The value of event t from the scores (T, N) of all items."""
    own = scores[t][targets[t]]
    if loss == "cross_entropy":
        return -math.log(math.exp(own) / sum(map(math.exp, scores[t])))
    if loss == "sampled_softmax":
        others = [scores[t][item] for item in negatives if item != targets[t]]
        return -math.log(math.exp(own) / (math.exp(own) + sum(map(math.exp, others))))
    others = [scores[t][item] for item in negatives[t]]
    if loss == "bce":
        return -math.log(sigmoid(own)) - sum(math.log(1 - sigmoid(x)) for x in others) / len(others)
    if loss == "bpr":
        return -sum(math.log(sigmoid(own - x)) for x in others) / len(others)
    alpha = len(others) / (len(scores[t]) - 1)  # gSASRec, equation of beta
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    return -math.log(sigmoid(own) ** beta) - sum(math.log(1 - sigmoid(x)) for x in others)


@pytest.mark.parametrize("calibration", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_its_formula(loss: str, calibration: float) -> None:
    hidden, targets, table, negatives = problem(loss)
    found = LOSSES[loss](hidden, targets, table, negatives, calibration=calibration)
    scores = (hidden @ table.T).tolist()
    wanted = [by_hand(loss, t, scores, targets.tolist(), negatives.tolist(), calibration) for t in range(T)]
    assert found.shape == (T,)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_value(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_block", lambda _: 4)  # the catalogue in blocks of 4, 4 and 3
    hidden, targets, table, negatives = problem(loss)
    assert torch.autograd.gradcheck(lambda h, w: LOSSES[loss](h, targets, w, negatives), (hidden, table))


@pytest.mark.parametrize("loss", ["bce", "bpr", "gbce"])
def test_many_negatives_are_embedded_some_events_at_a_time(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, targets, table, negatives = problem(loss)
    whole = LOSSES[loss](hidden, targets, table, negatives)
    want = torch.autograd.grad(whole.sum(), (hidden, table))
    held: list[int] = []
    embed = F.embedding
    monkeypatch.setattr(losses.F, "embedding", lambda items, rows: held.append(items.numel() * E) or embed(items, rows))
    monkeypatch.setattr(losses, "PAIR_BLOCK", 2 * (1 + K) * E)
    parts = LOSSES[loss](hidden, targets, table, negatives)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts.sum(), (hidden, table)), want)
    assert len(held) > 4 and max(held) <= losses.PAIR_BLOCK


def test_gbce_without_calibration_is_bce_summed_over_negatives() -> None:
    hidden, targets, table, negatives = problem("gbce")
    each = torch.stack([losses.bce(hidden, targets, table, negatives[:, k : k + 1]) for k in range(K)])
    positive = F.softplus(-(hidden * table[targets]).sum(1))
    found = losses.gbce(hidden, targets, table, negatives, calibration=0.0)
    torch.testing.assert_close(found, each.sum(0) - (K - 1) * positive)


def test_gbce_of_more_negatives_than_there_are_items_samples_all_of_them() -> None:
    hidden, targets, table = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.randn(5, 4)
    negatives = torch.tensor([[4, 3] * 10] * 3)
    found = (losses.gbce(hidden, targets, table, negatives, calibration=t) for t in (0.0, 0.5, 1.0))
    assert all(torch.equal(each, losses.gbce(hidden, targets, table, negatives, calibration=0.0)) for each in found)


def test_gbce_fully_calibrated_weighs_the_target_by_the_sampling_rate() -> None:
    hidden, targets, table, negatives = problem("gbce")
    one, none = (losses.gbce(hidden, targets, table, negatives, calibration=t) for t in (1.0, 0.0))
    positive = F.softplus(-(hidden * table[targets]).sum(1))
    torch.testing.assert_close(none - one, (1 - K / (N - 1)) * positive)


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_scores_stay_finite(loss: str) -> None:
    hidden, targets, table, negatives = problem(loss, torch.float32)
    value = LOSSES[loss](hidden * 1e3, targets, table, negatives)
    value.sum().backward()
    assert value.isfinite().all() and (value >= 0).all()
    assert hidden.grad is not None and hidden.grad.isfinite().all() and table.grad is not None and table.grad.isfinite().all()


# Between Gaussians


@pytest.mark.parametrize("blocks", [True, False])
def test_the_penalty_of_stosa_is_its_formula(blocks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, targets, y, negatives = problem("bpr")
    if blocks:
        monkeypatch.setattr(losses, "PAIR_BLOCK", 2 * (1 + K) * (E + 2))
    rows, columns = distance_rows(x), distance_columns(y)
    found = losses.bpr(rows, targets, columns, negatives, pvn_weight=0.3)
    wanted = []
    for t in range(T):
        positive = (x[t] - y[targets[t]]).square().sum()
        each = []
        for item in negatives[t]:
            negative, between = (x[t] - y[item]).square().sum(), (y[targets[t]] - y[item]).square().sum()
            each.append(-(negative - positive).sigmoid().log() + 0.3 * (positive - between).clamp(min=0))
        wanted.append(torch.stack(each).mean())
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-12)
    assert (found - losses.bpr(rows, targets, columns, negatives) > 1e-3).any()  # so the penalty did something


def test_the_penalty_has_the_gradient_of_its_value() -> None:
    x, targets, y, negatives = problem("bpr")

    def penalised(x: Tensor, y: Tensor) -> Tensor:
        return losses.bpr(distance_rows(x), targets, distance_columns(y), negatives, pvn_weight=0.3)

    assert torch.autograd.gradcheck(penalised, (x, y))


# The whole catalogue


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", [1, 4, N - 1, N, N + 1])
def test_cross_entropy_in_blocks_is_that_of_torch(
    size: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "_block", lambda _: size)
    hidden, targets, table, negatives = problem("cross_entropy", dtype)
    upstream = torch.randn(T, dtype=dtype)
    wanted = F.cross_entropy(hidden @ table.T, targets, reduction="none")
    found = losses.cross_entropy(hidden, targets, table, negatives)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    for one, other in zip(*(torch.autograd.grad(x, (hidden, table), upstream) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if _is(x))]
        )
        return out


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)


def test_cross_entropy_holds_no_score_of_every_item_for_every_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CATALOGUE_BLOCK", 1 << 15)
    events, items = 128, 3000
    hidden, table = torch.randn(events, 4, requires_grad=True), torch.randn(items, 4, requires_grad=True)
    targets = torch.randint(items, (events,))
    with Largest() as seen:
        losses.cross_entropy(hidden, targets, table, targets[:, None]).sum().backward()
    assert seen.elements == 1 << 15 and table.grad is not None  # a block of scores; all of them would be 384,000
    with Largest() as whole:
        F.cross_entropy(hidden @ table.T, targets).backward()
    assert whole.elements == events * items  # so the yardstick does see such a tensor


# Negatives


@pytest.mark.parametrize("loss", ["bce", "bpr", "gbce"])
@pytest.mark.parametrize("items", [2, 3, 5])
def test_a_negative_is_any_item_but_the_target(items: int, loss: str) -> None:
    targets = torch.arange(items)
    drawn = draw_negatives(loss, targets, items, 200, generator())
    assert drawn.shape == (items, 200)
    for target in range(items):
        assert set(drawn[target].tolist()) == set(range(items)) - {target}


def test_negatives_are_uniform_over_the_others() -> None:
    from scipy.stats import chisquare

    items, k = 6, 20_000
    drawn = draw_negatives("bce", torch.arange(items), items, k, generator(1))
    for target in range(items):
        counts = torch.bincount(drawn[target], minlength=items)
        assert chisquare(counts[torch.arange(items) != target].numpy()).pvalue > 0.001


def test_each_event_draws_its_own_negatives() -> None:
    drawn = draw_negatives("bce", torch.zeros(50, dtype=torch.int64), 1000, 3, generator())
    assert len(drawn.unique(dim=0)) == 50


@pytest.mark.parametrize("loss", LOSSES)
def test_the_generator_alone_decides_what_is_drawn(loss: str) -> None:
    targets = torch.randint(100, (20,), generator=generator(2))
    torch.manual_seed(1)
    one = draw_negatives(loss, targets, 100, 8, generator())
    torch.manual_seed(2)
    assert torch.equal(one, draw_negatives(loss, targets, 100, 8, generator()))
    if loss != "cross_entropy":
        assert not torch.equal(one, draw_negatives(loss, targets, 100, 8, generator(1)))


def test_a_pool_is_shared_and_uniform() -> None:
    from scipy.stats import chisquare

    pool = draw_negatives("sampled_softmax", torch.zeros(3, dtype=torch.int64), 50_000, 40_000, generator())
    assert pool.shape == (40_000,) and 0 <= int(pool.min()) and int(pool.max()) < 50_000
    assert chisquare(torch.bincount(pool // 5_000, minlength=10).numpy()).pvalue > 0.001


@pytest.mark.parametrize("k", [N, N + 1, 10 * N])
def test_a_pool_no_smaller_than_the_catalogue_is_the_catalogue(k: int) -> None:
    """Sampled softmax is then cross-entropy itself."""
    hidden, targets, table, pool = problem("sampled_softmax", k=k)
    assert pool.tolist() == list(range(N))
    exact = F.cross_entropy(hidden @ table.T, targets, reduction="none")
    torch.testing.assert_close(losses.sampled_softmax(hidden, targets, table, pool), exact)


def test_a_target_in_the_pool_counts_once() -> None:
    hidden, _, table, _ = problem("sampled_softmax")
    targets = torch.full((T,), 3)
    with_it, without = (losses.sampled_softmax(hidden, targets, table, torch.tensor(p)) for p in ([3, 1, 3, 4, 1], [1, 4, 1]))
    torch.testing.assert_close(with_it, without)


def test_a_pool_of_nothing_but_the_target_costs_nothing() -> None:
    hidden, _, table, _ = problem("sampled_softmax")
    value = losses.sampled_softmax(hidden, torch.full((T,), 3), table, torch.tensor([3, 3]))
    value.sum().backward()
    assert torch.equal(value, torch.zeros(T).double())
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.zeros(T, E).double())


def test_cross_entropy_draws_nothing() -> None:
    assert draw_negatives("cross_entropy", torch.zeros(3, dtype=torch.int64), N, 0, generator()).shape == (3, 0)


# Small catalogues


@pytest.mark.parametrize("loss", LOSSES)
def test_a_catalogue_of_two_items(loss: str) -> None:
    hidden, targets, table, negatives = problem(loss, items=2)
    value = LOSSES[loss](hidden, targets, table, negatives)
    value.sum().backward()
    assert value.isfinite().all() and hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["cross_entropy", "sampled_softmax"])
def test_a_catalogue_of_one_item_leaves_nothing_to_learn(loss: str) -> None:
    hidden, targets, table, negatives = problem(loss, items=1)
    value = LOSSES[loss](hidden, targets, table, negatives)
    torch.testing.assert_close(value, torch.zeros_like(value))


@pytest.mark.parametrize("loss", ["bce", "bpr", "gbce"])
def test_a_catalogue_of_one_item_has_no_negatives(loss: str) -> None:
    with pytest.raises(ValueError, match=f"num_items is 1, must be 2 or more: loss '{loss}'"):
        draw_negatives(loss, torch.zeros(3, dtype=torch.int64), 1, 2, generator())


# Half precision


def gradients(loss: str, autocast: bool, run: Callable[..., Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    hidden, table = torch.randn(60, 32) * 3, torch.randn(500, 32)
    targets = torch.randint(500, (60,), generator=generator())
    negatives = draw_negatives(loss, targets, 500, 16, generator())
    hidden, table = hidden.requires_grad_(), table.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = run(hidden, targets, table, negatives)
    value.mean().backward()  # outside of autocast, as Lightning does
    assert hidden.grad is not None and table.grad is not None
    return [value.detach(), hidden.grad, table.grad]


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_autocast_stays_close(loss: str) -> None:
    exact, found = (gradients(loss, autocast, LOSSES[loss]) for autocast in (False, True))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32 and one.isfinite().all()
        assert ((one - other).norm() / other.norm()).item() < 0.05


def test_cross_entropy_errs_no_more_than_that_of_torch_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward computes its scores again: in another precision than the forward did, they would not fit its normaliser."""
    monkeypatch.setattr(losses, "_block", lambda _: 100)

    def library(hidden: Tensor, targets: Tensor, table: Tensor, _: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ table.T).float(), targets, reduction="none")

    exact, same, found = (
        gradients("cross_entropy", half, run) for half, run in ((False, library), (True, library), (True, losses.cross_entropy))
    )
    for one, other, wanted in zip(found, same, exact, strict=True):
        assert (one - wanted).norm() <= 1.5 * (other - wanted).norm()
