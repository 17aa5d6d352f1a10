"""Photographs every page of the built site in a wide and a narrow window, and names pages that do not fit into one.

    make docs && python docs/screenshots.py        # docs/_build/screenshots/index_1200.png, index_420.png and so on

A page fits if its document is no wider than the window, so that only boxes made for it scroll sideways, and if it asks for nothing
from the network. The exit status is 1 if a page does not fit. Needs chromium (Debian: apt install chromium), and a site: it builds
none.
"""

import argparse
import base64
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
WINDOW_HEIGHT = 900
MOST_PIXELS = 16_000  # height of a picture: beyond that chromium repeats what it drew
NOT_PAGES = {"genindex.html", "search.html", "py-modindex.html"}

# When formulas and fonts are there: the size of the document, and the outermost elements that reach over the window's right side.
# An element with a scroll bar of its own is a box made for what is wide, unless the heading is in it, too: then it is the page.
MEASURE = """(async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise
  await document.fonts.ready
  const page = document.documentElement, heading = document.querySelector("h1"), wide = []
  const parents = e => e ? [e, ...parents(e.parentElement)] : []
  const boxed = e => parents(e.parentElement).some(p => getComputedStyle(p).overflowX !== "visible" && !p.contains(heading))
  const width = Math.max(page.scrollWidth, ...parents(heading).map(e => e.scrollWidth))
  if (width > innerWidth)
    for (const e of (document.querySelector("article") || document.body).querySelectorAll("*"))
      if (e.getBoundingClientRect().right > innerWidth + 1 && !boxed(e) && !wide.some(w => w.contains(e))) wide.push(e)
  const name = e => [e.tagName.toLowerCase(), ...e.classList].join(".") + ` '${e.textContent.trim().slice(0, 40)}'`
  return {width, height: page.scrollHeight, wide: wide.map(name)}
})()"""


class Photograph(NamedTuple):
    """A page in a window: the picture, and what is wrong with the page."""

    png: bytes
    faults: list[str]
    cut: bool  # whether the page is longer than the picture


class Browser:
    """Chromium without a window, spoken to in the DevTools protocol: JSON messages through two pipes, each ended by a zero byte."""

    def __init__(self, requests: int, replies: int) -> None:
        self.requests, self.replies = requests, replies
        self.buffer, self.count = b"", 0
        self.events: list[dict[str, Any]] = []  # what chromium told unasked
        self.session: str | None = None  # of the one tab
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method and return its result."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self.events.append(answer)

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            read = os.read(self.replies, 1 << 20)
            if not read:
                raise RuntimeError("chromium ended before it had answered")
            self.buffer += read
        message, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(message))

    def photograph(self, url: str, width: int) -> Photograph:
        """Open a page in a window of this width and take all of it."""
        window = {"width": width, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", height=WINDOW_HEIGHT, **window)
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        result = self.send("Runtime.evaluate", expression=MEASURE, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{url}: {result['exceptionDetails']}")
        page = result["result"]["value"]
        faults = [f"{page['width']} pixels wide in a window of {width}: {'; '.join(page['wide'])}"] * (page["width"] > width)
        asked = (e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent")
        faults += [f"asks the network for {other}" for other in asked if other.startswith(("http:", "https:"))]
        part = {"x": 0, "y": 0, "width": width, "height": min(page["height"], MOST_PIXELS), "scale": 1}
        taken = self.send("Page.captureScreenshot", clip=part, captureBeyondViewport=True)
        return Photograph(base64.b64decode(taken["data"]), faults, page["height"] > MOST_PIXELS)


@contextmanager
def browser(program: str) -> Iterator[Browser]:
    """A running chromium, which is ended afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # chromium refuses to run as root with one
        command = [program, *FLAGS, *sandbox, f"--user-data-dir={profile}"]
        reads, requests = os.pipe()
        replies, writes = os.pipe()
        pipes = [(os.POSIX_SPAWN_DUP2, reads, 3), (os.POSIX_SPAWN_DUP2, writes, 4)]  # where chromium looks for them
        quiet = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
        process = os.posix_spawn(program, command, os.environ, file_actions=pipes + quiet)
        os.close(reads)
        os.close(writes)
        try:
            running = Browser(requests, replies)
            yield running
            running.session = None
            running.send("Browser.close")
        finally:
            os.close(requests)  # which ends it, too
            os.close(replies)
            os.waitpid(process, 0)


def main(arguments: list[str] | None = None) -> int:
    docs = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, nargs="?", default=docs / "_build", help="Folder of the site (default: docs/_build).")
    parser.add_argument("--out", type=Path, help="Folder for the pictures (default: screenshots in the folder of the site).")
    parser.add_argument("--widths", type=int, nargs="+", default=[1200, 420], help="Window widths in pixels (default: 1200 420).")
    parser.add_argument("--pages", nargs="+", help="Names of the pages to take, such as index or study (default: all).")
    parser.add_argument("--browser", help="Browser to run (default: chromium or Google Chrome, whichever is found first).")
    given = parser.parse_args(arguments)
    program = next(filter(None, map(shutil.which, [given.browser] if given.browser else BROWSERS)), None)
    if program is None:
        parser.error(f"{given.browser or 'chromium'} is not installed; on Debian: apt install chromium")
    pages = sorted(path for path in given.site.glob("*.html") if path.name not in NOT_PAGES)
    pages = [path for path in pages if not given.pages or path.stem in given.pages]
    if not pages:
        parser.error(f"{given.site} holds none of the pages; make docs builds them")
    out = given.out or given.site / "screenshots"
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    with browser(program) as chromium:
        for path in pages:
            for width in given.widths:
                taken = chromium.photograph(path.resolve().as_uri(), width)
                (out / f"{path.stem}_{width}.png").write_bytes(taken.png)
                for fault in taken.faults:
                    print(f"{path.name}: {fault}")
                if taken.cut:
                    print(f"{path.name}: its picture at {width} ends after {MOST_PIXELS:,} pixels, the page is longer")
                failed += bool(taken.faults)
    print(f"{len(pages)} pages in {out}; " + (f"{failed} pictures show a page that does not fit" if failed else "every page fits"))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
