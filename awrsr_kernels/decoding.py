"""Decoding: refined attention of one new position at a time, in O(L) work, with a cache of earlier positions.

B batch, H query heads, H_kv key and value heads, N rows of the cache, n rows in use, G = H / H_kv, D head dim, D_v value dim,
R refinement rank, M table rows.

With causal attention, a new position does not change the results of earlier rows. For its own row it needs of them K and V, the
rows of W that its weights multiply, K_A = P W_k and, for "value", Y = P V. It does not need Q_A, which only its own row uses:

    p = softmax(softmax_scale q K^T)     q_a = p W_q     k_a = p W_k  (appended to K_A)     "value": y = p V  (appended to Y)
    r = softmax(refine_scale q_a K_A^T)  output: r V, "value" r Y, "additive" p V + gate r V

All of these are attention outputs, so plain attention calls also compute the cache of a whole prompt. With lags, scores of the
second softmax also compare earlier rows of Q_A, which the cache then keeps as well:

    q_a K_A^T + sum over a of lags[a-1] times what row a before has in Q_A, by K_A moved down by a rows

and with `shift` a weight falls on the value of the row after; that of the new row itself falls on nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import checks, habits, plans
from .backends import choose_backend, run
from .cache import RefinedCache
from .call import Call, Inputs
from .launch_config import table_features
from .reference import arithmetic_dtype, masked_softmax
from .torch_state import own_tensor, without_autocast


@habits.own_signature
def refined_attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    cache: RefinedCache,
    *,
    align: str = "left",
    gate: Tensor | float | None = None,
    lags: Tensor | Sequence[float] | None = None,
    shift: bool = False,
    plain_heads: int = 0,
    lengths: Tensor | None = None,
    padding_side: str = "right",
    softmax_scale: float | None = None,
    refine_scale: float | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """Causal refined attention of prompts, which also fills an empty cache for `refined_attention_step`.

    Args:
        q, k, v: (B, H, L, D), (B, H_kv, L, D), (B, H_kv, L, D_v), as in `refined_attention`, with the sizes of the cache.
        w_q, w_k: position tables (M, R) or (H, M, R), with at least one row for every item of the longest prompt; or content
            tables (B, H, L, R). Ignored, and may be None, if the cache's refinement is "none".
        cache: an empty cache (new, or after `reset`). It grows if L exceeds its capacity.
        align: "left": row j of a position table belongs to item j of an entry, on whichever side its padding is. "right" raises an
            error with position tables, since every step would move all items to other rows; with content tables and with "none"
            it is allowed. Unlike in `refined_attention`, this is not another name of padding_side: the two are independent.
        lengths: (B,) integer tensor in 0..L: number of real items per entry. The rest is padding on `padding_side`, "right" or
            "left".

    The other arguments are those of `refined_attention`.

    Returns:
        (B, H, L, D_v) in v's dtype, 0 at padding. It has no gradient.

    Raises:
        ValueError, TypeError: an argument does not fit, or requires a gradient while gradients are recorded; the message names it.
    """
    if unknown:
        habits.refuse(refined_attention_prefill, unknown)
    scales = {"softmax_scale": softmax_scale, "refine_scale": refine_scale}
    options = scales | {"shift": shift, "plain_heads": plain_heads}
    inputs, call, backend = _checked(q, k, v, w_q, w_k, cache, align, gate, lags, options, backend)
    length = inputs.q.shape[2]
    if cache.end_bound:
        raise ValueError(f"cache is in use, up to row {cache.end_bound}; it must be empty (call its reset)")
    checks.choice("padding_side", padding_side, ("left", "right"))
    checks.lengths(lengths, inputs.q)
    least, most = checks.length_range(lengths, length)
    left = padding_side == "left" and lengths is not None
    if inputs.w_q is not None and cache.tables == "position":
        checks.enough_rows(inputs.w_q, most)
    cache.make_room(length)
    cache.end_bound, cache.length_bound = (length if left else most), most  # a call that fails leaves it in use
    cache.ragged = least < cache.end_bound
    lengths = None if lengths is None else lengths.long().clamp(0, length)
    real = torch.full_like(cache.end, length) if lengths is None else lengths
    cache.first.copy_(length - real) if left else cache.first.zero_()
    cache.end.copy_(cache.first + real)
    with without_autocast(inputs.q.device):
        return own_tensor(_prefill(inputs._replace(bounds=lengths), call._replace(align_right=left), backend, cache))


@habits.own_signature
def refined_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor | None,
    w_k: Tensor | None,
    cache: RefinedCache,
    *,
    align: str = "left",
    gate: Tensor | float | None = None,
    lags: Tensor | Sequence[float] | None = None,
    shift: bool = False,
    plain_heads: int = 0,
    softmax_scale: float | None = None,
    refine_scale: float | None = None,
    backend: str = "auto",
    **unknown: NoReturn,
) -> Tensor:
    """Append one new position per entry to the cache, and compute the row that the full causal call has for it.

    This takes O(n) work and memory for n cached items. It does not synchronise with a GPU.

    Args:
        q, k, v: (B, H, 1, D), (B, H_kv, 1, D), (B, H_kv, 1, D_v), with the sizes of the cache and any strides.
        w_q, w_k: with position tables, the whole tables, (M, R) or (H, M, R), the same in all calls, with a row for this item;
            with content tables, the rows of this item, (B, H, 1, R). Ignored, and may be None, if the refinement is "none".
        cache: changed in place: every entry gets one more item. The cache may be empty.
        align: as in `refined_attention_prefill`.
        gate, lags, shift, plain_heads: as in `refined_attention`. They must be the same in all calls, like the scales. Steps
            with A lags need a cache that was made for as many, `RefinedCache(lags=A)`.
        backend: "triton" (one kernel), "torch" (plain torch operations on the rows in use), "reference" (the definition, over all
            rows of the cache) or "auto": triton where it can run on a GPU, otherwise torch.

    Returns:
        (B, H, 1, D_v) in v's dtype. It has no gradient.

    Raises:
        ValueError, TypeError: an argument does not fit, or requires a gradient while gradients are recorded; the position tables
            have no row for this item; the named backend cannot run. The message names the argument.
    """
    if unknown:
        habits.refuse(refined_attention_step, unknown)
    options = {"softmax_scale": softmax_scale, "refine_scale": refine_scale, "shift": shift, "plain_heads": plain_heads}
    sight = _look(q, k, v, w_q, w_k, cache, align, gate, lags, options, backend)
    if sight is not None and sight.plan is not None:
        if w_q is not None and cache.tables == "position" and cache.refinement != "none":
            checks.enough_rows(w_q, cache.length_bound + 1)
        out: Tensor = sight.plan(sight)
    else:
        inputs, call, backend = _checked(q, k, v, w_q, w_k, cache, align, gate, lags, options, backend, one=True)
        table_rows = None
        if inputs.w_q is not None and cache.tables == "position":
            checks.enough_rows(inputs.w_q, cache.length_bound + 1)
            table_rows = inputs.w_q.shape[2]
        cache.make_room(1, table_rows)
        with without_autocast(inputs.q.device):
            out = _kernel_step(inputs, call, cache, sight) if backend == "triton" else _step(inputs, call, backend, cache)
    cache.end.add_(1)
    cache.end_bound += 1
    cache.length_bound += 1
    return out


def _look(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor | None, w_k: Tensor | None, cache: RefinedCache, align: str,
    gate: Tensor | float | None, lags: Tensor | Sequence[float] | None, options: dict[str, Any], backend: str,
) -> plans.Sight | None:  # fmt: skip
    """A step as `plans.look` sees it; None too if its cache must grow, and has other tensors afterwards."""
    if not isinstance(cache, RefinedCache) or cache.end_bound >= cache.capacity:
        return None
    decisive = ["step", cache.refinement, cache.tables, cache.heads, cache.lags, align]
    for value in options.values():
        decisive += (value.__class__, value)
    return plans.look([q, k, v, w_q, w_k, gate, None, None, *_tensors(cache), lags], backend, tuple(decisive))


def _tensors(cache: RefinedCache) -> tuple[Tensor | None, ...]:
    """Those of a cache, as a step on the kernel takes them."""
    return cache.k, cache.v, cache.k_a, cache.y, cache.w_q, cache.w_k, cache.first, cache.end, cache.q_a


def _kernel_step(inputs: Inputs, call: Call, cache: RefinedCache, sight: plans.Sight | None) -> Tensor:
    """The step in one launch. If it has a sight, its signature gets a plan."""
    from ._triton.decode import triton_step

    tensors = (*inputs[:6], *_tensors(cache), inputs.lags)
    options = call.refinement, call.softmax_scale, call.refine_scale, call.shift, call.plain_heads
    if sight is not None:
        from ._triton.step_plan import step_plan_of

        plan = step_plan_of(sight, tensors, options)
        if plan is not None:
            plans.remember(sight.signature, plan)
            return plan(sight)
    out: Tensor = triton_step(*tensors[:-2], *options[:3], *tensors[-2:], *options[3:])
    return out


def _checked(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor | None, w_k: Tensor | None, cache: RefinedCache, align: str,
    gate: Tensor | float | None, lags: Tensor | Sequence[float] | None, options: dict[str, Any], backend: str, one: bool = False,
) -> tuple[Inputs, Call, str]:  # fmt: skip
    """The checked tensors, the call that they are a row or the beginning of, and the chosen backend."""
    if not isinstance(cache, RefinedCache):
        raise TypeError(f"cache is {type(cache).__name__}; it must be a RefinedCache")
    checks.choice("align", align, ("left", "right"))
    checks.inference({"q": q, "k": k, "v": v, "w_q": w_q, "w_k": w_k, "gate": gate, "lags": lags})
    q, k, v = checks.batch(q, k, v)
    checks.cached(cache, q, k, v, one)
    w_q, w_k = checks.cached_tables(w_q, w_k, q, cache, align)
    gate, factors = checks.gate(gate, cache.refinement, q.shape[1], q), checks.lags(lags, cache.refinement, w_q, q)
    count = 0 if factors is None else factors.shape[1]
    if count != cache.lags:
        checks.refuse("lags", f"{count} factors", f"{cache.lags}, as many as the cache was made for (RefinedCache(lags=...))")
    rank = 1 if w_q is None else w_q.shape[-1]
    features = table_features(q.shape[-1], v.shape[-1], rank, False, cache.refinement)
    options |= {"refinement": cache.refinement, "causal": True}
    call = Call.settled(q, w_q, **options, varlen=False, align_right=False, max_len=q.shape[2], per_entry=True)
    return Inputs(q, k, v, w_q, w_k, gate, None, lags=factors), call, choose_backend(backend, q, features)


def _prefill(inputs: Inputs, whole: Call, backend: str, cache: RefinedCache) -> Tensor:
    """Compute the output, and store the rows of the prompts. whole: the call."""
    q, k, v, w_q, w_k, gate, lengths, *_ = inputs
    length, group, left = q.shape[2], q.shape[1] // k.shape[1], whole.align_right
    kept = {"k": k, "v": v}
    call = whole._replace(refinement="none", per_entry=False, refine_scale=1.0, shift=False, plain_heads=0)
    apart = inputs.lags is not None or whole.shift or whole.plain_heads > 0  # the output is not a plain call's
    if w_q is None or w_k is None:
        call = whole._replace(per_entry=False) if apart else call
        out = run(inputs, call, None, backend)[0]
    else:
        if cache.tables == "content":
            kept |= {"w_q": w_q, "w_k": w_k}
        else:
            w_q, w_k = (_rows_by_item(w, cache.first if left else None, length) for w in (w_q, w_k))
        per_query = v.repeat_interleave(group, 1) if group > 1 else v
        shared = w_q.shape[1] == 1  # then a key head's query heads read the same values
        keys, values = (k, v) if shared or group == 1 else (k.repeat_interleave(group, 1), per_query)
        tables = [w.to(q.dtype).expand(*keys.shape[:3], -1) for w in (w_q, w_k)]
        direct = [values] if cache.refinement == "value" or (cache.refinement == "additive" and not apart) else []
        q_a, k_a, *weighted = _attend(q, keys, [*tables, *direct], call, backend, lengths)
        kept |= {"k_a": k_a} | ({"y": weighted[0]} if cache.refinement == "value" else {})
        kept |= {"q_a": q_a} if cache.lags else {}
        if apart:
            w_q, w_k = (w.expand(*q.shape[:3], -1) for w in (w_q, w_k))
            out = run(inputs._replace(w_q=w_q, w_k=w_k), whole, None, backend)[0]
        else:
            call = call._replace(softmax_scale=whole.refine_scale)
            out = _attend(q_a, k_a, [kept.get("y", per_query)], call, backend, lengths)[0]
        if cache.refinement == "additive" and not apart:
            wide = torch.promote_types(out.dtype, torch.float32)
            higher = out.to(wide) if gate is None else gate.to(wide).view(-1, 1, 1) * out
            out = (weighted[0] + higher).to(out.dtype)
    for name, x in kept.items():
        rows = getattr(cache, name).narrow(2, 0, length)
        rows.copy_(x)
        if lengths is not None:  # padding may hold anything
            at = torch.arange(length, device=q.device)
            empty = (at < cache.first[:, None]) | (at >= cache.end[:, None])
            rows.masked_fill_(empty[:, None, :, None], 0)
    return out


def _rows_by_item(w: Tensor, first: Tensor | None, length: int) -> Tensor:
    """(1 or B, 1 or H, L, R): the table's row for each row of a window; rows without an item get an arbitrary one."""
    if first is None and w.shape[2] >= length:
        return w.narrow(2, 0, length)
    item = torch.arange(length, device=w.device) - (0 if first is None else first[:, None])
    return w[0][:, item.clamp(0, w.shape[2] - 1).view(-1, length)].transpose(0, 1)


def _attend(q: Tensor, k: Tensor, values: list[Tensor], call: Call, backend: str, lengths: Tensor | None) -> list[Tensor]:
    """softmax(q k^T) times each of the values. As many of them share a call as its width allows."""
    packs: list[list[Tensor]] = [[]]
    for x in values:
        if sum(each.shape[-1] for each in packs[-1]) + x.shape[-1] > checks.MAX_FEATURES:
            packs.append([])
        packs[-1].append(x)
    results: list[Tensor] = []
    for pack in packs:
        joint = pack[0] if len(pack) == 1 else torch.cat(pack, -1)
        out = run(Inputs(q, k, joint, None, None, None, lengths), call, None, backend)[0]
        results += out.split([x.shape[-1] for x in pack], -1)
    return results


def _append(cache: RefinedCache, **new: Tensor) -> None:
    """Write new rows, (B, heads, 1, F) or of as many elements, into row `end` of each entry, by name."""
    for name, x in new.items():
        rows = getattr(cache, name)
        x = x.reshape(rows.shape[0], rows.shape[1], rows.shape[3])
        if cache.ragged:
            rows[torch.arange(rows.shape[0], device=rows.device), :, cache.end] = x.to(rows.dtype)
        else:
            rows.select(2, cache.end_bound).copy_(x)


def _step(inputs: Inputs, call: Call, backend: str, cache: RefinedCache) -> Tensor:
    """The equations in this module's docstring for one row, with the arithmetic of the backend."""
    q, k, v, w_q, w_k, gate, *_ = inputs
    _append(cache, k=k, v=v)
    softmax, meet, meet_tables, add = (_reference_arithmetic if backend == "reference" else _torch_arithmetic)(q, gate, cache)
    p = softmax(q, cache.k, call.softmax_scale)
    if w_q is None or w_k is None or cache.k_a is None:
        out = meet(_placed(p, p, call), cache.v)
    else:
        if cache.tables == "content":
            _append(cache, w_q=w_q, w_k=w_k)
            q_a, k_a = meet(p, cache.w_q), meet(p, cache.w_k)
        else:
            q_a, k_a = meet_tables(p, w_q, w_k)
        _append(cache, k_a=k_a)
        if cache.q_a is not None and inputs.lags is not None:
            _append(cache, q_a=q_a)
            q_a = _with_earlier(q_a, cache)
        r = softmax(q_a, cache.k_a, call.refine_scale, inputs.lags)
        if cache.y is not None:
            _append(cache, y=meet(p, cache.v))
        elif cache.refinement == "additive":
            r = add(p, r)
        out = meet(_placed(r, p, call), cache.v if cache.y is None else cache.y)
    return own_tensor(out.to(q.dtype).view(*q.shape[:3], v.shape[-1]))


def _with_earlier(q_a: Tensor, cache: RefinedCache) -> Tensor:
    """(B, H, A + 1, R): the new row of Q_A and those before it, zero before the first item."""
    assert cache.q_a is not None
    rows = [q_a.reshape(*cache.q_a.shape[:2], 1, -1)]
    for lag in range(1, cache.lags + 1):
        at = cache.end - lag
        earlier = cache.q_a[torch.arange(cache.batch, device=q_a.device), :, at.clamp(min=0)]
        rows.append(torch.where((at >= cache.first)[:, None, None], earlier, 0)[:, :, None].to(q_a.dtype))
    return torch.cat(rows, 2)


def _moved_down(scores: Tensor, lags: Tensor) -> Tensor:
    """(..., A + 1, n) -> (..., n): scores of a row and of those before it, each moved to the columns as far down, and added up."""
    total = scores[..., 0, :].clone()
    for lag in range(1, scores.shape[-2]):
        factor = lags[:, lag - 1, None].to(scores.dtype)
        total[..., lag:] += factor * scores[..., lag, :-lag] if lag < scores.shape[-1] else 0
    return total


def _placed(weights: Tensor, first: Tensor, call: Call) -> Tensor:
    """Weights (B, H, n) or (B, H, 1, n) of the new row as values meet them: shifted, and those of plain heads P.

    What the row gives to itself falls on the row after it, which is zero, or there is none.
    """
    if not call.shift and not call.plain_heads:
        return weights
    shifted = torch.nn.functional.pad(weights[..., :-1], (1, 0)) if call.shift else weights
    return torch.cat([first[:, : call.plain_heads], shifted[:, call.plain_heads :]], 1)


def _reference_arithmetic(q: Tensor, gate: Tensor | None, cache: RefinedCache) -> tuple[Callable[..., Any], ...]:
    """Arithmetic over all N rows, of which the new row sees those from first to end."""
    dtype = arithmetic_dtype(q.dtype)
    at = torch.arange(cache.capacity, device=q.device)
    visible = ((at >= cache.first[:, None]) & (at <= cache.end[:, None]))[:, None, None]

    def per_query(x: Tensor) -> Tensor:
        return x.repeat_interleave(q.shape[1] // x.shape[1], 1).to(dtype)

    def softmax(queries: Tensor, keys: Tensor, scale: float, lags: Tensor | None = None) -> Tensor:
        scores = scale * queries.to(dtype) @ per_query(keys).transpose(-1, -2)
        return masked_softmax(scores if lags is None else _moved_down(scores, lags)[:, :, None], visible)

    def meet(weights: Tensor, values: Tensor) -> Tensor:
        return weights @ per_query(values)

    def meet_tables(weights: Tensor, *tables: Tensor) -> list[Tensor]:
        item = (at - cache.first[:, None]).clamp(0, tables[0].shape[2] - 1)
        return [weights @ w[0][:, item].transpose(0, 1).to(q.dtype).to(dtype) for w in tables]

    def add(p: Tensor, r: Tensor) -> Tensor:
        return p + (1.0 if gate is None else gate.to(dtype).view(-1, 1, 1)) * r

    return softmax, meet, meet_tables, add


def _torch_arithmetic(q: Tensor, gate: Tensor | None, cache: RefinedCache) -> tuple[Callable[..., Any], ...]:
    """Arithmetic over the rows in use, in as few torch calls as possible; half precision is computed in float32."""
    (batch, heads, _, _), used = q.shape, cache.end_bound + 1
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = back = None
    if cache.ragged:
        at = torch.arange(used, device=q.device)
        hidden = ((at < cache.first[:, None]) | (at > cache.end[:, None]))[:, None]  # (B, 1, n)
        back = (at + cache.first[:, None]).remainder_(used)[:, None].expand(-1, heads, -1)  # row of each item; others weigh 0

    def rows(x: Tensor) -> Tensor:
        return x.narrow(2, 0, used).flatten(0, 1).to(wide)  # (B * heads, n, F)

    def softmax(queries: Tensor, keys: Tensor, scale: float, lags: Tensor | None = None) -> Tensor:
        queries = queries.reshape(batch * keys.shape[1], -1, keys.shape[3])
        scores = torch.bmm(queries.to(wide) * scale, rows(keys).transpose(1, 2)).view(batch, heads, -1, used)
        scores = scores[:, :, 0] if lags is None else _moved_down(scores, lags)
        return (scores if hidden is None else scores.masked_fill_(hidden, -torch.inf)).softmax(-1)

    def meet(weights: Tensor, values: Tensor) -> Tensor:
        return torch.bmm(weights.view(batch * values.shape[1], heads // values.shape[1], used), rows(values))

    def meet_tables(weights: Tensor, *tables: Tensor) -> list[Tensor]:
        met = min(used, tables[0].shape[2])  # with padding on the left, no item is beyond that
        weights = (weights if back is None else weights.gather(2, back))[..., :met]
        met_rows = [w[0].narrow(1, 0, met).to(q.dtype).to(wide) for w in tables]  # float32 is read in q's dtype
        if tables[0].shape[1] == 1:
            return [torch.mm(weights.reshape(batch * heads, met), w[0]) for w in met_rows]
        return [torch.bmm(weights.transpose(0, 1), w).transpose(0, 1) for w in met_rows]

    def add(p: Tensor, r: Tensor) -> Tensor:
        return r.add_(p) if gate is None else torch.addcmul(p, gate.to(wide).view(-1, 1), r)

    return softmax, meet, meet_tables, add
