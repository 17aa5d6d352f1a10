"""Argument checks of the public call. Every message names the argument, what it was and what it must be.

Shapes, dtypes, devices and Python numbers are checked always. The values inside `lengths` and `cu_seqlens` are checked where
that is free: on the CPU, outside torch.compile and torch.func.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .torch_state import autocast, batched, readable, transformed
from .values import divisor, flag, number, plain, probability, refuse, scale, whole

__all__ = ["divisor", "flag", "number", "probability", "refuse", "scale", "whole"]  # callers find all checks here

Names = tuple[str, str, str]  # of queries, keys and values
Tables = tuple[Tensor | None, Tensor | None, bool]  # and whether each entry, or packed item, has its own
REFINEMENTS = ("none", "simple", "value", "additive")
STOCHASTIC_ATTENTION_REFINEMENTS = (*REFINEMENTS, "stochastic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHIFTED = ("none", "simple", "additive")
MAX_FEATURES = 256
MAX_LAGS = 7
ROWS = "; what decides rows: max_len of RefinedMultiheadAttention, max_positions of a refined transformers model"


def batch(q: Tensor, k: Tensor, v: Tensor, names: Names = ("q", "k", "v")) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a padded batch, under autocast in its dtype; names: what the caller calls them."""
    q, k, v = _query_key_value(q, k, v, "(B, H, L, D)", 4, names)
    for name, x in zip(names[1:], (k, v), strict=True):
        if x.shape[0] != q.shape[0] or x.shape[2] != q.shape[2]:
            refuse(name, _shape(x), f"of {names[0]}'s batch and length: {q.shape[0]} entries of L = {q.shape[2]} positions")
    _heads(q, k, v, names)
    if q.shape[2] < 1:
        refuse(names[0], _shape(q), "at least one position long")
    return q, k, v


def packed(q: Tensor, k: Tensor, v: Tensor, names: Names = ("q", "k", "v")) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a packed batch, under autocast in its dtype; names: what the caller calls them."""
    q, k, v = _query_key_value(q, k, v, "(T, H, D)", 3, names)
    for name, x in zip(names[1:], (k, v), strict=True):
        if x.shape[0] != q.shape[0]:
            refuse(name, _shape(x), f"of {names[0]}'s T = {q.shape[0]} positions")
    _heads(q, k, v, names)
    return q, k, v


def covariance(name: str, cov: Tensor, mean: Tensor) -> Tensor:
    """Diagonal covariances of checked means, under autocast in its dtype."""
    _tensor(name, cov)
    _same_device(name, cov, mean)
    cov, of_mean = autocast(cov), name.replace("cov", "mean")
    if cov.shape != mean.shape:
        refuse(name, _shape(cov), f"of {of_mean}'s shape, {tuple(mean.shape)}")
    if cov.dtype != mean.dtype:
        refuse(name, str(cov.dtype), f"of {of_mean}'s dtype, {mean.dtype}", TypeError)
    return cov


def padded_tables(
    w_q: Tensor | None, w_k: Tensor | None, q: Tensor, refinement: str, names: tuple[str, str] = ("w_q", "w_k")
) -> Tables:
    """W as (1 or B, 1 or H, L, R), and whether it has a table per entry."""
    if refinement == "none":
        return None, None, False
    w_q, w_k = _pair_of_tables(w_q, w_k, q, names)
    entries, heads, length, _ = q.shape
    shapes = {2: (length,), 3: (heads, length), 4: (entries, heads, length)}
    if w_q.dim() not in shapes or tuple(w_q.shape[:-1]) != shapes[w_q.dim()]:
        must = f"(L, R), (H, L, R) or (B, H, L, R) with B = {entries}, H = {heads}, L = {length}"
        if tuple(w_q.shape[:-2]) in ((), (heads,)) and w_q.shape[-2] > length:
            must += (
                f"; of a longer table take the last rows, {names[0]}[..., -{length}:, :], where padding is on the left, the first, "
                f"{names[0]}[..., :{length}, :], where it is on the right; and the same ones of {names[1]}"
            )
        refuse(names[0], _shape(w_q), must)
    per_entry = w_q.dim() == 4
    if not per_entry:
        form = *[1] * (4 - w_q.dim()), *w_q.shape
        w_q, w_k = w_q.view(form), w_k.view(form)
    return w_q, w_k, per_entry


def packed_tables(
    w_q: Tensor | None, w_k: Tensor | None, q: Tensor, refinement: str, names: tuple[str, str] = ("w_q", "w_k")
) -> Tables:
    """W as (1, 1 or H, N or T, R), and whether its rows are the items' own."""
    if refinement == "none":
        return None, None, False
    w_q, w_k = _pair_of_tables(w_q, w_k, q, names)
    total, heads, _ = q.shape
    if w_q.dim() == 3 and tuple(w_q.shape[:2]) == (total, heads):
        return w_q.transpose(0, 1).unsqueeze(0), w_k.transpose(0, 1).unsqueeze(0), True
    if w_q.dim() == 2:
        return w_q[None, None], w_k[None, None], False
    if w_q.dim() == 3 and w_q.shape[0] == heads:
        return w_q[None], w_k[None], False
    if w_q.dim() == 4 and tuple(w_q.shape[:2]) == (1, heads):
        return w_q, w_k, False
    refuse(names[0], _shape(w_q), f"(N, R), (H, N, R), (1, H, N, R) or (T, H, R) with H = {heads}, T = {total}")


def refinement(value: str, stochastic: bool = False) -> None:
    """stochastic: of stochastic attention, which has one refinement more, called "stochastic" itself."""
    choice("refinement", value, STOCHASTIC_ATTENTION_REFINEMENTS if stochastic else REFINEMENTS)


def gate(value: Tensor | float | None, refinement: str, heads: int, q: Tensor) -> Tensor | None:
    """The gate as a tensor of shape (1,) or (H,)."""
    if value is None:
        return None
    if refinement != "additive":
        refuse("gate", "given", f'None unless refinement is "additive"; refinement is "{refinement}"')
    if not isinstance(value, Tensor):
        return torch.full((1,), number("gate", value), device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    _tensor("gate", value)
    if not value.is_floating_point():
        refuse("gate", str(value.dtype), "a floating-point tensor", TypeError)
    if value.dim() > 1 or value.numel() not in (1, heads):
        refuse("gate", _shape(value), f"a scalar or of shape (H,) with H = {heads}")
    _same_device("gate", value, q)
    return value.reshape(-1)


def lags(value: Tensor | Sequence[float] | None, refinement: str, w_q: Tensor | None, q: Tensor) -> Tensor | None:
    """The factors of lagged correlations as a tensor of shape (1, A) or (H, A). w_q, q: checked; heads are their dimension 1."""
    if value is None:
        return None
    if w_q is None or refinement == "stochastic":
        refuse("lags", "given", f'None with refinement "{refinement}"; they belong to "simple", "value" and "additive"')
    heads = q.shape[1]
    if not isinstance(value, Tensor):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            refuse("lags", type(value).__name__, "a tensor or a sequence of numbers", TypeError)
        factors = [number("lags", x) for x in value]
        value = torch.tensor(factors, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    _tensor("lags", value)
    if not value.is_floating_point():
        refuse("lags", str(value.dtype), "a floating-point tensor", TypeError)
    if value.dim() not in (1, 2) or value.shape[0] != heads and value.dim() == 2:
        refuse("lags", _shape(value), f"of shape (A,) or (H, A) with H = {heads}")
    if not 1 <= value.shape[-1] <= MAX_LAGS:
        refuse("lags", _shape(value), f"of 1 to {MAX_LAGS} factors, for 1, 2, ... rows before")
    if (width := (1 + value.shape[-1]) * w_q.shape[-1]) > MAX_FEATURES:
        must = f"so few that (A + 1) R, now {width}, is at most {MAX_FEATURES}; the tables have R = {w_q.shape[-1]} columns"
        refuse("lags", _shape(value), must)
    _same_device("lags", value, q)
    return value if value.dim() == 2 else value[None]


def shift(value: bool, refinement: str, causal: bool) -> bool:
    """Whether weights fall on what followed."""
    value = flag("shift", value)
    if value and refinement not in SHIFTED:
        refuse("shift", "True", f'False with refinement "{refinement}"; "none", "simple" and "additive" have it')
    if value and not causal:
        refuse("shift", "True", "False unless causal is True: otherwise nothing says what is still to come")
    return value


def plain_heads(value: int, refinement: str, heads: int) -> int:
    """How many heads, the first ones, attend by P alone."""
    value = whole("plain_heads", value, 0, heads - 1)
    if value and refinement not in ("none", "additive"):
        refuse("plain_heads", str(value), f'0 with refinement "{refinement}"; "none" and "additive" have plain heads')
    return value


def lengths(value: Tensor | None, q: Tensor) -> None:
    if value is None:
        return
    _integers("lengths", value, q)
    if tuple(value.shape) != (q.shape[0],):
        refuse("lengths", _shape(value), f"of shape (B,) with B = {q.shape[0]}")
    if readable(value) and value.numel():
        low, high = value.min().item(), value.max().item()
        if low < 0 or high > q.shape[2]:
            refuse("lengths", f"{low} to {high}", f"within 0..L, L = {q.shape[2]}")


def cu_seqlens(value: Tensor | None, q: Tensor) -> Tensor:
    _integers("cu_seqlens", value, q)
    assert value is not None
    if value.dim() != 1 or value.numel() < 1:
        refuse("cu_seqlens", _shape(value), "of shape (B + 1,)")
    if not readable(value):
        return value
    if value[0].item() != 0 or value[-1].item() != q.shape[0]:
        refuse("cu_seqlens", f"from {value[0].item()} to {value[-1].item()}", f"from 0 to T = {q.shape[0]}")
    falls = (value.diff() < 0).nonzero()
    if falls.numel():
        at = int(falls[0].item())
        refuse("cu_seqlens", f"{value[at].item()}, then {value[at + 1].item()} at index {at + 1}", "nowhere falling")
    return value


def max_seqlen(value: int | None, bounds: Tensor, total: int, table_rows: int | None) -> int:
    """A bound on the length of every sequence: the tightest that is known without reading a GPU's memory.

    table_rows: of tables by position, None if rows come with the `total` items.
    """
    if value is not None:
        value = whole("max_seqlen", value, 0)
        if table_rows is None and torch.compiler.is_compiling():
            return max(1, value)  # a graph for it serves any total
    window = total if table_rows is None else table_rows
    bound = window if value is None else value
    if readable(bounds):
        longest = int(bounds.diff().max().item()) if bounds.numel() > 1 else 0
        if value is not None and longest > value:
            refuse("max_seqlen", str(value), f"at least the longest sequence, which cu_seqlens says has {longest} items")
        if longest > window:
            refuse("w_q", f"of {window} rows", f"at least as long as the longest sequence, {longest} items{ROWS}")
        bound = longest
    elif value is not None and value > window and window < total:
        refuse("w_q", f"of {window} rows", f"at least max_seqlen = {value} rows")
    return max(1, min(bound, window))


def length_range(value: Tensor | None, length: int) -> tuple[int, int]:
    """Bounds on the shortest and the longest of checked lengths: those themselves where reading them is free."""
    if value is None:
        return length, length
    if not readable(value) or not value.numel():
        return 0, length
    return int(value.min().item()), int(value.max().item())


def cached(cache: Any, q: Tensor, k: Tensor, v: Tensor, one: bool) -> None:
    """Checked q, k, v against the cache that they go to; one: whether they are of a single position."""
    if one and q.shape[2] != 1:
        refuse("q", _shape(q), "of one new position, (B, H, 1, D); refined_attention_prefill takes a prompt")
    if cache.device != q.device:
        refuse("cache", f"on {cache.device}", f"on q's device, {q.device}")
    if cache.dtype != q.dtype:
        refuse("cache", f"of dtype {cache.dtype}", f"of q's dtype, {q.dtype}", TypeError)
    sizes = (
        ("B = {} entries", cache.batch, "q", q.shape[0]),
        ("H = {} heads", cache.heads, "q", q.shape[1]),
        ("H_kv = {} heads", cache.k.shape[1], "k", k.shape[1]),
        ("head dim D = {}", cache.k.shape[3], "q", q.shape[3]),
        ("value dim D_v = {}", cache.v.shape[3], "v", v.shape[3]),
    )
    for what, was, name, must in sizes:
        if was != must:
            refuse("cache", f"for {what.format(was)}", f"for {name}'s {must}")


def cached_tables(w_q: Tensor | None, w_k: Tensor | None, q: Tensor, cache: Any, align: str) -> tuple[Tensor | None, Tensor | None]:
    """W as (1, 1 or H, M, R) by position, or (B, H, L, R) per item, as the cache has them."""
    if cache.refinement == "none":
        return None, None
    w_q, w_k = _pair_of_tables(w_q, w_k, q, ("w_q", "w_k"))
    entries, heads, length, _ = q.shape
    if cache.tables == "content":
        if tuple(w_q.shape[:-1]) != (entries, heads, length):
            must = f"(B, H, L, R) with B = {entries}, H = {heads}, L = {length}, as the cache is for content tables"
            refuse("w_q", _shape(w_q), must)
    elif w_q.dim() > 3 or (w_q.dim() == 3 and w_q.shape[0] != heads):
        refuse("w_q", _shape(w_q), f"(M, R) or (H, M, R) with H = {heads}, as the cache is for position tables")
    elif align == "right":
        refuse("align", '"right"', '"left" (or the tables content): every new item would move all others to another row')
    if w_q.shape[-1] != cache.k_a.shape[-1]:
        refuse("w_q", f"of rank R = {w_q.shape[-1]}", f"of the cache's rank, {cache.k_a.shape[-1]}")
    while w_q.dim() < 4:
        w_q, w_k = w_q.unsqueeze(0), w_k.unsqueeze(0)
    return w_q, w_k


def enough_rows(w_q: Tensor, items: int) -> None:
    """A position table has a row for every item that the cache may hold."""
    if w_q.shape[-2] < items:
        end = "a cache ends where its position tables do; content tables do not end"
        must = f"of a row for each of up to {items} items ({end}){ROWS}"
        refuse("w_q", f"of {w_q.shape[-2]} rows", must)


def inference(arguments: dict[str, Any]) -> None:
    """Nothing that would get a gradient."""
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            refuse(name, "a tensor that requires a gradient", "without one: decoding has no backward (use torch.no_grad())")


def indices(name: str, value: Tensor, count: int, like: Tensor) -> None:
    """(n,) indices of `count` entries."""
    _integers(name, value, like)
    if value.dim() != 1:
        refuse(name, _shape(value), "of shape (B',)")
    if readable(value) and value.numel() and not 0 <= int(value.min()) <= int(value.max()) < count:
        refuse(name, f"{int(value.min())} to {int(value.max())}", f"within 0..{count - 1}, the entries there are")


def dtype(name: str, value: torch.dtype) -> None:
    if value not in DTYPES:
        refuse(name, str(value), "float32, bfloat16, float16 or float64", TypeError)


def seed(value: int | Tensor | None, device: torch.device) -> Tensor:
    """The dropout seed as an int64 tensor of shape ()."""
    if value is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            refuse("dropout_seed", str(value.dtype), "an int or an int64 tensor of one element", TypeError)
        if value.numel() != 1:
            refuse("dropout_seed", _shape(value), "a tensor of one element")
        if value.device != device:
            refuse("dropout_seed", f"on {value.device}", f"on q's device, {device}")
        return value.reshape(())
    value = plain("dropout_seed", value)
    if isinstance(value, bool) or not isinstance(value, int):
        refuse("dropout_seed", type(value).__name__, "an int or an int64 tensor of one element", TypeError)
    if not -(2**63) <= value < 2**63:
        refuse("dropout_seed", str(value), "within 64 bits")
    return torch.full((), value, dtype=torch.int64, device=device)


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        refuse(name, repr(value), "one of " + ", ".join(f'"{c}"' for c in choices))


def side(name: str, value: str | None, alias: str, other: str | None, default: str) -> str:
    """The value of `name`, or the opposite of its alias's: `padding_side` and `align` are two names of one choice.

    The alias is checked here; a value of `name` alone is checked where it is used.
    """
    if other is None:
        return default if value is None else value
    choice(alias, other, ("left", "right"))
    meant = "left" if other == "right" else "right"
    if value is not None:
        choice(name, value, ("left", "right"))
    if value not in (None, meant):
        raise ValueError(f'{alias}="{other}" contradicts {name}="{value}": it means {name}="{meant}"; give only one of the two')
    return meant


def absent(must: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value is not None:
            refuse(name, "given", must)


def _shape(x: Any) -> str:
    return f"of shape {tuple(x.shape)}"


def no_transform(backend: str, tensors: Iterable[Tensor | None]) -> None:
    if transformed():
        raise ValueError(
            f'backend is "{backend}"; it must be "reference" under torch.func (vmap, grad, jvp ...). Or leave that out: instead of '
            "vmap, fold the mapped dimension into the batch B or the heads H, over which the operator goes anyway (packed: more "
            "sequences); instead of grad, call torch.autograd.grad"
        )
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise NotImplementedError(f'backend is "{backend}", which has no forward mode AD; it must be "reference"')


def one_gradient(backend: str, gradients: Iterable[Tensor | None]) -> None:
    if any(batched(x) for x in gradients):
        raise ValueError(
            f'backend is "{backend}"; it must be "reference" for a batch of gradients (vmap, is_grads_batched). Or call '
            "torch.autograd.grad once for each of them"
        )


def _tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        refuse(name, type(x).__name__, "a torch.Tensor", TypeError)
    if x.is_nested:
        refuse(name, "nested", "a dense tensor, or the first tensor of the call jagged, too", TypeError)
    if type(x).__name__ == "DTensor":  # not imported to look, which takes long
        must = "a torch.Tensor: map the call over shards of entries or heads with torch.distributed.tensor.experimental.local_map"
        refuse(name, "a DTensor", f"{must} (docs/pytorch.md shows how)", TypeError)


def _same_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        refuse(name, f"on {x.device}", f"on q's device, {q.device}")


def _integers(name: str, x: Any, q: Tensor) -> None:
    _tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        refuse(name, str(x.dtype), "an int32 or int64 tensor", TypeError)
    _same_device(name, x, q)


def _query_key_value(q: Tensor, k: Tensor, v: Tensor, form: str, dims: int, names: Names) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in zip(names, (q, k, v), strict=True):
        _tensor(name, x)
        if x.dim() != dims:
            refuse(name, _shape(x), f"{form}, of {dims} dimensions")
        _same_device(name, x, q)
    q, k, v = autocast(q), autocast(k), autocast(v)
    for name, x in zip(names, (q, k, v), strict=True):
        dtype(name, x.dtype)
        if x.dtype != q.dtype:
            refuse(name, str(x.dtype), f"of {names[0]}'s dtype, {q.dtype}", TypeError)
        if not 1 <= x.shape[-1] <= MAX_FEATURES:
            refuse(name, _shape(x), f"1 to {MAX_FEATURES} wide in its last dimension")
    if k.shape[-1] != q.shape[-1]:
        refuse(names[1], _shape(k), f"of {names[0]}'s head dim D = {q.shape[-1]}")
    return q, k, v


def _heads(q: Tensor, k: Tensor, v: Tensor, names: Names) -> None:
    if q.shape[1] < 1:
        refuse(names[0], _shape(q), "of one head at least")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        refuse(names[1], _shape(k), f"of a number of heads that divides {names[0]}'s H = {q.shape[1]}")
    if v.shape[1] != k.shape[1]:
        refuse(names[2], _shape(v), f"of {names[1]}'s H_kv = {k.shape[1]} heads")


def _pair_of_tables(w_q: Tensor | None, w_k: Tensor | None, q: Tensor, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    for name, w in zip(names, (w_q, w_k), strict=True):
        _tensor(name, w)
    assert w_q is not None and w_k is not None
    w_q, w_k = (w if w.dtype == torch.float32 else autocast(w) for w in (w_q, w_k))
    for name, w in zip(names, (w_q, w_k), strict=True):
        _same_device(name, w, q)
        half = q.dtype in (torch.bfloat16, torch.float16)
        if w.dtype != q.dtype and not (half and w.dtype == torch.float32):
            must = f"of q's dtype, {q.dtype}" + (", or float32" if half else "")
            refuse(name, str(w.dtype), must, TypeError)
        if w.dim() < 2 or not 1 <= w.shape[-1] <= MAX_FEATURES:
            refuse(name, _shape(w), f"a table of 1 to {MAX_FEATURES} columns")
    if w_k.shape != w_q.shape or w_k.dtype != w_q.dtype:
        refuse(names[1], f"{_shape(w_k)}, {w_k.dtype}", f"like {names[0]} {_shape(w_q)}, {w_q.dtype}")
    return w_q, w_k
