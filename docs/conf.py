"""Sphinx: the pages of this folder, and a reference from the docstrings. `make docs` builds it into docs/_build."""

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sphinx.util.inspect import stringify_signature  # noqa: E402

import awrsr_kernels  # noqa: E402

project = "awrsr-kernels"
copyright = "the authors of awrsr-kernels"
version = release = awrsr_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["sphinx.ext.mathjax", "sphinx-mathjax-offline"]  # formulas, drawn by a copy of MathJax in the site: no network
myst_enable_extensions = ["dollarmath"]
smartquotes = False  # quotes in docstrings are those of Python, and two dashes begin an option
html_theme = "furo"
html_title = "awrsr-kernels"
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
highlight_language = "none"  # of blocks that name none: output, commands
default_role = "code"  # `name` in a docstring is code, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and dtypes stand in the text, which says more
autodoc_mock_imports = ["rectools", "replay", "recbole"]  # in environments of their own
napoleon_use_rtype = False


def plain_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with formulas: bars, stars and the @ of NDCG@10 mean themselves."""
    lines[:] = [re.sub(r"(?<!\\)([|*@])", r"\\\1", line) for line in lines]


def with_options(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A dataclass of options has a paragraph for each: its default and its help, with the choices that the help does not name."""
    for each in dataclasses.fields(obj) if holds_options(obj) else []:
        unnamed = [choice for choice in each.metadata["choices"] if choice not in each.metadata["help"]]
        choices = f" One of {', '.join(each.metadata['choices'])}." if unnamed else ""
        lines += ["", f"``{each.name}``, default ``{each.default!r}``", f"    {each.metadata['help']}{choices}"]


def holds_options(obj: Any) -> bool:
    return dataclasses.is_dataclass(obj) and all("help" in each.metadata for each in dataclasses.fields(obj))


def own_signature(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> tuple[str, str] | None:
    """A class on a mocked one takes what its own __init__ takes; autodoc sees the arguments of the mock. Options stand below."""
    if what == "class" and holds_options(obj):
        return "(**options)", returns
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    own = inspect.signature(obj.__init__)
    taken = list(own.parameters.values())[1:] if "__init__" in vars(obj) else []
    return stringify_signature(own.replace(parameters=taken), show_annotation=False, show_return_annotation=False), returns


def with_tables(app: Any, name: str, source: list[str]) -> None:
    """Tables that a page links to, in files that are none of the site's, stand at its end instead."""
    results = re.compile(r"\]\(\.\./(benchmarks/results/\w+/(\w+)\.md)\)")
    for path, table in results.findall(source[0]):
        source[0] += f"\n(table-{table})=\n\n{(ROOT / path).read_text(encoding='utf-8')}"
    source[0] = results.sub(r"](#table-\2)", source[0])


def setup(app: Any) -> None:
    app.connect("source-read", with_tables)
    app.connect("autodoc-process-signature", own_signature)
    app.connect("autodoc-process-docstring", with_options, priority=50)
    app.connect("autodoc-process-docstring", plain_text, priority=100)  # before napoleon, which writes stars that mean something
