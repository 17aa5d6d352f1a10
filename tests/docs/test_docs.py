"""The pages under docs/ run as they are printed, and build without a warning."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import awrsr
import awrsr_kernels

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
NEEDS = {"transformers.md": ("transformers",), "reference-recommender.md": ("onnxscript", "onnxruntime")}
ELSEWHERE = {"recommenders.md"}  # runs in the environment of those libraries: tests/test_rectools.py and so on


@pytest.mark.parametrize("page", [name for name in PAGES if name not in ELSEWHERE])
def test_the_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(snippet, names)  # a page's later examples use what earlier ones made


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs the docs extra")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    pages = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.html")}
    assert "softmax_scale" in pages["reference"] and "Width of the network:" in pages["reference-recommender"]
    assert r"\mathrm{softmax}" in pages["index"] and (tmp_path / "_static/mathjax/tex-chtml.js").exists()
    for name, page in pages.items():  # the site needs no network
        assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=.https?:", page), name


@pytest.mark.parametrize(("package", "page"), [(awrsr_kernels, "reference.md"), (awrsr, "reference-recommender.md")])
def test_every_public_name_is_in_the_reference(package: ModuleType, page: str) -> None:
    reference = (DOCS / page).read_text(encoding="utf-8")
    for name in package.__all__:
        assert f":: {package.__name__}.{name}\n" in reference, name


def test_nothing_is_left_to_fill_in() -> None:
    for page in PAGES:
        assert not re.search(r"_TABLE\b|TODO|TBD|XXX", (DOCS / page).read_text(encoding="utf-8")), page
