"""A file is read as what it proves to be: JSON lines, tables without a header, joined files; everything else is refused by name."""

import gzip
import io
import json
import pickle
import re
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from awrsr import DataError, DataWarning, Histories, read
from awrsr.cli import main

FRAME = pl.DataFrame({"user": [1, 1], "item": [2, 3]})
MOVIELENS = "1::1193::5::978300760\n1::661::3::978302109\n2::1357::5::978298709\n"
HEADLESS = "1,10,4.5,978300760\n2,20,3.0,978302109\n"
COLUMNS = "user,item,rating,time"


def as_lists(histories: Histories) -> dict[Any, list[Any]]:
    return {user: histories.item_ids[histories.of(n)].tolist() for n, user in enumerate(histories.user_ids.tolist())}


def made(write: Callable[[Any], Any]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def zipped(name: str) -> bytes:
    return made(lambda stream: zipfile.ZipFile(stream, "w").writestr(name, "x"))


def database(folder: Path) -> bytes:
    with sqlite3.connect(folder / "a.db") as connection:
        connection.execute("CREATE TABLE events (user, item)")
    connection.close()
    return (folder / "a.db").read_bytes()


# Other kinds of files

BINARY = {
    "an Excel workbook": zipped("xl/workbook.xml"),
    "an OpenDocument file": zipped("mimetype"),
    "a file of torch.save, which is never opened": zipped("archive/data.pkl"),
    "an archive of NumPy arrays": made(lambda stream: np.savez(stream, a=np.arange(3))),
    "a zip archive": zipped("ratings.csv"),
    "a NumPy array": made(lambda stream: np.save(stream, np.arange(3))),
    "an Arrow file": made(FRAME.write_ipc),
    "an Arrow stream": made(FRAME.write_ipc_stream),
    "an Avro file": made(FRAME.write_avro),
    "a gzip archive inside another": gzip.compress(gzip.compress(b"1 2\n")),
    "an ORC file": b"ORC\n\x0b",
    "an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "a PNG picture": b"\x89PNG\r\n\x1a\n",
    "a PDF document": b"%PDF-1.4\n",
    "a tar archive": b"a.csv".ljust(257, b"0") + b"ustar\x0000",
    "UTF-16 text": "user,item\n1,2\n".encode("utf-16"),
    "UTF-16 text without a mark": "user,item\n1,2\n".encode("utf-16-le"),
    "UTF-32 text": "user,item\n1,2\n".encode("utf-32"),
}
TEXT = {
    "a JSON array": '[{"user":1,"item":2}]\n',
    "a JSON array ": '[\n  {"user":1,"item":2}\n]\n',
    "a JSON array  ": "[1, 2]\n[1, 3]\n",
    "JSON over several lines": '{\n "user": 1,\n "item": 2\n}\n',
    "lines of Python's dictionaries": "{u'username': u'x', u'product_id': u'1'}\n{u'username': u'y', u'product_id': u'2'}\n",
    "XML or HTML": "<!DOCTYPE html>\n<html><body>1 2</body></html>\n",
    "XML or HTML ": '<?xml version="1.0"?>\n<ratings/>\n',
    "XML or HTML  ": "<ratings>\n<row user='1' item='2'/>\n</ratings>\n",
    "a printed table": "| user | item |\n|------|------|\n| 1 | 2 |\n",
    "a printed table ": " user | item \n------+------\n 1 | 2\n",
    "a printed table  ": "+------+------+\n| user | item |\n+------+------+\n",
    "a printed table   ": str(FRAME),
    "SQL": "-- MySQL dump 10.13\n--\nCREATE TABLE `events` (`user` int);\nINSERT INTO `events` VALUES (1,2);\n",
    "SQL ": "SET statement_timeout = 0;\nCOPY events FROM stdin;\n1\t2\n",
    "a web server's log": '127.0.0.1 - - [10/Oct/2000:13:55:36 -0700] "GET /a HTTP/1.0" 200 2326\n',
    "a log": "2024-01-01 00:00:00,123 INFO user 5 bought 7\n",
    "a system log": "Jan  5 12:00:00 host sshd[1]: hello\n",
    "a Git LFS pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:5\nsize 9\n",
    "a Python pickle, which is never opened": pickle.dumps({"a": [1]}, protocol=0).decode(),
    "a Matrix Market file": "%%MatrixMarket matrix coordinate real general\n1 2 3\n",
    "a LibSVM file": "1 3:1.0 5:2\n2 4:1\n",
    "an ARFF file": "@relation ratings\n@attribute user numeric\n",
    "YAML": "---\nuser: 1\n",
    "text that begins with a comment": "# FromNodeId\tToNodeId\n0\t1\n",
}


@pytest.mark.parametrize(
    "kind", [*BINARY, "an SQLite database", *(f"a Python pickle, which is never opened{n}" for n in (2, 4, 5))]
)
@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a"])
def test_binary_files_are_named_whatever_their_suffix(tmp_path: Path, kind: str, name: str) -> None:
    data = database(tmp_path) if "SQLite" in kind else BINARY.get(kind) or pickle.dumps([1, 2], protocol=int(kind[-1]))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: is {kind.rstrip('245')}.*; must be text or Parquet: .") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", TEXT)
def test_text_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    for name in ("a.txt", "a.csv", "a.txt.gz"):
        content = TEXT[kind].encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(DataError, match=f"{name}: is {re.escape(kind.strip())}.*; must be .*: .") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_parquet_is_read_under_any_name_and_its_name_does_not_make_it(tmp_path: Path) -> None:
    FRAME.write_parquet(tmp_path / "a.csv")
    assert as_lists(read(tmp_path / "a.csv")) == {1: [2, 3]}
    (tmp_path / "a.parquet").write_text("user,item\n1,2\n")
    with pytest.raises(DataError, match="is not a readable Parquet file: it begins with b'user'"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("user", ["use", "set", "begin", "{a}", "[b]", "<3", "-", "--", "c", "#1", "a:b"])
def test_ids_that_resemble_other_kinds_of_files_are_ids(user: str) -> None:
    assert as_lists(read(io.StringIO(f"{user} 2 3 4\nx 5 6\n"))) == {user: [2, 3, 4], "x": [5, 6]}


@pytest.mark.parametrize("kind", ["item", "time"])
@pytest.mark.parametrize("dtype", [pl.Duration, pl.Time, pl.Boolean, pl.Binary, pl.List(pl.Int64), pl.Struct({"a": pl.Int64})])
def test_parquet_columns_of_other_types_are_refused(tmp_path: Path, kind: str, dtype: Any) -> None:
    columns = {"user": pl.Series([1]), "item": pl.Series([1]), "time": pl.Series([1])} | {kind: pl.Series([None], dtype=dtype)}
    pl.DataFrame(columns).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a.parquet: row 1: {kind} is of type {re.escape(str(dtype)[:4])}.*; must be [^\n]*$"):
        read(tmp_path / "a.parquet")


def test_a_small_archive_does_not_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"1 2\n" * (70 << 20), 1))
    with pytest.raises(
        DataError, match=r"gzipped bytes become more than 2\d\d,\d\d\d,\d\d\d; unpack it by hand .* or raise max_unz"
    ):
        read(tmp_path / "a.gz")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"1 2\n") + gzip.compress(b"2 3\n"))  # joined archives
    assert as_lists(read(tmp_path / "b.gz", max_unzipped=8)) == {1: [2], 2: [3]}
    with pytest.raises(DataError, match="become more than 7"):
        read(tmp_path / "b.gz", max_unzipped=7)


# JSON lines

REVIEWS = {
    "Amazon until 2018": {"reviewerID": "A", "asin": "007", "helpful": [0, 1], "unixReviewTime": 5, "reviewTime": "02 4, 2014"},
    "Amazon 2023": {"user_id": "A", "parent_asin": "007", "asin": "9", "timestamp": 1588687728923, "images": []},
    "Yelp": {"review_id": "r", "user_id": "A", "business_id": "007", "stars": 3.0, "date": "2018-07-07 22:09:11"},
}


@pytest.mark.parametrize("source", REVIEWS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a.csv", "a.json.gz"])
def test_reviews_as_they_are_published_are_read(tmp_path: Path, source: str, name: str) -> None:
    first = REVIEWS[source]
    text = json.dumps(first | {"text": "late: 1 2 3\n"}) + "\n\n" + json.dumps(first) + "\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    with pytest.warns(DataWarning, match="1 of 2 events equal another in user, item and time"):
        found = read(tmp_path / name)
    assert as_lists(found) == {"A": ["007", "007"]}
    expected = {"Amazon until 2018": 5, "Amazon 2023": 1588687728923, "Yelp": 1531001351}[source]
    assert found.times is not None and found.times.tolist() == [expected] * 2


def test_columns_of_json_may_be_named_and_ids_follow_the_rule() -> None:
    text = '{"who":17.0,"what":"17","t":2}\n{"who":"17","what":17,"t":1.5}\n{"what":5,"who":17,"t":3}\n'
    found = read(io.StringIO(text), user="who", item="what", time="t")
    assert as_lists(found) == {17: [17, 17, 5]} and found.times is not None and found.times.tolist() == [1.5, 2, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", ":3: is not JSON: "),
        ("[1, 2]", r":3: is '\[1, 2\]'; must be an object, one per event"),
        ('{"user": 1}', ":3: item is missing"),
        ('{"user": null, "item": 2}', ":3: user is missing"),
        ('{"user": 1, "item": [1, 2]}', r":3: item is '\[1, 2\]'; must be one number or text"),
        ('{"user": true, "item": 2}', ":3: user is 'true'; must be"),
        ('{"user": NaN, "item": 2}', ":3: user is missing"),
        ('{"user": "NULL", "item": 2}', ":3: user is 'NULL' among whole numbers"),
    ],
)
def test_lines_of_json_that_are_no_events_are_named(line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(io.StringIO('{"user":1,"item":2}\n\n' + line + "\n"))


def test_a_time_that_comes_late_in_json_lines_is_not_ignored() -> None:
    text = '{"user":1,"item":2}\n' * 150 + '{"user":1,"item":3,"date":"2019-10-01"}\n'
    with pytest.raises(DataError, match=":151: has 'date', which may be the time and which the lines before lack"):
        read(io.StringIO(text))
    assert read(io.StringIO(text), time="none").times is None
    with pytest.raises(DataError, match=":1: time is missing"):
        read(io.StringIO('{"user":1,"item":2}\n{"user":1,"item":3,"date":"2019-10-01"}\n'))


# Tables without a header


def test_movielens_is_read_with_named_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ratings.dat"
    path.write_text(MOVIELENS)
    for options in ({"columns": COLUMNS}, {"columns": COLUMNS.split(","), "separator": "::"}):
        found = read(path, **options)  # type: ignore[arg-type]
        assert as_lists(found) == {1: [1193, 661], 2: [1357]} and found.times is not None and found.times[0] == 978300760
    found = read(path, header=False, user="1", item="2", time="4")
    assert as_lists(found) == {1: [1193, 661], 2: [1357]}
    with pytest.raises(DataError, match=r"columns names 2 fields, but the first line has 4 fields divided by '::'"):
        read(path, columns="user,item")
    for flags in (["--columns", COLUMNS], ["--separator", "::", "--no-header", "--user-column", "1", "--item-column", "2"]):
        assert main(["data", "stats", str(path), *flags]) == 0
    assert capsys.readouterr().out.count("events                                                        3") == 2


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.tsv", "a"])
@pytest.mark.parametrize("separator", [",", "\t", ";", "|", "::", ", ", " "])
def test_a_table_without_a_header_is_never_read_as_something_else(tmp_path: Path, name: str, separator: str) -> None:
    path = tmp_path / name
    path.write_text(HEADLESS.replace(",", separator))
    with pytest.raises(DataError, match=r"--columns user,item,rating,time"):
        read(path)
    for form in ("csv", "auto"):
        with pytest.raises(DataError, match="--columns user,item,rating,time"):
            read(path, format=form, user="1", item="10")
    if separator != ", ":
        assert as_lists(read(path, columns=COLUMNS)) == {1: [10], 2: [20]}


@pytest.mark.parametrize(
    "text",
    [
        "1\t10\t20\n2\t20\t30\n",
        "1 10 978300760\n2 20 978300761\n",
        "1 10 2014-01-01\n2 20 2014-01-02\n",
        "1\t10\t4.5\n",
        "a b 3.0\nc d 4.5\n",
    ],
)
def test_events_whose_users_never_recur_are_no_lines(text: str) -> None:
    with pytest.raises(DataError, match=":1: .* looks like an event rather than a user and items, because each line has"):
        read(io.StringIO(text))
    assert read(io.StringIO(text), format="lines").num_users == text.count("\n")


def test_a_first_event_of_text_is_not_lost_as_a_header() -> None:
    text = "u1,i1\nu1,i2\nu2,i1\n"
    with pytest.raises(DataError, match="no column whose name suggests the user; .* if the file has no header, name its columns"):
        read(io.StringIO(text), format="csv")
    with pytest.raises(DataError, match=":2: user is 'u1', which is also the name of the column; if the file has no header"):
        read(io.StringIO(text), user="u1", item="i1")
    assert as_lists(read(io.StringIO(text), columns="user,item")) == {"u1": ["i1", "i2"], "u2": ["i1"]}


@pytest.mark.parametrize("options", [{"columns": "user,item"}, {"header": False}])
def test_a_header_is_not_read_as_an_event(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="the first line, 'user,item', is a header; leave out --columns and --no-header"):
        read(io.StringIO("user,item\n1,2\n"), **options)


def test_prose_is_no_histories() -> None:
    with pytest.raises(DataError, match="its words end in punctuation, as in prose"):
        read(io.StringIO("It was late. Nobody had come,\nand the letters lay unread.\nThen someone knocked: twice.\n"))


# Joined files


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_header_that_occurs_again_is_no_user(mark: str) -> None:
    part = f"{mark}user,item\n1,2\n1,3\n"
    with pytest.warns(DataWarning, match="standard input:4: the header occurs again; left out 2 such lines"):
        assert as_lists(read(io.BytesIO((part * 3).encode()))) == {1: [2, 3] * 3}
    found = read(io.BytesIO(f"{mark}1 2 3\n{mark}2 3 4\n".encode()))
    assert as_lists(found) == {1: [2, 3], 2: [3, 4]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item\n1,2\nitem,user\n3,4\n", ":3: is a header with the columns in another order"),
        ("user,item\n1,2\nuser,9\n", ":3: user is 'user', which is also the name of the column"),
        ("user,item\n1,2\ufeffuser,item\n3,4\n", ":2: has a byte order mark inside a line"),
        ("1 2\n1 3\nuser_id item_id\n2 3\n", ":3: looks like names of columns between events"),
    ],
)
def test_joined_files_that_do_not_fit_are_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(io.BytesIO(text.encode()))


@pytest.mark.parametrize("field", ['""4""', '"4"x', 'x"4"', 'x""', '"4" ', '"4""', '5" disk 6"'])
def test_quotes_enclose_a_whole_field_or_none(field: str) -> None:
    for row in (f"{field},2", f"2,{field}"):
        with pytest.raises(DataError, match=r":[34]: has (a quote \(\"\) inside a field|the last of an odd number)"):
            read(io.StringIO(f'user,item\n"1","2"\n{row}\n"3",4\n'))
    text = 'user,item\n"4","a""b"\n"","5"\n'
    with pytest.raises(DataError, match=":3: user is missing"):
        read(io.StringIO(text))
    assert as_lists(read(io.StringIO(text.replace('"",', '"""",')))) == {"4": ['a"b'], '"': ["5"]}
