"""Text files of histories: one user per line, one "user item" pair per line, and delimited columns with a header.

T events, K words (a word is what whitespace divides), M lines that are not blank.
"""

import csv
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl

from ._read_columns import DataError, find_columns, labels_of, to_histories, to_ids
from .histories import Histories, number

NEWLINE, QUOTE = 10, 34
SEPARATORS = (",", "\t", ";", "|", " ")
LINES_RULE = "a line must be a user id followed by item ids"
PAIRS_RULE = "a line must be a user id and an item id"
MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "an SQLite database",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
}


def tidy(source: str, data: bytes) -> bytes:
    """The text of a file as UTF-8 with "\\n" at the end of each line. Raises DataError for what is no text."""
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    if kind is None and re.match(rb"\x80[\x02-\x05]", data):
        kind = "a Python pickle, which is never opened"
    if kind is not None:
        raise DataError(f"{source}: is {kind}; must be text or Parquet")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            byte = f"byte 0x{data[error.start]:02x}"
            raise DataError(f"{source}:{line}: {byte} is not UTF-8; must be UTF-8 text or Parquet") from None
    control = re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", data)
    if control:
        line = data.count(b"\n", 0, control.start()) + 1
        raise DataError(f"{source}:{line}: byte 0x{control[0][0]:02x} is not text; must be UTF-8 text or Parquet")
    if not data or data.isspace():
        raise DataError(f"{source}: is empty" if not data else f"{source}: holds nothing but blank lines")
    return data


@dataclass(frozen=True)
class Words:
    """The words of a text. words: (K,). counts: (M,) how many on each line that is not blank.
    lines: (M,) their numbers from 1."""

    source: str
    words: pl.Series
    counts: np.ndarray
    lines: np.ndarray

    def of_line(self, line: int) -> list[str]:
        """The first words of the m-th line that is not blank."""
        start = int(self.counts[:line].sum())
        return self.words[start : start + int(self.counts[line])].to_list()

    def place(self, line: int) -> str:
        return f"{self.source}:{self.lines[line]}"


def words_of(source: str, data: bytes) -> Words:
    """Divide tidy text at spaces, tabs and line ends."""
    codes = np.frombuffer(data, np.uint8)
    inside = codes > 32
    starts = inside.copy()
    starts[1:] &= ~inside[:-1]
    before = np.searchsorted(np.flatnonzero(starts), np.flatnonzero(codes == NEWLINE))
    counts = np.diff(before, prepend=0, append=np.count_nonzero(starts))
    keep = inside
    keep[1:] |= codes[:-1] > 32  # the one separator behind each word
    column = codes[keep]
    column[column <= 32] = NEWLINE
    options = {"has_header": False, "separator": "\x01", "quote_char": None, "schema": {"word": pl.String}}
    words = pl.read_csv(column.tobytes(), **options)["word"]  # type: ignore[arg-type]
    lines = np.flatnonzero(counts)
    return Words(source, words, counts[lines], lines + 1)


def refuse_header(words: Words) -> None:
    """Raises DataError where the first line has no number and numbers follow it: everywhere, or in a column of lines of one length.
    Those are names of columns, not ids."""
    first, number = words.of_line(0), r"^-?[0-9]*[.]?[0-9]+$"
    if len(words.lines) < 2 or any(re.match(number, word) for word in first):
        return
    numbers = words.words.slice(len(first)).str.contains(number)
    columns = numbers.to_numpy().reshape(-1, len(first)) if (words.counts == len(first)).all() else numbers.to_numpy()[:, None]
    if columns.all(0).any():
        problem = (
            f"{_quoted(' '.join(first))} are no numbers, as names of columns are not, and numbers follow; remove the line, or name"
        )
        raise DataError(f"{words.place(0)}: {problem} them with --user-column and --item-column, or the format if these are ids")


def read_lines(words: Words, hint: str = "") -> Histories:
    """User id, then item ids in time order, one user per line. `hint` ends a complaint about what looks like one event per line."""
    lonely = words.counts < 2
    if lonely.any():
        line = int(lonely.argmax())
        word = words.of_line(line)[0]
        delimited = re.search(r"[,;|]|::", word) is not None
        raise DataError(f"{words.place(line)}: user {_quoted(word)} has no items; {LINES_RULE}{hint if delimited else ''}")
    firsts = np.cumsum(words.counts) - words.counts
    lengths = words.counts - 1
    is_item = np.ones(len(words.words), dtype=bool)
    is_item[firsts] = False

    def item_place(event: int) -> str:
        return words.place(int(np.searchsorted(np.cumsum(lengths), event, side="right")))

    users, user_labels = to_ids(words.words.gather(firsts), "user", words.place)
    distinct, user = number(users)
    if len(distinct) < len(user):
        line = int(np.flatnonzero(np.maximum.accumulate(user) != np.arange(len(user)))[0])
        earlier = words.lines[int(np.flatnonzero(user == user[line])[0])]
        problem = f"user {_quoted(words.of_line(line)[0])} is on line {earlier} already; a user has one line{hint}"
        raise DataError(f"{words.place(line)}: {problem}")
    items, item_labels = to_ids(words.words.filter(pl.Series(is_item)), "item", item_place)
    item_ids, item = number(items)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Histories(item, offsets, labels_of(item_ids, item_labels), labels_of(distinct, user_labels))


def read_pairs(words: Words) -> Histories:
    """One event per line: user id and item id, each user's in time order."""
    wrong = words.counts != 2
    if wrong.any():
        line = int(wrong.argmax())
        raise DataError(f"{words.place(line)}: has {_fields(words.counts[line])}; {PAIRS_RULE}")
    return to_histories({"user": words.words.gather_every(2), "item": words.words.gather_every(2, 1)}, words.place)


@dataclass(frozen=True)
class Header:
    """The first line of delimited columns that is not blank. names: as they stand there. start, end: where it lies in the text."""

    names: list[str]
    separator: str
    start: int
    end: int


def header_of(data: bytes) -> Header:
    """The header, divided by whatever of , tab ; | and space is in it most often outside quotes."""
    start = len(data) - len(data.lstrip(b"\n "))
    end = data.find(b"\n", start)
    end = len(data) if end < 0 else end
    text = data[start:end].decode()
    bare = Counter(re.sub(r'"[^"]*"', "", text))
    separator = max(SEPARATORS[:-1], key=lambda sign: bare[sign])
    separator = separator if bare[separator] else " "
    try:
        names = next(csv.reader([text], delimiter=separator, strict=True))
    except csv.Error:
        names = text.split(separator)  # a quote left open; no header of a usual kind
    return Header(names, separator, start, end)


def inter_names(header: Header) -> list[str] | None:
    """Names without their types where this is the header of a RecBole .inter file (user_id:token), otherwise None."""
    typed = [re.fullmatch(r"\s*([^:]+):(token|float|token_seq|float_seq)\s*", name) for name in header.names]
    return [match[1] for match in typed if match] if all(typed) else None


def read_delimited(source: str, data: bytes, header: Header, wanted: dict[str, str | None]) -> Histories:
    """Columns with a header, one event per row; a field in double quotes may hold separators, line ends and doubled quotes."""
    if inter_names(header) is not None:  # both the bare name and name:type find a column
        wanted = {role: None if name is None else name.rsplit(":", 1)[0] for role, name in wanted.items()}
    columns = find_columns(source, inter_names(header) or header.names, wanted)
    history = f"{header.names[columns['item']].strip().partition(':')[0]}_list:token_seq"
    if history in (name.strip() for name in header.names):
        raise DataError(f"{source}: has a column {history}: its rows are histories cut in pieces; must be one event per row")
    body = data[header.end + 1 :]
    starts, fields, rows = _rows(source, data, header, body)
    if not len(starts):
        raise DataError(f"{source}: has a header and no rows")

    def place(row: int) -> str:
        line = data.count(b"\n", 0, header.end + 1 + int(starts[row])) + 1
        return f"{source}:{line}"

    wrong = fields != len(header.names)
    if wrong.any():
        row = int(wrong.argmax())
        problem = f"has {_fields(fields[row])}, the header has {len(header.names)}: {', '.join(header.names)}"
        raise DataError(f"{place(row)}: {problem}")
    schema = {f"column_{i}": pl.String for i in range(len(header.names))}
    kept = {role: f"column_{column}" for role, column in columns.items()}
    try:
        table = pl.read_csv(rows, has_header=False, separator=header.separator, schema=schema, columns=list(kept.values()))
    except pl.exceptions.PolarsError:
        table = pl.DataFrame()
    if len(table) != len(starts):
        odd = _first_misquoted(body, starts, header.separator)
        problem = 'has a quote (") inside a field; quotes must stand around the whole field, and be doubled inside it'
        raise DataError(f"{source if odd is None else place(odd)}: {problem}")
    return to_histories({role: table[name] for role, name in kept.items()}, place)


def _rows(source: str, data: bytes, header: Header, body: bytes) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Where each row starts in `body`, how many fields it has, and `body` without blank lines, which are no rows."""
    codes = np.frombuffer(body, np.uint8)
    ends, separators = codes == NEWLINE, codes == ord(header.separator)
    if b'"' in body:
        quoted = np.logical_xor.accumulate(codes == QUOTE)
        if quoted[-1]:
            line = data.count(b"\n", 0, header.end + 1 + body.rfind(b'"')) + 1
            raise DataError(f'{source}:{line}: here is the last of an odd number of quotes ("): one is opened and never closed')
        ends &= ~quoted
        separators &= ~quoted
    stops = np.append(np.flatnonzero(ends), len(body))
    starts = np.concatenate([[0], stops[:-1] + 1])
    fields = np.diff(np.searchsorted(np.flatnonzero(separators), stops), prepend=0) + 1
    blank = np.zeros(len(starts), dtype=bool)
    for row in np.flatnonzero(fields == 1).tolist():
        blank[row] = not body[starts[row] : stops[row]].strip()
        if not blank[row]:  # too few fields: all is over
            break
    if blank[:-1].any():
        keep = np.ones(len(body), dtype=bool)
        for row in np.flatnonzero(blank).tolist():
            keep[starts[row] : stops[row] + 1] = False
        body = codes[keep].tobytes()
    return starts[~blank], fields[~blank], body


def _first_misquoted(body: bytes, starts: np.ndarray, separator: str) -> int | None:
    """The first row with a quote that is neither around a field nor doubled in one."""
    field = rf'("([^"]|"")*"|[^"{re.escape(separator)}\n]*)'
    row = re.compile(rf"{field}({re.escape(separator)}{field})*\s*".encode())
    stops = [*starts[1:].tolist(), len(body)]
    return next((i for i, (start, stop) in enumerate(zip(starts, stops, strict=True)) if not row.fullmatch(body[start:stop])), None)


def _fields(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"


def _quoted(word: str) -> str:
    return f'"{word if len(word) <= 40 else word[:40] + "..."}"'
