"""Command lines of the benchmarks: their help, and the flags that several share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from awrsr_kernels.tuning.arguments import number, whole

SECONDS = number(0, 1e9, "a number of seconds")
FLAGS: dict[str, dict[str, Any]] = {
    "--device": {"choices": ("cpu", "cuda"), "help": "device to measure on (default: cuda if there is a GPU)"},
    "--threads": {
        "type": whole(1),
        "metavar": "N",
        "help": "number of CPU threads; on a busy machine, fewer threads than cores give steadier times",
    },
    "--reps": {"type": whole(1), "metavar": "N", "help": "number of samples of each measurement, instead of a time budget"},
    "--budget": {"type": SECONDS, "metavar": "S", "help": "seconds of timing per problem"},
    "--seed": {"type": whole(0), "default": 0, "help": "random seed (default 0)"},
    "--out": {"type": Path, "metavar": "DIR", "help": "write results.json and results.md to this folder"},
}


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is a module's docstring: its first sentence, the options, then the rest, line by line."""
    first, _, rest = (doc or "").partition("\n\n")
    shown, usage = argparse.RawDescriptionHelpFormatter, "%(prog)s [options]; --help lists them with examples"
    return argparse.ArgumentParser(usage=usage, description=first, epilog=rest, formatter_class=shown)


def add_flag(add: Callable[..., Any], name: str, **changes: Any) -> None:
    """Add one of the shared flags. changes: arguments of `add_argument` that differ in this benchmark."""
    add(name, **(FLAGS[name] | changes))


def settle_machine(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Choose the device if none is given, and set the number of CPU threads."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: was cuda, but torch finds no GPU here (use cpu)")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
