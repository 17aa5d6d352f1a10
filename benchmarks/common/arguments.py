"""Command lines of the benchmarks: their help, and the flags that several share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from awrsr_kernels.tuning.arguments import number, whole

SECONDS = number(0, 1e9, "a number of seconds")
FLAGS: dict[str, dict[str, Any]] = {
    "--device": {"choices": ("cpu", "cuda"), "help": "default: cuda if there is one"},
    "--threads": {"type": whole(1), "metavar": "N", "help": "CPU threads; fewer than cores steady the times on a busy machine"},
    "--reps": {"type": whole(1), "metavar": "N", "help": "samples of each instead of a time budget"},
    "--budget": {"type": SECONDS, "metavar": "S", "help": "seconds of timing per problem"},
    "--seed": {"type": whole(0), "default": 0, "help": "of everything that is random (default 0)"},
    "--out": {"type": Path, "metavar": "DIR", "help": "write results.json and results.md"},
}


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help is a module's docstring: its first sentence, the options, then the rest, line by line."""
    first, _, rest = (doc or "").partition("\n\n")
    shown, usage = argparse.RawDescriptionHelpFormatter, "%(prog)s [options]; --help lists them with examples"
    return argparse.ArgumentParser(usage=usage, description=first, epilog=rest, formatter_class=shown)


def add_flag(add: Callable[..., Any], name: str, **changes: Any) -> None:
    """One of the shared flags; changes: what differs in this benchmark."""
    add(name, **(FLAGS[name] | changes))


def settle_machine(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Choose the device where none was named, and set the number of CPU threads."""
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: was cuda, but torch finds no GPU here (cpu would work)")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
