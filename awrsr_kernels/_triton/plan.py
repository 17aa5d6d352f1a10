"""The plan of a call: what its signature decides, and the way from the caller's tensors straight to the recorded launches.

A `Plan` is made when a call has passed all checks (`backends.run`), and runs it. The second call runs the launchers under a
`Recorder`, forward and backward; later ones repeat the launches (`record.py`). Tensors come and go as the caller has them, so that
no view is made: results and gradients are allocated in the caller's form, and views in the package's form, (entries, heads, rows,
features), are made only for the launchers. What cannot be recorded goes to the launchers each time, from here.
"""

import contextlib
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks
from ..call import Call, Inputs
from ..plans import NUMBERS, PLAIN, SEED, Sight
from ..torch_state import own_tensor
from .autograd import gradients_of, launch_backward, launch_forward
from .record import Launches, Recorder, Slot, bytes_of, typed

GATE = Inputs._fields.index("gate")
BACKWARDS = 8  # recordings of a plan, by the strides of the gradient that comes in
DIFFERENTIABLE = tuple(name not in ("bounds", "seed") for name in Inputs._fields)


class Form(NamedTuple):
    """How the caller's tensor lies in the package's: its size and strides there, and which of its dimensions are the caller's."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dims: tuple[int, ...]

    def inside(self, x: Tensor) -> Tensor:
        stride = list(self.stride)  # of dimensions that the caller does not have; the others may differ from call to call
        for dim, own in zip(self.dims, x.stride(), strict=True):
            stride[dim] = own
        return x.as_strided(self.size, stride, x.storage_offset())


class Kept(NamedTuple):
    """Where a tensor that the backward needs lies in the piece of memory that is kept."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # in bytes


def outside(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A tensor of the package in the caller's form; dimensions that the caller does not have are of size 1."""
    size, stride = x.shape, x.stride()
    return x.as_strided([size[d] for d in dims], [stride[d] for d in dims], x.storage_offset())


def numbered(first: int, tensors: Sequence[Tensor | None]) -> list[tuple[Tensor, Slot]]:
    """Tensors that are there, and their slots from `first` on."""
    return [(x, Slot(first + i, 0, x.dtype)) for i, x in enumerate(x for x in tensors if x is not None)]


def form_of(given: Tensor, x: Tensor, packed: bool) -> Form | None:
    """The form of a caller's tensor that is `x` inside; None if x lies elsewhere. packed: x has a row per packed item."""
    dims = (2, 1, 3) if packed else tuple(range(x.dim() - given.dim(), x.dim()))
    form = Form(tuple(x.shape), x.stride(), dims)
    if given.data_ptr() != x.data_ptr() or given.dtype != x.dtype or given.device != x.device:
        return None
    agrees = outside(x, dims).stride() == given.stride() and tuple(outside(x, dims).shape) == tuple(given.shape)
    return form if agrees and given.numel() == x.numel() else None


class Plan:
    """What the signature of a call decides."""

    def __init__(self, forms: list[Form], fields: list[int], call: Call, learns: bool) -> None:
        self.forms, self.fields, self.call, self.learns = forms, fields, call, learns
        self.forward: Launches | None = None
        self.calls = 0  # so far: the first just runs, the second is recorded
        self.backwards: dict[Any, Launches | None] = {}
        self.out: Form | None = None
        self.kept: list[Kept] = []
        self.take = itemgetter(*fields)
        self.differentiable = [DIFFERENTIABLE[field] for field in fields]
        self.absent = [None] * self.differentiable.count(False)  # bounds and seed come last

    def __call__(self, sight: Sight) -> Tensor:
        """The output for a call of this signature."""
        tensors, pointers = sight.tensors, sight.pointers
        if self.call.dropout_p:
            tensors[SEED] = checks.seed(tensors[SEED], tensors[0].device)
            pointers = [*pointers[:SEED], tensors[SEED].data_ptr()]
        if tensors[GATE].__class__ in NUMBERS:
            tensors[GATE] = checks.gate(tensors[GATE], "additive", self.forms[0].size[1], tensors[0])
            pointers = [*pointers[:GATE], tensors[GATE].data_ptr(), *pointers[GATE + 1 :]]
        given, addresses = self.take(tensors), self.take(pointers)
        if self.learns:
            out: Tensor = PlannedAttention.apply(self, addresses, *given)
            return out
        return self.results(given, addresses)[0]

    def inputs(self, given: Sequence[Tensor]) -> Inputs:
        """Views of the caller's tensors in the package's form, each another object."""
        inside = [form.inside(x) for form, x in zip(self.forms, given, strict=True)]
        named = {Inputs._fields[field]: x for field, x in zip(self.fields, inside, strict=True)}
        return Inputs(**{name: named.get(name) for name in Inputs._fields})  # type: ignore[arg-type]  # q, k, v are there

    def results(self, given: Sequence[Tensor], addresses: Sequence[int]) -> list[Tensor]:
        """The output, in the caller's form, and if the backward needs more than the inputs, a piece of memory with the rest.

        It is so in every call of a signature, as activation checkpointing compares what is saved.
        """
        if self.forward is not None:
            return self.forward.run(given, addresses)
        inputs, self.calls = self.inputs(given), self.calls + 1
        with Recorder(given, numbered(0, inputs)) if self.calls == 2 else contextlib.nullcontext() as recorder:
            out, *kept = launch_forward(inputs, self.call, self.learns, together=True)
        results = [own_tensor(outside(out, self.forms[0].dims))]
        if kept:
            results.append(bytes_of(kept[0]))
        self.out = Form(tuple(out.shape), out.stride(), self.forms[0].dims)
        self.kept = [Kept(tuple(x.shape), x.stride(), x.dtype, int(x.storage_offset()) * x.itemsize) for x in kept]
        if recorder is not None:
            self.forward = recorder.repeatable(results)
        return results

    def gradients(self, dout: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the caller's tensors that have one. saved: those tensors, then what was kept."""
        everything = [dout, *saved]
        plain = not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
        if not plain or not all(x.__class__ in PLAIN for x in everything):
            return self.launch(dout, saved, gradients_of)
        try:
            addresses = [x.data_ptr() for x in everything]
        except RuntimeError:  # a batch of gradients has no memory of its own
            return self.launch(dout, saved, gradients_of)
        if dout.is_neg():
            return self.launch(dout.resolve_neg(), saved, gradients_of)
        # Hooks on saved tensors may have brought them back in another layout.
        key = tuple([x.stride() for x in everything] + [address & 15 for address in addresses])
        known = self.backwards.get(key, self)
        if known is None or self.forward is None:
            return self.launch(dout, saved, gradients_of)
        if isinstance(known, Launches):
            return known.run(everything, addresses)
        return self.record(key, dout, saved)

    def package_form(self, dout: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Inputs]:
        """The gradient of the output, the output and the rest if they were kept, and the inputs, as launchers take them."""
        assert self.out is not None
        count = len(self.fields)
        kept = []
        if self.kept:
            out, piece = self.out.inside(saved[count]), saved[count + 1]
            if out.stride() != self.out.stride:  # launchers take its layout for that of the rest, and hooks may have changed it
                out = out.new_empty_strided(out.shape, self.out.stride).copy_(out)
            kept = [out, *(typed(piece, x.offset, x.dtype).as_strided(x.size, x.stride) for x in self.kept)]
        return self.out.inside(dout), kept, self.inputs(saved[:count])

    def launch(self, dout: Tensor, saved: Sequence[Tensor], backward: Any) -> list[Tensor]:
        """The gradients by the launchers."""
        dout, kept, inputs = self.package_form(dout, saved)
        gradients = backward([dout], kept, inputs, self.call)
        return self.in_form(gradients)

    def in_form(self, gradients: list[Tensor]) -> list[Tensor]:
        forms = [form for form, has in zip(self.forms, self.differentiable, strict=True) if has]
        return [outside(x, form.dims) for x, form in zip(gradients, forms, strict=True)]

    def record(self, key: Any, dout: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
        inside, kept, inputs = self.package_form(dout, saved)
        tensors = [dout, *saved]
        views = [(inside, Slot(0, 0, dout.dtype)), *numbered(1, inputs), *numbered(1 + len(self.fields), kept[:1])]
        views += [(x, Slot(len(saved), known.offset, known.dtype)) for x, known in zip(kept[1:], self.kept, strict=True)]
        with Recorder(tensors, views) as recorder:
            gradients = launch_backward([inside], kept, inputs, self.call)
        results = self.in_form(gradients)
        if len(self.backwards) >= BACKWARDS:
            self.backwards.clear()
        copied = any(x.data_ptr() != out.data_ptr() for x, out in zip(kept[:1], saved[len(self.fields) :], strict=False))
        self.backwards[key] = None if copied else recorder.repeatable(results)
        return results


class PlannedAttention(torch.autograd.Function):
    """(plan, addresses of the tensors, the tensors of a call as its caller has them) -> output; differentiable once."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, addresses: list[int], *given: Tensor) -> Tensor:
        results = plan.results(given, addresses)
        ctx.plan = plan
        if len(results) > 1:
            ctx.save_for_backward(*given, *results)
        else:
            ctx.save_for_backward(*given)
        return results[0]

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return first_order_only(ctx, dout) if torch.is_grad_enabled() else planned_gradients(ctx, dout)


def planned_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """For the arguments of `PlannedAttention.forward`."""
    gradients = ctx.plan.gradients(dout, ctx.saved_tensors)  # read once: under activation checkpointing a second read fails
    return None, None, *gradients, *ctx.plan.absent


first_order_only = once_differentiable(planned_gradients)  # where a graph of the gradients is asked for


def plan_of(sight: Sight, inputs: Inputs, call: Call) -> Plan | None:
    """The plan of a checked call, None if its tensors are not the caller's own."""
    if call.stochastic or inputs.v_cov is not None:
        return None
    forms, fields = [], []
    for field, (x, name) in enumerate(zip(inputs, Inputs._fields, strict=True)):
        if x is None:
            continue
        given = sight.tensors[field]
        if field == SEED or given.__class__ not in PLAIN:
            given = x  # a seed, and a gate that is a number, become tensors in every call
        packed = call.varlen and (name in ("q", "k", "v") or (name in ("w_q", "w_k") and call.per_entry))
        form = form_of(given, x, packed)
        if form is None:
            return None
        forms.append(form)
        fields.append(field)
    return Plan(forms, fields, call, inputs.need_gradient())
