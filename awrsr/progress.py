"""How far long work is: bars on a terminal and in notebooks."""

import sys
from importlib.util import find_spec
from typing import Any

import tqdm


def in_notebook() -> bool:
    """Whether this is a notebook that can draw bars."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return type(shell).__name__ == "ZMQInteractiveShell" and find_spec("ipywidgets") is not None


def on_screen() -> bool:
    """Whether somebody can see a bar move."""
    return in_notebook() or sys.stderr.isatty()


def bar(iterable: Any = None, *, shown: bool = True, **options: Any) -> Any:
    """A bar of tqdm, on a screen if it is to be shown, which is as wide as the screen is at any time."""
    kind: Any = tqdm.tqdm
    if in_notebook():
        from tqdm import notebook

        kind = notebook.tqdm
    return kind(iterable, disable=not (shown and on_screen()), dynamic_ncols=True, **options)
