"""The cache of decoding: growing, reordering, cropping, resetting, and what it refuses."""

from typing import Any

import pytest
import torch

from awrsr_kernels import RefinedCache, refined_attention_prefill

from ..conftest import DEVICE
from .decoding import TABLES, sequences

pytestmark = pytest.mark.usefixtures("one_thread")



@pytest.mark.parametrize("table", TABLES)
def test_a_full_cache_grows(table: str) -> None:
    given = sequences("value", table, [2, 1], 7)
    cache = given.cache(capacity=1)
    out = given.decode(cache, 7, "right", "torch")
    torch.testing.assert_close(out, given.full(7), rtol=0, atol=1e-12)
    assert cache.capacity == (16 if table == "content" else 9) and cache.end.tolist() == [9, 8]  # tables have nine rows
    cache.grow(20)
    assert {x.shape[2] for x in cache.rows().values()} == {20}


def test_position_tables_end_a_cache() -> None:
    given = sequences("simple", "shared", [2, 3], 1)
    short = given._replace(w_q=given.w_q[:3], w_k=given.w_k[:3])
    cache = given.cache()
    short.decode(cache, 0, "right", "torch")
    before = cache.end.tolist()
    with pytest.raises(ValueError, match=r"\bw_q\b is of 3 rows; it must be of a row for each of up to 4 items"):
        short.step(cache, 0)
    assert cache.end.tolist() == before
    with pytest.raises(ValueError, match=r"\bw_q\b is of 2 rows; it must be .* 3 items"):
        refined_attention_prefill(
            **given.prompt("left") | {"w_q": given.w_q[:2], "w_k": given.w_k[:2]}, cache=given.cache(), lengths=None
        )


@pytest.mark.skipif(DEVICE != "cpu", reason="lengths are read on the CPU alone")
def test_a_window_longer_than_the_table_goes_on_while_its_items_fit() -> None:
    """A recommender's window of five, padded on the left, with a table of four rows."""
    given = sequences("simple", "shared", [3, 2], 1)
    padded = {name: torch.nn.functional.pad(x, (0, 0, 2, 0)) if x.dim() == 4 else x for name, x in given.prompt("left").items()}
    cache = given.cache()
    refined_attention_prefill(**padded, cache=cache, lengths=torch.tensor(given.prompts), padding_side="left")
    for backend in ("torch", "reference"):
        out = given.step(cache, 0, backend=backend)
        torch.testing.assert_close(out, given.row(given.full(1), 0), rtol=0, atol=1e-12)
        cache.crop(5)
        assert cache.end.tolist() == [5, 5] and cache.length_bound == 3


@pytest.mark.parametrize("index", [[1, 1, 0], [2], [0, 1, 2, 2]])
@pytest.mark.parametrize("table", ["shared", "content"])
def test_beams_are_reordered(table: str, index: list[int]) -> None:
    given = sequences("value", table, [4, 2, 3], 2)
    cache = given.cache()
    given.decode(cache, 0, "left", "torch")
    memory = cache.k.data_ptr()
    cache.reorder(torch.tensor(index, device=DEVICE))
    assert (cache.k.data_ptr() == memory) == (len(index) == 3) and cache.batch == len(index)
    tables = {"w_q": given.w_q[index], "w_k": given.w_k[index]} if table == "content" else {}
    picked = given._replace(
        q=given.q[index], k=given.k[index], v=given.v[index], prompts=[given.prompts[i] for i in index], **tables
    )
    if DEVICE == "cpu":
        lengths = picked.prompts
        assert cache.end_bound == 4 and cache.length_bound == max(lengths) and cache.ragged == (min(lengths) < 4)
    for i in range(2):
        torch.testing.assert_close(picked.step(cache, i), picked.row(picked.full(2), i), rtol=0, atol=1e-12)


def test_a_prompt_that_fails_leaves_a_cache_that_can_be_reset() -> None:
    given = sequences("additive", "shared", [3, 2], 2)
    cache = given.cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("awrsr_kernels.decoding._prefill", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            given.decode(cache, 0, "right", "torch")
    with pytest.raises(ValueError, match="cache is in use"):
        given.decode(cache, 0, "right", "torch")
    cache.reset()
    torch.testing.assert_close(given.decode(cache, 2, "right", "torch"), given.full(2), rtol=0, atol=1e-12)


def test_crop_into_the_padding_of_a_window_leaves_empty_entries() -> None:
    given = sequences("additive", "content", [4, 1], 1)
    cache = given.cache()
    given.decode(cache, 0, "left", "torch")
    cache.crop(2)  # the second prompt lay in row 3
    assert cache.first.tolist() == [0, 2] and cache.end.tolist() == [2, 2]
    shorter = given._replace(prompts=[2, 0])
    torch.testing.assert_close(shorter.step(cache, 0), shorter.row(shorter.full(1), 0), rtol=0, atol=1e-12)


def test_reset_and_crop_leave_nothing_behind() -> None:
    """Rows that are forgotten held NaN, and a shorter prompt beside a longer one reads over them."""
    given = sequences("additive", "content", [4, 1], 2)
    cache = given.cache()
    broken = given._replace(v=torch.full_like(given.v, torch.nan), w_k=torch.full_like(given.w_k, torch.nan))
    broken.decode(cache, 2, "right", "torch")
    cache.reset()
    out = given.decode(cache, 1, "right", "torch")
    torch.testing.assert_close(out[:, :, :5], given.full(1)[:, :, :5], rtol=0, atol=1e-12)
    cache.crop(4)
    assert cache.end.tolist() == [4, 2]
    assert not any(x[:, :, 4:].any() for x in cache.rows().values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_either_mode_without_gradients(mode: Any) -> None:
    """Also one after the other: a cache that grew under inference_mode is no inference tensor."""
    given = sequences("simple", "shared", [3], 3)
    needing = given._replace(q=given.q.clone().requires_grad_(), w_q=given.w_q.clone().requires_grad_())
    cache = given.cache(capacity=3)
    with mode():
        needing.decode(cache, 1, "right", "torch")
        cache.reorder(torch.tensor([0, 0], device=DEVICE))
    assert not any(x.is_inference() or x.requires_grad for x in [*cache.rows().values(), cache.first, cache.end])
    cache.reorder(torch.tensor([0], device=DEVICE))
    torch.testing.assert_close(given.step(cache, 1), given.row(given.full(3), 1), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"\bq\b is a tensor that requires a gradient; it must be .*torch.no_grad"):
        needing.step(cache, 2)


@pytest.mark.parametrize(
    "change,name,error",
    [
        ({"capacity": 0}, "capacity", ValueError),
        ({"batch": 1.0}, "batch", TypeError),
        ({"kv_heads": 3}, "kv_heads", ValueError),
        ({"head_dim": 257}, "head_dim", ValueError),
        ({"rank": None}, "rank", TypeError),
        ({"refinement": "stochastic"}, "refinement", ValueError),
        ({"tables": "items"}, "tables", ValueError),
        ({"lags": 8}, "lags", ValueError),
        ({"lags": 1, "refinement": "none"}, "lags", ValueError),
        ({"dtype": torch.int64}, "dtype", TypeError),
    ],
)
def test_a_wrong_size_of_a_cache_is_named(change: dict[str, Any], name: str, error: type[Exception]) -> None:
    sizes: dict[str, Any] = {"batch": 2, "capacity": 4, "heads": 4, "head_dim": 8, "rank": 4}
    with pytest.raises(error, match=rf"\b{name}\b is .*must be"):
        RefinedCache(**sizes | change)


@pytest.mark.parametrize("index,error", [([0, 2], ValueError), ([[0]], ValueError), ([0.0], TypeError)])
def test_a_wrong_index_of_entries_is_named(index: list[Any], error: type[Exception]) -> None:
    if DEVICE != "cpu" and index == [0, 2]:
        pytest.skip("values are read on the CPU alone")
    with pytest.raises(error, match=r"\bindex\b is .*must be"):
        RefinedCache(2, 4, heads=1, head_dim=8, refinement="none", device=DEVICE).reorder(torch.tensor(index, device=DEVICE))
