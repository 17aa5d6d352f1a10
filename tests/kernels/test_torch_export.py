"""The operator in exported programs: torch.export for any size, with and without gradients, and an AOTInductor package."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..conftest import DEVICE
from .modules import STOCHASTIC, draw
from .problems import Kind

pytestmark = pytest.mark.usefixtures("forget")



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
