"""Tensors as callers have them, views of them as launchers take them, and work of launchers that is repeated.

Tensors come and go as the caller has them, so that no view is made: results are allocated in the caller's form, and views in the
package's form, (entries, heads, rows, features), are made only for the launchers.
"""

import contextlib
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from torch import Tensor

from .. import checks
from ..plans import GATE, NUMBERS, Sight
from ..torch_state import own_tensor
from .record import Launches, Recorder, Slot


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


def outside(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A tensor of the package in the caller's form; dimensions that the caller does not have are of size 1."""
    size, stride = x.shape, x.stride()
    return x.as_strided([size[d] for d in dims], [stride[d] for d in dims], x.storage_offset())


def numbered(first: int, tensors: Sequence[Tensor | None]) -> list[tuple[Tensor, Slot]]:
    """Tensors that are there, and their slots from `first` on."""
    return [(x, Slot(first + i, 0, x.dtype)) for i, x in enumerate(x for x in tensors if x is not None)]


def dims_of(given: Tensor, x: Tensor, packed: bool) -> tuple[int, ...]:
    """The dimensions of `x` that a caller's tensor has. packed: x has a row per packed item."""
    return (2, 1, 3) if packed else tuple(range(x.dim() - given.dim(), x.dim()))


def form_of(given: Tensor, x: Tensor, packed: bool) -> Form | None:
    """The form of a caller's tensor that is `x` inside; None if x lies elsewhere."""
    dims = dims_of(given, x, packed)
    form = Form(tuple(x.shape), x.stride(), dims)
    if given.data_ptr() != x.data_ptr() or given.dtype != x.dtype or given.device != x.device:
        return None
    agrees = outside(x, dims).stride() == given.stride() and tuple(outside(x, dims).shape) == tuple(given.shape)
    return form if agrees and given.numel() == x.numel() else None


class Repeated:
    """Work of launchers on tensors of one signature: it just runs at first, is recorded the second time, and then repeated.

    Args:
        forms: of the tensors that it takes, the first of which are queries.
        fields: where these are among a sight's tensors.
    """

    def __init__(self, forms: list[Form], fields: list[int]) -> None:
        self.forms, self.fields = forms, fields
        self.take = itemgetter(*fields)
        self.launches: Launches | None = None
        self.calls = 0  # that succeeded

    def launched(self, views: list[Tensor]) -> list[Tensor]:
        """What the launchers make of the tensors, which are views in the package's form, each another object."""
        raise NotImplementedError

    def taken(self, sight: Sight) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The tensors of a call of this signature, and their addresses."""
        tensors, pointers = sight.tensors, sight.pointers
        if tensors[GATE].__class__ in NUMBERS:
            tensors[GATE] = checks.gate(tensors[GATE], "additive", self.forms[0].size[1], tensors[0])
            pointers[GATE] = tensors[GATE].data_ptr()
        return self.take(tensors), self.take(pointers)

    def views(self, given: Sequence[Tensor]) -> list[Tensor]:
        return [form.inside(x) for form, x in zip(self.forms, given, strict=True)]

    def results(self, given: Sequence[Tensor], addresses: Sequence[int]) -> list[Tensor]:
        """What `launched` returns for views of these tensors, by launchers or repeated."""
        if self.launches is not None:
            return self.launches.run(given, addresses)
        views = self.views(given)
        with Recorder(given, numbered(0, views)) if self.calls == 1 else contextlib.nullcontext() as recorder:
            results = self.launched(views)
        self.calls += 1
        if recorder is not None:
            self.launches = recorder.repeatable(results)
        return [own_tensor(x) for x in results]
