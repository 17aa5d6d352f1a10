"""Which ptxas assembles the kernels.

ptxas 12.8, with which Triton 3.6 assembles for compute capability 9.0, gets some loops around products on tensor cores wrong: it
sets a register that describes an operand at the end of the loop body, but reads it in the first iteration. In half precision
with D_v up to 16, outputs were wrong on an H200; the compile report finds the same in a few other kernels. Triton brings a
newer ptxas for Blackwell; later versions of Triton use that one for 9.0, too.
"""

import os

SOUND = (12, 9)  # the first ptxas without the bug, as `awrsr_kernels.compile_report` checks


def prefer_newer_ptxas() -> str | None:
    """Make Triton use the newer ptxas that it ships, in this process and its children. Returns its path, or None if not needed.

    A TRITON_PTXAS_PATH that is already set is respected.
    """
    from triton import knobs

    if "TRITON_PTXAS_PATH" in os.environ or not hasattr(knobs, "nvidia"):
        return None
    try:
        usual, newer = knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell
    except (RuntimeError, AttributeError):  # a build of Triton without them, for AMD only
        return None
    if _number(usual.version) >= SOUND or _number(newer.version) < SOUND:
        return None
    os.environ["TRITON_PTXAS_PATH"] = newer.path
    from triton.backends.nvidia import compiler

    compiler.get_ptxas_version.cache_clear()  # the version is part of the key under which binaries are cached
    return str(newer.path)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
