"""Two gloo processes on the CPU: DDP and FSDP2 get the gradients that one process gets from the whole batch."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map
from torch.nn.parallel import DistributedDataParallel

from awrsr_kernels import refined_attention

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
MAPPED = {"entries": 0, "heads": 1}
SECONDS = 240  # after which two processes that wait for each other are ended


class Tables(nn.Module):
    """Refined attention of a head, its tables by position as parameters: a unit that FSDP2 shards on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w_q, self.w_k = nn.Parameter(torch.randn(2, 6, 4)), nn.Parameter(torch.randn(2, 6, 4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return refined_attention(q, k, v, self.w_q, self.w_k, refinement="value", lengths=lengths, backend="torch")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.attention, self.out = nn.Linear(8, 24), Tables(), nn.Linear(8, 8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.attention(q, k, v, lengths).transpose(1, 2).flatten(2))


def whole_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 6, 8, generator=generator), torch.tensor([6, 3, 0, 5])


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def gradients(of: nn.Module, x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    of(x, lengths).float().square().mean().backward()
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): x.grad for name, x in of.named_parameters() if x.grad is not None
    }


def distributed_data(compiled: bool) -> nn.Module:
    wrapped = DistributedDataParallel(model())
    return torch.compile(wrapped, backend="aot_eager") if compiled else wrapped


def sharded(half: bool) -> nn.Module:
    """half: what multiplies is bfloat16, the tables stay float32, which the operator takes beside it."""
    found, mesh = model(), init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    fully_shard(found.attention, mesh=mesh)
    fully_shard(found, mesh=mesh, mp_policy=policy)
    return found


WRAPPERS: dict[str, Callable[[], nn.Module]] = {
    "ddp": lambda: distributed_data(False),
    "ddp compiled": lambda: distributed_data(True),
    "fsdp": lambda: sharded(False),
    "fsdp half": lambda: sharded(True),
}


def mapped(dim: int) -> dict[str, Tensor]:
    """Gradients of DTensors that are sharded by entries (0) or heads (1), through the call that docs/pytorch.md shows."""
    mesh, items, tables = init_device_mesh("cpu", (2,)), [Shard(dim)], [Replicate()]
    attention = local_map(
        refined_attention, out_placements=items, in_placements=(items, items, items, tables, tables),
        in_grad_placements=(items, items, items, [Partial()], [Partial()]), device_mesh=mesh,
    )  # fmt: skip
    leaves = [distribute_tensor(x, mesh, [Shard(dim)] if x.dim() == 4 else tables).requires_grad_() for x in tensors()]
    attention(*leaves).square().sum().backward()
    return {str(i): x.grad for i, x in enumerate(leaves) if x.grad is not None}


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for shape in [(4, 2, 6, 8)] * 3 + [(6, 5)] * 2]


def work(rank: int, port: int, folder: str) -> None:
    """One of the two processes: its half of the batch through every wrapper; the first one writes the gradients."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    x, lengths = (each.chunk(2)[rank] for each in whole_batch())
    found = {}
    for name, wrap in WRAPPERS.items():
        grads = gradients(wrap(), x, lengths)
        found[name] = {key: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for key, grad in grads.items()}
    for name, dim in MAPPED.items():
        found[name] = {key: grad.full_tensor() for key, grad in mapped(dim).items()}  # type: ignore[attr-defined]
    if rank == 0:
        torch.save(found, Path(folder) / "gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.spawn(work, (port, str(folder)), nprocs=2, join=False)
    end = time.monotonic() + SECONDS
    while not context.join(1):  # which raises what one of them raised
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"not done after {SECONDS} seconds")
    loaded: dict[str, dict[str, Tensor]] = torch.load(folder / "gradients.pt")
    return loaded


@pytest.mark.parametrize("name", MAPPED)
def test_sharded_tensors_are_mapped_over(name: str, found: dict[str, dict[str, Tensor]]) -> None:
    leaves = [x.requires_grad_() for x in tensors()]
    refined_attention(*leaves).square().sum().backward()
    for i, x in enumerate(leaves):
        torch.testing.assert_close(found[name][str(i)], x.grad)


def test_sharded_tensors_are_refused_with_advice() -> None:
    class DTensor(Tensor):
        pass

    x, w = torch.randn(2, 2, 6, 8), torch.randn(6, 4)
    for name in ("q", "v", "w_q", "lengths", "gate"):
        given: dict[str, Any] = {"q": x, "k": x, "v": x, "w_q": w, "w_k": w, "lengths": torch.tensor([3, 6]), "gate": torch.ones(2)}
        given[name] = given[name].as_subclass(DTensor)
        with pytest.raises(TypeError, match=f"^{name} is a DTensor; it must be a torch.Tensor: map the call .*local_map"):
            refined_attention(**given, refinement="additive", backend="torch")


@pytest.mark.parametrize("name", WRAPPERS)
def test_gradients_are_those_of_the_whole_batch(name: str, found: dict[str, dict[str, Tensor]]) -> None:
    expected, tolerance = gradients(model(), *whole_batch()), 5e-2 if "half" in name else 1e-5
    assert set(found[name]) == set(expected)
    for key, grad in expected.items():
        assert found[name][key].dtype == torch.float32
        torch.testing.assert_close(found[name][key], grad, rtol=tolerance, atol=tolerance * float(grad.abs().max()))
