"""The providers: each computes the same problem with its own best call.

textbook           as in a paper's code: L x L matrices, masked_fill, softmax (it also computes the padded rows)
textbook+compile   the same through torch.compile
reference          ours, backend="reference": the definition
sdpa2              two stock attention calls with concatenated values, by the kernel that torch chooses
sdpa2-split        the same with one call per value block, each as wide as the queries: flash kernels, which want equal
                   widths, then take it, where the concatenated form falls back to a slower kernel (on a CPU to L x L matrices)
sdpa2-flash, sdpa2-split-cudnn  sdpa2-split by this kernel alone, and sdpa2-efficient, sdpa2-cudnn, sdpa2-math sdpa2 by this kernel
                   alone (`common/stock.py`); a CPU has flash and math
sdpa2+compile      sdpa2 through torch.compile
flex2              sdpa2 in FlexAttention, compiled; needs a GPU
flex2-flash        sdpa2-split in FlexAttention by its FLASH backend; needs a GPU, half precision, and torch and flash-attn-4 as
                   new as that backend
varlen2            sdpa2-split in torch's varlen_attn, the packed rival; needs a GPU, half precision, torch as new as that call
lagged2            for lagged attention alone (`lagged.py`): attention calls that return their log-sum-exps, with rows of earlier
                   positions side by side; by the CPU's flash call, on a GPU by FlexAttention, compiled
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
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_type_hints

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
from ..common.stock import FORMS, Attend, Form, Tensors, by_stock, stock, two_calls
from ..common.stosa import stosa
from .lagged import lagged_calls, textbook_lagged
from .wasserstein import FlashCpu, squares, tensors_of
from .workloads import DOT, LAGGED, STOCHASTIC, Batch, Outputs


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


def lacks_flash_flex(_: Batch | None = None) -> bool:
    """Whether this torch's FlexAttention has no BACKEND="FLASH" (torch 2.11 and later have it)."""
    try:
        from torch.nn.attention.flex_attention import FlexKernelOptions
    except ImportError:
        return True
    return "FLASH" not in str(get_type_hints(FlexKernelOptions).get("BACKEND"))


def lacks_flash_attn(_: Batch | None = None) -> bool:
    """Whether the package is missing whose kernels that backend calls."""
    return importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None


Limit = tuple[Callable[[Batch], object], str]  # which batches a provider cannot compute, and why
NOT_PACKED: Limit = (lambda b: b.packed, "this call takes no packed batches")
ONLY_PACKED: Limit = (lambda b: not b.packed, "for packed batches only (--lengths)")
NEEDS_GPU: Limit = (lambda b: not b.q.is_cuda, "needs a GPU")
NEEDS_CPU: Limit = (lambda b: b.q.is_cuda, "is made of the CPU's flash call (flex2-squares is the same on a GPU)")
NOT_ON_CPU: Limit = (lambda b: not b.q.is_cuda, "needs a GPU: on a CPU stock attention has flash and math only")
FLEX_HAS_FLASH: Limit = (lacks_flash_flex, "this torch's FlexAttention has no BACKEND=\"FLASH\"; torch 2.11 has it")
FLASH_ATTN: Limit = (lacks_flash_attn, "needs flash_attn.cute, from the package flash-attn-4, which is not installed")
HALF: Limit = (lambda b: b.q.dtype not in (torch.bfloat16, torch.float16), "takes bfloat16 and float16 only")
NO_DROPOUT: Limit = (lambda b: b.dropout_p, "this call has no dropout")
ONE_MASK: Limit = (
    lambda b: b.dropout_p and b.refinement == "additive",
    "two attention calls draw two masks; dropout of the sum P + gate R needs one",
)
OWN_MASKS: Limit = (lambda b: b.dropout_p, "attention calls draw a mask each; squared weights need that of the weights")
NOT_LAGGED: Limit = (lambda b: b.refinement == LAGGED, "cannot shift weights: it returns no log-sum-exps; lagged2 does")
ONLY_LAGGED: Limit = (lambda b: b.refinement != LAGGED, "for lagged attention only")
OF_SQUARES = OWN_MASKS, NOT_PACKED
OF_STOCK = ONE_MASK, NOT_PACKED, NOT_LAGGED
OF_VARLEN = NEEDS_GPU, NO_DROPOUT, ONLY_PACKED, NOT_LAGGED
OF_FLEX = NEEDS_GPU, NO_DROPOUT, NOT_PACKED, NOT_LAGGED


def ours(batch: Batch, backend: str, jagged: bool = False) -> Outputs:
    """The public call."""
    options: dict[str, Any] = {"refinement": batch.refinement, "dropout_p": batch.dropout_p, "dropout_seed": batch.dropout_seed}
    if batch.refinement in ("additive", LAGGED):
        options["gate"] = batch.gate
    if batch.refinement == LAGGED:
        options |= {"refinement": "additive", "lags": batch.lags, "shift": True, "plain_heads": batch.plain_heads}
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


def _textbook(batch: Batch, prepare: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda f: f) -> Tensor:
    tensors = batch.q, batch.k, batch.v, batch.w_q, batch.w_k, batch.gate
    if batch.refinement == LAGGED:
        return prepare(textbook_lagged)(*tensors, batch.lags, batch.plain_heads, batch.dropout_p)
    return prepare(textbook)(*tensors, batch.refinement, batch.dropout_p)


def _lagged(batch: Batch) -> Tensor:
    return lagged_calls(batch, flex_lse if batch.q.is_cuda else FlashCpu.apply)


def _stosa(batch: Batch, function: Callable[..., Outputs] = stosa) -> Outputs:
    return function(*tensors_of(batch), batch.gate, batch.refinement, batch.dropout_p)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = 64  # a shape per bucket
    return torch.compile(function, dynamic=False, fullgraph=True)  # without fullgraph it would quietly run eagerly beyond the limit


@functools.cache
def _causal_blocks(length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=device)


def _flex_tools(length: int, device: torch.device) -> tuple[Callable[..., Any], Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return _compiled(flex_attention), _causal_blocks(length, device)


FLEX_WIDTH = 16  # features that FlexAttention's kernels need at least


def flex(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0, **options: Any) -> Tensor:
    """FlexAttention at every shape: too few features are padded with zeros. options: its `kernel_options`."""
    attention, mask = _flex_tools(q.shape[2], q.device)
    width = v.shape[-1]
    q, k, v = (F.pad(x, (0, FLEX_WIDTH - x.shape[-1])) if x.shape[-1] < FLEX_WIDTH else x for x in (q, k, v))
    out = attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options or None)
    return out[..., :width]


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


def two_stage(batch: Batch, attend: Attend = stock, split: bool = False) -> Tensor:
    return two_calls(*_tensors(batch), batch.refinement, batch.dropout_p, attend=attend, split=split)


def _by_stock(batch: Batch, form: Form) -> Tensor:
    return by_stock(form, _tensors(batch), batch.refinement, batch.dropout_p)


def _sdpa2_compiled(batch: Batch) -> Tensor:
    out: Tensor = _compiled(two_calls)(*_tensors(batch), batch.refinement, batch.dropout_p)
    return out


def _tensors(batch: Batch) -> Tensors:
    """The first arguments of `two_calls`: packed rows get the tables' rows of their places."""
    w_q, w_k = batch.w_q, batch.w_k
    if batch.packed and batch.refinement != "none":
        w_q, w_k = (w[batch.positions][:, None] for w in (w_q, w_k))
    return batch.q, batch.k, batch.v, w_q, w_k, batch.gate


def _of_form(name: str, form: Form) -> Provider:
    """The provider of one of stock attention's forms. Math computes in float32; on a CPU the joined form mostly runs as that."""
    squares = (9, 12) if form.kernel == "MATH" else (0, 0) if form.split else (6, 0)
    limits = OF_STOCK if form.on_cpu else (NOT_ON_CPU, *OF_STOCK)
    return Provider(name, "rival", functools.partial(_by_stock, form=form), limits, squares)


BOTH = DOT, STOCHASTIC
GAUSSIAN = (STOCHASTIC,)
OURS = {backend: functools.partial(ours, backend=backend) for backend in ("reference", "torch", "triton")}
FLASH_FLEX = functools.partial(two_stage, attend=functools.partial(flex, BACKEND="FLASH"), split=True)
JAGGED = {backend: functools.partial(call, jagged=True) for backend, call in OURS.items()}
PROVIDERS = {
    p.name: p
    for p in (
        Provider("textbook", "rival", _textbook, (NOT_PACKED,), squares=(10, 10)),
        Provider("textbook+compile", "rival", lambda b: _textbook(b, _compiled), (NOT_PACKED,), squares=(8, 8)),
        *(_of_form(name, form) for name, form in FORMS.items()),
        Provider("sdpa2+compile", "rival", _sdpa2_compiled, OF_STOCK, (6, 0)),
        Provider("flex2", "rival", functools.partial(two_stage, attend=flex), OF_FLEX),
        Provider("flex2-flash", "rival", FLASH_FLEX, (*OF_FLEX, HALF, FLEX_HAS_FLASH, FLASH_ATTN)),
        Provider("varlen2", "rival", lambda b: two_stage(b, varlen(b), split=True), OF_VARLEN),
        Provider("lagged2", "rival", _lagged, (ONLY_LAGGED, NOT_PACKED, OWN_MASKS)),
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
