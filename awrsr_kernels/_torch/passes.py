"""The passes of the torch backend over the chunks of a batch, forward and backward, and what goes from one to the other.

H query heads, L window length.
"""

import operator
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call, Inputs
from .chunks import Place, Plan
from .sweeps import WEIGHTS, Chunk, ChunkGradients, Named, Shapes, forward_chunk, key_term, product_shapes, weight_shapes


def values_of(given: Inputs) -> list[Tensor]:
    """V and, between Gaussians, V_cov."""
    return [x for x in (given.v, given.v_cov) if x is not None]


def items_of(given: Inputs) -> dict[str, Tensor]:
    """What has a row per item, but tables."""
    return dict(zip(("q", "k", "v", "v_cov"), (given.q, given.k, *values_of(given)), strict=False))


def tables_of(given: Inputs, call: Call) -> dict[str, Tensor]:
    return {name: w for name, w in (("w_q", given.w_q), ("w_k", given.w_k)) if w is not None and call.refinement != "none"}


def widths_of(given: Inputs, call: Call) -> dict[str, int]:
    """Features of each product of P that the backward needs, by name."""
    found = dict.fromkeys(("q_a", "k_a"), given.w_q.shape[-1]) if given.w_q is not None and call.refinement != "none" else {}
    if call.refinement == "value":
        found |= {name: x.shape[-1] for name, x in zip(("y", "y_cov"), values_of(given), strict=False)}
    return found


def weights_kept(plan: Plan, given: Inputs) -> list[bool]:
    """Whether each chunk keeps its weights: its own, or those of all, weigh no more than q, k and v. The order of memory stays."""
    kinds = 1 + (plan.call.refinement != "none")
    features = sum(x.shape[-1] for x in items_of(given).values())
    areas = [kinds * sum((hi - lo) * (hi if plan.call.causal else p.length) for lo, hi in p.blocks) for p in plan.places]
    rooms = [p.length * features for p in plan.places]
    counts = [p.count for p in plan.places]
    fit = sum(map(operator.mul, counts, areas)) <= sum(map(operator.mul, counts, rooms))
    return [fit or area <= room for area, room in zip(areas, rooms, strict=True)]


def saved_shapes(place: Place, given: Inputs, keep: bool) -> Shapes:
    """Of what the backward needs of a chunk, per window and head."""
    found = product_shapes(place, widths_of(given, place.call))
    return found | weight_shapes(place) if keep else found


def _load_chunk(place: Place, loaded: Inputs, keep: bool, kept: Named, room: Named) -> Chunk:
    q, k, values = place.load(loaded.q), place.load(loaded.k), [place.load(x) for x in values_of(loaded)]
    tables, gate = [place.load_table(w) for w in tables_of(loaded, place.call).values()], loaded.gate
    if gate is not None:
        gate = gate.to(place.dtype).expand(place.heads).repeat(place.count).view(-1, 1, 1)
    hidden = (None, None, None) if kept else (place.future(), place.padding(), place.owner())
    term = key_term(k) if place.call.gaussian and not kept else None
    return Chunk(place, q, k, values, tables, gate, *hidden, loaded.seed, keep, kept, room, term)


def forward_pass(
    plan: Plan, loaded: Inputs, dtype: torch.dtype, saved: list[Named] | None = None, rooms: Iterable[Named] | None = None
) -> tuple[Tensor, ...]:
    """The outputs in rows form and `dtype`. What the backward needs of each chunk is appended to `saved`, or put where `rooms`
    says, if there is any for the chunk."""
    outs = [plan.buffer(plan.heads, x.shape[-1], dtype) for x in values_of(loaded)]
    rooms = [{}] * len(plan.places) if rooms is None else rooms
    for place, keep, room in zip(plan.places, weights_kept(plan, loaded), rooms, strict=True):
        chunk = _load_chunk(place, loaded, (saved is not None and keep) or any(name[0] in WEIGHTS for name in room), {}, room)
        values = [place.result(out) for out in outs]
        products = forward_chunk(chunk, values)
        if saved is not None:
            saved.append(products | chunk.kept)
        for out, value in zip(outs, values, strict=True):
            place.store(out, value)
    return tuple(plan.collect(out, dtype) for out in outs)


class Kind(NamedTuple):
    """A tensor of the caller, as its gradient shall be."""

    shape: torch.Size
    dtype: torch.dtype


def kinds_of(given: Inputs, call: Call) -> dict[str, Kind]:
    return {name: Kind(x.shape, x.dtype) for name, x in (items_of(given) | tables_of(given, call)).items()}


def backward_pass(
    plan: Plan, kinds: dict[str, Kind], loaded: Inputs, douts: Iterable[Tensor], saved: Iterable[Named]
) -> dict[str, Tensor]:
    """Gradients by name. kinds: of the caller's tensors. saved: what the forward saved of each chunk; products that are not there
    are computed again."""
    call, gate = plan.call, loaded.gate
    loaded_douts = [plan.load_items(dout) for dout in douts]
    count = len(items_of(loaded))
    inputs, tables = list(kinds.values()), []
    if not call.per_entry:
        inputs, tables = inputs[:count], inputs[count:]
    buffers = [plan.buffer(shape[1], shape[-1], dtype) for shape, dtype in inputs]
    new_zeros = loaded.q.new_zeros
    dtables = [new_zeros(shape[2:] if shape[1] == 1 else shape[1:], dtype=plan.dtype) for shape, _ in tables]
    dgate = new_zeros(plan.heads, dtype=plan.dtype)
    for place, named in zip(plan.places, saved, strict=True):
        kept = {name: x for name, x in named.items() if name[0] in WEIGHTS}
        products = {name: x for name, x in named.items() if name not in kept}
        chunk = _load_chunk(place, loaded, bool(kept), kept, {})
        if chunk.tables and not products:
            products = forward_chunk(chunk, [place.empty(x.shape[-1]) for x in chunk.values])
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
    found_grads = dict(zip(kinds, grads, strict=True))
    if gate is not None:
        found_grads["gate"] = (dgate if gate.shape[0] == plan.heads else dgate.sum(0, keepdim=True)).to(gate.dtype)
    return found_grads
