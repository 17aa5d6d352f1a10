"""Files of histories, in the formats that sequential recommenders share.

"lines"    one user per line: user id, then item ids in time order (S3-Rec, STOSA).
"pairs"    one event per line: user id and item id, with the events of each user in time order (SASRec).
"inter"    RecBole: columns divided by tabs under a header such as user_id:token, item_id:token, timestamp:float.
"csv"      columns under a header, divided by commas, tabs, semicolons, bars or spaces, whichever is most frequent in the header.
"parquet"  columns.
"jsonl"    one JSON object per event (Amazon's and Yelp's reviews).

"auto" decides by content: whatever is recognised as another kind of file is refused by name, and so is a table without a header,
unless its columns are named.

Ids are whole numbers or text (`awrsr/data/ids.py`). Blank lines are ignored. Without a time column, a user's events must be in time
order. With one they are sorted by it, and keep their order if times are equal. Numbers in a time column are kept; dates become
seconds since 1970, in UTC unless they name a zone. A file may be gzipped.
"""

import gzip
import io
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import polars as pl

from ..processes import unforked
from ._columns import find_columns, guesses
from ._read_delimited import delimited_columns, header_of
from ._read_json import read_json_lines
from ._read_words import pairs_of, read_lines, refuse_header, refuse_table, words_of
from ._recognise import recognise_text, refuse_binary
from ._text import HEADLESS, Text, text_of
from ._where import ROLE, condition, kept_rows
from .histories import Histories
from .ids import MISSING_IDS, DataError
from .times import UNTIMED

__all__ = ["FORMATS", "DataError", "read"]

Source = str | os.PathLike[str] | IO[str] | IO[bytes]
FORMATS = ("auto", "lines", "pairs", "inter", "csv", "parquet", "jsonl")
SUFFIXES = {".inter": "inter", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".pq": "parquet"}
SUFFIXES |= {".jsonl": "jsonl", ".ndjson": "jsonl"}
HINT = f"; if each line is one event, name the columns with {HEADLESS}, or name the format if it is pairs"
STANDARD_INPUT = "standard input"
MOST_UNZIPPED, MOST_RATIO = 1 << 34, 100  # bytes, and times the size of the archive; small ones may always become 256 MiB
BLOCK = 1 << 24  # bytes that are unzipped at a time
SPELLED = {"\\t": "\t", "tab": "\t", "space": " "}  # separators as one writes them on a command line
Found = tuple[dict[str, pl.Series], Callable[[int], str]]  # role -> column; row -> its place


@unforked
def read(
    path: Source,
    *,
    format: str = "auto",
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    separator: str = "",
    columns: Sequence[str] = (),
    header: bool = True,
    missing_ids: str = "refuse",
    drop_duplicates: bool = False,
    where: str = "",
    max_unzipped: int | None = None,
) -> Histories:
    """Read a file of histories.

    Args:
        path: a file, "-" for standard input, or an open text or binary stream.
        format: "lines", "pairs", "inter", "csv", "parquet" or "jsonl", as the head of `awrsr/data/readers.py` describes them;
            "auto" decides by the file's first bytes, its suffix and its first lines.
        user: name of the column of users; by default one of the usual names.
        item: name of the column of items; by default one of the usual names.
        time: name of the column of times; by default one of the usual names, if there is one. "none": ignore a column that looks
            like times.
        separator: what divides the fields of a line, such as "::"; by default what the first line contains most often.
        columns: names for the columns of a file without a header, from the left, such as ["user", "item", "rating", "time"].
        header: False for a file without a header whose columns are not named; user, item and time are then numbers from "1".
        missing_ids: what to do with events whose user or item is missing: "refuse" the file, "drop" the events, or "keep" text such
            as "None" as an id.
        drop_duplicates: let events with the same user, item and time count once.
        where: a condition on the columns in the words of SQL, such as "rating >= 4"; events that do not fulfil it are left out.
        max_unzipped: most bytes that a gzip archive may become; by default 100 times its size (and always 256 MiB), at most 16 GiB.

    Raises:
        DataError: the file is missing, empty or not of this format, or has a wrong line, which the message names.
        ValueError: the format, or missing_ids, is unknown.
    """
    for name, value, choices in (("format", format, FORMATS), ("missing_ids", missing_ids, MISSING_IDS)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(choices)}")
    source, data = _load(path, max_unzipped)
    wanted = {"user": user, "item": item, "time": time} | (condition(where)[1] if where else {})
    names = [name.strip() for name in (columns.split(",") if isinstance(columns, str) else columns) if name.strip()]
    table = (SPELLED.get(separator, separator), names, header)
    found = _read(source, data, format, wanted, table, missing_ids)
    if isinstance(found, Histories):
        if where:
            raise DataError(f"{source}: where needs columns, and lines of ids have none")
        if drop_duplicates:
            raise DataError(f"{source}: drop_duplicates needs times, and lines of ids have none")
        return found
    by_role, place = kept_rows(source, where, *found) if where else found
    return Histories.from_columns(by_role, lambda role, row: f"{place(row)}: {role}", missing_ids, drop_duplicates)


def _read(
    source: str, data: bytes, format: str, wanted: dict[str, str | None], table: tuple[str, list[str], bool], missing_ids: str
) -> "Found | Histories":
    """Columns, or the histories of a file of lines. table: separator, columns and header, as in `read`."""
    own = {role: name for role, name in wanted.items() if name is not None and not role.startswith(ROLE)}
    named = ", ".join(f"{role}={name!r}" for role, name in own.items() if (role, name) != ("time", UNTIMED))
    chosen = SUFFIXES.get(Path(source.removesuffix(".gz")).suffix.lower()) if format == "auto" else format
    if data.startswith(b"PAR1") and (format == "auto" or chosen == "parquet"):
        return _parquet_columns(source, data, wanted)
    refuse_binary(source, data)
    if chosen == "parquet":
        raise DataError(f"{source}: is not a readable Parquet file: it begins with {data[:4]!r}, must begin with b'PAR1'")
    text = text_of(source, data)
    is_table = bool(table[0] or table[1] or not table[2])
    other = None if is_table or format in ("lines", "pairs") else recognise_text(source, text.data)
    if chosen == "jsonl" or (format == "auto" and other == "jsonl"):
        found, lines = read_json_lines(text, wanted)
        return found, lambda row: f"{source}:{lines[row]}"
    if other == "jsonl":
        raise DataError(f"{source}: is JSON lines, not {chosen}; leave the format out")
    if is_table and chosen in ("lines", "pairs"):
        raise DataError(f'{source}: format "{chosen}" has no columns, so separator, columns and header do not apply')
    if is_table or chosen in (None, "inter", "csv"):
        header = header_of(text, *table)
        if chosen == "inter" and not header.typed and not is_table:
            raise DataError(f"{source}: has no header like user_id:token<tab>item_id:token; its first line is {header.names}")
        guessed = guesses("user", header.names) and guesses("item", header.names)
        if is_table or chosen is not None or header.typed or named or guessed:
            return delimited_columns(text, header, wanted)
    if named:
        raise DataError(f'{source}: format "{chosen}" has no columns, so {named} cannot be found')
    return _words(text, chosen, missing_ids)


def _words(text: Text, chosen: str | None, missing_ids: str) -> "Found | Histories":
    """Lines or pairs. Without a choice, the text must prove to be one of them."""
    words = words_of(text)
    if chosen is None:
        refuse_header(words)
        refuse_table(text, words)
    if chosen == "pairs" or (chosen is None and (words.counts == 2).all()):
        return pairs_of(words), words.place
    return read_lines(words, "" if chosen else HINT, missing_ids)


def _load(path: Source, most: int | None) -> tuple[str, bytes]:
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
        data = _unzipped(source, data, most or min(max(len(data) * MOST_RATIO, 1 << 28), MOST_UNZIPPED))
    if not data:
        raise DataError(f"{source}: is empty")
    return source, data


def _unzipped(source: str, data: bytes, most: int) -> bytes:
    """The content of a gzip archive of at most so many bytes."""
    blocks, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as archive:
            while block := archive.read(BLOCK):
                blocks.append(block)
                if (size := size + len(block)) > most:
                    rule = "unpack it by hand if that is right (gunzip), or raise max_unzipped in Python"
                    raise DataError(f"{source}: {len(data):,} gzipped bytes become more than {most:,}; {rule}")
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{source}: is an incomplete or damaged gzip archive: {error}") from None
    return b"".join(blocks)


def _parquet_columns(source: str, data: bytes, wanted: dict[str, str | None]) -> Found:
    try:
        schema = pl.read_parquet_schema(io.BytesIO(data))
        names = list(schema)
        columns = find_columns(source, names, wanted, [i for i, kind in enumerate(schema.values()) if kind.is_temporal()])
        table = pl.read_parquet(io.BytesIO(data), columns=[names[column] for column in dict.fromkeys(columns.values())])
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{source}: is not a readable Parquet file: {' '.join(str(error).split())}") from None
    if not len(table):
        raise DataError(f"{source}: has no rows")
    return {role: table[names[column]] for role, column in columns.items()}, lambda row: f"{source}: row {row + 1}"
