"""Recommendations as CSV, JSON lines or Parquet, part by part."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .files import atomic
from .recommender import TopItems

SUFFIXES = (".csv", ".jsonl", ".parquet")


@contextmanager
def writer(output: str, item_ids: np.ndarray, user_ids: np.ndarray) -> Iterator[Callable[[TopItems], None]]:
    """A function that adds a part to the file: columns user, item, rank, score with the ids of the data. The file takes its name
    when all is written. output: a path, or - for CSV on standard output.

    Raises:
        ValueError: a suffix other than .csv, .jsonl or .parquet.
    """
    import polars as pl

    suffix = ".csv" if output == "-" else Path(output).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"output is {output!r}, must be - or end in one of {', '.join(SUFFIXES)}")

    def frame(part: TopItems) -> pl.DataFrame:
        return pl.DataFrame({"user": user_ids[part.user], "item": item_ids[part.item], "rank": part.rank, "score": part.score})

    if output == "-":
        header = iter((True,))
        yield lambda part: sys.stdout.write(frame(part).write_csv(include_header=next(header, False))) and None
        return
    with atomic(output) as temporary:
        if suffix == ".parquet":
            parts: list[pl.DataFrame] = []
            yield lambda part: parts.append(frame(part))
            pl.concat(parts).write_parquet(temporary)
            return
        with temporary.open("w", encoding="utf-8") as file:
            first = iter((True,))
            if suffix == ".csv":
                yield lambda part: file.write(frame(part).write_csv(include_header=next(first, False))) and None
            else:
                yield lambda part: file.write(frame(part).write_ndjson()) and None
