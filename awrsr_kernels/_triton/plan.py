"""The plan of a call: what its signature decides, and the way from the caller's tensors straight to the recorded launches.

A `Plan` is made when a call has passed all checks (`backends.run`), and runs it. The second call runs the launchers under a
`Recorder`, forward and backward; later ones repeat the launches (`repeat.py`, `record.py`). What cannot be recorded goes to the
launchers each time, from here. In stochastic attention the caller's tensors are points, made of means and covariances before.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks
from ..call import Call, Inputs
from ..plans import PLAIN, SEED, Sight, state
from .autograd import gradients_of, launch_backward, launch_forward
from .record import Launches, Recorder, Slot, bytes_of, typed
from .repeat import Form, Repeated, dims_of, form_of, numbered, outside

UNKNOWN = object()
BACKWARDS = 8  # recordings of a plan, by the strides of the gradients that come in
NOT_LEARNED = ("bounds", "seed")
IN_ORDER = (*(name for name in Inputs._fields if name not in NOT_LEARNED), *NOT_LEARNED)  # of the tensors that a plan takes


class Kept(NamedTuple):
    """Where a tensor that the backward needs lies in the piece of memory that is kept."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int  # in bytes


class Plan(Repeated):
    """What the signature of a call decides. Its tensors are the fields of `Inputs` that the call has, in the order `IN_ORDER`."""

    def __init__(self, forms: list[Form], names: list[str], call: Call, learns: bool) -> None:
        super().__init__(forms, [Inputs._fields.index(name) for name in names])
        self.names, self.call, self.learns = names, call, learns
        self.outputs = 1 + call.stochastic
        self.backwards: dict[Any, Launches | None] = {}
        self.outs: list[Form] = []
        self.kept: list[Kept] = []
        self.learned = sum(name not in NOT_LEARNED for name in names)
        self.absent = [None] * (len(names) - self.learned)

    def __call__(self, sight: Sight) -> tuple[Tensor, ...]:
        """The outputs for a call of this signature: one, in stochastic attention two."""
        if self.call.dropout_p:
            sight.tensors[SEED] = checks.seed(sight.tensors[SEED], sight.tensors[0].device)
            sight.pointers[SEED] = sight.tensors[SEED].data_ptr()
        given, addresses = self.taken(sight)
        if self.learns:
            outs: tuple[Tensor, ...] = PlannedAttention.apply(self, addresses, *given)
            return outs
        return tuple(self.results(given, addresses)[: self.outputs])

    def inputs(self, views: Sequence[Tensor]) -> Inputs:
        named = dict(zip(self.names, views, strict=True))
        return Inputs(**{name: named.get(name) for name in Inputs._fields})  # type: ignore[arg-type]  # q, k, v are there

    def launched(self, views: list[Tensor]) -> list[Tensor]:
        """The outputs, in the caller's form, and if the backward needs more than the inputs, a piece of memory with the rest.

        It is so in every call of a signature, as activation checkpointing compares what is saved.
        """
        made, dims = launch_forward(self.inputs(views), self.call, self.learns, together=True), self.forms[0].dims
        outs, kept = made[: self.outputs], made[self.outputs :]
        self.outs = [Form(tuple(out.shape), out.stride(), dims) for out in outs]
        self.kept = [Kept(tuple(x.shape), x.stride(), x.dtype, int(x.storage_offset()) * x.itemsize) for x in kept]
        return [outside(out, dims) for out in outs] + [bytes_of(x) for x in kept[:1]]

    def gradients(self, douts: Sequence[Tensor], saved: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the caller's tensors that have one. saved: those tensors, then what was kept."""
        everything = [*douts, *saved]
        plain = not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()
        if not plain or not all(x.__class__ in PLAIN for x in everything):
            return self.launch(douts, saved, gradients_of)
        try:
            addresses = [x.data_ptr() for x in everything]
        except RuntimeError:  # a batch of gradients has no memory of its own
            return self.launch(douts, saved, gradients_of)
        if any(dout.is_neg() for dout in douts):
            return self.launch([dout.resolve_neg() for dout in douts], saved, gradients_of)
        # Hooks on saved tensors may have brought them back in another layout or dtype.
        if self.kept and (addresses[-1] % 16 or not saved[-1].is_contiguous()):
            return self.launch(douts, [*saved[:-1], saved[-1].clone(memory_format=torch.contiguous_format)], gradients_of)
        key = (
            *state(saved[0].dtype), *[(x.shape, x.stride(), x.dtype) for x in everything], *[address & 15 for address in addresses],
        )  # fmt: skip
        known = self.backwards.get(key, UNKNOWN)
        if known is None or self.launches is None:
            return self.launch(douts, saved, gradients_of)
        if isinstance(known, Launches):
            return known.run(everything, addresses)
        return self.record(key, douts, saved)

    def package_form(
        self, douts: Sequence[Tensor], saved: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The gradients of the outputs, the outputs and the rest if they were kept, and the inputs, as launchers take them."""
        count = len(self.fields)
        kept = []
        if self.kept:
            for form, own in zip(self.outs, saved[count:], strict=False):
                out = form.inside(own)
                if out.stride() != form.stride:  # launchers take it for that of the rest, and hooks may have changed it
                    out = out.new_empty_strided(out.shape, form.stride).copy_(out)
                kept.append(out)
            kept += [typed(saved[-1], x.offset, x.dtype).as_strided(x.size, x.stride) for x in self.kept]
        return [form.inside(dout) for form, dout in zip(self.outs, douts, strict=True)], kept, self.views(saved[:count])

    def launch(self, douts: Sequence[Tensor], saved: Sequence[Tensor], backward: Any) -> list[Tensor]:
        """The gradients by the launchers."""
        inside, kept, views = self.package_form(douts, saved)
        return self.in_form(backward(inside, kept, self.inputs(views), self.call))

    def in_form(self, gradients: list[Tensor]) -> list[Tensor]:
        return [outside(x, form.dims) for x, form in zip(gradients, self.forms[: self.learned], strict=True)]

    def record(self, key: Any, douts: Sequence[Tensor], saved: Sequence[Tensor]) -> list[Tensor]:
        inside, kept, views = self.package_form(douts, saved)
        outs, rest, first = kept[: self.outputs], kept[self.outputs :], len(douts) + len(views)
        slots = numbered(0, inside) + numbered(len(douts), views) + numbered(first, outs)
        slots += [(x, Slot(first + len(outs), known.offset, known.dtype)) for x, known in zip(rest, self.kept, strict=True)]
        with Recorder([*douts, *saved], slots) as recorder:
            gradients = launch_backward(inside, kept, self.inputs(views), self.call)
        results = self.in_form(gradients)
        if len(self.backwards) >= BACKWARDS:
            self.backwards.clear()
        copied = any(x.data_ptr() != out.data_ptr() for x, out in zip(outs, saved[len(views) :], strict=False))
        self.backwards[key] = None if copied else recorder.repeatable(results)
        return results


class PlannedAttention(torch.autograd.Function):
    """(plan, addresses of the tensors, the tensors of a call as its caller has them) -> outputs; differentiable once."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, addresses: list[int], *given: Tensor) -> tuple[Tensor, ...]:
        results = plan.results(given, addresses)
        ctx.plan = plan
        if len(results) > plan.outputs:
            ctx.save_for_backward(*given, *results)
        else:
            ctx.save_for_backward(*given)
        return tuple(results[: plan.outputs])

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        return first_order_only(ctx, *douts) if torch.is_grad_enabled() else planned_gradients(ctx, *douts)


def planned_gradients(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
    """For the arguments of `PlannedAttention.forward`."""
    gradients = ctx.plan.gradients(douts, ctx.saved_tensors)  # read once: under activation checkpointing a second read fails
    return None, None, *gradients, *ctx.plan.absent


first_order_only = once_differentiable(planned_gradients)  # where a graph of the gradients is asked for


def plan_of(sight: Sight, inputs: Inputs, call: Call) -> Plan | None:
    """The plan of a checked call, None if its tensors are not the caller's own. The sight gets those that the call has made."""
    made = ["q", "k"] * call.stochastic + ["w_q", "w_k"] * (call.refinement == "stochastic")
    forms, names = [], []
    for name in IN_ORDER:
        x, field = getattr(inputs, name), Inputs._fields.index(name)
        if x is None:
            continue
        given = sight.tensors[field]
        packed = call.varlen and (name in ("q", "k", "v", "v_cov") or (name in ("w_q", "w_k") and call.per_entry))
        if field == SEED or given.__class__ not in PLAIN:
            given = x  # a seed, and a gate that is a number, become tensors in every call
        elif name in made:
            given = sight.tensors[field] = outside(x, dims_of(given, x, packed))
        form = form_of(given, x, packed)
        if form is None:
            return None
        forms.append(form)
        names.append(name)
    return Plan(forms, names, call, inputs.need_gradient())
