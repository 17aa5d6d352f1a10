"""Decoding: prompts and steps equal the rows of the full causal call, for every refinement, in O(L) work each."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from awrsr_kernels import RefinedCache, decoding, refined_attention_prefill, refined_attention_step
from awrsr_kernels.reference import rounded_at_every_step
from awrsr_kernels.tolerance import wrong_results
from benchmarks.operator import decode_bench

from ..conftest import DEVICE
from .decoding import TABLES, every_refinement, needs, sequences

pytestmark = pytest.mark.usefixtures("one_thread")


BACKENDS = ("reference", "torch", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("table", TABLES)
@every_refinement
def test_rows_of_the_full_call(refinement: str, table: str, backend: str) -> None:
    """Grouped or own key heads, one length or several, an empty prompt, padding on either side or no prompt at all."""
    needs(backend, torch.float64)
    cases = [([5, 3, 0], "left", 2), ([5, 3, 0], "right", 1), ([4, 4], "right", 1), ([0, 0], "right", 2)]
    if backend != "triton":
        cases = list(itertools.product([[5, 3, 0], [4, 4], [0, 0], [3]], ["left", "right"], [1, 2]))
    for prompts, side, kv_heads in cases if (table, refinement) != ("content", "none") else []:
        given = sequences(refinement, table, prompts, 3, heads=2, kv_heads=kv_heads)
        out = given.decode(given.cache(), 3, side, backend, "torch" if backend == "triton" else None)
        torch.testing.assert_close(out, given.full(3), rtol=0, atol=1e-12)
    for prompts, side in [([5, 3, 0], "left"), ([4, 4], "right"), ([0, 0], "right")]:
        given = sequences(refinement, table, prompts, 3, heads=2, lagged=True)
        out = given.decode(given.cache(), 3, side, backend, "torch" if backend == "triton" else None)
        torch.testing.assert_close(out, given.full(3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("backend", BACKENDS)
@every_refinement
def test_within_the_tolerance_of_its_dtype(refinement: str, backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("needs a GPU: Triton's interpreter gets bfloat16 products wrong")
    needs(backend, dtype)
    for table in ("shared", "content"):
        given = sequences(refinement, table, [6, 3], 2, heads=2, kv_heads=1, dtype=dtype)
        prompts = "torch" if table == "shared" and backend == "triton" else backend  # interpreted kernels take their time
        out = given.decode(given.cache(), 2, "left", backend, prompts)
        exact = given.to(torch.float64).full(2)
        with rounded_at_every_step():
            same = given.full(2)
        assert wrong_results({"out": out}, {"out": exact}, {"out": same}, dtype) == []
        if table == "shared":  # float32 tables beside half precision are read in its dtype
            wide = given._replace(w_q=given.w_q.float(), w_k=given.w_k.float())
            assert torch.equal(wide.decode(given.cache(), 2, "left", backend, prompts), out)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_more_items_than_a_tile_has(backend: str) -> None:
    needs(backend, torch.float32)
    given = sequences("value", "head", [70, 33], 2, heads=2, dtype=torch.float32)
    out = given.decode(given.cache(), 2, "left", backend, "torch")
    exact, same = given.to(torch.float64).full(2), given.full(2)
    assert wrong_results({"out": out}, {"out": exact}, {"out": same}, torch.float32) == []


@pytest.mark.parametrize("refinement", ["simple", "value"])
def test_a_wide_prompt_takes_several_calls(refinement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awrsr_kernels.checks.MAX_FEATURES", 13)  # 6 + 6 + 3 columns: two calls for "value"
    widths, run = [], decoding.run
    monkeypatch.setattr(decoding, "run", lambda given, *rest: (widths.append(given.v.shape[-1]), run(given, *rest))[1])
    given = sequences(refinement, "shared", [4, 2], 1)
    out = given.decode(given.cache(), 1, "right", "torch")
    torch.testing.assert_close(out, given.full(1), rtol=0, atol=1e-12)
    assert widths == ([12, 3, 3] if refinement == "value" else [12, 3])


@pytest.mark.parametrize("scales", [{"softmax_scale": 0.7, "refine_scale": 1.3}])
@pytest.mark.parametrize("gate", [None, 0.3, torch.tensor(-0.4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_and_gates(backend: str, gate: Any, scales: dict[str, float]) -> None:
    needs(backend, torch.float64)
    given = sequences("additive", "shared", [0], 2)
    gate = gate.to(DEVICE) if isinstance(gate, Tensor) else gate
    cache, exact = given.cache(), given._replace(gate=gate).full(2, **scales)
    for i in range(2):
        out = given.step(cache, i, backend=backend, gate=gate, **scales)
        torch.testing.assert_close(out, given.row(exact, i), rtol=0, atol=1e-12)


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest result of any operation, views left out, and how many there were."""

    largest = count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not function._schema.returns[0].alias_info:
            self.largest, self.count = max(self.largest, result.numel()), self.count + 1
        return result


@pytest.mark.parametrize("table", TABLES)
@every_refinement
def test_a_step_makes_nothing_but_rows_of_weights(refinement: str, table: str) -> None:
    """No copy of the cache either, float32 on a CPU: the largest thing made is (B, H, n)."""
    batch, heads, length = 2, 4, 200
    for prompts in ([length, length], [length, 7]):
        given = sequences(refinement, table, prompts, 1, heads=heads, dtype=torch.float32)
        given = given._replace(**{name: getattr(given, name).contiguous() for name in ("q", "k", "v", "w_q", "w_k")})
        cache = given.cache(256)
        given.decode(cache, 0, "left", "torch")
        with Allocations() as seen:
            given.step(cache, 0, backend="torch")
        assert seen.largest <= batch * heads * (length + 1) and seen.count < 60


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_step_compiles_into_one_graph(backend: str) -> None:
    needs(backend, torch.float32)
    given = sequences("value", "shared", [3, 2], 6, heads=2, dtype=torch.float32)
    cache = given.cache(16)
    given.decode(cache, 0, "left", "torch")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(refined_attention_step, fullgraph=True, backend="aot_eager")
    exact = given.full(6)
    with torch.no_grad():
        for i in range(6):
            rows = [given.row(x, i) for x in given[:3]]
            out = compiled(*rows, given.w_q, given.w_k, cache, backend=backend)
            torch.testing.assert_close(out, given.row(exact, i), rtol=1e-4, atol=1e-5)
    assert cache.end.tolist() == [9, 9] and (cache.end_bound, cache.length_bound) == (9, 9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one for so many rows, then one for any number


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_compiles_into_one_graph(side: str) -> None:
    """Where lengths are not read: bounds are looser then, and the step that follows is right all the same."""
    given = sequences("value", "shared", [3, 1], 2, heads=2, dtype=torch.float32)
    cache, lengths = given.cache(8), torch.tensor(given.prompts, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(refined_attention_prefill, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(**given.prompt(side), cache=cache, lengths=lengths, padding_side=side, backend="torch")
    assert cache.ragged and cache.end_bound == 3
    torch.testing.assert_close(given.step(cache, 0), given.row(given.full(2), 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("table", ["shared", "content"])
def test_the_kernel_is_a_wellformed_operator(table: str) -> None:
    needs("triton", torch.float32)
    from awrsr_kernels._triton.decode import triton_step

    given = sequences("value", table, [2], 1, heads=2, dtype=torch.float32)
    cache = given.cache()
    given.decode(cache, 0, "left", "torch")
    tables = [given.row(w, 0) if given.content else w[None, None] for w in (given.w_q, given.w_k)]
    new = [*(given.row(x, 0) for x in given[:3]), *tables, None]
    kept = cache.k, cache.v, cache.k_a, cache.y, cache.w_q, cache.w_k, cache.first, cache.end
    torch.library.opcheck(triton_step, (*new, *kept, "value", 0.3, 0.5))


def test_the_kernel_stays_within_a_full_cache() -> None:
    """What a replayed graph would do that ran too often: nothing is written, and the row is still read right."""
    needs("triton", torch.float32)
    from awrsr_kernels._triton.decode import triton_step

    given = sequences("none", "shared", [4], 1, heads=2, dtype=torch.float32)
    cache = given.cache(4)
    given.decode(cache, 0, "left", "torch")
    before = {name: x.clone() for name, x in cache.rows().items()}
    new = [given.row(x, 0) for x in given[:3]]
    none = [None] * 4
    out = triton_step(*new, None, None, None, cache.k, cache.v, *none, cache.first, cache.end + 7, "none", 5**-0.5, 1.0)
    torch.testing.assert_close(out, given.row(given.full(1), 0), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x, before[name]) for name, x in cache.rows().items())


def test_the_benchmark_times_what_is_right_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--length", "12", "--batch", "2", "--dim", "8", "--reps", "1", "--out", str(tmp_path)]
    assert decode_bench.main(options) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len({row["task"] for row in results["rows"]}) == 7 and len(results["rows"]) == 28
    assert all(row["median_ms"] > 0 and (row["provider"] == "full") <= (row["ratio_to_full"] == 1) for row in results["rows"])
    assert (tmp_path / "results.md").read_text() == decode_bench.markdown(results)
    monkeypatch.setattr(decode_bench.F, "scaled_dot_product_attention", lambda q, k, v, **_: v[:, :, -1:])
    assert decode_bench.main(options[:-2]) == 1
    assert "WRONG, nothing was written: none" in capsys.readouterr().err


def arguments() -> tuple[dict[str, Any], RefinedCache]:
    given = sequences("simple", "shared", [0, 0], 3, dtype=torch.float32)
    rows = {name: given.row(getattr(given, name), 0) for name in "qkv"}
    return rows | {"w_q": given.w_q, "w_k": given.w_k}, given.cache()


@pytest.mark.parametrize(
    "change,name,error",
    [
        ({"q": torch.zeros(2, 4, 2, 5), "k": torch.zeros(2, 2, 2, 5), "v": torch.zeros(2, 2, 2, 3)}, "q", ValueError),
        ({"q": torch.zeros(3, 4, 1, 5), "k": torch.zeros(3, 2, 1, 5), "v": torch.zeros(3, 2, 1, 3)}, "cache", ValueError),
        ({"q": torch.zeros(2, 2, 1, 5)}, "cache", ValueError),
        ({"k": torch.zeros(2, 4, 1, 5), "v": torch.zeros(2, 4, 1, 3)}, "cache", ValueError),
        ({"q": torch.zeros(2, 4, 1, 6), "k": torch.zeros(2, 2, 1, 6)}, "cache", ValueError),
        ({"v": torch.zeros(2, 2, 1, 4)}, "cache", ValueError),
        ({"dtype": torch.float64}, "cache", TypeError),
        ({"device": "meta"}, "cache", ValueError),
        ({"cache": {}}, "cache", TypeError),
        ({"w_q": torch.zeros(3, 7), "w_k": torch.zeros(3, 7)}, "w_q", ValueError),
        ({"w_q": torch.zeros(2, 3, 6), "w_k": torch.zeros(2, 3, 6)}, "w_q", ValueError),
        ({"w_q": torch.zeros(2, 4, 1, 6), "w_k": torch.zeros(2, 4, 1, 6)}, "w_q", ValueError),
        ({"w_q": None}, "w_q", TypeError),
        ({"align": "right"}, "align", ValueError),
        ({"align": "top"}, "align", ValueError),
        ({"gate": 0.5}, "gate", ValueError),
        ({"backend": "cuda"}, "backend", ValueError),
        ({"softmax_scale": "1"}, "softmax_scale", TypeError),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], name: str, error: type[Exception]) -> None:
    given, cache = arguments()
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in change.items()}
    if where := {k: moved.pop(k) for k in ("dtype", "device") if k in moved}:
        given = {k: x.to(**where) for k, x in given.items()}
    with pytest.raises(error, match=rf"\b{name}\b is .*must be"):
        refined_attention_step(**{**given, "cache": cache, **moved})
    assert not cache.k.any() and not cache.end_bound


def test_content_rows_must_be_those_of_the_item_and_go_with_either_alignment() -> None:
    given = sequences("simple", "content", [0], 2)
    with pytest.raises(ValueError, match=r"\bw_q\b is .*must be \(B, H, L, R\) .* content tables"):
        refined_attention_step(*(given.row(x, 0) for x in given[:3]), given.w_q, given.w_k, given.cache())
    assert torch.equal(given.step(given.cache(), 0, align="right"), given.step(given.cache(), 0))


def test_a_prompt_wants_an_empty_cache() -> None:
    given, cache = arguments()
    refined_attention_step(**given, cache=cache)
    with pytest.raises(ValueError, match=r"\bcache\b is in use, up to row 1; it must be empty"):
        refined_attention_prefill(**given, cache=cache)
