"""Launches, recorded once and repeated with other tensors.

A `Recorder` watches the launchers of a call at work: it sees every allocation, every operation of torch and every launch. What it
saw becomes `Launches`: the memory to allocate, and for each launch its kernel, grid and flat arguments, in which each tensor is a
slot (the number of an input or of an allocation, and an offset) and everything else a constant. No tensor is kept. If an operation
of torch computed something, such as a copy of an input whose last dimension is not contiguous, there is nothing to repeat.

Slots are filled with addresses where a kernel's compiled handle can be called (`handles.py`), and with tensors elsewhere, for
`kernel[grid]`: in the interpreter, under a profiler's hooks, and with launchers that are not known.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import driver

from .handles import Handle, handle_of, hooked
from .launch import recording

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Slot(NamedTuple):
    number: int  # of an input, or after those of an allocation
    offset: int  # in bytes


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]
    slots: dict[str, Slot]
    options: dict[str, Any]
    compiled: Any  # what `kernel[grid]` returns: nothing in the interpreter


class Recorder(TorchDispatchMode):
    """Records the launches of what runs inside, whose inputs are these tensors, of distinct identity."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs = list(inputs)
        self.made: list[Tensor] = []
        self.launches: list[Launch] = []
        self.complete = True  # whether repeating the launches repeats everything

    def __enter__(self) -> "Recorder":
        recording.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        recording.recorder = None
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ALLOCATIONS:
            self.made.append(result)
        elif not function.is_view:
            self.complete = False
        return result

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]) -> None:
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        with _disable_current_modes():
            compiled = kernel[grid](**arguments, **options) if 0 not in grid else None
            slots = {name: self.slot(x) for name, x in tensors.items()}
        known = {name: slot for name, slot in slots.items() if slot is not None}
        self.complete = self.complete and len(known) == len(slots)
        constants = {name: x for name, x in arguments.items() if name not in tensors}
        self.launches.append(Launch(kernel, grid, constants, known, options, compiled))

    def slot(self, x: Tensor) -> Slot | None:
        """Inputs are told apart by identity, as they may share memory, and allocations by their memory."""
        for number, each in enumerate(self.inputs):
            if x is each:
                return Slot(number, 0)
        for number, each in enumerate(self.made):
            if x.untyped_storage()._cdata == each.untyped_storage()._cdata:
                return Slot(len(self.inputs) + number, int(x.storage_offset()) * x.itemsize)
        return None

    def repeatable(self, results: Sequence[Tensor]) -> "Launches | None":
        """What was recorded, to repeat; results: what it returns, in the form in which it is to be allocated."""
        slots = [self.slot(x) for x in results]
        own = [slot for slot in slots if slot is not None and slot.number >= len(self.inputs) and not slot.offset]
        if not self.complete or not self.launches or len({slot.number for slot in own}) < len(results):
            return None
        made = list(self.made)
        for slot, x in zip(own, results, strict=True):
            at = slot.number - len(self.inputs)
            if x.numel() * x.itemsize != made[at].untyped_storage().nbytes():
                return None
            made[at] = x
        return Launches(self.inputs, made, self.launches, [slot.number for slot in own])


class Launches:
    """Allocations and launches, to be repeated with other tensors of the same shapes, strides, dtypes and alignment."""

    def __init__(self, inputs: list[Tensor], made: list[Tensor], launches: list[Launch], results: list[int]) -> None:
        device = inputs[0].device
        self.index = device.index if device.type == "cuda" else None
        used = {slot.number for launch in launches for slot in launch.slots.values()} | set(results)
        kept = [number for number in range(len(inputs) + len(made)) if number < len(inputs) or number in used]
        place = {number: i for i, number in enumerate(kept)}
        self.results = [place[number] - len(inputs) for number in results]
        self.memory = [_allocation(x, inputs) for i, x in enumerate(made) if len(inputs) + i in place]
        self.launches = [
            launch._replace(slots={name: Slot(place[at], offset) for name, (at, offset) in launch.slots.items()}, compiled=None)
            for launch in launches
            if 0 not in launch.grid
        ]
        # One list of values serves every launch: addresses, then addresses with an offset, then constants
        self.offsets = sorted({slot for launch in self.launches for slot in launch.slots.values() if slot.offset})
        self.constants: list[Any] = []
        self.handles: list[tuple[Handle, Callable[[list[Any]], tuple[Any, ...]]]] | None = None
        ran = [launch.compiled for launch in launches if 0 not in launch.grid]
        handles = [handle_of(launch.kernel, launch.grid, compiled) for launch, compiled in zip(self.launches, ran, strict=True)]
        if all(handle is not None for handle in handles):
            count = len(kept)
            self.handles = [
                (handle, self._pick(launch, handle.names, count))
                for launch, handle in zip(self.launches, handles, strict=True)
                if handle is not None
            ]

    def _pick(self, launch: Launch, names: Sequence[str], count: int) -> Callable[[list[Any]], tuple[Any, ...]]:
        """A function that takes a launch's arguments out of the list of values."""
        places = []
        for name in names:
            if name in launch.slots:
                slot = launch.slots[name]
                places.append(count + self.offsets.index(slot) if slot.offset else slot.number)
            else:
                places.append(count + len(self.offsets) + len(self.constants))
                self.constants.append(launch.constants[name])
        return itemgetter(*places)

    def run(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> list[Tensor]:
        """The results for these inputs. pointers: their addresses."""
        made = []
        for like, allocate in self.memory:
            made.append(allocate() if like is None else torch.empty_like(tensors[like]))
        if self.index is not None and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                self._run(tensors, pointers, made)
        else:
            self._run(tensors, pointers, made)
        return [made[number] for number in self.results]

    def _run(self, tensors: Sequence[Tensor], pointers: Sequence[int], made: list[Tensor]) -> None:
        if self.handles is None or hooked():
            return self.run_by_grid([*tensors, *made])
        values = [*pointers, *(x.data_ptr() for x in made)]
        if self.offsets:
            values += [values[number] + offset for number, offset in self.offsets]
        values += self.constants
        active = driver.active
        stream = active.get_current_stream(active.get_current_device() if self.index is None else self.index)
        for (call, grid, fixed, _, packed), pick in self.handles:
            if packed:
                call(*grid, stream, *fixed, pick(values))
            else:
                call(*grid, stream, *fixed, *pick(values))
        return None

    def run_by_grid(self, tensors: Sequence[Tensor]) -> None:
        """The same launches by `kernel[grid]`, the path that always works."""
        for launch in self.launches:
            filled = {name: _at(tensors[number], offset) for name, (number, offset) in launch.slots.items()}
            launch.kernel[launch.grid](**launch.constants, **filled, **launch.options)


def _at(x: Tensor, offset: int) -> Tensor:
    """A tensor that begins so many bytes later; kernels only read its address and dtype."""
    return x if not offset else x.as_strided((1,), (1,), x.storage_offset() + offset // x.itemsize)


def _allocation(x: Tensor, inputs: list[Tensor]) -> tuple[int | None, Callable[[], Tensor]]:
    """How to allocate memory like x: the number of an input that it is like, as this is fastest, or a function."""
    size, stride, dtype = tuple(x.shape), x.stride(), x.dtype
    for number, each in enumerate(inputs):
        if each.dtype == dtype and tuple(each.shape) == size:
            with contextlib.suppress(RuntimeError):
                if torch.empty_like(each).stride() == stride:
                    return number, partial(torch.empty_strided, size, stride, dtype=dtype, device=x.device)
    return None, partial(torch.empty_strided, size, stride, dtype=dtype, device=x.device)
