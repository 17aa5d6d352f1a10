"""Several machines: who trains together, how long they wait for each other, and how the first process decides for all.

The machines need not share a disk. Only the first process reads and writes the run folder; the others get its state from it.
"""

import io
import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from ..config import TrainingOptions
from ..files import first_process
from ..run_folder import flat

PATIENCE = timedelta(minutes=5)  # how long a process waits for the others, at the start and in every step
OF_ONE_MACHINE = {"data", "path", "threads", "progress", "logger", "backend"}  # may differ between machines; data: the file
LAUNCHED = ("RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # what launchers set in each process
START = "torchrun --nnodes {} --nproc-per-node {} --node-rank N --master-addr HOST --master-port PORT -m awrsr train ..."


def check_launch(options: TrainingOptions) -> None:
    """Raise ValueError unless a launcher started the processes that the options name; otherwise they would wait for ever."""
    together, world = options.devices * options.nodes, os.environ.get("WORLD_SIZE")
    start = START.format(options.nodes, options.devices)
    if options.nodes > 1 and not any(name in os.environ for name in LAUNCHED):
        raise ValueError(f"nodes is {options.nodes}, but no launcher started this process; run on each machine: {start}")
    if "RANK" in os.environ and world and int(world) != together:
        raise ValueError(
            f"devices is {options.devices} and nodes is {options.nodes}, so {together} processes must train together, but the "
            f"launcher started WORLD_SIZE={world}; run on each machine: {start}"
        )


def agreed(options: TrainingOptions, config: dict[str, Any], decide: Callable[[], dict[str, Any] | None]) -> Any:
    """What `decide` returns or raises. If processes of several machines train together, the first one decides for all of them.

    Raises:
        ValueError: another process was started with other options or data.
        ConnectionError: the others did not come within PATIENCE.
    """
    if options.nodes == 1 or "RANK" not in os.environ:
        return decide()
    join()
    made: list[Any] = [None, None]
    if first_process():
        try:
            made[0] = content = io.BytesIO()
            torch.save(decide(), content)
        except Exception as error:
            made = [None, error]
    own = {name: value for name, value in flat(config).items() if name.split(".")[-1] not in OF_ONE_MACHINE}
    configs: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(configs, own)
    for rank, other in enumerate(configs):
        for name in configs[0]:
            if other.get(name) != configs[0][name]:
                its = f"{name} {other.get(name)!r}, but the first has {configs[0][name]!r}"
                raise ValueError(f"process {rank} has {its}: all processes must be started with the same options and data")
    distributed.broadcast_object_list(made, src=0)
    if made[1] is not None:
        raise made[1]
    made[0].seek(0)
    return torch.load(made[0], map_location="cpu", weights_only=True)


def join() -> None:
    """Meet the other processes at the address that the launcher gave; Lightning then finds them met."""
    if distributed.is_initialized():
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:  # torch's errors of stores and sockets
        raise ConnectionError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at {where} within "
            f"{PATIENCE.total_seconds():.0f} s: {str(error).splitlines()[0]}"
        ) from error


def let_sigterm_end_it() -> None:
    """SIGTERM ends this process at once. Lightning's own answer tells the other processes first, and waits for them for ever when
    they are gone; what is on the disk is complete at any time."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
