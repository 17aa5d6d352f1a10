"""The providers: each computes the same problem with its own best call.

textbook           as in a paper's code: L x L matrices, masked_fill, softmax (it also computes the padded rows)
textbook+compile   the same through torch.compile
reference          ours, backend="reference": the definition
sdpa2              two stock attention calls with concatenated values
sdpa2-split        the same with one call per value block, each as wide as the queries: flash kernels, which want equal
                   widths, then take it, where the concatenated form falls back to a slower kernel (on a CPU to L x L matrices)
flex2              sdpa2 in FlexAttention, compiled; needs a GPU
varlen2            sdpa2-split in torch's varlen_attn, the packed rival; needs a GPU, half precision, torch as new as that call
sdpa               plain attention: the least that any of these could cost; another result, so not counted as a rival
torch, triton      ours
torch-jagged, triton-jagged  the same packed rows as jagged tensors of torch.nested, made and taken apart in each call

Between Gaussians (`wasserstein.py`), in addition to ours and to plain attention, which there is that of the means:

stosa              STOSA's own formulation (`common/stosa.py`) and the refinements on top of it: L x L matrices
stosa+compile      the same through torch.compile
sdpa2-squares      stock attention calls, with features that make distances of dot products and log-sum-exps that make squares of
                   weights: O(L) memory; the CPU's flash call
flex2-squares      the same in FlexAttention, compiled; needs a GPU

Padding is on the side that is best for rivals: on the right, where is_causal alone gives correct rows of items.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

from awrsr_kernels import (
    refined_attention,
    refined_attention_varlen,
    stochastic_refined_attention,
    stochastic_refined_attention_varlen,
)

from ..common.pages import ROLES
from ..common.stosa import stosa
from .wasserstein import FlashCpu, squares, tensors_of
from .workloads import DOT, STOCHASTIC, Batch, Outputs

Attend = Callable[..., Tensor]  # (q, k, v, scale, dropout_p) -> out, causal


@dataclass(frozen=True)
class Provider:
    """`role` is ours, rival or floor; `squares`: about how many L x L matrices exist at a time, (on a CPU, on a GPU)."""

    name: str
    role: str
    call: Callable[[Batch], Outputs]
    limits: tuple["Limit", ...] = ()
    squares: tuple[int, int] = (0, 0)
    backbones: tuple[str, ...] = (DOT,)

    def view(self, batch: Batch) -> Batch:
        """The batch as this provider computes it."""
        return batch.plain if self.role == "floor" else batch

    def refusal(self, batch: Batch) -> str | None:
        """Why this provider cannot compute a batch; None if it can."""
        return next((reason for applies, reason in self.limits if applies(batch)), None)


Limit = tuple[Callable[[Batch], object], str]  # which batches a provider cannot compute, and why
NOT_PACKED: Limit = (lambda b: b.packed, "this call takes no packed batches")
ONLY_PACKED: Limit = (lambda b: not b.packed, "for packed batches only (--lengths)")
NEEDS_GPU: Limit = (lambda b: not b.q.is_cuda, "needs a GPU")
NEEDS_CPU: Limit = (lambda b: b.q.is_cuda, "is made of the CPU's flash call (flex2-squares is the same on a GPU)")
NO_DROPOUT: Limit = (lambda b: b.dropout_p, "this call has no dropout")
ONE_MASK: Limit = (
    lambda b: b.dropout_p and b.refinement == "additive",
    "two attention calls draw two masks; dropout of the sum P + gate R needs one",
)
OWN_MASKS: Limit = (lambda b: b.dropout_p, "attention calls draw a mask each; squared weights need that of the weights")
OF_SQUARES = OWN_MASKS, NOT_PACKED


def ours(batch: Batch, backend: str, jagged: bool = False) -> Outputs:
    """The public call."""
    options: dict[str, Any] = {"refinement": batch.refinement, "dropout_p": batch.dropout_p, "dropout_seed": batch.dropout_seed}
    if batch.refinement == "additive":
        options["gate"] = batch.gate
    tensors: tuple[Any, ...] = batch.q, batch.k, batch.v, batch.w_q, batch.w_k
    padded: Callable[..., Outputs] = refined_attention
    packed: Callable[..., Outputs] = refined_attention_varlen
    if batch.stochastic:
        covs = (batch.w_q_cov, batch.w_k_cov) if batch.refinement == "stochastic" else (None, None)
        tensors = *tensors_of(batch)[0], batch.w_q, batch.w_k, *covs
        padded, packed = stochastic_refined_attention, stochastic_refined_attention_varlen
    if jagged:
        offsets = batch.bounds
        rows = (x if x is None or x.dim() < 3 else nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in tensors)
        outs = padded(*rows, padding_side="right", backend=backend, **options)
        outputs = tuple(x.values().transpose(0, 1) for x in (outs if isinstance(outs, tuple) else (outs,)))
        return outputs if batch.stochastic else outputs[0]
    if batch.packed:
        return packed(*tensors, batch.bounds, batch.max_len, align="left", backend=backend, **options)
    return padded(*tensors, lengths=batch.bounds, padding_side="right", backend=backend, **options)


def textbook(q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, gate: Tensor, refinement: str, dropout_p: float) -> Tensor:
    """The equations line by line."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    first = scores.masked_fill(future, -torch.inf).softmax(-1)
    if refinement == "none":
        return F.dropout(first, dropout_p) @ v
    scores = (first @ w_q) @ (first @ w_k).transpose(-1, -2) * w_q.shape[-1] ** -0.5
    higher = scores.masked_fill(future, -torch.inf).softmax(-1)
    if refinement == "simple":
        return F.dropout(higher, dropout_p) @ v
    if refinement == "value":
        return F.dropout(higher, dropout_p) @ (first @ v)
    return F.dropout(first + gate[:, None, None] * higher, dropout_p) @ v


def _textbook(batch: Batch, function: Callable[..., Tensor] = textbook) -> Tensor:
    tensors = batch.q, batch.k, batch.v, batch.w_q, batch.w_k, batch.gate
    return function(*tensors, batch.refinement, batch.dropout_p)


def _stosa(batch: Batch, function: Callable[..., Outputs] = stosa) -> Outputs:
    return function(*tensors_of(batch), batch.gate, batch.refinement, batch.dropout_p)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = 64  # a shape per bucket; beyond the limit torch would quietly run eagerly
    return torch.compile(function, dynamic=False)


def stock(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, dropout_p=dropout_p, enable_gqa=q.shape[1] != k.shape[1]
    )


@functools.cache
def _flex_tools(length: int, device: torch.device) -> tuple[Callable[..., Tensor], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)
    return torch.compile(flex_attention, dynamic=False), mask


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    attention, mask = _flex_tools(q.shape[2], q.device)
    return attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def flex_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest

    attention, mask = _flex_tools(q.shape[2], q.device)
    out, aux = attention(q, k, v, block_mask=mask, scale=scale, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def varlen(batch: Batch) -> Attend:
    """The packed call of torch, flash-attention's own."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
        where: Any = batch.bounds, batch.bounds, batch.max_len, batch.max_len
        out: Any = varlen_attn(q, k, v, *where, scale=scale, window_size=(-1, 0), enable_gqa=q.shape[1] != k.shape[1])
        return out

    return attend


def _equal_widths(attend: Attend, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0) -> Tensor:
    """Attention with queries, keys and values padded with zeros to one width, if they are not of one width already."""
    missing = v.shape[-1] - q.shape[-1]
    if missing > 0:
        q, k = F.pad(q, (0, missing)), F.pad(k, (0, missing))
    return attend(q, k, F.pad(v, (0, -missing)) if missing < 0 else v, scale, dropout_p)[..., : v.shape[-1]]


def two_stage(batch: Batch, attend: Attend = stock, split: bool = False) -> Tensor:
    """P [W_q | W_k | V] in one attention, R V or R (P V) in the next; tables are expanded over batch and heads, not copied."""
    q, k, v, tables = batch.q, batch.k, batch.v, [batch.w_q, batch.w_k]
    scale, group, rank = q.shape[-1] ** -0.5, q.shape[1] // k.shape[1], batch.w_q.shape[-1]
    if split:
        attend = functools.partial(_equal_widths, attend)
    if batch.refinement == "none":
        return attend(q, k, v, scale, batch.dropout_p)
    if not split:
        tables = [torch.cat(tables, -1)]
    if batch.packed:
        tables = [w[batch.positions][:, None] for w in tables]
    values = [w.expand(*k.shape[:-1], w.shape[-1]) for w in tables] + ([] if batch.refinement == "simple" else [v])
    if split:
        parts = [attend(q, k, x, scale) for x in values]
    else:
        joint = attend(q, k, values[0] if len(values) == 1 else torch.cat(values, -1), scale)
        parts = list(joint.split([rank, rank, *(x.shape[-1] for x in values[1:])], -1))
    second = parts[2] if batch.refinement == "value" else v if group == 1 else v.repeat_interleave(group, 1)
    out = attend(parts[0], parts[1], second, rank**-0.5, batch.dropout_p)
    return out if batch.refinement != "additive" else parts[2] + batch.gate.view(-1, *[1] * (q.dim() - 2)) * out


BOTH = DOT, STOCHASTIC
GAUSSIAN = (STOCHASTIC,)
OURS = {backend: functools.partial(ours, backend=backend) for backend in ("reference", "torch", "triton")}
JAGGED = {backend: functools.partial(call, jagged=True) for backend, call in OURS.items()}
PROVIDERS = {
    p.name: p
    for p in (
        Provider("textbook", "rival", _textbook, (NOT_PACKED,), squares=(10, 10)),
        Provider("textbook+compile", "rival", lambda b: _textbook(b, _compiled(textbook)), (NOT_PACKED,), squares=(8, 8)),
        Provider("sdpa2", "rival", two_stage, (ONE_MASK, NOT_PACKED), squares=(6, 0)),
        Provider("sdpa2-split", "rival", functools.partial(two_stage, split=True), (ONE_MASK, NOT_PACKED)),
        Provider("flex2", "rival", functools.partial(two_stage, attend=flex), (NEEDS_GPU, NO_DROPOUT, NOT_PACKED)),
        Provider("varlen2", "rival", lambda b: two_stage(b, varlen(b), split=True), (NEEDS_GPU, NO_DROPOUT, ONLY_PACKED)),
        Provider("sdpa", "floor", two_stage, (NOT_PACKED,), backbones=BOTH),
        Provider("reference", "ours", OURS["reference"], squares=(13, 13), backbones=BOTH),
        Provider("torch", "ours", OURS["torch"], backbones=BOTH),
        Provider("triton", "ours", OURS["triton"], (NEEDS_GPU,), backbones=BOTH),
        Provider("torch-jagged", "ours", JAGGED["torch"], (ONLY_PACKED,), backbones=BOTH),
        Provider("triton-jagged", "ours", JAGGED["triton"], (NEEDS_GPU, ONLY_PACKED), backbones=BOTH),
        Provider("stosa", "rival", _stosa, (NOT_PACKED,), (16, 16), GAUSSIAN),
        Provider("stosa+compile", "rival", lambda b: _stosa(b, _compiled(stosa)), (NOT_PACKED,), (12, 12), GAUSSIAN),
        Provider("sdpa2-squares", "rival", lambda b: squares(b, FlashCpu.apply), (NEEDS_CPU, *OF_SQUARES), (0, 0), GAUSSIAN),
        Provider("flex2-squares", "rival", lambda b: squares(b, flex_lse), (NEEDS_GPU, *OF_SQUARES), (0, 0), GAUSSIAN),
    )
}


def side_by_side(backbone: str | None = None) -> list[Provider]:
    """Providers of a backbone, or all of them, rivals first."""
    chosen = [p for p in PROVIDERS.values() if backbone is None or backbone in p.backbones]
    return sorted(chosen, key=lambda p: ROLES.index(p.role))
