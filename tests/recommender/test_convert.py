"""Sources of public data sets become histories, each shown on a few lines in the format of its source."""

import gzip
import json
from pathlib import Path

import pytest

from awrsr.data import _convert
from awrsr.data.public import REGISTRY, table

CHORDS = [
    {
        "Title": "one",
        "Sections": [
            {"MainSegment": {"Chords": "C7, F|G7|"}, "Endings": [{"Chords": "C"}, {"Chords": "Am"}]},
            {"Endings": [{"Chords": "Dm"}]},
            {"MainSegment": {"Chords": " E "}},
        ],
    }
]

ABC = b"""% a comment
X: 1
T: A title
K:D
"Am"d2 ^f/ | [M:3/4] {g}a, z4 :|\r
!trill!B
X:2
=c'3/2
\\ to the next
"""

PYTHON = b'''import os  # not in a function


def first(value, *rest: "text"):
    """Text, def third."""
    return f"{value}" if rest else 'it''s' + os.name  # no comment


class Second(Base):
    size = 1

    @property
    async def method(self):
        def inner(): pass
        return self.size
'''

C = rb"""#include <stdio.h>
#define TWICE(x) \
    ((x) * 2)
struct point { int x; };
/* a comment { } */
int first(char *text) {
    return printf("%s {\n", text); // no comment
}

static void second(void)
{
    if (x) { first('"', u); }
}
"""

XES = b"""<?xml version="1.0" encoding="UTF-8"?>
<log xmlns="http://www.xes-standard.org/"><string key="concept:name" value="the log"/>
<trace><string key="concept:name" value="17"/>
  <event><string key="concept:name" value="Triage"/><date key="time:timestamp" value="2014-10-22T11:15:41+02:00"/></event>
  <event><string key="lifecycle:transition" value="START"/><string key="concept:name" value="Check"/></event>
</trace>
<trace><event><string key="concept:name" value="Triage"/></event></trace>
</log>"""

PAGES = b"# a comment\n\na1\t1297054935\t180\tMoon;Sun;<;Moon_(film);Film;<;<;Star\tSea\ttimeout\n"

CONVERTED = [
    (_convert.chords, json.dumps(CHORDS).encode(), ["C7 F G7 C C7 F G7 Am Dm E"]),
    (_convert.notes, ABC, ["", "d2 ^f/ a, z4 B", "=c'3/2"]),
    (
        _convert.python_names,
        PYTHON,
        ["first value rest rest os name", "Second Base size property", "method self inner self size"],
    ),
    (_convert.c_names, C, ["point x first text printf text", "second x first u"]),
    (_convert.activities, gzip.compress(XES), ["Triage|Check START", "Triage"]),
    (_convert.pages, PAGES, ["Moon Sun Moon Moon_(film) Film Moon_(film) Moon Star"]),
    (_convert.exercises, b"3\n7,7,12,\n1,0,1,\n1\n9\n1\n", ["7 7 12", "9"]),
]


@pytest.mark.parametrize(("convert", "source", "expected"), CONVERTED, ids=[each[0].__name__ for each in CONVERTED])
def test_each_format_gives_its_words(convert, source: bytes, expected: list[str]) -> None:
    separator = "|" if convert is _convert.activities else " "
    assert [separator.join(words) for words in convert([source])] == expected


def test_items_are_numbered_by_use_and_rare_ones_left_out() -> None:
    words = [list("abcb"), list("xccy"), list("bbaxz"), list("q")]
    assert _convert.lines(words) == b"1 3 1 2 1\n2 4 2 2 5\n3 1 1 3 4 6\n4 7\n"
    # d, q and z are used once; without d the last sequence has three items, too few, and goes with its uses of the others
    words = [list(word) for word in ("abcb", "xcbb", "bbaxz", "q", "abbx", "dacb")]
    assert _convert.lines(words, min_length=4, min_uses=2) == b"1 2 1 4 1\n2 3 4 1 1\n3 1 1 2 3\n4 2 1 1 3\n"


def test_runs_of_an_item_collapse() -> None:
    assert _convert.lines([list("aabba")], collapse=True) == b"1 1 2 1\n"


def test_the_table_and_the_page_list_every_set() -> None:
    rows = table().splitlines()
    assert [row.split()[0] for row in rows] == ["name", *REGISTRY] and "54,598" in rows[list(REGISTRY).index("jazz") + 1]
    page = (Path(__file__).parents[2] / "docs" / "recommender.md").read_text(encoding="utf-8")
    for name, remote in REGISTRY.items():
        assert remote.sizes, name
        sizes = " / ".join(f"{size:,}" for size in remote.sizes)
        assert f"| {name} | {remote.about} | {sizes} | {remote.licence} | " in page, name
