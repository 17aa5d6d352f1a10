"""Files of histories, in the formats that sequential recommenders share.

"lines"    one user per line: user id, then item ids in time order (S3-Rec, STOSA).
"pairs"    one event per line: user id and item id, with the events of each user in time order (SASRec).
"inter"    RecBole: columns divided by tabs under a header such as user_id:token, item_id:token, timestamp:float.
"csv"      columns under a header, divided by commas, tabs, semicolons, bars or spaces, whichever is most frequent in the header.
"parquet"  columns.

"auto" recognises Parquet by its first bytes, then looks at the suffix (.inter, .csv, .tsv, .parquet), then at the first line, which
may be a header of "inter" or "csv". Otherwise the format is "pairs" if every line has exactly two fields, else "lines". If all
lines have two fields and no user occurs twice, both formats mean the same.

Ids are labels of any kind. The ids of users (and those of items) are int64 if each of them is a whole number in the form that int64
prints; a single 007, +7 or 10**30 makes all of them text. Blank lines and blanks around a field are ignored. Without a time column,
a user's events must be in time order. With one they are sorted by it, and keep their order if times are equal. Numbers in a time
column are kept; dates become seconds since 1970, in UTC unless they name a zone. A text file may be gzipped.
"""

import gzip
import io
import os
import sys
import zlib
from pathlib import Path
from typing import IO

import polars as pl

from ..processes import unforked
from ._read_columns import UNTIMED, DataError, find_columns, guesses, to_histories
from ._read_text import header_of, read_delimited, read_lines, read_pairs, refuse_header, text_of, words_of
from .histories import Histories

__all__ = ["FORMATS", "DataError", "read"]

Source = str | os.PathLike[str] | IO[str] | IO[bytes]
FORMATS = ("auto", "lines", "pairs", "inter", "csv", "parquet")
SUFFIXES = {".inter": "inter", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet"}
HINT = '; if each line is one event, name the format: "pairs", or "csv" and give it a header'
STANDARD_INPUT = "standard input"


@unforked
def read(
    path: Source, *, format: str = "auto", user: str | None = None, item: str | None = None, time: str | None = None
) -> Histories:
    """Read a file of histories.

    Args:
        path: a file, "-" for standard input, or an open text or binary stream.
        format: "lines", "pairs", "inter", "csv" or "parquet", as the head of `awrsr/data/readers.py` describes them; "auto" decides
            by the file's first bytes, its suffix and its first line.
        user: name of the column of users; by default one of the usual names.
        item: name of the column of items; by default one of the usual names.
        time: name of the column of times; by default one of the usual names, if there is one. "none": ignore a column that looks
            like times.

    Raises:
        DataError: the file is missing, empty or not of this format, or has a wrong line, which the message names.
        ValueError: the format is unknown.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, must be one of {', '.join(FORMATS)}")
    source, data = _load(path)
    wanted = {"user": user, "item": item, "time": time}
    named = ", ".join(f"{role}={name!r}" for role, name in wanted.items() if name is not None and (role, name) != ("time", UNTIMED))
    chosen = SUFFIXES.get(Path(source.removesuffix(".gz")).suffix.lower()) if format == "auto" else format
    if chosen == "parquet" or (format == "auto" and data.startswith(b"PAR1")):
        return _read_parquet(source, data, wanted)
    text = text_of(source, data)
    if chosen in (None, "inter", "csv"):
        header = header_of(text)
        if chosen == "inter" and not header.typed:
            raise DataError(f"{source}: has no header like user_id:token<tab>item_id:token; its first line is {header.names}")
        if chosen is not None or header.typed or named or (guesses("user", header.names) and guesses("item", header.names)):
            return read_delimited(text, header, wanted)
    if named:
        raise DataError(f'{source}: format "{chosen}" has no columns, so {named} cannot be found')
    words = words_of(text)
    if chosen is None:
        refuse_header(words)
    if chosen == "pairs" or (chosen is None and (words.counts == 2).all()):
        return read_pairs(words)
    return read_lines(words, hint="" if chosen else HINT)


def _load(path: Source) -> tuple[str, bytes]:
    """The name of the source for messages, and its unzipped content."""
    if path == "-":
        source, data = STANDARD_INPUT, sys.stdin.buffer.read()
    elif isinstance(path, str | os.PathLike):
        source = os.fspath(path)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            problems = {FileNotFoundError: "there is no such file", IsADirectoryError: "is a folder; must be a file of histories"}
            problem = problems.get(type(error), f"cannot be read: {error.strerror or error}")
            raise DataError(f"{source}: {problem}") from None
    else:
        name, content = getattr(path, "name", None), path.read()
        source = name if isinstance(name, str) and name != "<stdin>" else STANDARD_INPUT
        data = content.encode() if isinstance(content, str) else content
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{source}: is an incomplete or damaged gzip archive: {error}") from None
    if not data:
        raise DataError(f"{source}: is empty")
    return source, data


def _read_parquet(source: str, data: bytes, wanted: dict[str, str | None]) -> Histories:
    try:
        schema = pl.read_parquet_schema(io.BytesIO(data))
        names = list(schema)
        columns = find_columns(source, names, wanted, [i for i, kind in enumerate(schema.values()) if kind.is_temporal()])
        table = pl.read_parquet(io.BytesIO(data), columns=[names[column] for column in columns.values()])
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{source}: is not a readable Parquet file: {error}") from None
    if not len(table):
        raise DataError(f"{source}: has no rows")
    return to_histories({role: table[names[column]] for role, column in columns.items()}, lambda row: f"{source}: row {row + 1}")
