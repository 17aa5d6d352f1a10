"""Which ptxas assembles our kernels; those of others are assembled as Triton would.

ptxas 12.8, with which Triton 3.6 assembles for compute capability 9.0, gets some loops around products on tensor cores wrong: it
sets a register that describes an operand at the end of the loop body, but reads it in the first iteration. In half precision
with D_v up to 16, outputs were wrong on an H200; the compile report finds the same in a few other kernels. Triton brings a
newer ptxas for Blackwell; later versions of Triton use that one for 9.0, too.
"""

import contextlib
import functools
import os
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

SOUND = (12, 9)  # the first ptxas without the bug, as `awrsr_kernels.compile_report` checks

_ours = threading.local()  # .depth: above 0 while this thread launches, and so may compile, kernels of ours


@contextlib.contextmanager
def sound_ptxas() -> Iterator[None]:
    """Inside, in this thread, Triton assembles with the newer ptxas that it ships, if `install` found that this is needed."""
    _ours.depth = getattr(_ours, "depth", 0) + 1
    try:
        yield
    finally:
        _ours.depth -= 1


def newer_ptxas() -> Any:
    """Triton's newer ptxas, if it is needed; otherwise None. A TRITON_PTXAS_PATH that is set is respected."""
    from triton import knobs

    if "TRITON_PTXAS_PATH" in os.environ or not hasattr(knobs, "nvidia"):
        return None
    try:
        usual, newer = knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell
    except (RuntimeError, AttributeError):  # a build of Triton without them, for AMD only
        return None
    return newer if _number(usual.version) < SOUND <= _number(newer.version) else None


def install() -> None:
    """Have Triton ask `sound_ptxas` which ptxas to take, if that makes a difference."""
    if newer_ptxas() is None:
        return
    from triton.backends.nvidia import compiler

    if not hasattr(compiler.get_ptxas, "by_thread"):
        compiler.get_ptxas = _by_thread(compiler.get_ptxas, lambda tool: tool)
        # Part of the key under which binaries are cached
        compiler.get_ptxas_version = _by_thread(compiler.get_ptxas_version, _full_version)


def _by_thread(usual: Any, ours: Any) -> Any:
    @functools.wraps(usual)
    def chosen(*arguments: Any, **options: Any) -> Any:
        newer = newer_ptxas() if getattr(_ours, "depth", 0) else None
        return usual(*arguments, **options) if newer is None else ours(newer)

    chosen.by_thread = True  # type: ignore[attr-defined]
    return chosen


def _full_version(tool: Any) -> str:
    """As Triton has it."""
    return _version_of(tool.path)


@functools.cache
def _version_of(path: str) -> str:
    return subprocess.check_output([path, "--version"]).decode()


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
