"""What a screen shows that a file does not: bars on a terminal and in notebooks, and colours."""

import os
import sys
from importlib.util import find_spec
from typing import Any

import tqdm

COLOURS = {"bold": 1, "red": 31, "green": 32, "yellow": 33}

def in_notebook() -> bool:
    """Whether this is a notebook that can draw bars."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return type(shell).__name__ == "ZMQInteractiveShell" and find_spec("ipywidgets") is not None


def on_screen() -> bool:
    """Whether somebody can see a bar move."""
    return in_notebook() or sys.stderr.isatty()


def coloured(text: str, colour: str, stream: Any = None) -> str:
    """Text in one of COLOURS, if it goes to a terminal that shows them (and NO_COLOR is not set, https://no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    shows = wanted and (sys.stdout if stream is None else stream).isatty()
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if shows else text


def bar(iterable: Any = None, *, shown: bool = True, **options: Any) -> Any:
    """A bar of tqdm, on a screen if it is to be shown, which is as wide as the screen is at any time."""
    kind: Any = tqdm.tqdm
    if in_notebook():
        from tqdm import notebook

        kind = notebook.tqdm
    return kind(iterable, disable=not (shown and on_screen()), dynamic_ncols=True, **options)
