"""Plans: repeated calls give the bits of the first, nothing that a check refuses slips through, and plans stay small."""

import functools
import gc
import os
import threading
import weakref
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from awrsr_kernels import plans, refined_attention, refined_attention_varlen, stochastic_refined_attention, tuned
from awrsr_kernels.launch_config import TABLE, Key

from ..conftest import DEVICE
from .decoding import sequences
from .planned_calls import CALLS, packed, padded, results, stochastic, tuple_of

pytest.importorskip("triton", reason="needs Triton")
from awrsr_kernels._triton import plan as plan_module  # noqa: E402
from awrsr_kernels._triton.problem import Problem  # noqa: E402
from awrsr_kernels._triton.record import Launches, Recorder  # noqa: E402


@pytest.fixture(autouse=True)
def tuner_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tuner's file of the test's own, which has been looked at: no other test's file changes the generation meanwhile."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv("AWRSR_KERNELS_TUNED", str(path))
    monkeypatch.setattr(tuned, "_looked", float("-inf"))
    tuned.generation()
    return path


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[Launches]:
    """What was repeated from here on."""
    seen: list[Launches] = []
    run = Launches.run
    monkeypatch.setattr(Launches, "run", lambda self, *args: (seen.append(self), run(self, *args))[1])
    return seen


def test_a_backward_follows_the_state_in_which_it_runs(repeated: list[Launches], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the forward, or of an earlier call: the precision of products, and the tuner's results."""
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(Problem, "precision", lambda self: "tf32" if matmul.fp32_precision == "tf32" else "ieee")
    (call, inputs, dout), before = padded(), matmul.fp32_precision
    try:
        for precision in ("ieee", "ieee", "tf32", "ieee", "tf32", "ieee"):
            matmul.fp32_precision = "ieee"
            out = call()
            matmul.fp32_precision = precision
            torch.autograd.grad(out, inputs, dout)
    finally:
        matmul.fp32_precision = before
    used = [each.launches[0].constants["PRECISION"] for each in repeated if "dq_ptr" in each.launches[0].slots]
    assert used == ["ieee", "tf32", "ieee"]  # the third, fifth and sixth: the others were recorded


def test_rows_that_overlap_get_their_gradients() -> None:
    """As of sliding windows, whose memory torch lays out otherwise."""
    for name in ("q", "k", "v"):
        base, (_, inputs, _) = torch.randn(60, device=DEVICE), padded(6)
        given = dict(zip(("q", "k", "v", "w_q", "w_k"), (x.detach() for x in inputs), strict=True))
        given[name] = base.as_strided((2, 2, 6, 8), (28, 14, 1, 1)).requires_grad_()
        found = []
        for backend in ("reference", *["triton"] * 4):
            found.append(torch.autograd.grad(refined_attention(**given, backend=backend).square().sum(), given[name])[0])
        for x in found[1:]:
            torch.testing.assert_close(x, found[0])


def test_a_recording_that_fails_is_made_later(repeated: list[Launches], monkeypatch: pytest.MonkeyPatch) -> None:
    call, inputs, dout = padded()
    call()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recorder, "launch", Mock(side_effect=KeyboardInterrupt))
        call()
    for _ in range(3):
        torch.autograd.grad(call(), inputs, dout)
    assert len(repeated) == 4  # the last two calls and their backwards


@pytest.mark.parametrize("name", CALLS)
def test_repeated_calls_give_the_bits_of_the_first(name: str, repeated: list[Launches]) -> None:
    work = CALLS[name]()
    first = results(work)
    for times in (1, 2, 3):
        again = results(work)
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(first, again, strict=True)), times
    backward = bool(work[1])
    assert len(repeated) >= 2 + backward and len(set(map(id, repeated))) == 1 + backward
    for mode in (torch.no_grad, torch.inference_mode):
        before = len(repeated)
        with mode():
            for _ in range(3):
                outs = tuple_of(work[0]())
                assert all(map(torch.equal, outs, first[: len(outs)]))
        assert len(repeated) > before


def test_tensors_may_change_places_and_contents(repeated: list[Launches]) -> None:
    """One tensor for q, k and v, then others: slots are filled anew."""
    one, w = torch.randn(3, 1, 2, 9, 8, device=DEVICE), torch.randn(2, 9, 5, device=DEVICE)
    for q, k, v in [(0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 1, 2), (2, 1, 1)]:
        given = one[q], one[k], one[v], w[0], w[1]
        plans_result = refined_attention(*given, backend="triton")
        torch.testing.assert_close(plans_result, refined_attention(*given, backend="reference"))
    assert len(repeated) == 3


def test_a_seed_that_is_drawn_differs_each_time_and_follows_manual_seed(repeated: list[Launches]) -> None:
    call, _, _ = padded(dropout_p=0.4)
    for _ in range(2):
        call()
    torch.manual_seed(5)
    one, two = call(), call()
    torch.manual_seed(5)
    assert torch.equal(one, call()) and not torch.equal(one, two) and len(repeated) == 3
    plans.forget()
    torch.manual_seed(5)
    assert torch.equal(one, call())


def test_seeds_and_gates_that_are_numbers(repeated: list[Launches]) -> None:
    """A seed is no part of a signature, a gate is."""
    q, k, v = (torch.randn(2, 2, 9, 8, device=DEVICE) for _ in "qkv")
    w = torch.randn(9, 5, device=DEVICE)
    call = functools.partial(refined_attention, q, k, v, w, w, refinement="additive")
    for gate, seed in [(1, 1), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]:
        found, wanted = (call(gate=gate, dropout_p=0.4, dropout_seed=seed, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(found, wanted)
    assert len(repeated) == 3


@pytest.mark.parametrize("seen", [1, 3])
def test_what_is_refused_at_first_is_refused_later(seen: int) -> None:
    given = [torch.randn(2, 2, 9, 8, device=DEVICE) for _ in "qkv"] + [torch.randn(9, 5, device=DEVICE)] * 2
    lengths, plain = torch.tensor([3, 9], device=DEVICE), {"refinement": "additive", "plain_heads": 1}
    call = functools.partial(refined_attention, *given, backend="triton")
    for _ in range(seen):
        call(lengths=lengths, dropout_p=0.0, causal=True), call(dropout_p=0.5, dropout_seed=1), call(**plain)
    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (TypeError, {"lengths": lengths, "causal": 1}),
        (TypeError, {"lengths": lengths, "dropout_p": False}),
        (TypeError, {"dropout_p": 0.5, "dropout_seed": True}),
        (TypeError, {"lengths": 3}),
        (TypeError, plain | {"plain_heads": 1.0}),
        (ValueError, {"dropout_p": 0.5, "dropout_seed": 2**70}),
        (ValueError, {"lengths": lengths[:1]}),
    ]
    for kind, options in wrong:
        with pytest.raises(kind):
            call(**options)
    if DEVICE == "cpu":
        lengths[1] = 10  # the same tensor, with other contents
        with pytest.raises(ValueError, match="lengths is 3 to 10"):
            call(lengths=lengths, dropout_p=0.0, causal=True)


def test_bounds_of_packed_sequences_are_read_each_time_on_a_cpu() -> None:
    if DEVICE != "cpu":
        pytest.skip("the values of a GPU's tensors are not read")
    call, _, _ = packed()
    bounds = call.args[5]  # type: ignore[attr-defined]
    for _ in range(3):
        call()
    bounds[1:3] = torch.tensor([8, 4])
    with pytest.raises(ValueError, match="nowhere falling"):
        call()
    bounds[1:3] = torch.tensor([8, 9])
    given = call.args[:5]  # type: ignore[attr-defined]
    torch.testing.assert_close(call(), refined_attention_varlen(*given, bounds, 15, backend="reference"))


def test_a_cache_that_steps_change_grows_and_ends_where_its_tables_do(repeated: list[Launches]) -> None:
    """Steps from an empty cache, by plans and as the definition takes them; they count as changes of the cache's tensors."""
    given = sequences("value", "shared", [0, 0], 9, heads=2, dtype=torch.float32)
    given = given._replace(**{name: getattr(given, name).contiguous() for name in ("w_q", "w_k")})
    cache, other = given.cache(2), given.cache(16)
    for i in range(9):
        kept, version = cache.k, cache.k._version
        out = given.step(cache, i, backend="triton")
        torch.testing.assert_close(out, given.step(other, i, backend="reference"))
        assert cache.k is not kept or cache.k._version > version
    assert cache.capacity == 9 and len(repeated) >= 1
    short = given._replace(w_q=given.w_q[:4], w_k=given.w_k[:4])
    cache = given.cache(8)
    for i in range(4):
        short.step(cache, i, backend="triton")
    before = cache.end.clone()
    with pytest.raises(ValueError, match="of a row for each of up to 5 items"):
        short.step(cache, 4, backend="triton")
    assert torch.equal(cache.end, before) and cache.end_bound == 4


def test_a_step_that_would_need_a_gradient_or_other_lags_is_refused_when_its_plan_is_known() -> None:
    given = sequences("simple", "shared", [0], 5, heads=2, dtype=torch.float32, lagged=True)
    learned, cache = given._replace(w_q=given.w_q.clone().requires_grad_()), given.cache(8)
    with torch.no_grad():
        for i in range(3):
            learned.step(cache, i, backend="triton")
    with pytest.raises(ValueError, match="w_q is a tensor that requires a gradient"):
        learned.step(cache, 3, backend="triton")
    cache.lags = 3  # the tensors of a cache for three lags are the same
    with torch.no_grad(), pytest.raises(ValueError, match="lags is 2 factors; it must be 3"):
        learned.step(cache, 3, backend="triton")


def test_tables_of_means_and_covariances_in_two_forms() -> None:
    """Of one head, (L, R) and (1, L, R) fit each other; they cannot lie side by side as they are."""
    items = [torch.rand(2, 1, 9, 8, device=DEVICE) + 0.1 for _ in range(6)]
    w, w_cov = torch.randn(9, 5, device=DEVICE), torch.randn(1, 9, 5, device=DEVICE)
    call = functools.partial(stochastic_refined_attention, *items, w, w, refinement="stochastic", backend="triton")
    wanted = call(w_cov[0], w_cov[0])
    for _ in range(3):
        assert all(map(torch.equal, call(w_cov, w_cov), wanted))


@pytest.mark.parametrize("seen", [1, 3])
def test_what_stochastic_attention_refuses_at_first_is_refused_later(seen: int) -> None:
    call, learned, _ = stochastic()
    for _ in range(seen):
        call()
    with torch.autocast(DEVICE, torch.float16):
        assert [x.dtype for x in tuple_of(call())] == [torch.float16] * 2
    items, tables = learned[:6], learned[6:]
    wrong: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("v_cov is of shape", [*items[:5], items[5][:1]], {}),
        ("q_cov is float", [items[0], 0.5, *items[2:]], {}),
        ("w_q_cov is given", items, {"w_q_cov": tables[0]}),
        ("gate is given", items, {"gate": 1.0}),
    ]
    for message, given, options in wrong:
        with pytest.raises((ValueError, TypeError), match=message):
            stochastic_refined_attention(*given, *tables, backend="triton", **options)


class Own(Tensor):
    pass


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_the_slow_path_is_taken_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    call, inputs, _ = padded()
    for _ in range(3):
        call()

    def refuse(*_: Any) -> None:
        raise AssertionError("took the plan")

    monkeypatch.setattr(plan_module.Plan, "__call__", refuse)
    with pytest.raises(AssertionError, match="took the plan"):
        call()
    q, k, v, w_q, w_k = inputs
    with torch.autocast(DEVICE, torch.float16):
        assert call().dtype == torch.float16
    with Watching():
        call()
    own = q.detach().as_subclass(Own)
    for _ in range(3):
        refined_attention(own, k, v, w_q, w_k, backend="triton")
    negative = torch.complex(torch.zeros_like(q), -q.detach()).conj().imag
    assert negative.is_neg()
    for _ in range(3):
        found = refined_attention(negative, k, v, w_q, w_k, backend="triton")
        torch.testing.assert_close(found, refined_attention(q, k, v, w_q, w_k, backend="reference"))
    with pytest.raises(ValueError, match="vmap"):
        torch.func.vmap(lambda q: refined_attention(q, k, v, w_q, w_k, backend="triton"))(torch.stack([q.detach()] * 2))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x.detach()) for x in inputs]
        assert plans.look([*fakes, None, None, None], "triton", ()) is None
    assert plans.look([x.to("meta") for x in inputs] + [None] * 3, "triton", ()) is None


@pytest.mark.parametrize("length", [12, 70])
def test_gradients_of_any_layout(length: int) -> None:
    call, inputs, dout = padded(length)
    for _ in range(3):
        results((call, inputs, dout))
    layouts = {
        "transposed": dout.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": dout[:1, :1, :1, :1].expand_as(dout),
        "unaligned": torch.cat([dout.new_zeros(1), dout.flatten()])[1:].view_as(dout),
        "negated": torch.complex(torch.zeros_like(dout), -dout).conj().imag,
    }
    for name, each in layouts.items():
        found = [torch.autograd.grad(call(), inputs, each) for _ in range(3)]
        plans.forget()
        wanted = torch.autograd.grad(call(), inputs, each.clone())
        for one in found:
            assert all(map(torch.equal, one, wanted)), name
        for _ in range(3):
            results((call, inputs, dout))


def test_saved_tensors_that_come_back_in_another_layout() -> None:
    first = results(work := padded(70))

    def elsewhere(x: Tensor) -> Tensor:
        return x.detach().transpose(0, -1).contiguous().transpose(0, -1).contiguous() if x.dim() > 1 else x.clone()

    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(elsewhere, lambda x: x):
            found = results(work)
        torch.testing.assert_close(found, first, rtol=0, atol=0)


@pytest.mark.parametrize("moved", [lambda x: torch.cat([x[:1], x])[1:], lambda x: torch.stack([x, x], 1).flatten()[::2]])
def test_kept_memory_that_comes_back_at_an_odd_address_or_with_gaps(moved: Any) -> None:
    first = results(work := padded(70))
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: moved(x) if x.dtype == torch.uint8 else x):
            found = results(work)
        assert all(map(torch.equal, found, first))


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter says what it refuses")
def test_saved_tensors_that_come_back_in_another_dtype_are_not_misread() -> None:
    work = padded()
    for _ in range(4):
        results(work)
    half = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.half() if x.is_floating_point() else x)
    with half, pytest.raises(Exception, match="same dtype"):
        results(work)


@pytest.mark.parametrize("name", ["short", "both", "tiled", "stochastic", "stochastic, tiled, covariances alone"])
def test_checkpoints_from_the_first_call_on(name: str) -> None:
    """Forward and recomputation save the same, whichever calls of a signature they are."""
    call, inputs, dout = CALLS[name]()
    found = []
    for _ in range(3):
        out = checkpoint(lambda *_: call(), *inputs, use_reentrant=False)
        found.append(torch.autograd.grad(out, inputs, dout))
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True))


@pytest.mark.parametrize("name", ["short", "stochastic"])
def test_a_second_derivative_and_batches_of_gradients_are_refused_as_before(name: str) -> None:
    call, inputs, douts = CALLS[name]()
    for _ in range(3):
        results((call, inputs, douts))
    first = torch.autograd.grad(call(), inputs[0], douts, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        first.sum().backward()
    with pytest.raises(ValueError, match="batch of gradients"):
        batches = [torch.stack([dout, dout]) for dout in tuple_of(douts)]
        torch.autograd.grad(tuple_of(call()), inputs[0], batches, is_grads_batched=True)


@pytest.mark.parametrize("name", ["resident", "stochastic", "step"])
def test_a_plan_keeps_no_tensor(name: str) -> None:
    work = CALLS[name]()
    for _ in range(4):
        kept = results(work)
    held = [weakref.ref(x) for x in (*work[1], *kept, *(tuple_of(work[2]) if work[1] else ()))]
    del work, kept
    gc.collect()
    assert plans._plans and not any(each() is not None for each in held)


def test_plans_are_bounded_and_those_in_use_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST", 4)
    used = padded(3, batch=1)
    with torch.no_grad():
        for _ in range(3):
            used[0]()
        for length in range(4, 12):  # each once: they cannot push out what is used
            padded(length, batch=1)[0]()
    assert len(plans._new) == 4 and len(plans._plans) == 1
    with torch.no_grad():
        for length in range(4, 12):
            call = padded(length, batch=1)[0]
            call(), call()
    assert len(plans._plans) == 4


@pytest.mark.parametrize("name", ["short", "stochastic"])
def test_threads_share_plans(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":  # one kernel at a time: the interpreter replaces functions of Triton while it runs one
        from triton.runtime.interpreter import GridExecutor

        run, one = GridExecutor.__call__, threading.Lock()

        def alone(*args: Any, **kwargs: Any) -> None:
            with one:
                run(*args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", alone)
    work = CALLS[name]()
    wanted, wrong = results(work), []

    def several() -> None:
        for _ in range(4):
            found = results(work)
            wrong.extend(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if not torch.equal(a, b))

    threads = [threading.Thread(target=several) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(plans._plans) == 1


@pytest.mark.skipif(not hasattr(os, "fork") or DEVICE != "cpu", reason="needs os.fork, and no GPU in use")
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("name", ["short", "stochastic", "step"])
def test_a_forked_process_begins_without_plans(name: str) -> None:
    call = CALLS[name]()[0]
    for _ in range(3):
        call()
    assert plans._plans
    child = os.fork()
    if child == 0:
        os._exit(0 if not plans._plans and not plans._new and not plans._lock.locked() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and plans._plans


def test_a_changed_tuner_file_is_noticed(tuner_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tuned.generation()
    assert tuned.generation() == before
    tuner_file.write_text('{"version": 1, "entries": []}')
    monkeypatch.setattr(tuned, "_looked", float("-inf"))  # a second later
    assert tuned.generation() != before


def test_forced_configurations_are_not_hidden_by_a_plan(repeated: list[Launches]) -> None:
    call = padded()[0]
    for _ in range(3):
        call()
    key = Key("short_fwd", 16, 32, 4)
    config = TABLE[key][0].config._replace(num_stages=2)
    with tuned.forced({key: config}):
        for _ in range(3):
            call()
    stages = [each.launches[0].options["num_stages"] for each in repeated]
    assert set(stages) == {1, 2} and stages == sorted(stages)
