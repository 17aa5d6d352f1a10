"""Recommendations as CSV, JSON lines or Parquet, written part by part."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

import numpy as np
import polars as pl

from ..files import atomic
from ..recommender import TopItems

SUFFIXES = (".csv", ".jsonl", ".parquet")


@contextmanager
def writer(output: str, item_ids: np.ndarray, user_ids: np.ndarray) -> Iterator[Callable[[TopItems], None]]:
    """A function that adds a part to the file: columns user, item, rank, score with the ids of the data. The file takes its name
    when all is written. output: a path, or - for CSV on standard output.

    Raises:
        ValueError: a suffix other than .csv, .jsonl or .parquet.
    """
    suffix = ".csv" if output == "-" else Path(output).suffix
    if suffix not in SUFFIXES:
        raise ValueError(f"output is {output!r}, must be - or end in one of {', '.join(SUFFIXES)}")

    def frame(part: TopItems) -> pl.DataFrame:
        return pl.DataFrame({"user": user_ids[part.user], "item": item_ids[part.item], "rank": part.rank, "score": part.score})

    with nullcontext() if output == "-" else atomic(output) as path:
        if suffix == ".parquet":
            parts: list[pl.DataFrame] = []
            yield lambda part: parts.append(frame(part))
            pl.concat(parts).write_parquet(str(path))
            return
        with nullcontext(sys.stdout) if path is None else path.open("w", encoding="utf-8") as file:
            yield lines(file, frame, suffix == ".csv")


def lines(file: TextIO, frame: Callable[[TopItems], pl.DataFrame], as_csv: bool) -> Callable[[TopItems], None]:
    begun = False

    def write(part: TopItems) -> None:
        nonlocal begun
        file.write(frame(part).write_csv(include_header=not begun) if as_csv else frame(part).write_ndjson())
        begun = True

    return write
