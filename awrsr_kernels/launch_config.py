"""Which kernel and which tile for which call, as data; and why a call cannot run on the kernels. Imports no Triton."""

import os
from importlib.util import find_spec

import torch


def unsupported_reason(device: torch.device, dtype: torch.dtype, features: tuple[int, int, int]) -> str | None:
    """Why the Triton kernels cannot run, and what to do about it; None where they can. features: D, D_v and R."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton, Linux only)"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "the tensors are on the CPU (move them to a GPU, or set TRITON_INTERPRET=1 before Triton is imported)"
        return "Triton's interpreter gets bfloat16 products wrong (use float32)" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"the tensors are on {device.type} (move them to an NVIDIA or AMD GPU)"
    if dtype == torch.float64:
        return "the kernels have no float64 on a GPU (use float32, or backend='torch')"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0 (use backend='torch')"
    return None
