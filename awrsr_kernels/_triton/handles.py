"""Compiled kernels, called directly: past Triton's binder, whose work was done when the launch was recorded.

Triton has no interface for this, so each known version's launcher is called as `JITFunction.run` of that version calls it; anything
unexpected (another version, an AMD GPU, scratch memory, sanitizers, hooks) is left to `kernel[grid]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from triton import knobs

CONSTEXPR = "constexpr"
_runtime = knobs.runtime


class Handle(NamedTuple):
    """call(*grid, stream, *fixed, arguments), or with the arguments one by one if not `packed`.

    names: the arguments. compiled: Triton unloads a kernel that nobody holds.
    """

    call: Callable[..., Any]
    grid: tuple[int, int, int]
    fixed: tuple[Any, ...]
    names: tuple[str, ...]
    packed: bool
    compiled: Any


def hooked() -> bool:
    """Whether someone, such as a profiler, wants to hear of launches."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def handle_of(kernel: Any, grid: tuple[int, ...], compiled: Any) -> Handle | None:
    """The handle of what `kernel[grid]` returned, None if it must be launched that way."""
    version = ".".join(triton.__version__.split(".")[:2])
    make = {"3.6": _handle_3_6, "3.9": _handle_3_9}.get(version)
    launcher: Any = getattr(compiled, "run", None)
    if make is None or type(launcher).__name__ != "CudaLauncher" or kernel.pre_run_hooks or knobs.runtime.debug:
        return None
    unusual = launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False)
    if unusual or knobs.compilation.instrumentation_mode or compiled.metadata.tensordesc_meta:
        return None
    x, y, z = (*grid, 1, 1)[:3]
    return make(launcher, compiled, (x, y, z), tuple(kernel.arg_names))


def _handle_3_9(launcher: Any, compiled: Any, grid: tuple[int, int, int], names: tuple[str, ...]) -> Handle:
    """Arguments are a sequence, which may be without those known to the compiler if the annotations are."""
    given = [compiled.src.signature[name] != CONSTEXPR for name in names]
    annotations = [each for each, runtime in zip(launcher.arg_annotations, given, strict=True) if runtime]
    fixed = (
        compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, compiled.packed_metadata,
        None, None, None, None, None, annotations, launcher.kernel_signature,
    )  # fmt: skip
    names = tuple(name for name, runtime in zip(names, given, strict=True) if runtime)
    return Handle(launcher.launch, grid, fixed, names, packed=True, compiled=compiled)


def _handle_3_6(launcher: Any, compiled: Any, grid: tuple[int, int, int], names: tuple[str, ...]) -> Handle:
    """Arguments come one by one, those known to the compiler among them, where nobody looks at them."""
    fixed = (
        compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None, compiled.packed_metadata,
        None, None, None,
    )  # fmt: skip
    return Handle(launcher.launch, grid, fixed, names, packed=False, compiled=compiled)
