"""`awrsr compare`: tests whether runs differ by more than chance."""

from typing import Any

from jsonargparse import ArgumentParser

from ..files import write_json
from .shared import add_part


def add_flags(to: ArgumentParser) -> None:
    to.add_argument("runs", nargs="+", type=str, help="Run folders. Runs that differ only in the seed count as one variant.")
    to.add_argument(
        "--metrics", nargs="+", type=str, default=["HR@10", "NDCG@10", "MRR"], help="Metrics to compare: HR@k, NDCG@k or MRR."
    )
    to.add_argument("--baseline", type=str, default="", help="Run or variant to compare the others with (default: the first).")
    add_part(to)
    to.add_argument(
        "--resamples",
        type=int,
        default=2000,
        help="Number of bootstrap resamples, and minimum number of permutations in the permutation test.",
    )
    to.add_argument("--json", type=str, default="", help="JSON file to write the results to.")


def run(options: Any) -> None:
    """Test whether runs differ by more than chance. Tests are paired by user.
    Confidence intervals are over users and, if a variant has several runs, over
    seeds. Runs that differ only in the seed count as one variant.

      awrsr compare runs/plain runs/refined
      awrsr compare runs/plain-* runs/refined-* --metrics NDCG@10 --json comparison.json
    """
    from ..evaluation.compare import compare

    settings = {name: options[name] for name in ("part", "metrics", "resamples")}
    comparison = compare(options.runs, baseline=options.baseline or None, **settings)
    print(comparison)
    if options.json:
        write_json(options.json, comparison.to_json())
