"""The operator inside PyTorch: torch.compile, export, torch.func, checkpoints, autocast, CUDA graphs, deterministic mode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from awrsr_kernels import refined_attention, refined_attention_varlen
from awrsr_kernels._torch.operator import backward_op, forward_op

from ..conftest import DEVICE, ENGINES, cumulative
from .problems import Kind

OLD = torch.__version__ < "2.13"  # its compiled graphs order some sums in another way
STOCHASTIC = Kind("stochastic", True)
LENGTHS, SHORT = (6, 9, 17, 23, 40), (3, 4, 5, 17, 6)  # the latter for the interpreter, which takes its time


@pytest.fixture(autouse=True)
def forget() -> None:
    """Graphs of other tests are not found again."""
    torch._dynamo.reset()
    counters.clear()


def draw(kind: Kind, layout: str, length: int = 6, extra: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments with a gradient and where sequences lie, for 2 + extra of them; packed tables have 64 rows."""
    if layout == "packed":
        cu = cumulative([length, 0, 3, *[1] * extra])
        given, bounds = kind.draw((length + 3 + extra, 4, 8), (64, 5)), {"cu_seqlens": cu}
    else:
        lengths = torch.tensor([length, 2, *[length // 2] * extra], device=DEVICE)
        given, bounds = kind.draw((2 + extra, 4, length, 8), (length, 5)), {} if layout == "plain" else {"lengths": lengths}
    return {name: x.requires_grad_() for name, x in given.items()}, bounds


def summed(kind: Kind, given: dict[str, Tensor], **options: Any) -> Tensor:
    outs = kind.call(**given, **options).values()
    return sum((out.square().sum() for out in outs), torch.zeros((), device=DEVICE))


def gradients(loss: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(given.values())))


ROUTES = [("torch", "plain"), ("torch", "lengths"), ("torch", "packed"), ("short", "packed"), ("tiled", "lengths")]
OPERATORS = [Kind("none"), Kind("simple"), Kind("value"), Kind("additive"), Kind("additive", True), STOCHASTIC]


@pytest.mark.parametrize(
    "kind,layout", [(Kind("value"), x) for x in ("plain", "lengths", "packed", "content")] + [(k, "packed") for k in OPERATORS]
)
def test_the_torch_backend_is_a_wellformed_operator(kind: Kind, layout: str) -> None:
    packed, rows = layout == "packed", 9 if layout == "packed" else 6
    q = torch.randn(1 if packed else 2, 2, rows, 8, device=DEVICE)
    w = torch.randn(*((2, 2) if layout == "content" else (1, 1)), rows, 4, device=DEVICE)
    tables = (None, None) if kind.refinement == "none" else (w, w.clone())
    gate = torch.ones(2, device=DEVICE) if kind.refinement == "additive" else None
    bounds = cumulative([6, 3]) if packed else torch.tensor([6, 2], device=DEVICE) if layout == "lengths" else None
    tensors = (q, q.clone(), q.clone(), *tables, gate, bounds, None, q.clone() if kind.gaussian else None)
    call = (kind.refinement, True, packed, True, 6, layout == "content", 0.3, 0.5, 0.0, kind.gaussian)
    torch.library.opcheck(forward_op, (*tensors, *call, False))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # another would compare memory nobody wrote to
    torch.library.opcheck(forward_op, (*tensors, *call, True), test_utils=checks)
    found, outputs = forward_op(*tensors, *call, True), 1 + kind.gaussian
    douts = [torch.randn_like(out) for out in found[:outputs]]
    torch.library.opcheck(backward_op, (douts, found[outputs:], *tensors, *call))


@pytest.mark.parametrize("engine", ["short", "tiled"])
@pytest.mark.parametrize("kind", [Kind("none"), Kind("additive", True)], ids=str)
def test_kernels_are_wellformed_operators(kind: Kind, engine: str, choose: Callable[[str], str]) -> None:
    choose(engine)
    import awrsr_kernels._triton as kernels

    q, w = torch.randn(2, 2, 6, 8, device=DEVICE), torch.randn(1, 1, 6, 4, device=DEVICE)
    tables = (None, None) if kind.refinement == "none" else (w, w.clone())
    gate = torch.ones(1, device=DEVICE) if kind.refinement == "additive" else None
    tensors = (q, q.clone(), q.clone(), *tables, gate, None, None, q.clone() if kind.gaussian else None)
    call = (kind.refinement, True, False, True, 6, False, 0.3, 0.5, 0.0, kind.gaussian)
    torch.library.opcheck(kernels._forward_op, (*tensors, *call, True))
    found, outputs = kernels._forward_op(*tensors, *call, True), 1 + kind.gaussian
    assert len(kernels._forward_op(*tensors, *call, False)) == outputs
    saved = found if len(found) > outputs else []
    assert len(saved) == {"short": 0, "tiled": {"none": 2, "additive": 10}[kind.refinement]}[engine]
    assert max((x.numel() for x in saved), default=0) <= q.numel()  # nothing of the size of L x L
    douts = [torch.randn_like(q) for _ in range(outputs)]
    torch.library.opcheck(kernels._backward_op, (douts, saved, *tensors, *call))


@pytest.mark.parametrize("engine", ["short", "tiled"])
def test_who_watches_operators_sees_them(engine: str, choose: Callable[[str], str]) -> None:
    """In eager mode the dispatcher is passed by; under a dispatch mode each pass is one operator, with the same numbers."""
    (given, _), backend, names = draw(Kind("value"), "plain"), choose(engine), []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(function).split(".default")[0])
            return function(*args, **kwargs or {})

    def results() -> list[Tensor]:
        return gradients(summed(Kind("value"), given, backend=backend), given)

    expected = results()
    with Watching():
        found = results()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    name = "awrsr_kernels.refined_attention"
    assert [x for x in names if x.startswith("awrsr_kernels")] == [name, f"{name}_backward"]


@pytest.mark.parametrize("layout", ["lengths", "packed"])
@pytest.mark.parametrize("kind", OPERATORS[2:], ids=str)
def test_compiled_torch_is_the_eager_one_bit_for_bit(kind: Kind, layout: str) -> None:
    given, bounds = draw(kind, layout)
    options = bounds | {"dropout_p": 0.3, "dropout_seed": 5, "backend": "torch"}
    compiled = torch.compile(lambda given: summed(kind, given, **options), fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(summed(kind, given, **options), given), gradients(compiled(given), given), strict=True):
        if OLD:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [Kind("value"), STOCHASTIC], ids=str)
def test_compiles_into_one_graph_forward_and_backward(engine: str, kind: Kind, choose: Callable[[str], str]) -> None:
    backend = choose(engine)
    given, bounds = draw(kind, "lengths")
    compiled = torch.compile(lambda given: summed(kind, given, **bounds, backend=backend), fullgraph=True, backend="aot_eager")
    expected = gradients(summed(kind, given, **bounds, backend=backend), given)
    for a, b in zip(expected, gradients(compiled(given), given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine,layout,marked", [(*route, route[0] == "tiled") for route in ROUTES] + [("torch", "packed", True)])
def test_any_length_and_batch_is_one_dynamic_graph(engine: str, layout: str, marked: bool, choose: Callable[[str], str]) -> None:
    backend, kind = choose(engine), Kind("simple")
    options = {"max_seqlen": 50} if layout == "packed" else {}
    with_gradient = engine == "torch"

    def function(given: dict[str, Tensor], bounds: dict[str, Tensor]) -> Tensor:
        return summed(kind, given, **bounds, **options, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for extra, length in enumerate(LENGTHS if with_gradient else SHORT):
        given, bounds = draw(kind, layout, length, extra)
        if not with_gradient:
            given = {name: x.detach() for name, x in given.items()}
        if marked:
            for name, x in (given | bounds).items():
                dims = {"packed": () if name[0] == "w" else (0,)}.get(layout, (0,) if x.dim() < 3 else (0, 2))
                torch._dynamo.mark_dynamic(x, dims)
        found = compiled(given, bounds)
        torch.testing.assert_close(found, function(given, bounds), rtol=1e-4, atol=1e-4)
        if with_gradient:
            gradients(found, given)
    assert counters["stats"]["unique_graphs"] == (1 if marked else 2)


def test_a_graph_takes_numbers_that_change() -> None:
    x, w = torch.randn(2, 2, 6, 4, device=DEVICE), torch.randn(6, 3, device=DEVICE)

    def function(p: float, scale: float) -> Tensor:
        return refined_attention(x, x, x, w, w, dropout_p=p, dropout_seed=3, softmax_scale=scale, backend="torch")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for p, scale in ((0.1, 0.2), (0.2, 0.3), (0.3, 0.5)):
        torch.testing.assert_close(compiled(p, scale), function(p, scale))


class Block(nn.Module):
    """A transformer block on refined attention."""

    def __init__(self, backend: str = "torch", dropout_p: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out, self.norm = nn.Linear(16, 48), nn.Linear(16, 16), nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.w_q, self.w_k = nn.Parameter(torch.randn(2, 40, 6)), nn.Parameter(torch.randn(2, 40, 6))
        self.backend, self.dropout_p = backend, dropout_p

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        w_q, w_k = self.w_q[:, -x.shape[1] :], self.w_k[:, -x.shape[1] :]
        options: dict[str, Any] = {"lengths": lengths, "dropout_p": self.dropout_p, "backend": self.backend}
        x = x + self.out(refined_attention(q, k, v, w_q, w_k, **options).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def of(block: nn.Module, loss: Tensor) -> list[Tensor]:
    block.zero_grad()
    loss.backward()
    return [x.grad for x in block.parameters() if x.grad is not None]


def test_a_block_compiles_with_inductor() -> None:
    block = Block().to(DEVICE)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for length in (7, 12):
        x, lengths = torch.randn(3, length, 16, device=DEVICE), torch.tensor([length, 0, 4], device=DEVICE)
        for a, b in zip(of(block, block(x, lengths).sum()), of(block, compiled(x, lengths).sum()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


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


class Attention(nn.Module):
    """What is exported: the operator with its tables as parameters."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.tables = nn.ParameterDict({name: nn.Parameter(torch.randn(64, 5)) for name in kind.tables})

    def forward(self, given: dict[str, Tensor], bounds: dict[str, Tensor]) -> tuple[Tensor, ...]:
        rows = 64 if "cu_seqlens" in bounds else given[self.kind.items[0]].shape[2]
        tables = {name: w[64 - rows :] for name, w in self.tables.items()}
        more: dict[str, Any] = {"max_seqlen": 50} if "cu_seqlens" in bounds else {}
        return tuple(self.kind.call(**given, **tables, **bounds, **more, backend="torch").values())

    def draw(self, layout: str, length: int, extra: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        given, bounds = draw(self.kind, layout, length, extra)
        return {name: given[name].detach() for name in self.kind.items}, bounds


def own_nodes(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "awrsr" in str(node.target)]


@pytest.mark.parametrize("layout", ["plain", "lengths", "packed"])
@pytest.mark.parametrize("kind,strict", [(Kind("none"), False), (Kind("value"), False), (Kind("value"), True), (STOCHASTIC, False)])
def test_exports_for_any_batch_and_length(kind: Kind, strict: bool, layout: str) -> None:
    module, dim = Attention(kind).to(DEVICE), torch.export.Dim
    if layout == "packed":
        shapes: Any = {"given": {name: {0: dim("T")} for name in kind.items}, "bounds": {"cu_seqlens": {0: dim("B", min=3)}}}
    else:
        batch, length = dim("B"), dim("L", max=64)
        bounds = {} if layout == "plain" else {"lengths": {0: batch}}
        shapes = {"given": {name: {0: batch, 2: length} for name in kind.items}, "bounds": bounds}
    program = torch.export.export(module, module.draw(layout, 6, 1), dynamic_shapes=shapes, strict=strict)
    assert not own_nodes(program)
    for length, extra in ((9, 0), (23, 4)):
        example = module.draw(layout, length, extra)
        for a, b in zip(module(*example), program.module()(*example), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_fixed_size_exports_in_blocks_of_rows() -> None:
    """As the torch backend computes it: no tensor of the size of L x L."""
    module = Attention(Kind("simple")).to(DEVICE)
    with torch.no_grad():
        program = torch.export.export(module, module.draw("lengths", 60, 1))
    sizes = [node.meta["val"].numel() for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert not own_nodes(program) and len(program.graph.nodes) > 0
    example = module.draw("lengths", 60, 1)
    for a, b in zip(module(*example), program.module()(*example), strict=True):  # gradients are recorded, and there are none
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert not b.requires_grad
    assert max(sizes) < 3 * 4 * 2 * 60 * 60


@pytest.mark.parametrize("kind", [Kind("none"), Kind("simple"), STOCHASTIC], ids=str)
def test_a_program_exported_with_gradients_has_them(kind: Kind) -> None:
    module = Attention(kind).to(DEVICE)
    example = module.draw("lengths", 9, 1)
    for x in example[0].values():
        x.requires_grad_()
    program, found = torch.export.export(module, example).module(), []
    for function in (module, program):
        loss = sum((out.sum() for out in function(*example)), torch.zeros((), device=DEVICE))
        found.append(torch.autograd.grad(loss, [*example[0].values(), *function.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="the package is built for the CPU")
def test_an_aotinductor_package_gives_the_same(tmp_path: Path) -> None:
    module = Attention(Kind("simple"))
    batch, length = torch.export.Dim("B"), torch.export.Dim("L", min=2, max=64)
    shapes = {"given": {name: {0: batch, 2: length} for name in module.kind.items}, "bounds": {"lengths": {0: batch}}}
    with torch.no_grad():
        program = torch.export.export(module, module.draw("lengths", 6, 1), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "attention.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for length_now, extra in ((6, 1), (17, 3)):
        example = module.draw("lengths", length_now, extra)
        for a, b in zip(module(*example), loaded(*example), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


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


def test_one_tensor_may_be_several_arguments_of_a_graph() -> None:
    x, w = torch.randn(9, 2, 8, device=DEVICE, requires_grad=True), torch.randn(9, 2, 5, device=DEVICE, requires_grad=True)

    def function(x: Tensor, w: Tensor) -> Tensor:
        padded = refined_attention(x[None], x[None], x[None], w[None], w[None], backend="torch")
        return padded.sum() + refined_attention_varlen(x, x, x, w, w, cumulative([4, 5]), 5, backend="torch").square().sum()

    y = torch.randn(1, 2, 9, 8, device=DEVICE, requires_grad=True)
    compiled = torch.compile(lambda y: refined_attention(y, y, y, None, None, refinement="none", backend="torch"), fullgraph=True)
    torch.testing.assert_close(compiled(y), refined_attention(y, y, y, None, None, refinement="none", backend="torch"))
    found = torch.autograd.grad(torch.compile(function, fullgraph=True, backend="aot_eager")(x, w), (x, w))
    for a, b in zip(torch.autograd.grad(function(x, w), (x, w)), found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_graph_takes_lengths_that_change() -> None:
    compiled = torch.compile(lambda given, bounds: summed(Kind("simple"), given, **bounds, backend="torch"), fullgraph=True)
    given, _ = draw(Kind("simple"), "lengths", 9, 1)
    for lengths in ([9, 2, 4], [9, 2, 4], [0, 9, 1], [9, 2, 4]):
        bounds = {"lengths": torch.tensor(lengths, device=DEVICE)}
        expected = gradients(summed(Kind("simple"), given, **bounds, backend="torch"), given)
        for a, b in zip(expected, gradients(compiled(given, bounds), given), strict=True):
            torch.testing.assert_close(a, b)
