"""The operator under torch.compile: well-formed operators, one graph for any length, the numbers of eager mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from awrsr_kernels import refined_attention, refined_attention_varlen
from awrsr_kernels._torch.operator import backward_op, forward_op

from ..conftest import DEVICE, ENGINES, cumulative
from .modules import OPERATORS, STOCHASTIC, Block, draw, gradients, of, summed
from .problems import Kind

pytestmark = pytest.mark.usefixtures("forget")


OLD = torch.__version__ < "2.13"  # its compiled graphs order some sums in another way
LENGTHS, SHORT = (6, 9, 17, 23, 40), (3, 4, 5, 17, 6)  # the latter for the interpreter, which takes its time
ROUTES = [("torch", "plain"), ("torch", "lengths"), ("torch", "packed"), ("short", "packed"), ("tiled", "lengths")]


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
    tensors = (q, q.clone(), q.clone(), *tables, gate, bounds, None, q.clone() if kind.stochastic else None)
    call = (kind.refinement, True, packed, True, 6, layout == "content", 0.3, 0.5, 0.0, kind.stochastic)
    torch.library.opcheck(forward_op, (*tensors, *call, False))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # another would compare memory nobody wrote to
    torch.library.opcheck(forward_op, (*tensors, *call, True), test_utils=checks)
    found, outputs = forward_op(*tensors, *call, True), 1 + kind.stochastic
    douts = [torch.randn_like(out) for out in found[:outputs]]
    torch.library.opcheck(backward_op, (douts, found[outputs:], *tensors, *call))


@pytest.mark.parametrize("engine", ["short", "tiled"])
@pytest.mark.parametrize("kind", [Kind("none"), Kind("additive", True)], ids=str)
def test_kernels_are_wellformed_operators(kind: Kind, engine: str, choose: Callable[[str], str]) -> None:
    choose(engine)
    from awrsr_kernels._triton import autograd

    q, w = torch.randn(2, 2, 6, 8, device=DEVICE), torch.randn(1, 1, 6, 4, device=DEVICE)
    tables = (None, None) if kind.refinement == "none" else (w, w.clone())
    gate = torch.ones(1, device=DEVICE) if kind.refinement == "additive" else None
    tensors = (q, q.clone(), q.clone(), *tables, gate, None, None, q.clone() if kind.stochastic else None)
    call = (kind.refinement, True, False, True, 6, False, 0.3, 0.5, 0.0, kind.stochastic)
    torch.library.opcheck(autograd.forward_op, (*tensors, *call, True))
    found, outputs = autograd.forward_op(*tensors, *call, True), 1 + kind.stochastic
    assert len(autograd.forward_op(*tensors, *call, False)) == outputs
    saved = found if len(found) > outputs else []
    assert len(saved) == {"short": 0, "tiled": {"none": 2, "additive": 10}[kind.refinement]}[engine]
    assert max((x.numel() for x in saved), default=0) <= q.numel()  # nothing of the size of L x L
    douts = [torch.randn_like(q) for _ in range(outputs)]
    torch.library.opcheck(autograd.backward_op, (douts, saved, *tensors, *call))


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


def test_a_block_compiles_with_inductor() -> None:
    block = Block().to(DEVICE)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for length in (7, 12):
        x, lengths = torch.randn(3, length, 16, device=DEVICE), torch.tensor([length, 0, 4], device=DEVICE)
        for a, b in zip(of(block, block(x, lengths).sum()), of(block, compiled(x, lengths).sum()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


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
