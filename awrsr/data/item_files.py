"""Files about items: which to choose from, which to leave out, and their titles."""

import io
import os
from pathlib import Path
from typing import Any

import polars as pl

from ._columns import guesses
from .ids import DataError
from .readers import read

LISTS = "must hold one item id per line, or columns of users and items"


def read_items(path: str | os.PathLike[str]) -> Any:
    """Item ids for all users, or `Histories` with those of each user.

    Args:
        path: a text file with an id in each line, perhaps below the name of the column; or any file that `read` reads, if it has
            users as well.

    Raises:
        DataError: the file is missing, empty or neither.
    """
    text = _content(path)
    if text is None or any(sign in text.partition("\n")[0] for sign in "\t,; {") or "|" in text.partition("\n")[0]:
        return read(path)
    ids = [line.strip() for line in text.splitlines() if line.strip()]
    if ids and guesses("item", ids[:1]):
        ids = ids[1:]
    if not ids:
        raise DataError(f"{os.fspath(path)}: is empty; {LISTS}")
    return ids


def read_titles(path: str | os.PathLike[str]) -> pl.DataFrame:
    """A table of items: CSV (or with tabs, semicolons or bars between fields) with names of columns, Parquet or JSON lines.

    Raises:
        DataError: the file is missing or no such table.
    """
    source, text = os.fspath(path), _content(path)
    try:
        if text is None:
            return pl.read_parquet(source)
        if text.lstrip().startswith("{"):
            return pl.read_ndjson(io.StringIO(text))
        first = text.partition("\n")[0]
        separator = max("\t,;|", key=first.count)
        if not first.count(separator):
            raise DataError(f"{source}: its first line, {first[:40]!r}, is one column; must be names of two or more")
        return pl.read_csv(io.StringIO(text), separator=separator, infer_schema=False, null_values="")
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{source}: is not a readable table: {' '.join(str(error).split())}") from None


def _content(path: str | os.PathLike[str]) -> str | None:
    """The text of a file; None for Parquet."""
    source = os.fspath(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{source}: {error.strerror or error}") from None
    if data.startswith((b"PAR1", b"\x1f\x8b")):
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: is not text in UTF-8 (byte {error.start})") from None
