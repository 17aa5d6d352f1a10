"""`awrsr recommend`: the best next items of every history, as CSV, JSON lines or Parquet."""

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jsonargparse import ArgumentParser

from ..data.histories import Histories
from ..data.ids import many
from ..data.item_files import read_items
from ..data.tables import with_titles
from ..files import atomic, write_columns
from ..options import FALLBACKS
from .shared import (
    OWN_DATA,
    OpenRun,
    UsageError,
    add_filter_seen,
    add_run,
    add_switch,
    add_titles,
    filter_seen,
    find_user,
    identifier,
    titles_of,
)

SUFFIXES = (".csv", ".jsonl", ".parquet")


def add_flags(to: ArgumentParser) -> None:
    add_run(to, f"File of histories; - reads standard input {OWN_DATA}.")
    to.add_argument("--user", nargs="+", type=identifier, default=[], help="Ids of the users to recommend to (default: all).")
    help = "Item ids of a history, oldest first, to recommend to its user alone, who is called history in the output."
    to.add_argument("--history", nargs="+", type=identifier, default=[], help=help)
    to.add_argument("-k", type=int, default=10, help="Number of items to recommend to each user; all if the model knows fewer.")
    lists = "with an item id in each line for all users, or with columns of users and items for each"
    to.add_argument("--candidates", type=str, default="", help=f"File of the items to choose from, {lists}.")
    to.add_argument("--exclude", type=str, default="", help=f"File of items to leave out, {lists}.")
    help = "What users without any item that the model knows get: the most popular items, without a score, or none."
    to.add_argument("--fallback", choices=FALLBACKS, default="popular", help=help)
    add_titles(to)
    add_output(to)
    add_filter_seen(to)
    help = "Leave out items that occur in no training history, whose scores are a matter of chance."
    add_switch(to, "filter_untrained", True, help)


def add_output(to: ArgumentParser) -> None:
    to.add_argument("--output", type=str, default="-", help=".csv, .jsonl or .parquet file; - writes CSV to standard output.")
    help = "Put an apostrophe before ids that a spreadsheet would take for formulas, such as those that begin with = or @."
    add_switch(to, "csv_safe", False, help)


def run(options: Any) -> None:
    """Recommend the best next items for every history. The output has the columns user,
    item, rank and score, with the ids of the data. Users may be new to the model;
    events with items that it does not know are left out. Ids may begin with a dash.

      awrsr recommend runs/beauty -k 5
      awrsr recommend runs/beauty --user 17 42 --titles items.csv
      awrsr recommend runs/beauty --history 4 8 15 --exclude sold-out.txt
      awrsr recommend runs/beauty --data new.txt --output top.parquet
      echo "me 4 8 15" | awrsr recommend runs/beauty --data - --format lines
    """
    from ..recommending import Rules, at_least_one, item_lists, top_items

    opened = OpenRun(options)
    model = opened.model
    if options.history:
        if options.user or options.data:
            raise UsageError("--history must not be given with --user or --data")
        histories = Histories.from_lists({"history": options.history})
    else:
        histories = opened.histories(everyone=bool(options.data or options.user))
    if options.user:
        chosen = [find_user(histories, user) for user in options.user]
        histories = histories.keep(np.isin(histories.owners, chosen))
    index = model.index()
    lists = {name: options[name] and read_items(options[name]) or None for name in ("candidates", "exclude")}
    candidates, exclude = (item_lists(name, given, index, histories.user_ids) for name, given in lists.items())
    seen = filter_seen(options)
    seen = model.filter_seen if seen is None else seen
    fallback = options.fallback if model.trained is not None and model.trained.dtype != bool else "none"  # of an older run
    rules = Rules(candidates, exclude, seen, options.filter_untrained, fallback)
    titles = titles_of(options)
    known, unknown = histories.numbered_as(index)
    empty = int((known.lengths == 0).sum())
    if empty == known.num_users and fallback == "none":
        raise ValueError(f"data: none of the {empty:,} users has an item that the model knows")
    if unknown:
        get = "get the most popular items" if fallback == "popular" else "get none"
        others = f"; {many(empty, 'user')} without any others {get}" if empty else ""
        print(f"Left out {unknown:,} events whose items the model does not know{others}.", file=sys.stderr)
    if options.k > model.known_items():
        print(f"The model knows {model.known_items():,} items, which is fewer than k={options.k:,}: ranking all.", file=sys.stderr)
    if options.filter_untrained and (count := len(model.untrained())):
        print(f"Left out {count:,} items that no training history holds; --no-filter-untrained ranks them, too.", file=sys.stderr)
    tables = top_items(model, known, at_least_one(options.k), rules, batch_size=1024)
    write(options, tables if titles is None else (with_titles(table, titles) for table in tables))


def csv_safe(table: pl.DataFrame) -> pl.DataFrame:
    """With an apostrophe before each text that a spreadsheet would take for a formula (OWASP, CSV injection)."""
    formula = pl.col(pl.String).str.contains("^[=+@\\t\\r-]")
    return table.with_columns(pl.when(formula).then("'" + pl.col(pl.String)).otherwise(pl.col(pl.String)).name.keep())


def write(options: Any, tables: Iterable[pl.DataFrame]) -> None:
    """Write tables one below the other, as they come, as the options of `add_output` say. A file appears under its name once all
    are written.

    Raises:
        ValueError: a suffix other than .csv, .jsonl or .parquet.
    """
    output, tables = options.output, map(csv_safe, tables) if options.csv_safe else tables
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
