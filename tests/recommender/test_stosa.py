"""The STOSA backbone: distances as products, its model against formulas written out, what is stored. What it shares with the other
backbone is in the tests of both."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from awrsr.models.attention import Padded
from awrsr.models.distance import distance_columns, distance_rows, gaussian_points, rows_of_columns

from .small import ITEMS, KINDS, PUBLISHED, WINDOW, make_model
from .test_model import EXACT, Kind, mixed, packed

pytestmark = pytest.mark.usefixtures("one_thread")

GAUSSIANS = KINDS[4:]


# Distances


def gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """[mean | a] -> mean, covariance."""
    mean, a = x.chunk(2, -1)
    return mean, F.elu(a) + 1


def squared_distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """Squared 2-Wasserstein distance, as Dowson and Landau write it: covariances, not their roots."""
    (m, c), (n, d) = one, other
    return (m - n).square().sum(-1) + (c + d - 2 * (c * d).sqrt()).sum(-1)


def test_products_are_negative_squared_distances() -> None:
    x, y = torch.randn(5, 12).double(), torch.randn(7, 12).double() * 2
    wanted = -squared_distance(gaussian(x[:, None]), gaussian(y))
    rows, columns = distance_rows(gaussian_points(x)), distance_columns(gaussian_points(y))
    torch.testing.assert_close(rows @ columns.T, wanted, **EXACT)
    between = -squared_distance(gaussian(y[:, None]), gaussian(y))
    torch.testing.assert_close(rows_of_columns(columns) @ columns.T, between, **EXACT)


def test_distances_of_close_items_keep_their_digits_in_float32() -> None:
    """As at the start, where all are close to N(0, 1): were deviations not counted from 1, the squares would take four digits."""
    x, y = 0.02 * torch.randn(50, 128), 0.02 * torch.randn(50, 128)
    found = distance_rows(gaussian_points(x)) @ distance_columns(gaussian_points(y)).T
    exact = -squared_distance(*(gaussian(z) for z in (x.double()[:, None], y.double())))
    assert ((found - exact) / exact).abs().max() < 1e-5


# The model


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kind", [*GAUSSIANS, PUBLISHED], ids=str)
@torch.inference_mode()
def test_a_model_of_gaussians_is_its_formulas(kind: Kind, norm: str) -> None:
    """From embeddings to scores, written out for one history with the attention's own maps."""
    model, (history,) = make_model(**kind, layers=1, norm=norm, activation="elu").double(), mixed([6])
    items = torch.tensor(history)
    (first, refined), *_ = model.attention_maps(history)
    block, x = model.blocks[0], (model.items(items) + model.positions.weight[-6:]) * 8**0.5
    mean, cov = x.chunk(2, -1)
    if norm == "post":
        mean, cov = model.norm.mean(mean), F.elu(model.norm.cov(cov)) + 1

    def read(part: Any, x: Tensor) -> Tensor:
        return part.attention_norm(x) if part is not None and norm == "pre" else x

    read_mean, read_cov = read(block.mean, mean), read(block.cov, cov)
    values = (F.elu(block.attention.cov_qkv(read_cov)) + 1)[:, 16:].unflatten(-1, (2, 4))
    squares = refined.square()
    if kind["refinement"] == "value":
        higher = torch.linalg.solve_triangular(first, refined, upper=False, left=False)  # M = R P
        squares = higher.square() @ first.square()
    attended = torch.einsum("hij,jhd->ihd", squares, values).flatten(-2)
    cov = after(block.cov, cov, block.attention.cov_out(attended), norm)
    if block.mean is not None:
        values = block.attention.mean_qkv(read_mean)[:, 16:].unflatten(-1, (2, 4))
        attended = torch.einsum("hij,jhd->ihd", refined, values).flatten(-2)
        mean = after(block.mean, mean, block.attention.mean_out(attended), norm)
    if norm == "pre":
        mean, cov = model.norm.mean(mean), model.norm.cov(cov)
    wanted = -squared_distance(gaussian(torch.cat([mean, cov], -1)[:, None]), gaussian(model.items.weight))
    torch.testing.assert_close(model(*packed([history])) @ model.item_table().T, wanted, rtol=1e-7, atol=1e-7)


def after(part: Any, x: Tensor, attended: Tensor, norm: str) -> Tensor:
    """Residuals and the feed-forward layer of a branch."""

    def widened(y: Tensor) -> Tensor:
        return part.narrow(F.elu(part.widen(y)))

    if norm == "pre":
        x = x + attended
        return x + widened(part.feedforward_norm(x))
    x = part.attention_norm(x + attended)
    return part.feedforward_norm(x + widened(x))


@pytest.mark.parametrize("kind", GAUSSIANS, ids=str)
def test_gaussians_attend_by_distance(kind: Kind) -> None:
    """P of the first block from the projections; rows of P sum to 1, of M to 1 or 2; the future has no weight."""
    model, (history,) = make_model(**kind, norm="post").double(), mixed([6])
    first, refined = model.attention_maps(history)[0]
    items, attention = torch.tensor([history]), model.blocks[0].attention
    mean, cov = model.blocks[0].before_attention(model.embed(items, Padded(torch.tensor([6]))))[0].chunk(2, -1)
    q_mean, k_mean, _ = attention.mean_qkv(mean).view(6, 3, 2, 4).permute(1, 2, 0, 3)
    q_cov, k_cov, _ = (F.elu(attention.cov_qkv(cov)) + 1).view(6, 3, 2, 4).permute(1, 2, 0, 3)
    distance = squared_distance((q_mean[:, :, None], q_cov[:, :, None]), (k_mean[:, None], k_cov[:, None]))
    future = torch.ones(6, 6).triu(1).bool()
    torch.testing.assert_close(first, (-distance / 2).masked_fill(future, -torch.inf).softmax(-1), rtol=1e-9, atol=1e-9)
    total = 2.0 if kind["refinement"] == "additive" else 1.0
    torch.testing.assert_close(refined.sum(-1), torch.full((2, 6), total).double(), **EXACT)
    assert not refined[:, future].any() and torch.equal(first, refined) == (kind["refinement"] == "none")


def test_as_published_the_means_come_back_unattended() -> None:
    """One block, normalised before it: the mean of the state is that of the last event, whatever came before; with the
    covariances it is not so, nor with the means of the corrected model."""
    for branch, same in (("published", True), ("attended", False)):
        model = make_model(backbone="stosa", refinement="none", mean_branch=branch, norm="post").double()
        one, other = (model(*packed([history]))[-1] for history in ([1, 2, 3], [4, 5, 3]))
        assert torch.equal(one[:8], other[:8]) == same and not torch.allclose(one[8:16], other[8:16])


def test_covariances_near_zero_have_finite_gradients() -> None:
    """ELU + 1 reaches 0 in float32 at about -17, where the gradient of a root is infinite."""
    model = make_model(backbone="stosa", norm="post").train()
    with torch.no_grad():
        model.items.weight[:, 8:] = torch.linspace(-120, 2, ITEMS)[:, None]
        model.blocks[0].attention.cov_qkv.bias -= 60
    (model(*packed(mixed([4, WINDOW]))) @ model.item_table().T).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_gaussians_store_a_half_for_means_and_one_for_covariances() -> None:
    """The published behaviour has no weights that nothing would train."""

    def stored(**changes: Any) -> dict[str, tuple[int, ...]]:
        kind = {"backbone": "stosa", "refinement": "none", "layers": 1} | changes
        return {name.removeprefix("blocks.0."): tuple(w.shape) for name, w in make_model(**kind).state_dict().items()}

    def branch(name: str) -> set[str]:
        parts = ("attention_norm", "feedforward_norm", "widen", "narrow")
        return {f"{name}.{part}.{kind}" for part in parts for kind in ("weight", "bias")}

    plain = stored()
    assert plain["items.weight"] == (ITEMS, 16) and plain["positions.weight"] == (WINDOW, 16) and plain["norm.cov.weight"] == (8,)
    assert plain["attention.mean_qkv.weight"] == plain["attention.cov_qkv.weight"] == (24, 8)
    published = stored(mean_branch="published")
    assert plain.keys() - published.keys() == branch("mean") | {"attention.mean_out.weight", "attention.mean_out.bias"}
    assert published["attention.mean_qkv.weight"] == (16, 8) and branch("cov") < published.keys()
    tables = {f"attention.{name}": (2, WINDOW, 3) for name in ("w_q", "w_k", "w_q_cov", "w_k_cov")}
    assert stored(refinement="stochastic", learned_gate=True) == plain | tables
    assert stored(refinement="stochastic", tables="content") == plain | {"attention.to_tables": (16, 24)}
    gated = stored(refinement="additive", learned_gate=True)
    assert gated.keys() - plain.keys() == {f"attention.{name}" for name in ("w_q", "w_k", "gate")}
