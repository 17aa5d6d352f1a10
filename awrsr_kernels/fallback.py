"""Refined attention in plain torch with O(L) memory and its own backward: the CPU path.

The batch is cut into chunks of windows of similar length (`_fallback_selection.py`; so padding costs little) and each chunk into
blocks of rows, which `_fallback_sweeps.py` visits and where the formulas are. Saved for the backward are Q_A, K_A and Y = P V of
"value"; weights are recomputed, except where all of them weigh no more than q, k and v, and computing them again would be a good
part of the work. Plain attention goes to torch's own kernel where that is faster (`_fallback_stock.py`).

Half precision is computed in float32 and rounded once, on the way out (torch's kernel rounds P, too, as the definition does).
"""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._fallback_chunks import Place, Plan
from ._fallback_stock import stock_attention, takes
from ._fallback_sweeps import Chunk, ChunkGradients, Named, forward_chunk, key_term
from .layout import Call, Inputs

_WEIGHTS = ("first", "higher")


def _values(given: Inputs) -> list[Tensor]:
    """V and, between Gaussians, V_cov."""
    return [x for x in (given.v, given.v_cov) if x is not None]


def _items(given: Inputs) -> dict[str, Tensor]:
    """What has a row per item, but tables."""
    return dict(zip(("q", "k", "v", "v_cov"), (given.q, given.k, *_values(given)), strict=False))


def _tables(given: Inputs, call: Call) -> dict[str, Tensor]:
    return {name: w for name, w in (("w_q", given.w_q), ("w_k", given.w_k)) if w is not None and call.refinement != "none"}


def _kept(plan: Plan, loaded: Inputs) -> list[bool]:
    """Whether each chunk keeps its weights: its own, or those of all, weigh no more than q, k and v. The order of memory stays."""
    kinds = 1 + (plan.call.refinement != "none")
    features = sum(x.shape[-1] for x in _items(loaded).values())
    areas = [kinds * sum((hi - lo) * (hi if plan.call.causal else p.length) for lo, hi in p.blocks) for p in plan.places]
    rooms = [p.length * features for p in plan.places]
    counts = [p.count for p in plan.places]
    fit = sum(map(operator.mul, counts, areas)) <= sum(map(operator.mul, counts, rooms))
    return [fit or area <= room for area, room in zip(areas, rooms, strict=True)]


def _load_chunk(place: Place, loaded: Inputs, keep: bool, kept: Named) -> Chunk:
    q, k, values = place.load(loaded.q), place.load(loaded.k), [place.load(x) for x in _values(loaded)]
    tables, gate = [place.load_table(w) for w in _tables(loaded, place.call).values()], loaded.gate
    if gate is not None:
        gate = gate.to(place.dtype).expand(place.heads).repeat(place.count).view(-1, 1, 1)
    hidden = (None, None, None) if kept else (place.future(), place.padding(), place.owner())
    term = key_term(k) if place.call.gaussian and not kept else None
    return Chunk(place, q, k, values, tables, gate, *hidden, loaded.seed, keep, kept, term)


def _forward(plan: Plan, loaded: Inputs, dtype: torch.dtype, saved: list[Named] | None) -> tuple[Tensor, ...]:
    """The outputs in rows form and `dtype`; what the backward needs of each chunk is appended to `saved`."""
    outs = [plan.buffer(plan.heads, x.shape[-1], dtype) for x in _values(loaded)]
    for place, keep in zip(plan.places, _kept(plan, loaded), strict=True):
        chunk = _load_chunk(place, loaded, saved is not None and keep, {})
        values = [place.result(out) for out in outs]
        products = forward_chunk(chunk, values)
        if saved is not None:
            saved.append(products | chunk.kept)
        for out, value in zip(outs, values, strict=True):
            place.store(out, value)
    return tuple(plan.collect(out, dtype) for out in outs)


class _RefinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args):  # type: ignore[no-untyped-def]
        *tensors, call = args
        saved: list[Named] = []
        given = Inputs(*tensors)
        plan = Plan(given, call)
        loaded = plan.load_inputs(given)
        outs = _forward(plan, loaded, given.v.dtype, saved)
        eager = not torch.compiler.is_compiling()
        ctx.call, ctx.names = call, [list(named) for named in saved]
        ctx.plan = plan if eager else None  # it has no tensors of the caller
        ctx.loaded = eager and plan.ragged  # rows once picked are not picked again
        ctx.kinds = {name: (x.shape, x.dtype) for name, x in (_items(given) | _tables(given, call)).items()}
        ctx.save_for_backward(*(loaded if ctx.loaded else given), *(x for named in saved for x in named.values()))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts):  # type: ignore[no-untyped-def]
        size, call, stored = len(Inputs._fields), ctx.call, ctx.saved_tensors  # read once, or checkpointing refuses
        given, saved = Inputs(*stored[:size]), iter(stored[size:])
        plan = ctx.plan or Plan(given, call)
        loaded = given if ctx.loaded else plan.load_inputs(given)
        loaded_douts = [plan.load_items(dout) for dout in douts]
        kinds, count = list(ctx.kinds.values()), len(_items(given))
        inputs, tables = (kinds, []) if call.per_entry else (kinds[:count], kinds[count:])
        buffers = [plan.buffer(shape[1], shape[-1], dtype) for shape, dtype in inputs]
        dtables = [douts[0].new_zeros(shape[2:] if shape[1] == 1 else shape[1:], dtype=plan.dtype) for shape, _ in tables]
        dgate = douts[0].new_zeros(plan.heads, dtype=plan.dtype)
        for place, names in zip(plan.places, ctx.names, strict=True):
            named = {name: next(saved) for name in names}
            kept = {name: x for name, x in named.items() if name[0] in _WEIGHTS}
            products = {name: x for name, x in named.items() if name not in kept}
            chunk = _load_chunk(place, loaded, bool(kept), kept)
            results = [place.result(x) for x in buffers] + [place.table_result(x) for x in dtables]
            found = ChunkGradients(chunk, products, [place.load(dout) for dout in loaded_douts], results)
            for buffer, value in zip(buffers, results, strict=False):
                place.store(buffer, value)
            for total, value in zip(dtables, results[count:], strict=False):
                place.store_table(total, value)
            if found.dgate is not None:
                dgate += found.dgate.view(-1, place.heads).sum(0)
        grads = [plan.collect(buffer, dtype) for buffer, (_, dtype) in zip(buffers, inputs, strict=True)]
        grads += [total.to(dtype).view(shape) for total, (shape, dtype) in zip(dtables, tables, strict=True)]
        if (gate := given.gate) is not None:
            dgate = (dgate if gate.shape[0] == plan.heads else dgate.sum(0, keepdim=True)).to(gate.dtype)
        named_grads = dict(zip(ctx.kinds, grads, strict=True)) | {"gate": None if gate is None else dgate}
        return *(named_grads.get(name) for name in Inputs._fields), None


def fallback_attention(given: Inputs, call: Call) -> tuple[Tensor, ...]:
    """The outputs in rows form, (entries, H, rows, D_v). Differentiable once; plain aten operations without gradients."""
    if call.gaussian:  # -scale |x_i - x_j|^2 is, in a softmax, 2 scale (x_i.x_j - |x_j|^2 / 2)
        factor = 1 + (call.refinement == "stochastic")
        call = call._replace(softmax_scale=2 * call.softmax_scale, refine_scale=factor * call.refine_scale)
    if takes(given, call):
        return (stock_attention(given, call),)
    if given.need_gradient():
        found: tuple[Tensor, ...] = _RefinedAttention.apply(*given, call)
        return found
    plan = Plan(given, call)
    return _forward(plan, plan.load_inputs(given), given.v.dtype, None)
