"""Runs as many cases of every kind as the time allows, prints counts and failures, and ends with status 1 if anything failed."""

import argparse
import random
import sys
import tempfile
import traceback
from pathlib import Path

from . import child, damage, fuzz, kills, races

KINDS = {"kills": (kills, 0.5), "damage": (damage, 0.25), "races": (races, 0.1), "fuzz": (fuzz, 0.15)}  # share of the time


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="Time for all kinds together, at most 20 (default: 5).")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="Kinds of cases (default: all).")
    parser.add_argument("--seed", type=int, default=0, help="Decides which cases come first (default: 0).")
    parser.add_argument("--show", type=int, default=5, help="Failures to print of each kind (default: 5).")
    options = parser.parse_args()
    child.preload()
    total, failed = sum(KINDS[kind][1] for kind in options.only), 0
    for kind in options.only:
        module, share = KINDS[kind]
        seconds = min(options.minutes, 20) * 60 * share / total
        failed += torture(kind, module, seconds, random.Random(options.seed), options.show)
    return 1 if failed else 0


def torture(kind: str, module: object, seconds: float, rng: random.Random, show: int) -> int:
    """Run cases of one kind, one at least. Returns how many failed."""
    time_is_left, done, failures = child.until(seconds), 0, 0
    with tempfile.TemporaryDirectory() as home:
        cases = module.cases(Path(home), rng)  # type: ignore[attr-defined]
        for name, check in cases:
            if done and not time_is_left():
                break
            done += 1
            try:
                check()
            except AssertionError as error:
                failures += 1
                if failures <= show:
                    print(f"  FAILED {name}: {error}", flush=True)
            except Exception:
                failures += 1
                print(f"  FAILED {name}:\n{traceback.format_exc()}", flush=True)
    print(f"{kind:7} {done:5} of {len(cases)} cases, {failures} failed", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
