"""Text files of histories: one user per line, one "user item" pair per line, and delimited columns with a header.

T events, K words (divided by whitespace), M lines that are not blank.
"""

import csv
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl

from ._read_columns import DataError, find_columns, first, shown, to_histories, to_ids
from .histories import Histories, number, sums

NEWLINE, QUOTE = 10, 34
SEPARATORS = ",\t;|"  # and blanks, where there is none of these
TEXT_RULE = "must be UTF-8 text or Parquet"
TYPED = re.compile(r"\s*[^:]+:(token|float|token_seq|float_seq)\s*")  # a name in the header of a RecBole .inter file
MAGIC = {
    b"PK\x03\x04": "a zip archive",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3": "an SQLite database",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    **{bytes([0x80, protocol]): "a Python pickle, which is never opened" for protocol in (2, 3, 4, 5)},
}


@dataclass(frozen=True)
class Text:
    """UTF-8 text with "\\n" at the end of each line, and the name of its file for messages."""

    source: str
    data: bytes

    def place(self, offset: int) -> str:
        """File and line of a byte."""
        return f"{self.source}:{self.data.count(NEWLINE, 0, offset) + 1}"


def text_of(source: str, data: bytes) -> Text:
    """The text of a file. Raises DataError if it is not text or has none."""
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    if kind is not None:
        raise DataError(f"{source}: is {kind}; must be text or Parquet")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    text = Text(source, data)
    if not data.isascii():
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{text.place(error.start)}: byte 0x{data[error.start]:02x} is not UTF-8; {TEXT_RULE}") from None
    control = re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", data)
    if control:
        raise DataError(f"{text.place(control.start())}: byte 0x{control[0][0]:02x} is not text; {TEXT_RULE}")
    if not data.strip():
        raise DataError(f"{source}: contains only blank lines")
    return text


@dataclass(frozen=True)
class Words:
    """The words of a text. words: (K,). counts: (M,) how many on each line that is not blank.
    lines: (M,) their numbers from 1."""

    source: str
    words: pl.Series
    counts: np.ndarray
    lines: np.ndarray

    def of_line(self, line: int) -> list[str]:
        """The words of the m-th line that is not blank."""
        start = int(self.counts[:line].sum())
        return self.words[start : start + int(self.counts[line])].to_list()

    def place(self, line: int) -> str:
        return f"{self.source}:{self.lines[line]}"


def words_of(text: Text) -> Words:
    """Divide a text at spaces, tabs and line ends."""
    codes = np.frombuffer(text.data, np.uint8)
    inside = codes > 32
    starts = inside.copy()
    starts[1:] &= ~inside[:-1]
    before = np.searchsorted(np.flatnonzero(starts), np.flatnonzero(codes == NEWLINE))
    counts = np.diff(before, prepend=0, append=np.count_nonzero(starts))
    keep = inside
    keep[1:] |= codes[:-1] > 32  # the separator right after each word
    column = codes[keep]
    column[column <= 32] = NEWLINE
    options = {"has_header": False, "separator": "\x01", "quote_char": None, "schema": {"word": pl.String}}
    words = pl.read_csv(column.tobytes(), **options)["word"]  # type: ignore[arg-type]
    lines = np.flatnonzero(counts)
    return Words(text.source, words, counts[lines], lines + 1)


def refuse_header(words: Words) -> None:
    """Raises DataError if the first line looks like names of columns: it has no number, and numbers follow it, either everywhere or
    in one column of lines of equal length."""
    names, number = words.of_line(0), r"^-?[0-9]*[.]?[0-9]+$"
    if len(words.lines) < 2 or any(re.match(number, word) for word in names):
        return
    numbers = words.words.slice(len(names)).str.contains(number).to_numpy()
    columns = numbers.reshape(-1, len(names)) if (words.counts == len(names)).all() else numbers[:, None]
    if columns.all(0).any():
        raise DataError(
            f"{words.place(0)}: {shown(' '.join(names))} looks like names of columns, as numbers follow; remove the line, or name "
            "the columns with --user-column and --item-column, or name the format if these are ids"
        )


def read_lines(words: Words, hint: str = "") -> Histories:
    """User id, then item ids in time order, one user per line. hint: end of the error if the file looks like one event per line."""
    if (line := first(words.counts < 2)) is not None:
        word = words.of_line(line)[0]
        rule = "a line must be a user id followed by item ids" + (hint if re.search(r"[,;|]|::", word) else "")
        raise DataError(f"{words.place(line)}: user {shown(word)} has no items; {rule}")
    starts, offsets = sums(words.counts)[:-1], sums(words.counts - 1)
    is_item = np.ones(len(words.words), dtype=bool)
    is_item[starts] = False

    def item_place(event: int) -> str:
        return words.place(int(np.searchsorted(offsets, event, side="right")) - 1)

    user_ids, user = number(to_ids(words.words.gather(starts), "user", words.place))
    if (line := first(np.maximum.accumulate(user) != np.arange(len(user)))) is not None:
        name, earlier = shown(words.of_line(line)[0]), words.lines[user == user[line]][0]
        raise DataError(f"{words.place(line)}: user {name} already has line {earlier}; each user must have one line{hint}")
    item_ids, item = number(to_ids(words.words.filter(pl.Series(is_item)), "item", item_place))
    return Histories(item, offsets, item_ids, user_ids)


def read_pairs(words: Words) -> Histories:
    """One event per line: user id and item id, each user's in time order."""
    if (line := first(words.counts != 2)) is not None:
        raise DataError(f"{words.place(line)}: has {_fields(words.counts[line])}; a line must be a user id and an item id")
    return to_histories({"user": words.words.gather_every(2), "item": words.words.gather_every(2, 1)}, words.place)


@dataclass(frozen=True)
class Header:
    """The first line of delimited columns that is not blank. names: as they are written. rows: start of the rows in the text."""

    names: list[str]
    separator: str
    rows: int

    @property
    def typed(self) -> bool:
        """Whether this is the header of a RecBole .inter file (user_id:token)."""
        return all(TYPED.fullmatch(name) for name in self.names)

    @property
    def columns(self) -> list[str]:
        """The names without their types."""
        return [name.partition(":")[0] for name in self.names] if self.typed else self.names


def header_of(text: Text) -> Header:
    """The header, divided by the separator that it contains most often outside quotes."""
    first_line = re.search(rb"[^\n ][^\n]*", text.data)
    assert first_line is not None  # the text is not blank
    line = first_line[0].decode()
    counts = Counter(re.sub(r'"[^"]*"', "", line))
    separator = max(SEPARATORS, key=lambda sign: counts[sign]) if any(counts[sign] for sign in SEPARATORS) else " "
    try:
        names = next(csv.reader([line], delimiter=separator, strict=True))
    except csv.Error:
        names = line.split(separator)  # a quote left open: not a header of a usual kind
    return Header(names, separator, first_line.end() + 1)


def read_delimited(text: Text, header: Header, wanted: dict[str, str | None]) -> Histories:
    """Columns with a header, one event per row; a field in double quotes may hold separators, line ends and doubled quotes."""
    if header.typed:  # both the bare name and name:type find a column
        wanted = {role: None if name is None else name.rsplit(":", 1)[0] for role, name in wanted.items()}
    columns = find_columns(text.source, header.columns, wanted)
    history = f"{header.columns[columns['item']].strip()}_list:token_seq"
    if history in (name.strip() for name in header.names):
        raise DataError(f"{text.source}: has a column {history}, so its rows are pieces of histories; must be one event per row")
    starts, fields, rows = _rows(text, header)
    if not len(starts):
        raise DataError(f"{text.source}: has a header and no rows")

    def place(row: int) -> str:
        return text.place(header.rows + int(starts[row]))

    if (row := first(fields != len(header.names))) is not None:
        expected = f"the header has {len(header.names)}: {', '.join(header.names)}"
        raise DataError(f"{place(row)}: has {_fields(fields[row])}, {expected}")
    schema = {f"column_{i}": pl.String for i in range(len(header.names))}
    kept = {role: f"column_{column}" for role, column in columns.items()}
    try:
        table = pl.read_csv(rows, has_header=False, separator=header.separator, schema=schema, columns=list(kept.values()))
    except pl.exceptions.PolarsError:
        table = pl.DataFrame()
    if len(table) != len(starts):
        odd = _first_misquoted(text.data[header.rows :], starts, header.separator)
        problem = 'has a quote (") inside a field; quotes must enclose the whole field, and be doubled inside it'
        raise DataError(f"{text.source if odd is None else place(odd)}: {problem}")
    return to_histories({role: table[name] for role, name in kept.items()}, place)


def _rows(text: Text, header: Header) -> tuple[np.ndarray, np.ndarray, bytes]:
    """The start of each row below the header, its number of fields, and all rows without blank lines."""
    body = text.data[header.rows :]
    codes = np.frombuffer(body, np.uint8)
    ends, separators = codes == NEWLINE, codes == ord(header.separator)
    if b'"' in body:
        quoted = np.logical_xor.accumulate(codes == QUOTE)
        if quoted[-1]:
            place = text.place(header.rows + body.rfind(b'"'))
            raise DataError(f'{place}: has the last of an odd number of quotes ("), so one of them is never closed')
        ends &= ~quoted
        separators &= ~quoted
    stops = np.append(np.flatnonzero(ends), len(body))
    starts = np.concatenate([[0], stops[:-1] + 1])
    fields = np.diff(np.searchsorted(np.flatnonzero(separators), stops), prepend=0) + 1
    blank = fields == 1
    blank[blank] = [not body[start:stop].strip() for start, stop in zip(starts[blank], stops[blank], strict=True)]
    if blank[:-1].any():
        body = b"\n".join(body[start:stop] for start, stop in zip(starts[~blank], stops[~blank], strict=True))
    return starts[~blank], fields[~blank], body


def _first_misquoted(body: bytes, starts: np.ndarray, separator: str) -> int | None:
    """The first row with a quote that is neither around a field nor doubled in one."""
    field = rf'("([^"]|"")*"|[^"{re.escape(separator)}\n]*)'
    row = re.compile(rf"{field}({re.escape(separator)}{field})*\s*".encode())
    stops = [*starts[1:].tolist(), len(body)]
    return next((i for i, (start, stop) in enumerate(zip(starts, stops, strict=True)) if not row.fullmatch(body[start:stop])), None)


def _fields(count: int) -> str:
    return "1 field" if count == 1 else f"{count} fields"
