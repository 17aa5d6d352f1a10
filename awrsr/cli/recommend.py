"""`awrsr recommend`: the best next items of every history, as CSV, JSON lines or Parquet."""

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jsonargparse import ArgumentParser

from ..files import atomic, write_columns
from .shared import OWN_DATA, OpenRun, add_filter_seen, add_run, add_switch, filter_seen, find_user, identifier

SUFFIXES = (".csv", ".jsonl", ".parquet")


def add_flags(to: ArgumentParser) -> None:
    add_run(to, f"File of histories; - reads standard input {OWN_DATA}.")
    to.add_argument("--user", nargs="+", type=identifier, default=[], help="Ids of the users to recommend to (default: all).")
    to.add_argument("-k", type=int, default=10, help="Number of items to recommend to each user; all if the model knows fewer.")
    to.add_argument("--output", type=str, default="-", help=".csv, .jsonl or .parquet file; - writes CSV to standard output.")
    help = "Put an apostrophe before ids that a spreadsheet would take for formulas, such as those that begin with = or @."
    add_switch(to, "csv_safe", False, help)
    add_filter_seen(to)
    help = "Leave out items that occur in no training history, whose scores are a matter of chance."
    add_switch(to, "filter_untrained", True, help)


def run(options: Any) -> None:
    """Recommend the best next items for every history. The output has the columns user,
    item, rank and score, with the ids of the data. Users may be new to the model;
    events with items that it does not know are left out. Ids may begin with a dash.

      awrsr recommend --run runs/beauty -k 5
      awrsr recommend --run runs/beauty --user 17 42
      awrsr recommend --run runs/beauty --data new.txt --output top.parquet
      echo "me 4 8 15" | awrsr recommend --run runs/beauty --data - --format lines
    """
    opened = OpenRun(options)
    model = opened.model
    histories = opened.histories(everyone=bool(options.data or options.user))
    if options.user:
        chosen = [find_user(histories, user) for user in options.user]
        histories = histories.keep(np.isin(histories.owners, chosen))
    known, unknown = histories.numbered_as(model.index())
    empty = int((known.lengths == 0).sum())
    if empty == known.num_users:
        raise ValueError(f"data: none of the {empty:,} users has an item that the model knows")
    if unknown:
        users = f"; users without any others: {empty:,}" if empty else ""
        print(f"Left out {unknown:,} events whose items the model does not know{users}.", file=sys.stderr)
    if options.k > model.known_items():
        print(f"The model knows {model.known_items():,} items, which is fewer than k={options.k:,}: ranking all.", file=sys.stderr)
    if options.filter_untrained and (count := len(model.untrained())):
        print(f"Left out {count:,} items that no training history holds; --no-filter-untrained ranks them, too.", file=sys.stderr)
    tables = model.top_items(known, options.k, filter_seen=filter_seen(options), filter_untrained=options.filter_untrained)
    write(options.output, map(csv_safe, tables) if options.csv_safe else tables)


def csv_safe(table: pl.DataFrame) -> pl.DataFrame:
    """With an apostrophe before each text that a spreadsheet would take for a formula (OWASP, CSV injection)."""
    formula = pl.col(pl.String).str.contains("^[=+@\\t\\r-]")
    return table.with_columns(pl.when(formula).then("'" + pl.col(pl.String)).otherwise(pl.col(pl.String)).name.keep())


def write(output: str, tables: Iterable[pl.DataFrame]) -> None:
    """Write tables one below the other, as they come. The file appears under its name once all are written. output: a path, or -
    for CSV on standard output.

    Raises:
        ValueError: a suffix other than .csv, .jsonl or .parquet.
    """
    suffix = ".csv" if output == "-" else Path(output).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"output is {output!r}, must be - or end in one of {', '.join(SUFFIXES)}")
    with nullcontext() if output == "-" else atomic(output) as path:
        if suffix == ".parquet" and path is not None:
            write_columns(path, pl.concat(tables).to_dict())
            return
        with nullcontext(sys.stdout) if path is None else path.open("w", encoding="utf-8") as file:
            for i, table in enumerate(tables):
                file.write(table.write_csv(include_header=i == 0) if suffix == ".csv" else table.write_ndjson())
