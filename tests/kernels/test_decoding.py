"""Decoding: prompts and steps equal the rows of the full causal call, for every refinement, in O(L) work each."""

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from awrsr_kernels import RefinedCache, decoding, refined_attention, refined_attention_prefill, refined_attention_step
from awrsr_kernels.checks import REFINEMENTS
from awrsr_kernels.tolerance import wrong_results
from benchmarks.operator import decode_bench

from ..conftest import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("reference", "torch", "triton")
TABLES = ("shared", "head", "content")
every_refinement = pytest.mark.parametrize("refinement", REFINEMENTS)


class Sequences(NamedTuple):
    """Whole sequences aligned to the left, and how many items of each make its prompt."""

    q: Tensor
    k: Tensor
    v: Tensor
    w_q: Tensor
    w_k: Tensor
    gate: Tensor | None
    prompts: list[int]
    refinement: str
    table: str

    @property
    def content(self) -> bool:
        return self.table == "content"

    def to(self, dtype: torch.dtype) -> "Sequences":
        return self._replace(**{n: x.to(dtype) for n, x in zip(self._fields[:6], self[:6], strict=True) if x is not None})

    def full(self, steps: int, **options: Any) -> Tensor:
        """(B, H, T, D_v) by the reference."""
        lengths = torch.tensor([n + steps for n in self.prompts], device=DEVICE)
        options = {"backend": "reference", "lengths": lengths, "padding_side": "right"} | options
        return refined_attention(*self[:5], refinement=self.refinement, gate=self.gate, **options)

    def cache(self, capacity: int = 4) -> RefinedCache:
        (batch, heads, _, d), (_, kv_heads, _, d_v) = self.q.shape, self.v.shape
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": d, "value_dim": d_v, "rank": self.w_q.shape[-1]}
        tables = "content" if self.content else "position"
        options = {"refinement": self.refinement, "tables": tables, "dtype": self.q.dtype, "device": DEVICE}
        return RefinedCache(batch, capacity, **sizes, **options)  # type: ignore[arg-type]

    def prompt(self, side: str) -> dict[str, Tensor]:
        """Windows of the prompts, NaN where there is padding."""
        window = max(self.prompts)

        def placed(x: Tensor) -> Tensor:
            found = torch.full_like(x[:, :, :window], torch.nan)
            for b, n in enumerate(self.prompts):
                first = window - n if side == "left" else 0
                found[b, :, first : first + n] = x[b, :, :n]
            return found

        tables = {"w_q": self.w_q, "w_k": self.w_k}
        items = {"q": self.q, "k": self.k, "v": self.v} | (tables if self.content else {})
        return tables | {name: placed(x) for name, x in items.items()}

    def row(self, x: Tensor, step: int) -> Tensor:
        """(B, heads, 1, F): of each entry the item at a step after its prompt."""
        return torch.stack([x[b, :, n + step] for b, n in enumerate(self.prompts)])[:, :, None]

    def step(self, cache: RefinedCache, step: int, **options: Any) -> Tensor:
        tables = [self.row(w, step) if self.content else w for w in (self.w_q, self.w_k)]
        return refined_attention_step(*(self.row(x, step) for x in self[:3]), *tables, cache, **{"gate": self.gate} | options)

    def decode(self, cache: RefinedCache, steps: int, side: str, backend: str, prompt_backend: str | None = None) -> Tensor:
        """As `full`, from a prompt where there is one and steps."""
        found = self.q.new_zeros(*self.q.shape[:3], self.v.shape[-1])
        if max(self.prompts):
            window = max(self.prompts)
            lengths = torch.tensor(self.prompts, device=DEVICE)
            out = refined_attention_prefill(
                **self.prompt(side), cache=cache, gate=self.gate, lengths=None if min(self.prompts) == window else lengths,
                padding_side=side, backend=prompt_backend or backend,
            )  # fmt: skip
            for b, n in enumerate(self.prompts):
                first = window - n if side == "left" else 0
                found[b, :, :n] = out[b, :, first : first + n]
                assert not out[b, :, :first].any() and not out[b, :, first + n :].any()
        for i in range(steps):
            out = self.step(cache, i, backend=backend)
            for b, n in enumerate(self.prompts):
                found[b, :, n + i] = out[b, :, 0]
        return found


def sequences(
    refinement: str,
    table: str,
    prompts: list[int],
    steps: int,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float64,
) -> Sequences:
    """Of uncommon widths, their last dimension not contiguous in memory."""
    batch, length, (d, d_v, r) = len(prompts), max(prompts) + steps, (5, 3, 6)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape[:-1], 2 * shape[-1], dtype=torch.float64, device=DEVICE).to(dtype)[..., ::2]

    w = {"shared": (length, r), "head": (heads, length, r), "content": (batch, heads, length, r)}[table]
    gate = new(heads) if refinement == "additive" else None
    items = new(batch, heads, length, d), new(batch, kv_heads, length, d), new(batch, kv_heads, length, d_v)
    return Sequences(*items, new(*w), new(*w), gate, prompts, refinement, table)


def needs(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs Triton")
        if dtype == torch.float64 and DEVICE != "cpu":
            pytest.skip("needs the interpreter: the kernels have no float64 on a GPU")


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
        exact, same = given.to(torch.float64).full(2), given.full(2)
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
