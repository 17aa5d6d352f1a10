"""Calls and modules that tests put into PyTorch's machinery: arguments, losses, a transformer block."""

from typing import Any

import torch
from torch import Tensor, nn

from awrsr_kernels import refined_attention

from ..conftest import DEVICE, cumulative
from .problems import Kind

STOCHASTIC = Kind("stochastic", True)


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


OPERATORS = [Kind("none"), Kind("simple"), Kind("value"), Kind("additive"), Kind("additive", True), STOCHASTIC]


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
