"""What a forked process lacks: the threads of polars and of torch, for which it would wait for ever.

A server that loads a model and then forks its workers (gunicorn --preload), and a DataLoader with workers, fork a process that has
used both. In the fork torch is held to one thread, and functions that need polars' threads (reading, writing, joins, filters;
not columns and their values) are run by a new interpreter: `unforked`.
"""

import io
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import wraps
from multiprocessing import spawn
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
PROGRAM = """
import pickle, sys
with open(int(sys.argv[1]), "rb") as task:
    sys.path[:] = pickle.load(task)
    from awrsr.processes import answer
    answer(task)
"""
MOST_THREADS = 1024
_forked = False


def forked() -> bool:
    """Whether this process was forked from one that had imported this package."""
    return _forked


def _note_the_fork() -> None:
    global _forked
    _forked = True
    if (torch := sys.modules.get("torch")) and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_note_the_fork)


def set_threads(count: int) -> None:
    """Have torch use this many CPU threads; 0 leaves the number as it is. A forked process keeps to one, with a warning."""
    import torch

    if not 0 <= count <= MOST_THREADS:
        raise ValueError(f"threads is {count}, must be at least 0 and at most {MOST_THREADS}")
    if count > 1 and _forked:
        warnings.warn(f"threads is {count}, but a forked process computes with one; start it by spawn to have more", stacklevel=3)
    elif count:
        torch.set_num_threads(count)


def unforked(function: Function) -> Function:
    """Have a new interpreter run the function whenever a forked process calls it. The function is one of a module; what it takes,
    apart from streams, and what it returns or raises can be pickled."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return _apart(call, args, options) if _forked else function(*args, **options)

    return call  # type: ignore[return-value]


class Content(io.BytesIO):
    """What a stream held, under its name."""

    def __init__(self, stream: Any) -> None:
        content = stream.read()
        super().__init__(content.encode() if isinstance(content, str) else content)
        self.name = getattr(stream, "name", None)


def _apart(function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    python = os.fsdecode(spawn.get_executable())
    with tempfile.TemporaryFile() as task:  # standard input may be what the function reads
        pickle.dump(sys.path, task)
        pickle.dump((function, [Content(each) if hasattr(each, "read") else each for each in args], options), task)
        task.flush()
        task.seek(0)
        command = [python, "-c", PROGRAM, str(task.fileno())]
        done = subprocess.run(command, stdout=subprocess.PIPE, pass_fds=[task.fileno()])
    if done.returncode:
        raise RuntimeError(
            f"{function.__name__} needs a new Python interpreter in a forked process, but {python} ended with status "
            f"{done.returncode}; name another with multiprocessing.set_executable, or start this process by spawn"
        )
    result, error, warned = pickle.loads(done.stdout)
    for warning in warned:
        warnings.warn(warning, stacklevel=4)
    if error is not None:
        raise error
    return result


def answer(task: Any) -> None:
    """What the new interpreter does: calls the function of the task, and writes its result, error and warnings to its output."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # where the function's own output goes
    result = error = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            function, args, options = pickle.load(task)
            result = function(*args, **options)
        except Exception as caught:
            error = caught
    with output:
        pickle.dump((result, error, [each.message for each in warned]), output)
