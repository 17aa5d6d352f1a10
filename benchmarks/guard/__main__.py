"""Prints what no later change may lose, beside the same figures of an earlier commit, in under ten minutes on two cores.

    make guard                      # against the merge-base with origin/main; without one, the last tag, or the commit before
    make guard BASE=v0.1            # against any commit
    make guard DATA=folder          # with the beauty.txt in a folder other than ../shared/data and awrsr's cache

Measured are this folder as it stands, changes that are not committed included, and the base in a git worktree of its own, with the
same interpreter and libraries. Times are ratios to two stock attention calls; base and now take turns. Quality and counts that are
worse by more than 3 %, and times by more than 10 %, are called worse: exit status 1. Status 2 says that something was not measured.
The base's figures are kept in .guard/ where they do not depend on what the machine is doing.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from .figures import Measured, Row, conclusion, judge, table
from .parts import PARTS, TURNS, CannotMeasure, Checkout, Part, medians

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".guard"
SIDES = ("base", "now")


def git(*arguments: str) -> str:
    """What git prints; empty where it fails."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def commit_of(name: str | None) -> str:
    """The base: the commit called that; otherwise where HEAD left origin/main; otherwise the last tag or commit before HEAD."""
    head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    if name:
        candidates = [git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")]
    else:
        tag = git("describe", "--tags", "--abbrev=0", "HEAD^")
        names = (git("merge-base", "HEAD", "origin/main"), tag and git("rev-list", "-1", tag), git("rev-parse", "HEAD^"))
        candidates = [commit for commit in names if commit != head or changed]
    base = next(filter(None, candidates), None)
    if base is None:
        raise SystemExit(f"guard: there is no commit {name}" if name else "guard: no commit comes before HEAD")
    return base


def find_beauty(folder: str | None) -> Path | None:
    """Beauty's file: in the folder named, or beside the project, or where `awrsr data fetch beauty` keeps it; None if nowhere."""
    if folder:
        path = Path(folder).resolve() / "beauty.txt"
        if not path.exists():
            raise SystemExit(f"guard: there is no {path}")
        return path
    beside = ROOT.parent / "shared" / "data" / "beauty.txt"
    if beside.exists():
        return beside
    import pooch  # as in awrsr/data/fetch.py

    cached = Path(os.environ.get("AWRSR_CACHE") or pooch.os_cache("awrsr")) / "Beauty.txt"
    return cached if cached.exists() else None


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The files of a commit, for as long as they are needed."""
    with tempfile.TemporaryDirectory(prefix="awrsr-guard-") as folder:
        root = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(root), commit], cwd=ROOT, check=True)
        try:
            yield root
        finally:
            git("worktree", "remove", "--force", str(root))


class Kept:
    """The base's figures from earlier runs, as long as they were measured in the same way."""

    def __init__(self, commit: str, data: Path | None) -> None:
        measured_with = [version("torch"), version("numpy"), str(data and data.stat().st_size)]
        sources = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.*"))]
        digest = hashlib.sha256("\n".join(measured_with + sources).encode()).hexdigest()
        self.path = CACHE / f"{commit[:12]}-{digest[:8]}.json"
        self.figures: dict[str, dict[str, float]] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, part: str, figures: dict[str, float]) -> None:
        self.figures[part] = figures
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.figures, indent=1), encoding="utf-8")
        temporary.replace(self.path)


class Guard:
    """Measures every part of both sides within its time, and says how far it is."""

    def __init__(self, sides: dict[str, Checkout], kept: Kept, patience: float) -> None:
        self.sides, self.kept, self.patience, self.began = sides, kept, patience, time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {text}", flush=True)

    def once(self, part: Part, side: str) -> Measured:
        """The figures of one side, for a part whose time does not matter."""
        if side == "base" and part.name in self.kept.figures:
            self.say(f"{part.name}, base: kept from an earlier run")
            return self.kept.figures[part.name]
        began = time.monotonic()
        try:
            figures = part.measure(self.sides[side], part.seconds * self.patience)
        except (CannotMeasure, OSError, ValueError, KeyError) as error:
            self.say(f"{part.name}, {side}: NOT MEASURED, {error}")
            return str(error)
        self.say(f"{part.name}, {side}: measured in {time.monotonic() - began:.0f} s")
        if side == "base" and part.keep:
            self.kept.add(part.name, figures)
        return figures

    def in_turn(self, part: Part) -> dict[str, Measured]:
        """The medians of both sides, which take turns."""
        end, turns = time.monotonic() + part.seconds * self.patience, {side: list[dict[str, list[float]]]() for side in SIDES}
        failed: dict[str, str] = {}
        for turn, side in itertools.product(range(1, TURNS + 1), SIDES):
            if side in failed:
                continue
            began = time.monotonic()
            try:
                turns[side].append(part.measure(self.sides[side], max(1.0, end - began)))
                self.say(f"{part.name}, {side}, turn {turn} of {TURNS}: measured in {time.monotonic() - began:.0f} s")
            except (CannotMeasure, OSError, ValueError) as error:
                failed[side] = str(error)
                self.say(f"{part.name}, {side}: NOT MEASURED, {error}")
        return {side: failed.get(side) or medians(turns[side]) for side in SIDES}

    def rows(self) -> list[Row]:
        """Everything measured and judged: two at a time what is not timed, then one by one what is."""
        measured: dict[str, dict[str, Measured]] = {}
        with ThreadPoolExecutor(2) as pool:
            jobs = {p.name: [pool.submit(self.once, p, side) for side in SIDES] for p in PARTS if not p.timed}
            measured |= {name: dict(zip(SIDES, (job.result() for job in pair), strict=True)) for name, pair in jobs.items()}
        measured |= {p.name: self.in_turn(p) for p in PARTS if p.timed}
        return [row for p in PARTS for row in p.shown(judge(p.name, p.kind, *(measured[p.name][side] for side in SIDES)))]


def suites(base: str) -> dict[str, tuple[str, ...]]:
    """For each side the commits whose `make test` counts: the base's own; for now these files', otherwise the one that ran last."""
    now = git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    others = [path for path in (CACHE / "suite").glob("*") if path.name not in (base, now)]
    last = sorted(others, key=lambda path: path.stat().st_mtime)[-1:]
    return {"base": (base,), "now": (now, *(path.name for path in last))}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="the commit to compare with")
    parser.add_argument("--data", help="folder with beauty.txt")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies every time limit, for a machine with other work")
    options = parser.parse_args()
    base, data = commit_of(options.base), find_beauty(options.data)
    CACHE.mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    now = git("describe", "--always", "--dirty", "--exclude=*")
    print(f"guard: {now} against {git('log', '-1', '--format=%h %s', base)}", flush=True)
    with worktree(base) as root, tempfile.TemporaryDirectory(prefix="awrsr-guard-") as scratch:
        sides = {}
        for side, commits in suites(base).items():
            folder = Path(scratch) / side
            folder.mkdir()
            sides[side] = Checkout(root if side == "base" else ROOT, commits, folder, CACHE, data, environment)
        rows = Guard(sides, Kept(base, data), options.patience).rows()
    sentence, status = conclusion(rows)
    print(f"\n{table(rows)}\n\n{sentence}")
    return status


if __name__ == "__main__":
    sys.exit(main())
