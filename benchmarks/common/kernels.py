"""Which kernels a call runs, as the profiler sees them: stock attention chooses among several and says nothing about it."""

import os
import re
from collections.abc import Callable, Iterable

import torch

from .clock import wait

COPIES = ("Memcpy", "Memset")
ON_CPU = "aten::_scaled_dot_product_"  # on a CPU the operators of stock attention alone are told apart


def short(name: str) -> str:
    """A kernel's name without its return type, namespaces, template arguments and parameters."""
    name, before = name.replace("(anonymous namespace)::", ""), ""
    while name != before:
        name, before = re.sub(r"<[^<>]*>", "", name), name
    words = name.split("(")[0].split()
    return words[-1].split("::")[-1] if words else name


def seen(function: Callable[[], object], device: torch.device) -> list[str]:
    """Short names of the kernels that a call launches, each once, in order; copies and fills by the driver do not count."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # as in `traced`
    for name, value in (("TEARDOWN_CUPTI", "0"), ("DISABLE_CUPTI_LAZY_REINIT", "1")):
        os.environ.setdefault(name, value)  # a second profile after CUDA graphs may crash otherwise
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    wait(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        kept = function()
        wait(device)
    del kept
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    if device.type == "cuda":
        names: Iterable[str] = (e.name() for e in events if e.device_type() == torch.autograd.DeviceType.CUDA)
        names = (name for name in names if not name.startswith(COPIES))
    else:
        names = (e.name() for e in events if e.name().startswith(ON_CPU))
    return list(dict.fromkeys(map(short, names)))
