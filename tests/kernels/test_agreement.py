"""Every backend and regime against the reference: outputs and all gradients, under the rule of `awrsr_kernels/tolerance.py`."""

import collections
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from awrsr_kernels import refined_attention
from awrsr_kernels._torch import packing
from awrsr_kernels.checks import REFINEMENTS
from awrsr_kernels.reference import rounded_at_every_step
from awrsr_kernels.tolerance import wrong_results

from ..conftest import DEVICE, ENGINES
from .problems import KINDS, Kind, RandomCall, disagreements, random_calls

LENGTHS = {"torch": (1, 5, 16, 40, 150, 300), "short": (1, 5, 16, 33, 50), "resident": (1, 17, 40, 70), "tiled": (1, 5, 17, 40)}
EXAMPLES = {"torch": 8, "short": 2, "resident": 2, "tiled": 2}  # the interpreter is slow, and kernels compile for each
EXAMPLES_ONLY = settings(  # shrinking a failure would take minutes of interpreted kernels
    phases=[Phase.generate],
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@every_kind
@pytest.mark.parametrize("engine", ENGINES)
def test_agrees_with_the_reference(engine: str, kind: Kind, dtype: torch.dtype, choose: Callable[[str], str]) -> None:
    if engine != "torch" and dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("needs a GPU: Triton's interpreter gets bfloat16 products wrong")
    if engine != "torch" and dtype == torch.float64 and DEVICE != "cpu":
        pytest.skip("needs the interpreter, that is a machine without a GPU: the kernels have no float64 there")
    if engine == "resident" and kind.stochastic:
        pytest.skip("stochastic attention has no resident regime")
    backend = choose(engine)
    reach = 32 if engine == "short" and dtype == torch.float32 and DEVICE != "cpu" else 1000  # longer ones are tiled there

    @settings(EXAMPLES_ONLY, max_examples=-(-EXAMPLES[engine] // (1 + kind.stochastic)))
    @given(random_calls(tuple(n for n in LENGTHS[engine] if n <= reach)))
    def holds(case: RandomCall) -> None:
        case = case._replace(causal=case.causal or engine == "resident")
        assert disagreements(case, kind, dtype, backend) == []

    holds()


@every_kind
@pytest.mark.parametrize("engine", ["mixed"])
def test_short_histories_beside_long_ones(
    engine: str, kind: Kind, choose: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call short ones go to the short kernels and long ones to the resident or tiled ones; lengths may be anything.
    Additive in every layout, other refinements in two each: interpreted kernels are slow."""
    backend, went = choose(engine), collections.Counter[str]()
    from awrsr_kernels._triton import autograd

    for name in (f"launch_{regime}_{way}" for regime in ("short", "resident", "tiled") for way in ("forward", "backward")):
        run = getattr(autograd, name)
        monkeypatch.setattr(autograd, name, lambda *args, run=run, name=name: (went.update([name]), run(*args))[1])
    for seed, (kv_heads, table, padded, causal, side) in enumerate(
        [
            (2, "shared", True, True, "left"),
            (2, "head", False, True, "right"),
            (2, "entry", False, False, "left"),
            (2, "entry", True, False, "left"),
            (1, "shared", True, True, "right"),
        ]
    ):
        if DEVICE == "cpu" and kind.refinement != "additive" and (seed - KINDS.index(kind)) % 5 > 1:
            continue
        dtype, dropout_p = (torch.float16 if seed == 1 else torch.float32), 0.3 * (seed < 3)
        case = RandomCall(
            2, kv_heads, lengths=[20, 3, 16, 0, 5, 17, 1], padded=padded, ragged=True, extra_rows=3, widths=(16, 8, 20),
            table=table, gate="head", side=side, causal=causal, dropout_p=dropout_p, wide_tables=False, seed=seed,
        )  # fmt: skip
        went.clear()
        assert disagreements(case, kind, dtype, backend) == []
        regimes = {name.split("_")[1] for name in went}
        assert regimes == {"resident" if causal and not kind.stochastic else "tiled"} | ({"short"} if kv_heads == 2 else set())
        assert len(went) == 2 * len(regimes)  # grouped queries are not shared between regimes


@every_kind
@pytest.mark.parametrize("engine", ["short", "resident", "tiled"])
def test_rounding_cancels_in_rows_that_see_one_column(engine: str, kind: Kind, choose: Callable[[str], str]) -> None:
    """Their scores have no gradient; what dropout's scale loses when a saved output is rounded must not appear there."""
    if engine == "resident" and kind.stochastic:
        pytest.skip("stochastic attention has no resident regime")
    backend = choose(engine)
    for seed in range(3):
        case = RandomCall(
            heads=2, kv_heads=1, lengths=[1, 0], padded=True, ragged=True, extra_rows=0, widths=(16, 5, 8), table="entry",
            gate="head", side="left", causal=engine == "resident" or seed < 2, dropout_p=0.3, wide_tables=False, seed=seed,
        )  # fmt: skip
        assert disagreements(case, kind, torch.float16, backend) == []


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("refinement", REFINEMENTS)
def test_resident_tiles_of_the_launch_table(refinement: str, padded: bool) -> None:
    """In half precision, on two blocks of rows, with a narrow one for what is left over (70, 129, 130) and without (100)."""
    pytest.importorskip("triton", reason="needs Triton")
    from awrsr_kernels.launch_config import RESIDENT, Key, choose, shared_memory

    tile = choose(Key("resident_bwd", RESIDENT, 32, 2), shared_memory(torch.device(DEVICE)))
    assert (tile.block_m, tile.block_n) == (64, 16)
    case = RandomCall(
        heads=2, kv_heads=2, lengths=[130] if padded else [70, 100, 129], padded=padded, ragged=False, extra_rows=0,
        widths=(32, 24, 32), table="shared", gate="head", side="right", causal=True, dropout_p=0.2 * padded, wide_tables=False,
        seed=REFINEMENTS.index(refinement),
    )  # fmt: skip
    assert disagreements(case, Kind(refinement), torch.float16 if DEVICE == "cpu" else torch.bfloat16, "triton") == []


@every_kind
def test_tiled_tiles_of_the_launch_table(kind: Kind) -> None:
    """In half precision with 65 to 128 features, where the backward's tiles have more rows than columns: two blocks of rows."""
    pytest.importorskip("triton", reason="needs Triton")
    from awrsr_kernels.launch_config import TILED, TILED_KERNELS, Key, choose, shared_memory

    for kernel in TILED_KERNELS[1:]:
        tile = choose(Key(kernel, TILED, 128, 2), shared_memory(torch.device(DEVICE)))
        assert DEVICE != "cpu" or tile.block_m == 128 > tile.block_n
    padded = KINDS.index(kind) % 2 == 0
    case = RandomCall(
        heads=2, kv_heads=1 + padded, lengths=[150] if padded else [131, 20, 70], padded=padded, ragged=False, extra_rows=0,
        widths=(33, 20, 40) if kind.stochastic else (66, 40, 60), table="shared", gate="head", side="right", causal=True,
        dropout_p=0.2 * padded, wide_tables=False, seed=KINDS.index(kind),
    )  # fmt: skip
    assert disagreements(case, kind, torch.float16 if DEVICE == "cpu" else torch.bfloat16, "triton") == []


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("causal", [True, False])
def test_stock_attention_where_the_torch_backend_takes_it(causal: bool, dtype: torch.dtype) -> None:
    if DEVICE != "cpu":
        pytest.skip("a CPU's shortcut")
    tensors = {name: torch.randn(2, 3, 300, 24).to(dtype).requires_grad_() for name in ("q", "k", "v")}
    doubles = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    dout = torch.randn(2, 3, 300, 24).to(dtype)

    def results(given: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        out = refined_attention(**given, w_q=None, w_k=None, refinement="none", causal=causal, backend=backend)
        assert backend == "reference" or type(out.grad_fn).__name__ == "_StockAttentionBackward"
        grads = torch.autograd.grad(out, list(given.values()), dout.to(out))
        return {"out": out} | {f"d{name}": g for name, g in zip(given, grads, strict=True)}

    found = results(tensors, "torch")
    with rounded_at_every_step():
        same = results(tensors, "reference")
    assert wrong_results(found, results(doubles, "reference"), same, dtype) == []
    with torch.no_grad():
        out = refined_attention(**tensors, w_q=None, w_k=None, refinement="none", causal=causal, backend="torch")
    assert wrong_results({"out": out}, {"out": results(doubles, "reference")["out"]}, {"out": found["out"]}, dtype) == []


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("refinement", ["none", "additive"])
@pytest.mark.parametrize("engine", ENGINES)
def test_scales_of_any_sign(engine: str, refinement: str, scale: float, choose: Callable[[str], str]) -> None:
    """With a gradient and without: torch's own attention, which hides later keys before it scales, serves some of these calls."""
    backend, length = choose(engine), 70 if engine == "torch" else 6
    given = [torch.randn(1, 2, length, 8, device=DEVICE) for _ in range(3)]
    tables = [torch.randn(length, 8, device=DEVICE) if refinement != "none" else None for _ in range(2)]
    options = {"refinement": refinement, "softmax_scale": scale} | ({"refine_scale": scale} if refinement != "none" else {})
    dout = torch.randn(1, 2, length, 8, device=DEVICE)

    def results(backend: str, learn: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        tensors = [x.to(dtype).requires_grad_(learn) for x in given]
        out = refined_attention(*tensors, *(w if w is None else w.to(dtype) for w in tables), **options, backend=backend)
        grads = torch.autograd.grad(out, tensors, dout.to(dtype)) if learn else ()
        return {"out": out} | {f"d{name}": x for name, x in zip("qkv", grads, strict=False)}

    for learn in (False, True):
        exact, same = results("reference", learn, torch.float64), results("reference", learn)
        assert wrong_results(results(backend, learn), exact, same, torch.float32) == []


@pytest.mark.parametrize("table,causal", [("shared", True), ("head", False), ("entry", True)])
@every_kind
def test_short_histories_share_windows(kind: Kind, table: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend on a CPU: each result agrees, and windows with several histories were used."""
    if DEVICE != "cpu":
        pytest.skip("a CPU's way")
    made: list[list[int]] = []
    pack = packing._pack

    def record(lengths: list[int], span: int) -> list[list[int]]:
        windows = pack(lengths, span)
        assert sorted(i for x in windows for i in x) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in x) <= span for x in windows)
        made.extend(windows)
        return windows

    monkeypatch.setattr(packing, "_pack", record)
    for seed, padded in enumerate([False, True]):
        lengths = torch.randint(0, 12, (30,), generator=torch.Generator().manual_seed(seed)).tolist() + [37, 50]
        case = RandomCall(
            heads=2, kv_heads=1, lengths=lengths, padded=padded, ragged=True, extra_rows=3, widths=(8, 16, 8), table=table,
            gate="head", side="right" if padded else "left", causal=causal, dropout_p=0.3 * padded, wide_tables=False, seed=seed,
        )  # fmt: skip
        assert disagreements(case, kind, torch.float32, "torch") == []
    assert max(len(window) for window in made) > 5


@every_kind
@pytest.mark.parametrize("engine", ["reference", *ENGINES])
def test_gradcheck(kind: Kind, engine: str, choose: Callable[[str], str]) -> None:
    if engine == "resident" and kind.stochastic:
        pytest.skip("stochastic attention has no resident regime")
    if DEVICE != "cpu" and engine in ("short", "resident", "tiled"):
        pytest.skip("float64 kernels need the interpreter, that is a machine without a GPU")
    backend = choose(engine)
    tensors = kind.draw((1, 2, 4, 3), (4, 2), torch.float64)
    tensors |= {"gate": torch.randn(2, dtype=torch.float64, device=DEVICE)} if kind.refinement == "additive" else {}
    given = [x.requires_grad_() for x in tensors.values()]

    def function(*t: Tensor) -> tuple[Tensor, ...]:
        return tuple(kind.call(**dict(zip(tensors, t, strict=True)), backend=backend).values())

    assert torch.autograd.gradcheck(function, given, fast_mode=backend == "triton")
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, given, fast_mode=True)
