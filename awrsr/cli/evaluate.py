"""`awrsr evaluate`: metrics of a run on its own held-out events or on those of another file."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ..files import write_json
from .shared import OWN_DATA, OpenRun, add_filter_seen, add_part, add_run, filter_seen


def add_flags(to: ArgumentParser) -> None:
    add_run(to, f"File of histories, split as in the run {OWN_DATA}.")
    help = "File of events to predict, each from what its user did before: in the run's own data or --data, then in this file."
    to.add_argument("--test-data", type=str, default="", help=help)
    help = "File of what users did before --test-data, instead of the run's own data; the same as --data."
    to.add_argument("--train-data", type=str, default="", help=help)
    help = "File of events between --train-data and --test-data."
    to.add_argument("--validation-data", type=str, default="", help=help)
    to.add_argument("--json", type=str, default="", help="JSON file to write the metrics to.")
    to.add_argument("--ranks", type=str, default="", help="Parquet file to write the rank of every held-out event to.")
    add_part(to)
    add_filter_seen(to)


def run(options: Any) -> None:
    """Rank the whole catalogue for every held-out event and print HR, NDCG and MRR, as
    awrsr train does when it ends. Ties count against the model. Below it stand what needs
    no training: the most popular items, a Markov chain of first order and, where items
    of the history are ranked, what followed the current item last time.

      awrsr evaluate runs/beauty
      awrsr evaluate runs/beauty --data later.txt --json later.json
    """
    from ..evaluation.baselines import BASELINES, baselines, table_lines
    from ..evaluation.ranking import evaluate, write_ranks

    opened = OpenRun(options)
    model, split, part = opened.model, opened.given(), options.part
    held_out = len(split.targets(part)[0])
    split, unknown = split.numbered_as(model.index())
    targets = len(split.targets(part)[0])
    if unknown:
        lost = f"{held_out - targets:,} of them held out"
        print(f"Left out {unknown:,} events whose items the model does not know, {lost}.", file=sys.stderr)
    if not targets:
        raise ValueError(f"data: the model knows none of the {held_out:,} held-out items")
    seen = filter_seen(options)
    ranked = evaluate(model, split, part, filter_seen=seen, progress=True)
    values, seen = ranked.metrics(), model.filter_seen if seen is None else seen
    others = baselines(split, ranked, seen)
    print("\n".join(table_lines({"this model": values} | others, part)))
    if options.json:
        results = {part: values, BASELINES: {part: others}, "targets": targets, "filter_seen": seen}
        write_json(options.json, results | {"eval_users_per_cpu_second": ranked.users_per_cpu_second})
    if options.ranks:
        write_ranks(ranked, split, Path(options.ranks))
