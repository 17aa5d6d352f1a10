"""From files of other projects to sequences of words (chords, notes, identifiers, activities, pages, exercises), and from these to
the lines that the public data sets are kept as.

Each converter takes the contents of the files of a source, in order, and returns a list of words for each sequence.
"""

import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from xml.etree import ElementTree

import numpy as np

from .histories import Histories

Sequences = Iterable[list[str]]

NOTE = re.compile(r"[_^=]*[A-Ga-gz][,']*\d*/*\d*")  # of ABC notation: accidentals, pitch or rest, octave, length
NO_NOTES = re.compile(r'"[^"]*"|\[[A-Z]:[^\]]*\]|\{[^}]*\}|![^!]*!')  # chord symbols, fields in a line, grace notes, decorations

NAME = re.compile(r"[^\W\d]\w*")
PYTHON_TEXT = re.compile(
    r"""#.*|(?:\b[rRbBuUfF]{1,2})?(?:('{3}|"{3})(?:\\[\s\S]|(?!\1)[\s\S])*\1|'(?:\\[\s\S]|[^'\\\n])*'|"(?:\\[\s\S]|[^"\\\n])*")"""
)
PYTHON_START = re.compile(r"^(?=(?: {4})?(?:async )?def |class )", re.MULTILINE)
PYTHON_WORDS = frozenset(
    "False None True and as assert async await break class continue def del elif else except finally for from "
    "global if import in is lambda nonlocal not or pass raise return try while with yield".split()
)
C_TEXT = re.compile(r"""//.*|/\*[\s\S]*?\*/|^[ \t]*#(?:\\\n|.)*|'(?:\\.|[^'\\\n])*'|(")(?:\\[\s\S]|[^"\\\n])*\1""", re.MULTILINE)
C_WORDS = frozenset(
    "auto break case char const continue default do double else enum extern float for goto if inline int long "
    "register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while".split()
)


def lines(sequences: Sequences, *, min_length: int = 1, min_uses: int = 1, collapse: bool = False) -> bytes:
    """A line per sequence: its number from 1 on, and its items, numbered from 1 on by how often they are used, then by where they
    are first used. Sequences with fewer than `min_length` items and items with fewer than `min_uses` uses are left out until none
    is left. collapse: of equal items in a row, keep the first."""
    numbers: dict[str, int] = {}
    numbered = [[numbers.setdefault(word, len(numbers)) for word in words] for words in sequences]
    if collapse:
        numbered = [[item for item, _ in groupby(items)] for items in numbered]
    users = np.repeat(np.arange(len(numbered)), [len(items) for items in numbered])
    kept = Histories.from_events(users, np.array([item for items in numbered for item in items], dtype=np.int64))
    kept = kept.core(min_length, min_uses)
    _, first, uses = np.unique(kept.items, return_index=True, return_counts=True)
    place = np.empty(len(uses), dtype=np.int64)
    place[np.lexsort((first, -uses))] = np.arange(1, len(uses) + 1)
    rows = (" ".join(map(str, [user + 1, *place[kept.of(user)].tolist()])) + "\n" for user in range(kept.num_users))
    return "".join(rows).encode()


def chords(files: list[bytes]) -> Iterator[list[str]]:
    """Of tunes in the JSON of JazzStandards: a section has a main part, and endings that are played after it in turn. Bars are
    separated by "|", chords in a bar by ","."""
    for tune in json.loads(files[0]):
        parts = []
        for section in tune["Sections"]:
            main = section.get("MainSegment", {}).get("Chords", "")
            parts += [f"{main}|{ending['Chords']}" for ending in section.get("Endings", [])] or [main]
        yield [chord.strip() for chord in re.split(r"[|,]", "|".join(parts)) if chord.strip()]


def notes(files: list[bytes]) -> Iterator[list[str]]:
    """Of tunes in ABC notation: pitch and length of each note and rest, as they are written."""
    for file in files:
        for tune in re.split(r"^(?=X: ?\d)", file.decode("latin1").replace("\r", ""), flags=re.MULTILINE):
            music = " ".join(line for line in tune.split("\n") if not re.match(r"[A-Za-z]:|[%\\]", line))
            yield NOTE.findall(NO_NOTES.sub("", music))


def python_names(files: list[bytes]) -> Iterator[list[str]]:
    """Of functions, methods and the heads of classes in Python: their identifiers, without keywords, comments and text."""
    for file in files:
        for block in PYTHON_START.split(PYTHON_TEXT.sub(" ", file.decode()))[1:]:
            yield [name for name in NAME.findall(block) if name not in PYTHON_WORDS]


def c_names(files: list[bytes]) -> Iterator[list[str]]:
    """Of functions in C, which end at a brace in the first column: their identifiers, without keywords, comments, text and lines
    for the preprocessor."""
    for file in files:
        for block in re.split(r"^\}", C_TEXT.sub(" ", file.decode()), flags=re.MULTILINE):
            if re.search(r"\)\s*\{", block):
                yield [name for name in NAME.findall(block) if name not in C_WORDS]


def activities(files: list[bytes]) -> Iterator[list[str]]:
    """Of the traces of a log in XES, packed with gzip: name and, where there is one, stage of each event."""
    for file in files:
        for _, trace in ElementTree.iterparse(io.BytesIO(gzip.decompress(file))):
            if _tag(trace) != "trace":
                continue
            values = ({each.get("key"): each.get("value", "") for each in event} for event in trace if _tag(event) == "event")
            yield [" ".join(filter(None, (event.get(key) for key in ("concept:name", "lifecycle:transition")))) for event in values]
            trace.clear()


def _tag(element: ElementTree.Element) -> str:
    """Its name without the namespace."""
    return element.tag.rpartition("}")[2]


def pages(files: list[bytes]) -> Iterator[list[str]]:
    """Of games of Wikispeedia: the articles that a player saw, where "<" goes back to the one before."""
    for line in b"".join(files).decode().splitlines():
        if not line or line.startswith("#"):
            continue
        seen: list[str] = []
        way: list[str] = []
        for click in line.split("\t")[3].split(";"):
            way = way[:-1] if click == "<" else [*way, click]
            seen.append(way[-1])
        yield seen


def exercises(files: list[bytes]) -> Iterator[list[str]]:
    """Of students, who take three lines each: how many answers there are, the skill that each is about, and whether it is right."""
    for file in files:
        yield from (line.strip(",").split(",") for line in file.decode().split()[1::3])
