"""Text files of delimited columns, with a header or with names that are given.

T events.
"""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from ._columns import find_columns, guesses
from ._text import HEADLESS, NEWLINE, NUMBER, Text, count_of_fields
from .ids import DataError, first, many, shown, warn

QUOTE = 34
BLOCK = 1 << 20  # bytes checked at a time
SEPARATORS = (",", "\t", ";", "|", "::")  # and blanks, where there is none of these
JOINED = b"\x1f"  # stands for a separator of several characters; text has no such byte
TYPED = re.compile(r"\s*[^:]+:(token|float|token_seq|float_seq)\s*")  # a name in the header of a RecBole .inter file


@dataclass(frozen=True)
class Header:
    """The names of delimited columns: the first line that is not blank, or given for a file without such a line. names: as they are
    written. rows: start of the rows in the text."""

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

    @property
    def is_event(self) -> bool:
        """Whether these are no names but values: there are numbers or dates among them, and no usual names."""
        value = NUMBER[:-1] + r"$|^[0-9]{4}-[0-9]{2}-[0-9]{2}"
        usual = guesses("user", self.names) and guesses("item", self.names)
        return bool(self.rows) and not usual and any(re.match(value, name.strip()) for name in self.names)


def header_of(text: Text, separator: str = "", columns: Sequence[str] = (), header: bool = True) -> Header:
    """The header, divided by the separator that it contains most often outside quotes.

    separator: the one to use instead. columns: names of the columns of a file without a header. header: False if there are neither;
    then columns are called 1, 2, ...
    """
    first_line = re.search(rb"[^\n ][^\n]*", text.data)
    assert first_line is not None  # the text is not blank
    line = first_line[0].decode()
    bare = re.sub(r'"[^"]*"', "", line)
    counts = {sign: bare.count(sign) * len(sign) for sign in SEPARATORS}
    separator = separator or (max(SEPARATORS, key=lambda sign: counts[sign]) if any(counts.values()) else " ")
    try:
        names = next(csv.reader([line], delimiter=separator, strict=True)) if len(separator) == 1 else line.split(separator)
    except csv.Error:
        names = line.split(separator)  # a quote left open: not a header of a usual kind
    if header and not columns:
        return Header(names, separator, first_line.end() + 1)
    found = Header(names, separator, 1)
    if guesses("user", names) and guesses("item", names):
        raise DataError(f"{text.source}: the first line, {shown(line)}, is a header; leave out --columns and --no-header")
    if columns and len(columns) != len(names):
        got = f"the first line has {count_of_fields(len(found.names))} divided by {separator!r}: {shown(line)}"
        raise DataError(
            f"{text.source}: columns names {count_of_fields(len(columns))}, but {got}; give a name for each (--separator if wrong)"
        )
    return Header(list(columns) or [str(i + 1) for i in range(len(names))], separator, 0)


def delimited_columns(
    text: Text, header: Header, wanted: dict[str, str | None]
) -> tuple[dict[str, pl.Series], Callable[[int], str]]:
    """Role -> column of a table, and the place of a row; one event per row. A field in double quotes may hold separators, line ends
    and doubled quotes."""
    if header.is_event:
        raise DataError(
            f"{text.source}: the first line, {shown(header.separator.join(header.names))}, looks like an event, not like names of "
            f"columns; if the file has no header, name its columns with {HEADLESS}; if these are "
            "a user and items, name the format (--format lines or pairs)"
        )
    if len(header.separator) > 1:
        skipped = text.data[: header.rows].count(header.separator.encode()) * (len(header.separator.encode()) - 1)
        text = Text(text.source, text.data.replace(header.separator.encode(), JOINED))
        header = replace(header, rows=header.rows - skipped, separator=JOINED.decode())
    if header.typed:  # both the bare name and name:type find a column
        wanted = {role: None if name is None else name.rsplit(":", 1)[0] for role, name in wanted.items()}
    headless = f"; if the file has no header, name its columns with {HEADLESS}" if header.rows else ""
    columns = find_columns(text.source, header.columns, wanted, headless=headless)
    history = f"{header.columns[columns['item']].strip()}_list:token_seq"
    if history in (name.strip() for name in header.names):
        raise DataError(f"{text.source}: has a column {history}, so its rows are pieces of histories; must be one event per row")
    starts, fields, rows = _rows(text, header)
    if not len(starts):
        raise DataError(f"{text.source}: has a header and no rows")

    def place(row: int) -> str:
        return text.place(header.rows + int(starts[row]))

    wrong = fields != len(header.names)
    if wrong.any():
        row = int(wrong.argmax())
        expected = f"the header has {len(header.names)}: {', '.join(header.names)}"
        raise DataError(f"{place(row)}: has {count_of_fields(fields[row])}, {expected}")
    schema = {f"column_{i}": pl.String for i in range(len(header.names))}
    kept = {role: f"column_{column}" for role, column in columns.items()}
    names = list(dict.fromkeys(kept.values()))  # a condition may need the same column again
    try:
        table = pl.read_csv(rows, has_header=False, separator=header.separator, schema=schema, columns=names)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{text.source}: cannot be divided into columns: {error}") from None
    assert len(table) == len(starts)
    found = {role: table[name] for role, name in kept.items()}
    again = _repeated_header(found, header.columns, columns, place) if header.rows else None
    if again is None:
        return found, place
    numbers = np.flatnonzero(~again.to_numpy())
    return {role: column.filter(~again) for role, column in found.items()}, lambda row: place(int(numbers[row]))


def _repeated_header(
    found: dict[str, pl.Series], names: list[str], columns: dict[str, int], place: Callable[[int], str]
) -> pl.Series | None:
    """Rows that hold the header once more, as where files were joined. Raises DataError if only one of the ids is such a name."""
    user, item = ((found[role] == names[columns[role]]).fill_null(False) for role in ("user", "item"))
    if not user.any() and not item.any():
        turned = (found["user"] == names[columns["item"]]) & (found["item"] == names[columns["user"]])
        if turned.any():
            raise DataError(f"{place(first(turned))}: is a header with the columns in another order; read the parts one by one")
        return None
    alone = user != item
    if alone.any():
        row = first(alone)
        role = "user" if user[row] else "item"
        problem = f"{role} is {shown(found[role][row])}, which is also the name of the column"
        raise DataError(f"{place(row)}: {problem}; if the file has no header, name its columns with {HEADLESS}")
    warn(f"{place(first(user))}: the header occurs again; left out {many(int(user.sum()), 'such line')}")
    return user


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
        _refuse_misquoted(text, header, codes, quoted)
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


def _refuse_misquoted(text: Text, header: Header, codes: np.ndarray, quoted: np.ndarray) -> None:
    """Raise DataError for a quote that is neither around a field nor doubled in one. codes: bytes of the rows. quoted: which of
    them are after an odd number of quotes, counting themselves."""
    bounds = np.zeros(256, dtype=bool)  # where a field may begin or end
    bounds[[NEWLINE, ord(header.separator), QUOTE]] = True
    for start in range(0, len(codes), BLOCK):
        block = codes[max(start - 1, 0) : start + BLOCK + 1]
        inside, marks, bound = quoted[max(start - 1, 0) : start + BLOCK + 1], block == QUOTE, bounds[block]
        wrong = np.zeros(len(block), dtype=bool)
        wrong[1:] = marks[1:] & inside[1:] & ~bound[:-1]  # opens after something else
        wrong[:-1] |= marks[:-1] & ~inside[:-1] & ~bound[1:]  # closes before something else
        if wrong.any():
            problem = 'has a quote (") inside a field; quotes must enclose the whole field, and be doubled inside it'
            raise DataError(f"{text.place(header.rows + max(start - 1, 0) + int(wrong.argmax()))}: {problem}")
