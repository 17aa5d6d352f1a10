"""`awrsr evaluate`: metrics of a run on its own held-out events or on those of another file."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ..files import write_json
from .shared import OWN_DATA, OpenRun, UsageError, add_filter_seen, add_part, add_run, filter_seen


def add_flags(to: ArgumentParser) -> None:
    add_run(to, f"File of histories, split as in the run {OWN_DATA}.")
    help = "File of events to predict, each from what its user did before: in the run's own data or --data, then in this file."
    to.add_argument("--test-data", type=str, default="", help=help)
    help = "File of what users did before --test-data, instead of the run's own data; the same as --data."
    to.add_argument("--train-data", type=str, default="", help=help)
    help = "File of events between --train-data and --test-data."
    to.add_argument("--validation-data", type=str, default="", help=help)
    help = "Metrics with their cut-offs, such as HR@1 NDCG@50; with --per user also Recall, Precision, MAP, MRR, Coverage, "
    help += "Novelty, Popularity and Diversity (default: HR and NDCG at 5, 10 and 20, and MRR; per user all at 10)."
    to.add_argument("--metrics", nargs="+", type=str, default=[], help=help)
    help = "event: predict each held-out event from all before it. user: one list per user, from all events before the part, which "
    help += "is compared with all items that the user took in it."
    to.add_argument("--per", choices=("event", "user"), default="event", help=help)
    help = "Rank each event among so many random items instead of the catalogue. Only to compare with papers that did so: such "
    help += "metrics may order models wrongly (Krichene and Rendle, KDD 2020)."
    to.add_argument("--sampled-negatives", type=int, default=0, help=help)
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
      awrsr evaluate runs/beauty --per user --metrics Recall@20 MAP@20 Coverage@20
      awrsr evaluate runs/beauty --data later.txt --json later.json
    """
    from ..evaluation.baselines import BASELINES
    from ..evaluation.ranking import write_ranks
    from ..evaluation.report import event_metrics, table_lines, user_metrics

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
    if options.per == "user" and (options.ranks or options.sampled_negatives):
        raise UsageError("--per user has no --ranks, and no --sampled-negatives")
    seen = filter_seen(options)
    seen = model.filter_seen if seen is None else seen
    if options.per == "user":
        found = user_metrics(model, split, part, options.metrics, seen)
    else:
        found = event_metrics(model, split, part, options.metrics, seen, negatives=options.sampled_negatives, progress=True)
    print("\n".join(table_lines({"this model": found} | found.baselines, part)))
    if options.json:
        results = {part: dict(found), BASELINES: {part: found.baselines}, f"{found.noun.split()[-1]}s": found.targets}
        speed = {"eval_users_per_cpu_second": found.ranked.users_per_cpu_second} if found.ranked else {}
        write_json(options.json, results | {"targets": targets, "filter_seen": seen} | speed)
    if options.ranks and found.ranked:
        write_ranks(found.ranked, split, Path(options.ranks))
