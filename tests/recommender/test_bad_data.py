"""Files that cannot be read: the complaint names the file, the line and what is wrong."""

import gzip
import io
import re
from pathlib import Path

import polars as pl
import pytest

from awrsr.data.histories import Histories
from awrsr.data.readers import DataError, read
from awrsr.data.synthetic import write

WRONG = [  # file name, content, what follows the path in the message
    ("a.txt", "", ": is empty"),
    ("a.txt", " \n\n", ": contains only blank lines"),
    ("a.txt", "1 2 3\n\n3\n", ":3: user '3' has no items; a line must be a user id followed by item ids"),
    ("a.txt", "1 2 3\n2 5\n1 4\n", ":3: user '1' already has line 1; each user must have one line; .* name the format"),
    ("a.txt", "1 2 3\n2 nan 3\n", ":2: item is 'nan' among whole numbers"),
    ("a.txt", "1 2\nNone 3\n", ":2: user is 'None' among whole numbers"),
    ("a.txt", "1 2\n1 " + "x" * 1001, ":2: item 'x{40}...' has 1001 characters; must have at most 1000"),
    ("a.txt", b"1 2\n\n\xff 3\n", ":3: byte 0xff is not UTF-8"),
    ("a.txt", b"1 2\n1 \x00\n", ":2: byte 0x00 is not text"),
    ("a.txt", "1::2::3\n", ":1: user '1::2::3' has no items; .* name the format"),
    ("a.pkl", b"\x80\x04\x95", ": is a Python pickle, which is never opened"),
    ("a.npz", b"PK\x03\x04", ": is a zip archive"),
    ("a.txt.gz", gzip.compress(b"1 2\n" * 99)[:-9], ": is an incomplete or damaged gzip archive"),
    ("a.csv", "user,item\n", ": has a header and no rows"),
    ("a.csv", "user,item,stars\n1,2,3\n\n1,2\n", ":4: has 2 fields, the header has 3: user, item, stars"),
    ("a.csv", "user,item\n1,2\n1,2,3\n", ":3: has 3 fields, the header has 2: user, item"),
    ("a.csv", "user,item\n1\n", ":2: has 1 field, the header has 2"),
    ("a.csv", 'user,item\n1,"a\nb"\n2,\n', ":4: item is missing"),
    ("a.csv", "user,item\n ,2\n", ":2: user is missing"),
    ("a.csv", "user,item\n1,2\nNaN,3\n", ":3: user is 'NaN' among whole numbers"),
    ("a.csv", "user,item,time\n1,2,\n", ":2: time is missing"),
    ("a.csv", "user,item,time\n1,2,3\n1,2,NaN\n", ":3: time is 'NaN'; must be a finite number"),
    ("a.csv", "user,item,time\n1,2,3\n1,2,-inf\n", ":3: time is '-inf'; must be a finite number"),
    ("a.csv", "user,item,time\n1,2,3\n1,2,2020-01-01\n", ":3: time is '2020-01-01'; must be a finite number"),
    ("a.csv", "user,item,time\n1,2,2020-01-01\n1,2,2020-02-30\n", ":3: time is '2020-02-30'; must be a number or an ISO 8601 date"),
    ("a.csv", "user,item,user\n1,2,3\n", ": column 'user' occurs more than once; columns: 'user', 'item', 'user'"),
    ("a.csv", "user,uid,item\n1,2,3\n", ": has more than one column that may be the user; name it with --user-column .*; .*'uid'"),
    ("a.csv", "user,thing\n1,2\n", ": has no column whose name suggests the item; name it with --item-column .*'thing'"),
    ("a.csv", "user,item,date,time\n1,2,3,4\n", ": has more than one column that may be the time; name it with --time-col"),
    (
        "a.csv",
        "user,item,reviewTime\n1,2,3\n",
        ": column 'reviewTime' may be the time; use --time-column 'reviewTime' if it",
    ),
    ("a.csv", "user,item,t_dat\n1,2,3\n", ": column 't_dat' may be the time; .* or --time-column none if the lines are in"),
    ("a.inter", "user_id:token\titem_id:token\torderDate:float\n1\t2\t3\n", ": column 'orderDate' may be the time"),
    ("a.txt", "u i\n1 2\n1 3\n", ":1: 'u i' looks like names of columns, as numbers follow; remove the line"),
    ("a.txt", "\nwho what when\n1 2 3\n4 5 6\n", ":2: 'who what when' looks like names"),
    ("a.txt", "who what stars\n1 2 4.5\n1 3 .5\n", ":1: 'who what stars' looks like names"),
    ("a.txt", "org remap\na1 0\nb7 1\n", ":1: 'org remap' looks like names"),
    ("a.txt", "who what\n1 2 3\n4 5\n", ":1: 'who what' looks like names"),
    ("a.csv", "user,item,timestamps\n1,2,3\n", ": column 'timestamps' may be the time"),
    ("a.csv", "user,item,datetime_utc\n1,2,3\n", ": column 'datetime_utc' may be the time"),
    ("a.csv", "user,item,timestamp1\n1,2,3\n", ": column 'timestamp1' may be the time"),
    (
        "a.csv",
        "user,item,date\n1,2,April 5\n",
        ":2: time is 'April 5'; must be .*; if the lines are in order of .* none ignores",
    ),
    ("a.csv", 'user,item\n1,"2\n', r':2: has the last of an odd number of quotes \("\)'),
    ("a.csv", 'user,item\n1,2\n1,"a"b\n', r':3: has a quote \("\) inside a field'),
    ("a.csv", 'user,item\n1,5" disk\n2,6" disk\n', r':2: has a quote \("\) inside a field'),
    ("a.inter", "user\titem\n1\t2\n", ": has no header like user_id:token<tab>item_id:token"),
    (
        "a.inter",
        "user_id:token\titem_id_list:token_seq\titem_id:token\n1\t2 3\t4\n",
        ": has a column item_id_list:token_seq, so its rows are pieces of histories; must be one event per row",
    ),
    ("a.inter", "user_id:token\titem_id:token\n1\t2\n1\n", ":3: has 1 field, the header has 2"),
    ("a.parquet", b"PAR1 and no more", ": is not a readable Parquet file"),
    ("a.parquet", b"", ": is empty"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG, ids=[f"{i}-{row[2][:30]}" for i, row in enumerate(WRONG)])
def test_complaints(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match="^" + re.escape(str(path)) + message):
        read(path)


def test_pairs_with_a_field_too_many() -> None:
    with pytest.raises(DataError, match="^standard input:3: has 3 fields; a line must be a user id and an item id"):
        read(io.StringIO("1 2\n\n1 2 3\n"), format="pairs")


def test_names_of_columns_that_are_not_there() -> None:
    stream = "who,item\n1,2\n"
    with pytest.raises(DataError, match="has no column 'user'; columns: 'who', 'item'"):
        read(io.StringIO(stream), user="user")
    with pytest.raises(DataError, match="column 'item' is both user and item"):
        read(io.StringIO(stream), user="item")
    with pytest.raises(DataError, match="""format "lines" has no columns, so user='who' cannot be found"""):
        read(io.StringIO(stream), user="who", format="lines")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read(tmp_path / "a.txt")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)


def test_an_unknown_format() -> None:
    with pytest.raises(ValueError, match="format is 'json', must be one of auto, lines, pairs, inter, csv, parquet"):
        read(io.StringIO("1 2\n"), format="json")


def test_parquet_rows_are_counted_from_one(tmp_path: Path) -> None:
    for column, message in (("item", "row 2: item is missing"), ("time", "row 2: time is nan; must be a finite number")):
        frame = pl.DataFrame({"user": [1, 1], "item": [1, None if column == "item" else 2], "time": [1.0, float("nan")]})
        frame.write_parquet(tmp_path / "a.parquet")
        with pytest.raises(DataError, match=message):
            read(tmp_path / "a.parquet")


def test_parquet_of_lists(tmp_path: Path) -> None:
    pl.DataFrame({"user": [1], "item": [[1, 2]]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"item is of type List\(Int64\); must be one number or text per row"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(("histories", "message"), [({"a b": [1]}, "user id is 'a b'"), ({"a": []}, "user a has no events")])
def test_what_lines_cannot_hold_is_not_written(tmp_path: Path, histories: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(Histories.from_lists(histories), tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())
