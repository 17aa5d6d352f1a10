"""The script that photographs the site: it finds pages that are wider than their window, and says so where there is no browser."""

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs/screenshots.py"
PAGES = {
    "fits": "<h1>Words</h1><div style='overflow-x: auto'><div style='width: 3000px'>box that scrolls</div></div>",
    "wide": "<div style='overflow-x: auto'><h1>All</h1><div class=table style='width: 800px'>too wide for one window</div></div>",
    "fetches": "<img src='https://site.invalid/picture.png'>",
}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_pages_that_do_not_fit_are_named(tmp_path: Path) -> None:
    if not shutil.which("chromium"):
        pytest.skip("needs chromium")
    for name, body in PAGES.items():
        (tmp_path / f"{name}.html").write_text(f"<!doctype html><body style='margin: 0'>{body}", encoding="utf-8")
    done = run(tmp_path, "--out", tmp_path / "pictures")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [
        "fetches.html: asks the network for https://site.invalid/picture.png",
        "fetches.html: asks the network for https://site.invalid/picture.png",
        "wide.html: 800 pixels wide in a window of 420: div.table 'too wide for one window'",
        f"3 pages in {tmp_path / 'pictures'}; 3 pictures show a page that does not fit",
    ]
    for name in PAGES:
        for width in (1200, 420):
            png = (tmp_path / f"pictures/{name}_{width}.png").read_bytes()
            assert png.startswith(b"\x89PNG") and struct.unpack(">I", png[16:20])[0] == width


def test_without_a_browser_or_a_site_it_says_what_to_do(tmp_path: Path) -> None:
    done = run(tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2 and "apt install chromium" in done.stderr
    if shutil.which("chromium"):
        assert "make docs builds them" in run(tmp_path).stderr
