"""Text files of words: one user per line, or one "user item" pair per line.

T events, K words (divided by whitespace), M lines that are not blank.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import polars as pl

from ._columns import guesses
from ._text import HEADLESS, NEWLINE, NUMBER, Text, count_of_fields
from .histories import Histories, first_again, sums
from .ids import DataError, first, number_ids, shown

SAMPLE = 20000  # bytes that show whether lines are events
LONGEST_WORD = 1000  # characters; longer words are prose or a file of another format


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


def refuse_table(text: Text, words: Words) -> None:
    """Raise DataError if lines of words look like a table without a header: they have equally many fields, and tabs or other
    separators divide them, or a column holds fractions, dates or times since 1970."""
    count = int(words.counts[0])
    alike, several = (words.counts == count).all(), len(words.lines) > 1
    beginning = text.data[:SAMPLE].decode(errors="ignore").split("\n")
    sample = [line for line in beginning[: -1 if len(text.data) > SAMPLE else None] if line.strip()] or beginning
    signs = [sign for sign in (",", ";", "|", "::") if len({line.count(sign) for line in sample}) == 1 and sample[0].count(sign)]
    if signs and count > 1 and len(sample) > 1:
        problem = f"each line has {sample[0].count(signs[0]) + 1} fields divided by {signs[0]!r}"
    elif alike and several and count > 2 and {line.count("\t") for line in sample} == {count - 1}:
        problem = f"each line has {count} fields divided by tabs"
    elif (
        alike
        and 2 < count < 10
        and (column := _telling_column(words.words.head(1000 * count).to_numpy().reshape(-1, count))) is not None
    ):
        problem = f"each line has {count} fields, and {shown(words.words[column])}, field {column + 1}, looks like no item"
    elif sum(bool(re.search(r"[a-z][,.:;!?](\s|$)", line)) for line in sample) > len(sample) / 2:
        problem = "its words end in punctuation, as in prose"
    else:
        return
    line = f"{words.place(0)}: {shown(sample[0])}"
    raise DataError(
        f"{line} looks like an event rather than a user and items, because {problem}; if it is one, name the columns with "
        f"{HEADLESS}; if the words are ids, name the format (--format lines)"
    )


def _telling_column(rows: np.ndarray) -> int | None:
    """The first column of words that are all fractions, dates or times since 1970, unless all but the first column are alike."""
    patterns = (r"-?[0-9]*[.][0-9]+", r"[0-9]{4}-[0-9]{2}-[0-9]{2}.*", r"(9|1[0-9])[0-9]{8}([0-9]{3})?")
    for pattern in patterns:
        telling = [all(re.fullmatch(pattern, word) for word in column) for column in rows.T[1:].tolist()]
        if any(telling) and not all(telling):
            return telling.index(True) + 1
    return None


def refuse_header(words: Words) -> None:
    """Raises DataError if the first line looks like names of columns: it has no number, and numbers follow it, either everywhere or
    in one column of lines of equal length."""
    names = words.of_line(0)
    if len(words.lines) < 2 or any(re.match(NUMBER, word) for word in names):
        return
    numbers = words.words.slice(len(names)).str.contains(NUMBER).to_numpy()
    columns = numbers.reshape(-1, len(names)) if (words.counts == len(names)).all() else numbers[:, None]
    if columns.all(0).any():
        raise DataError(
            f"{words.place(0)}: {shown(' '.join(names))} looks like names of columns, as numbers follow; remove the line, or name "
            "the columns with --user-column and --item-column, or name the format if these are ids"
        )


def read_lines(words: Words, hint: str = "", missing_ids: str = "refuse") -> Histories:
    """User id, then item ids in time order, one user per line. hint: end of the error if the file looks like one event per line."""
    few = words.counts < 2
    if few.any():
        line = int(few.argmax())
        word = words.of_line(line)[0]
        rule = "a line must be a user id followed by item ids" + (hint if re.search(r"[,;|]|::", word) else "")
        raise DataError(f"{words.place(line)}: user {shown(word)} has no items; {rule}")
    starts, offsets = sums(words.counts)[:-1], sums(words.counts - 1)
    is_item = np.ones(len(words.words), dtype=bool)
    is_item[starts] = False

    def item_subject(event: int) -> str:
        return f"{words.place(int(np.searchsorted(offsets, event, side='right')) - 1)}: item"

    user_ids, user = number_ids(words.words.gather(starts), lambda line: f"{words.place(line)}: user", missing_ids)
    if (again := first_again(user)) is not None:
        name, earlier = shown(words.of_line(again)[0]), words.lines[user == user[again]][0]
        raise DataError(f"{words.place(again)}: user {name} already has line {earlier}; each user must have one line{hint}")
    items = words.words.filter(pl.Series(is_item))
    refuse_long(items, item_subject)
    found = Histories.from_flat(user_ids, user, words.counts - 1, items, item_subject, missing_ids)
    return found.core() if missing_ids == "drop" else found


def refuse_long(words: pl.Series, subject: Callable[[int], str]) -> None:
    """Raise DataError for a word that is too long to be an id."""
    long = words.str.len_bytes() > LONGEST_WORD
    if long.any() and (long := words.str.len_chars() > LONGEST_WORD).any():
        row = first(long)
        length = f"has {len(words[row])} characters; must have at most {LONGEST_WORD}"
        raise DataError(f"{subject(row)} {shown(words[row])} {length}, or be in a column under a header")


def pairs_of(words: Words) -> dict[str, pl.Series]:
    """The columns of one event per line: user id and item id."""
    wrong = words.counts != 2
    if wrong.any():
        line = int(wrong.argmax())
        raise DataError(f"{words.place(line)}: has {count_of_fields(words.counts[line])}; a line must be a user id and an item id")
    columns = {"user": words.words.gather_every(2), "item": words.words.gather_every(2, 1)}
    for role, column in columns.items():
        refuse_long(column, lambda line, role=role: f"{words.place(line)}: {role}")  # type: ignore[misc]
    heads = columns["user"].str.to_lowercase().is_in(["user", "user_id", "userid"])
    line = first(heads)
    if heads.any() and guesses("item", [columns["item"][line]]):
        raise DataError(f"{words.place(line)}: looks like names of columns between events; remove the line")
    return columns
