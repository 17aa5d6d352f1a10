"""Compare quality, speed and size of this folder with those of an earlier commit, in under ten minutes on two cores.

    make guard                      # against the merge base with origin/main, or else the last tag, or else the previous commit
    make guard BASE=v0.1            # against any commit
    make guard DATA=folder          # with beauty.txt from a folder other than ../shared/data and awrsr's cache

It measures this folder, including uncommitted changes, and the base in its own git worktree, with the same interpreter and
libraries. Times are ratios to two stock attention calls, measured in turns on both sides. A quality or a count is called worse if
it is worse by more than 3 %, a time if it is worse by more than 10 %. The exit status is 1 if a figure is worse, and 2 if something
was not measured. Figures of the base that do not depend on the load of the machine are kept in .guard/ for the next run.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from awrsr.data.fetch import cached_file
from awrsr.files import write_json

from .figures import Figures, Measured, Row, conclusion, judge, table
from .parts import PARTS, TURNS, CannotMeasure, Checkout, Part

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".guard"
SIDES = ("base", "now")


def git(*arguments: str) -> str:
    """What git prints; empty where it fails."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def commit_of(name: str | None) -> str:
    """The base: the commit called that; otherwise where HEAD left origin/main; otherwise the last tag or commit before HEAD."""
    if name:
        base = git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    else:
        same = "" if git("status", "--porcelain", "--untracked-files=no") else git("rev-parse", "HEAD")
        tag = git("describe", "--tags", "--abbrev=0", "HEAD^")
        earlier = git("merge-base", "HEAD", "origin/main"), git("rev-list", "-1", tag), git("rev-parse", "HEAD^")
        base = next((commit for commit in earlier if commit not in ("", same)), "")
    if not base:
        raise SystemExit(f"guard: there is no commit {name or 'before HEAD'}")
    return base


def find_beauty(folder: str | None) -> Path | None:
    """Beauty's file: in the given folder, or next to the project, or in the cache of `awrsr data fetch`; None if not found."""
    beside = [ROOT.parent / "shared/data/beauty.txt", cached_file("beauty")]
    candidates = [Path(folder).resolve() / "beauty.txt"] if folder else beside
    return next((path for path in candidates if path.exists()), None)


def suites(base: str) -> tuple[Path, Path]:
    """The reports of `make test`: at the base, and at these files; if it has not run there, where it ran last."""
    folder, now = CACHE / "suite", git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    others = sorted((path for path in folder.glob("*") if path.name != base), key=lambda path: path.stat().st_mtime)
    if others and not (folder / now).exists():
        print(f"make test: its last run was at {others[-1].name}")
        now = others[-1].name
    return folder / base, folder / now


def kept_file(commit: str, data: Path | None) -> Path:
    """Where the base's figures are kept from run to run, as long as they are measured in the same way."""
    measured_with = [version("torch"), version("numpy"), str(data and data.stat().st_size)]
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.*"))]
    return CACHE / f"{commit[:12]}-{hashlib.sha256(chr(10).join(measured_with + sources).encode()).hexdigest()[:8]}.json"


class Guard:
    """Measures every part of both sides within its time, and says how far it is."""

    def __init__(self, sides: dict[str, Checkout], kept: Path, patience: float) -> None:
        self.sides, self.path, self.patience, self.began = sides, kept, patience, time.monotonic()
        self.kept: dict[str, Figures] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def measure(self, part: Part, side: str, seconds: float) -> Any:
        """What a part measures of one side, or why it cannot."""
        if side == "base" and part.name in self.kept:
            self.say(f"{part.name}, base: kept from an earlier run")
            return self.kept[part.name]
        began = time.monotonic()
        try:
            measured = part.measure(self.sides[side], seconds)
        except (CannotMeasure, OSError, ValueError, KeyError) as error:
            self.say(f"{part.name}, {side}: NOT MEASURED, {error}")
            return str(error)
        self.say(f"{part.name}, {side}: measured in {time.monotonic() - began:.0f} s")
        return measured

    def in_turn(self, part: Part) -> list[Measured]:
        """Medians of the ratios of both sides, which take turns."""
        end = time.monotonic() + part.seconds * self.patience
        turns = [self.measure(part, side, max(1.0, end - time.monotonic())) for side in SIDES * TURNS]
        medians: list[Measured] = []
        for of in (turns[0::2], turns[1::2]):
            reason = next((turn for turn in of if isinstance(turn, str)), "")
            medians.append(reason or {name: median([ratio for turn in of for ratio in turn[name]]) for name in of[0]})
        return medians

    def rows(self) -> list[Row]:
        """Everything measured and judged: two at a time what is not timed, then one by one what is."""
        with ThreadPoolExecutor(2) as pool:
            once = [part for part in PARTS if not part.timed]
            jobs = {p.name: [pool.submit(self.measure, p, side, p.seconds * self.patience) for side in SIDES] for p in once}
        measured = {name: [job.result() for job in pair] for name, pair in jobs.items()}
        keep = (part.name for part in PARTS if part.keep)
        write_json(self.path, {name: base for name in keep if not isinstance(base := measured[name][0], str)})
        rows = []
        for part in PARTS:
            judged = judge(part.name, part.kind, *(self.in_turn(part) if part.timed else measured[part.name]))
            rows += [r for r in judged if not part.brief or r.base != r.now or r.name.endswith(("sum", "worst"))]
        return rows


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__, formatter_class=raw)
    parser.add_argument("--base", help="commit to compare with")
    parser.add_argument("--data", help="folder that holds beauty.txt")
    parser.add_argument("--patience", type=float, default=1.0, help="factor for every time limit, on a busy machine (default 1)")
    options = parser.parse_args()
    base, data = commit_of(options.base), find_beauty(options.data)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    now = git("describe", "--always", "--dirty", "--exclude=*")
    print(f"guard: {now} against {git('log', '-1', '--format=%h %s', base)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="awrsr-guard-") as scratch:
        roots, folders = (Path(scratch) / "base", ROOT), (Path(scratch) / "out-base", Path(scratch) / "out-now")
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", roots[0], base], cwd=ROOT, check=True)
        try:
            each = zip(SIDES, roots, suites(base), folders, strict=True)
            sides = {side: Checkout(root, suite, folder, CACHE, data, environment) for side, root, suite, folder in each}
            rows = Guard(sides, kept_file(base, data), options.patience).rows()
        finally:
            git("worktree", "remove", "--force", str(roots[0]))
    sentence, status = conclusion(rows)
    print(f"\n{table(rows)}\n\n{sentence}")
    return status


if __name__ == "__main__":
    sys.exit(main())
