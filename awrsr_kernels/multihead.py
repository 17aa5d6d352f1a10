"""`RefinedMultiheadAttention` in place of torch.nn.MultiheadAttention: its weights taken over, and the arguments of its call.

B batch, L positions, E embed_dim, H heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .torch_state import readable

PARAMETERS = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}


class TorchNames:
    """What torch's encoder layers ask of their `self_attn` before they call it."""

    qkv: nn.Linear
    out: nn.Linear
    batch_first = True  # also of modules that were pickled before there was a choice
    _qkv_same_embed_dim = True
    in_proj_bias = None  # so that they do not compute the attention themselves

    @property
    def in_proj_weight(self) -> Tensor:
        """(E + 2 H_kv D, E): qkv.weight."""
        return self.qkv.weight

    @property
    def out_proj(self) -> nn.Module:
        """The last linear map."""
        return self.out


def check_replaceable(mha: Any) -> None:
    """Refuse what computes anything but torch's self-attention from its four parameters.

    Raises:
        TypeError: mha is not a torch.nn.MultiheadAttention. ValueError: it has a feature that would be lost; the message names it.
    """
    if not isinstance(mha, nn.MultiheadAttention):
        checks.refuse("mha", type(mha).__name__, "a torch.nn.MultiheadAttention", TypeError)
    kind, must = type(mha), "without it: this module computes self-attention only"
    own = {"kdim and vdim": mha._qkv_same_embed_dim, "bias_k": mha.bias_k is None, "bias_v": mha.bias_v is None}
    for name, fits in (own | {"add_zero_attn": not mha.add_zero_attn}).items():
        if not fits:
            checks.refuse("mha", f"with {name}", must)
    torchs = all(getattr(kind, name) is getattr(nn.MultiheadAttention, name) for name in ("forward", "__call__"))
    if not torchs or "forward" in vars(mha):
        must = "a torch.nn.MultiheadAttention with torch's own forward, as weights alone do not carry another one over"
        checks.refuse("mha", f"{kind.__name__}, with a forward of its own", must)
    for module, name in ((mha, "mha"), (mha.out_proj, "mha.out_proj")):
        if module._forward_hooks or module._forward_pre_hooks:
            must = "without them, as they would be lost: remove them (pruning: prune.remove), and register them on the new module"
            checks.refuse(name, "with forward hooks", must)
    weights: list[Any] = [mha.in_proj_weight, getattr(mha.out_proj, "weight", None)]
    if not all(isinstance(x, Tensor) and x.is_floating_point() and x.dtype == weights[0].dtype for x in weights):
        checks.refuse("mha", "with weights that are quantized, no tensors or of two dtypes", "one with floating-point weights")
    names = {name.replace("parametrizations.", "").rpartition(".original")[0] or name for name, _ in mha.named_parameters()}
    if strange := sorted(names - PARAMETERS):
        checks.refuse("mha", f"with the parameter {strange[0]}", f"with no others than {', '.join(sorted(PARAMETERS))}")


def copy_weights(mha: nn.MultiheadAttention, qkv: nn.Linear, out: nn.Linear) -> None:
    """Copy the weights into linear maps; a bias that only one of them has in `mha` is zero in the other and stays so."""
    pairs = [(qkv.weight, mha.in_proj_weight), (out.weight, mha.out_proj.weight)]
    pairs += [(qkv.bias, mha.in_proj_bias), (out.bias, mha.out_proj.bias)]
    for mine, its in pairs:
        if its is not None:
            mine.requires_grad_(its.requires_grad).data.copy_(its.detach())
        elif mine is not None:
            mine.requires_grad_(False).data.zero_()


def check_self_attention(query: Any, key: Any, value: Any) -> None:
    """Queries, keys and values are one tensor, as `module(x, x, x)` passes it."""
    for name, x in (("key", key), ("value", value)):
        if not _is_same(x, query):
            was = "None" if x is None else "another tensor than query"
            checks.refuse(name, was, "query itself: this module computes self-attention only, as in module(x, x, x)")


def _is_same(x: Any, query: Any) -> bool:
    """Whether both are one tensor, or one view made twice; a detached one is another, as gradients would differ."""
    if x is query or torch.compiler.is_compiling() or not isinstance(x, Tensor) or not isinstance(query, Tensor):
        return x is query
    return x.requires_grad == query.requires_grad and not x.is_nested and not query.is_nested and x.is_set_to(query)


def check_visibility(attn_mask: Tensor | None, is_causal: bool | None, causal: bool, heads: int, x: Tensor) -> None:
    """The mask of a call lets positions see what this module's positions see.

    attn_mask: (L, L), or one per entry and head, (B H, L, L); bool, True where hidden, or floats, -inf where hidden, otherwise 0.
    x: (B, L, E).
    """
    way = "sees earlier positions only (causal=True)" if causal else "sees all positions (causal=False)"
    if is_causal is not None and checks.flag("is_causal", is_causal):
        if not causal:
            checks.refuse("is_causal", "True", f"False for this module, which {way}")
    elif attn_mask is None and causal:
        must = f"the causal mask, or is_causal must be True, since this module {way}"
        checks.refuse("attn_mask", "None", must)
    if attn_mask is None:
        return
    batch, size, _ = x.shape
    if not isinstance(attn_mask, Tensor):
        checks.refuse("attn_mask", type(attn_mask).__name__, "a tensor", TypeError)
    if tuple(attn_mask.shape) not in ((size, size), (batch * heads, size, size)):
        must = f"(L, L) or (B H, L, L) with L = {size}, B H = {batch * heads}"
        checks.refuse("attn_mask", f"of shape {tuple(attn_mask.shape)}", must)
    if is_causal:
        return  # a hint, which torch believes as well
    must = f"the causal mask: this module {way}" if causal else f"None, or hide nothing: this module {way}"
    if not readable(attn_mask):
        must = f"{must}; if it is the causal one, say is_causal=True"
        checks.refuse("attn_mask", f"on {attn_mask.device}, or compiled, where it is not read", must)
    hidden = attn_mask if attn_mask.dtype == torch.bool else attn_mask <= _lowest(attn_mask)
    only_hides = attn_mask.dtype == torch.bool or bool((hidden | (attn_mask == 0)).all())
    wanted = torch.ones(size, size, dtype=torch.bool).triu(1) if causal else torch.zeros(size, size, dtype=torch.bool)
    if not only_hides or not bool((hidden == wanted).all()):
        checks.refuse("attn_mask", "another mask", must)


def padding(key_padding_mask: Tensor | None) -> Tensor | None:
    """A bool mask, True at padding, from one of bools or, as torch's layers make it, of floats: -inf at padding, otherwise 0."""
    if not isinstance(key_padding_mask, Tensor) or not key_padding_mask.is_floating_point():
        return key_padding_mask
    hidden = key_padding_mask <= _lowest(key_padding_mask)
    if readable(hidden) and not bool((hidden | (key_padding_mask == 0)).all()):
        checks.refuse("key_padding_mask", "with other numbers than 0 and -inf", "0 at items and -inf at padding, or a bool tensor")
    return hidden


def _lowest(mask: Tensor) -> float:
    """What hides as -inf does: the lowest number of a mask's dtype, which some libraries write instead."""
    if not mask.is_floating_point():
        checks.refuse("attn_mask", f"of {mask.dtype}", "of bools or floats", TypeError)
    return torch.finfo(mask.dtype).min


def turned_weights(weights: Tensor, turn: Tensor) -> Tensor:
    """(B, H, L, L), rows and columns of entry b from (i + turn[b]) % L."""
    rows = (torch.arange(weights.shape[2], device=weights.device) + turn[:, None]) % weights.shape[2]
    weights = weights.gather(2, rows[:, None, :, None].expand_as(weights))
    return weights.gather(3, rows[:, None, None, :].expand_as(weights))


@contextmanager
def onloaded(module: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Calls that are not `forward`: the hooks by which accelerate offloads a module's own weights run around `forward` alone."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        yield x
        return
    (x,), _ = hook.pre_forward(module, x)
    try:
        yield x
    finally:
        hook.post_forward(module, None)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """(B, L, E), row i of entry b from row (i + turn[b]) % L."""
    rows = (torch.arange(x.shape[1], device=x.device) + turn[:, None]) % x.shape[1]
    return x.gather(1, rows[..., None].expand_as(x))  # take_along_dim would make dynamic sizes static under torch.compile
