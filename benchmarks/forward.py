"""Forwards the commands that stood in this folder, and that pages and results name, to where their code is now."""

import os
import sys

# This folder's `operator` would hide the standard library's, which importlib and nearly all else needs
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def forward(module: str) -> None:
    """Run a module of `benchmarks` with the arguments of this command."""
    from importlib import import_module

    sys.exit(import_module(f"benchmarks.{module}").main())
