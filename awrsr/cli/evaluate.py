"""`awrsr evaluate`: metrics of a run on its own held-out events or on those of another file."""

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ..files import write_json
from .shared import OWN_DATA, OpenRun, add_filter_seen, add_part, add_run, filter_seen


def add_flags(to: ArgumentParser) -> None:
    add_run(to, f"File of histories, split as in the run {OWN_DATA}.")
    to.add_argument("--json", type=str, default="", help="JSON file to write the metrics to.")
    to.add_argument("--ranks", type=str, default="", help="Parquet file to write the rank of every held-out event to.")
    add_part(to)
    add_filter_seen(to)


def run(options: Any) -> None:
    """Rank the whole catalogue for every held-out event and print HR, NDCG and MRR, as
    awrsr train does when it ends. Ties count against the model.

      awrsr evaluate --run runs/beauty
      awrsr evaluate --run runs/beauty --data later.txt --json later.json
    """
    from ..evaluation.ranking import evaluate, write_ranks

    opened = OpenRun(options)
    model, split, part = opened.model, opened.split(), options.part
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
    values = ranked.metrics()
    for name, value in values.items():
        print(f"{name:8} {value:.4f}")
    if options.json:
        results = {part: values, "targets": targets, "filter_seen": model.filter_seen if seen is None else seen}
        write_json(options.json, results | {"eval_users_per_cpu_second": ranked.users_per_cpu_second})
    if options.ranks:
        write_ranks(ranked, split, Path(options.ranks))
