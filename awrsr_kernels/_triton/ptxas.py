"""Which ptxas assembles the kernels.

ptxas 12.8, with which Triton 3.6 assembles for compute capability 9.0, gets some loops around products on tensor cores wrong: it
sets a register that describes an operand at the end of the loop, and reads it in the first turn. In half precision with D_v up to
16 outputs were wrong on an H200; the compile report finds the same in a few other kernels. Triton brings a newer ptxas for
Blackwell, and later versions of it take that one for 9.0, too.
"""

import os

SOUND = (12, 9)  # the first ptxas that sets what it reads, as `awrsr_kernels.compile_report` checks


def prefer_newer_ptxas() -> str | None:
    """Let Triton assemble with the newer ptxas that it brings, for this process and what it starts; its path, None if all is well.

    TRITON_PTXAS_PATH, where it is set, is left as it is.
    """
    from triton import knobs

    if "TRITON_PTXAS_PATH" in os.environ or not hasattr(knobs, "nvidia"):
        return None
    try:
        usual, newer = knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell
    except (RuntimeError, AttributeError):  # a Triton without them, for AMD alone
        return None
    if _number(usual.version) >= SOUND or _number(newer.version) < SOUND:
        return None
    os.environ["TRITON_PTXAS_PATH"] = newer.path
    from triton.backends.nvidia import compiler

    compiler.get_ptxas_version.cache_clear()  # part of the name under which binaries are kept
    return str(newer.path)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
