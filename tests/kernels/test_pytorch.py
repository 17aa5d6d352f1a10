"""The operator inside PyTorch: torch.func, checkpoints, autocast, CUDA graphs, deterministic mode, counters, tracing."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from awrsr_kernels import refined_attention

from ..conftest import DEVICE, ENGINES
from .modules import OPERATORS, STOCHASTIC, Block, draw, gradients, of, summed
from .problems import Kind

pytestmark = pytest.mark.usefixtures("forget")



@pytest.mark.parametrize("use_reentrant,compiled", [(True, False), (False, False), (False, True)])  # reentrant ones do not compile
def test_a_checkpoint_draws_the_same_mask_again(use_reentrant: bool, compiled: bool) -> None:
    block, x = Block(dropout_p=0.5).to(DEVICE), torch.randn(2, 9, 16, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([9, 5], device=DEVICE)

    def run(x: Tensor) -> Tensor:
        return checkpoint(block, x, lengths, use_reentrant=use_reentrant)

    torch.manual_seed(1)
    run_or_compiled = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    found = of(block, (loss := run_or_compiled(x).square().sum()))
    assert x.grad is not None
    step, grad, losses = 1e-2 * torch.randn_like(x), x.grad.clone(), []
    for way in (step, -step):  # with another mask in the backward the gradient would not say how the loss changes
        torch.manual_seed(1)
        losses.append(run_or_compiled((x + way).detach().requires_grad_()).square().sum())
    torch.testing.assert_close(2 * (grad * step).sum(), losses[0] - losses[1], rtol=0.02, atol=0.02)
    if compiled and DEVICE != "cpu":
        return  # where graphs with checkpoints and graphs without draw different numbers
    torch.manual_seed(1)
    plain = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    expected = of(block, (plain_loss := plain(x, lengths).square().sum()))
    assert torch.equal(loss, plain_loss)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_each_replay_of_a_cuda_graph_draws_a_fresh_mask(backend: str) -> None:
    q, w = torch.randn(4, 2, 40, 16, device=DEVICE, requires_grad=True), torch.randn(40, 8, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        out = refined_attention(q, q, q, w, w, dropout_p=0.5, backend=backend)
        return out, torch.autograd.grad(out.square().sum(), q)[0]

    torch.use_deterministic_algorithms(False)  # which would fill memory while capturing
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dq = step()
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append((out.clone(), dq.clone()))
    assert all(x.isfinite().all() for pair in replays for x in pair)
    assert not any(torch.equal(a[i], b[i]) for a, b in zip(replays, replays[1:], strict=False) for i in (0, 1))


@pytest.mark.parametrize("kind", [Kind("simple"), STOCHASTIC], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_runs_in_its_dtype(kind: Kind, compiled: bool) -> None:
    given, bounds = draw(kind, "lengths")

    def function(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return tuple(kind.call(**given, **bounds, backend="torch").values())

    outs = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(given)
    assert all(out.dtype == torch.bfloat16 for out in outs)
    grads = gradients(sum((out.float().sum() for out in outs), torch.zeros((), device=DEVICE)), given)
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("kind", OPERATORS, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_backward_inside_autocast_is_that_outside(engine: str, kind: Kind, choose: Callable[[str], str]) -> None:
    given, bounds = draw(kind, "lengths")
    found = []
    half = torch.float16 if DEVICE == "cpu" and engine != "torch" else torch.bfloat16  # what the interpreter multiplies right
    for inside in (False, True):
        with torch.autocast(DEVICE, dtype=half):
            loss = summed(kind, given, **bounds, backend=choose(engine))
            if inside:
                found.append(gradients(loss, given))
        if not inside:
            found.append(gradients(loss, given))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [Kind("simple"), STOCHASTIC], ids=str)
def test_a_second_derivative_is_refused(engine: str, kind: Kind, choose: Callable[[str], str]) -> None:
    given, _ = draw(kind, "plain")
    loss = summed(kind, given, backend=choose(engine))
    (dq,) = torch.autograd.grad(loss, [given[kind.items[0]]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("engine", ENGINES)
def test_forward_mode_is_refused(engine: str, choose: Callable[[str], str]) -> None:
    given, _ = draw(Kind("simple"), "plain")
    backend, forward = choose(engine), torch.autograd.forward_ad
    with forward.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        dual = forward.make_dual(given["q"], torch.ones_like(given["q"]))
        refined_attention(**given | {"q": dual}, backend=backend)


@pytest.mark.parametrize("engine", [*ENGINES, "reference"])
def test_no_tangent_is_dropped(engine: str, choose: Callable[[str], str]) -> None:
    """Where nothing requires a gradient, and no autograd Function sees it: the right tangent, or an error."""
    given = {name: x.detach() for name, x in draw(Kind("simple"), "plain")[0].items()}
    backend, forward, moved = choose(engine), torch.autograd.forward_ad, torch.ones_like(given["q"])
    with forward.dual_level():
        dual = given | {"q": forward.make_dual(given["q"], moved)}
        if engine != "reference":
            with pytest.raises(NotImplementedError, match="forward mode AD"):
                refined_attention(**dual, backend=backend)
            return
        tangent = forward.unpack_dual(refined_attention(**dual, backend=backend)).tangent
    ahead, behind = (refined_attention(**given | {"q": given["q"] + step * moved}, backend=backend) for step in (1e-2, -1e-2))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-2, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_vmap_is_refused_with_advice(engine: str, choose: Callable[[str], str]) -> None:
    q, w, backend = torch.randn(3, 2, 4, 6, 8, device=DEVICE), torch.randn(6, 5, device=DEVICE), choose(engine)
    with pytest.raises(ValueError, match=r"\bbackend\b is .*must be \"reference\".*fold the mapped dimension into the batch"):
        torch.func.vmap(lambda q: refined_attention(q, q, q, w, w, backend=backend))(q)


@pytest.mark.parametrize("mapped", ["is_grads_batched", "vmap"])
@pytest.mark.parametrize("engine", ENGINES)
def test_batches_of_gradients_are_refused_with_advice(engine: str, mapped: str, choose: Callable[[str], str]) -> None:
    q, w, backend = torch.randn(2, 4, 6, 8, device=DEVICE, requires_grad=True), torch.randn(6, 5, device=DEVICE), choose(engine)
    out = refined_attention(q, q, q, w, w, backend=backend)
    several = torch.stack([out.detach()] * 2)
    with pytest.raises(ValueError, match=r"\bbackend\b is .*must be \"reference\" for a batch of gradients .*once for each"):
        if mapped == "vmap":
            torch.func.vmap(lambda dout: torch.autograd.grad(out, [q], dout)[0])(several)
        torch.autograd.grad(out, [q], several, is_grads_batched=True)


@pytest.mark.parametrize("kind", [Kind("value"), STOCHASTIC], ids=str)
def test_the_reference_is_mapped_and_differentiated_by_torch_func(kind: Kind) -> None:
    given = {name: x.detach() for name, x in draw(kind, "plain")[0].items()}
    lengths = torch.tensor([[6, 2], [3, 0], [1, 6]], device=DEVICE)

    def function(given: dict[str, Tensor], lengths: Tensor) -> Tensor:
        return summed(kind, given, lengths=lengths, backend="reference")

    found = torch.func.vmap(torch.func.grad(function), (None, 0))(given, lengths)
    for i, each in enumerate(lengths):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        for name, grad in zip(leaves, gradients(function(leaves, each), leaves), strict=True):
            torch.testing.assert_close(found[name][i], grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["plain", "lengths", "packed"])
@pytest.mark.parametrize("kind", OPERATORS, ids=str)
def test_operations_are_counted_alike_on_every_backend(kind: Kind, layout: str) -> None:
    """The products of the definition. Plain attention is long enough here for torch's own kernel."""
    pytest.importorskip("triton", reason="needs Triton")
    given, bounds = draw(kind, layout, 40 if kind.refinement == "none" else 6)
    longest: dict[str, Any] = {"max_seqlen": 40 if kind.refinement == "none" else 6} if layout == "packed" else {}
    counts = []
    for backend in ("reference", "torch", "triton"):
        with FlopCounterMode(display=False) as forward:
            loss = summed(kind, given, **bounds, **longest, backend=backend)
        with FlopCounterMode(display=False) as backward:
            gradients(loss, given)
        with torch.no_grad(), FlopCounterMode(display=False) as inference:
            summed(kind, given, **bounds, **longest, backend=backend)
        counts.append((forward.get_total_flops(), backward.get_total_flops(), inference.get_total_flops()))
    assert counts[0][0] > 0 and counts[0][1] == 2 * counts[0][0] and counts[0][2] == counts[0][0]
    assert len(set(counts)) == 1, counts


def test_a_counter_sees_the_first_call_of_a_process() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    code = """
import torch
from awrsr_kernels import refined_attention
from torch.utils.flop_counter import FlopCounterMode
x, w = torch.randn(1, 2, 6, 8), torch.randn(6, 4)
for backend in ("triton", "torch", "reference"):
    with FlopCounterMode(display=False) as counter:
        refined_attention(x, x, x, w, w, backend=backend)
    print(counter.get_total_flops())
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [str(2 * 2 * 36 * (8 + 3 * 4 + 8))] * 3


@pytest.mark.filterwarnings("ignore")  # of the tracer, about sizes
@pytest.mark.parametrize("backend", ["auto", "torch", "reference", "triton"])
def test_jit_trace_records_the_definition_for_any_lengths(backend: str) -> None:
    given, bounds = draw(Kind("additive"), "lengths")
    tensors = [*given.values(), bounds["lengths"]]

    def function(*tensors: Tensor) -> Tensor:
        return refined_attention(*tensors[:5], lengths=tensors[5], refinement="additive", backend=backend)

    if backend == "triton":
        with pytest.raises(ValueError, match='backend is "triton"; it must be torch or reference under torch.jit.trace'):
            torch.jit.trace(function, tensors)
        return
    program = torch.jit.trace(function, tensors)
    tensors[-1] = torch.tensor([1, 5], device=DEVICE)
    torch.testing.assert_close(program(*tensors), function(*tensors))
    assert len(gradients(program(*tensors).square().sum(), given)) == 5


@pytest.mark.parametrize("engine,compiled", [("torch", False), ("torch", True), ("short", True), ("tiled", False)])
@pytest.mark.filterwarnings("error:.*deterministic")
def test_results_repeat_bit_for_bit_in_deterministic_mode(engine: str, compiled: bool, choose: Callable[[str], str]) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    kind, backend = Kind("additive", True), choose(engine)
    given, bounds = draw(kind, "packed", 6, 1)
    longest: dict[str, Any] = {} if DEVICE == "cpu" else {"max_seqlen": 6}  # which on a GPU nobody reads

    def function(given: dict[str, Tensor]) -> Tensor:
        return summed(kind, given, **bounds, **longest, dropout_p=0.2, dropout_seed=7, backend=backend)

    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    first, again = gradients(run(given), given), gradients(run(given), given)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
