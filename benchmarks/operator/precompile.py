"""Fill Triton's disk cache in parallel: compiling is the slow part of a first run on a GPU, and one process compiles in turn."""

import multiprocessing
import time

import torch

from .measure import gradients
from .providers import PROVIDERS
from .workloads import Task, build


def compile_one(task: Task) -> str | None:
    """Forward and backward of every batch of a task; why not, if the kernels cannot."""
    try:
        for layout in task.layouts:
            for batch in build(task, layout):
                gradients(PROVIDERS["triton"].call(batch), batch)
        torch.cuda.synchronize()
    except Exception as error:  # the timed run meets the same error and reports it
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def precompile(tasks: list[Task], processes: int) -> str:
    """Run each task's Triton calls once in `processes` processes, so that this one finds the kernels on disk.

    Returns what to print. The tensors are as large as in the run: Triton compiles for the divisibility of sizes and strides, too.
    """
    tasks = [t for t in dict.fromkeys(tasks) if t.device == "cuda"]
    if not tasks:
        return "nothing to precompile: the Triton kernels need a GPU"
    begin = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(min(processes, len(tasks))) as pool:
        found = pool.map(compile_one, tasks, chunksize=1)
    done = f"precompiled {found.count(None)} of {len(found)} problems in {time.perf_counter() - begin:.1f} s"
    return "\n".join([done, *dict.fromkeys(x for x in found if x)])
