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
from torch import Tensor, empty_like
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import driver

from .handles import Handle, handle_of, hooked
from .launch import recording, start
from .problem import PIECE

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Slot(NamedTuple):
    """Where an argument comes from."""

    number: int  # of a tensor, and after those of an allocation
    offset: int  # in bytes
    dtype: torch.dtype


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]
    slots: dict[str, Slot]
    options: dict[str, Any]
    compiled: Any  # what `kernel[grid]` returns: nothing in the interpreter


class Recorder(TorchDispatchMode):
    """Records the launches of what runs inside.

    Args:
        tensors: with which these launches can be repeated, later with others in their place.
        inputs: what the launchers get, views of those, and where each lies among them. Views are told apart by identity, as they
            may share memory.
    """

    def __init__(self, tensors: Sequence[Tensor], inputs: Sequence[tuple[Tensor, Slot]]) -> None:
        super().__init__()
        self.tensors, self.inputs = tensors, inputs
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
            compiled = start(kernel, grid, **arguments, **options) if 0 not in grid else None
            slots = {name: self.slot(x) for name, x in tensors.items()}
        known = {name: slot for name, slot in slots.items() if slot is not None}
        self.complete = self.complete and len(known) == len(slots)
        constants = {name: x for name, x in arguments.items() if name not in tensors}
        self.launches.append(Launch(kernel, grid, constants, known, options, compiled))

    def slot(self, x: Tensor) -> Slot | None:
        """Where a tensor comes from. Allocations are numbered after the tensors."""
        for each, slot in self.inputs:
            if x is each:
                return slot
        for number, made in enumerate(self.made):
            if x.untyped_storage()._cdata == made.untyped_storage()._cdata:
                return Slot(len(self.tensors) + number, int(x.storage_offset()) * x.itemsize, x.dtype)
        return None

    def repeatable(self, results: Sequence[Tensor]) -> "Launches | None":
        """What was recorded, to repeat, if that can be. results: what it returns, in the form in which this is to be allocated."""
        slots = [self.slot(x) for x in results]
        own = [slot.number - len(self.tensors) for slot in slots if slot is not None and not slot.offset]
        if not self.complete or not self.launches or len(set(own)) < len(slots) or min(own) < 0:
            return None
        if any(x.numel() * x.itemsize != self.made[n].untyped_storage().nbytes() for n, x in zip(own, results, strict=True)):
            return None
        return Launches(self, dict(zip(own, results, strict=True)))


class Launches:
    """Allocations and launches, to be repeated with other tensors of the same shapes, strides, dtypes and alignment."""

    def __init__(self, recorder: Recorder, results: dict[int, Tensor]) -> None:
        tensors, made = recorder.tensors, recorder.made
        device, first = tensors[0].device, len(tensors)
        self.index = device.index if device.type == "cuda" else None
        self.memory = [_allocation(x, tensors) for x in results.values()]
        self.returned = len(results)
        ran = [launch for launch in recorder.launches if 0 not in launch.grid]
        # Scratch memory is one piece, with an offset for each allocation
        used = {slot.number - first for launch in ran for slot in launch.slots.values()}
        offsets, total = {}, 0
        for number, x in enumerate(made):
            if number not in results and number in used:
                offsets[number] = total
                total += -(-x.untyped_storage().nbytes() // PIECE) * PIECE
        if total:
            self.memory.append((None, partial(torch.empty_strided, (total,), (1,), dtype=torch.uint8, device=device)))
        order = {number: first + i for i, number in enumerate(results)}

        def place(slot: Slot) -> Slot:
            number = slot.number - first
            if number in offsets:
                return slot._replace(number=first + len(results), offset=slot.offset + offsets[number])
            return slot if number < 0 else slot._replace(number=order[number])

        self.launches = [
            launch._replace(slots={name: place(slot) for name, slot in launch.slots.items()}, compiled=None) for launch in ran
        ]
        # One list of values serves every launch: addresses, then addresses with an offset, then constants
        self.count = first + len(self.memory)
        self.offsets = sorted({slot[:2] for launch in self.launches for slot in launch.slots.values() if slot.offset})
        self.constants: list[Any] = []
        self.handles: list[tuple[Handle, Callable[[list[Any]], tuple[Any, ...]]]] | None = None
        handles = [handle_of(launch.kernel, launch.grid, launch.compiled) for launch in ran]
        if None not in handles:
            both = zip(self.launches, handles, strict=True)
            self.handles = [(handle, self._pick(launch, handle.names)) for launch, handle in both if handle is not None]
            self.stream_of = driver.active.get_current_stream
            self.stream_index = driver.active.get_current_device() if self.index is None else self.index

    def _pick(self, launch: Launch, names: Sequence[str]) -> Callable[[list[Any]], tuple[Any, ...]]:
        """A function that takes a launch's arguments out of the list of values."""
        places = []
        for name in names:
            if name in launch.slots:
                slot = launch.slots[name]
                places.append(self.count + self.offsets.index(slot[:2]) if slot.offset else slot.number)
            else:
                places.append(self.count + len(self.offsets) + len(self.constants))
                self.constants.append(launch.constants[name])
        return itemgetter(*places)

    def run(self, tensors: Sequence[Tensor], pointers: Sequence[int]) -> list[Tensor]:
        """The results for these tensors, which lie at `pointers`."""
        made = [allocate() if like is None else empty_like(tensors[like]) for like, allocate in self.memory]
        if self.handles is None or hooked():
            self.run_by_grid([*tensors, *made])
        elif self.index is not None and self.index != torch.cuda.current_device():
            with torch.cuda.device(self.index):
                self.run_by_handle(pointers, made)
        else:
            self.run_by_handle(pointers, made)
        return made[: self.returned]

    def run_by_handle(self, pointers: Sequence[int], made: list[Tensor]) -> None:
        values = [*pointers, *[x.data_ptr() for x in made]]
        if self.offsets:
            values += [values[number] + offset for number, offset in self.offsets]
        values += self.constants
        stream = self.stream_of(self.stream_index)
        assert self.handles is not None
        for (call, (x, y, z), fixed, _, packed, _), pick in self.handles:
            if packed:
                call(x, y, z, stream, *fixed, pick(values))
            else:
                call(x, y, z, stream, *fixed, *pick(values))

    def run_by_grid(self, tensors: Sequence[Tensor]) -> None:
        """The same launches by `kernel[grid]`, the path that always works."""
        elsewhere = self.index is not None and self.index != torch.cuda.current_device()
        with torch.cuda.device(self.index) if elsewhere else contextlib.nullcontext():
            for launch in self.launches:
                filled = {name: typed(tensors[number], offset, dtype) for name, (number, offset, dtype) in launch.slots.items()}
                start(launch.kernel, launch.grid, **launch.constants, **filled, **launch.options)


def typed(x: Tensor, offset: int, dtype: torch.dtype) -> Tensor:
    """A tensor that begins so many bytes later; of a kernel's argument only address and dtype matter."""
    return x if x.dtype == dtype and not offset else bytes_of(x)[offset:].view(dtype)


def bytes_of(x: Tensor) -> Tensor:
    """The memory of a tensor from its first element on, as bytes."""
    count = x.untyped_storage().nbytes() // x.itemsize - int(x.storage_offset())
    return x.as_strided((count,), (1,), x.storage_offset()).view(torch.uint8)


def _allocation(x: Tensor, tensors: Sequence[Tensor]) -> tuple[int | None, Callable[[], Tensor]]:
    """How to allocate memory like x: the number of a tensor that it is like, as this is fastest, or a function."""
    size, stride, dtype = tuple(x.shape), x.stride(), x.dtype
    allocate = partial(torch.empty_strided, size, stride, dtype=dtype, device=x.device)
    for number, each in enumerate(tensors):
        if each.dtype == dtype and tuple(each.shape) == size and torch.empty_like(each).stride() == stride:
            return number, allocate
    return None, allocate
