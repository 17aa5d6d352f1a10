"""Histories and splits against brute force; readers: every format, every complaint."""

import gzip
import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from awrsr.data.histories import Histories, number
from awrsr.data.readers import DataError, read
from awrsr.data.splits import Split, split, time_folds
from awrsr.data.synthetic import write

EVENTS = [("3", "10"), ("3", "20"), ("1", "10"), ("1", "30"), ("1", "10"), ("2", "40")]  # users one after another, in time order
AS_LISTS = {3: [10, 20], 1: [10, 30, 10], 2: [40]}
LINES = "3 10 20\n1 10 30 10\n2 40\n"
PAIRS = "".join(f"{user} {item}\n" for user, item in EVENTS)
ids = st.one_of(st.integers(-3, 3), st.integers(-(2**70), 2**70), st.text("aé漢7-_:#", min_size=1, max_size=4)).map(str)
event_lists = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40)


def as_lists(histories: Histories) -> dict[Any, list[Any]]:
    users = histories.user_ids.tolist()
    return {user: histories.item_ids[histories.of(place)].tolist() for place, user in enumerate(users)}


def same(a: Histories, b: Histories) -> bool:
    """Equal ids and items, not times."""
    fields = ("items", "offsets", "item_ids", "user_ids")
    return all(np.array_equal(getattr(a, f), getattr(b, f)) and getattr(a, f).dtype == getattr(b, f).dtype for f in fields)


def saved(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def events_of(pairs: list[tuple[int, int]], times: np.ndarray | None = None) -> Histories:
    users, items = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Histories.from_events(users, items, times)


# Histories


class Table:
    """A column as pandas has them: what an index asks for goes by labels, here places in reverse."""

    def __init__(self, values: list[Any]) -> None:
        self.values = np.array(values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, label: Any) -> Any:
        return self.values[::-1][label]


def test_columns_of_a_table_are_taken_by_place() -> None:
    users, items, times = [2, 1, 2, 1, 1], ["e", "a", "d", "c", "b"], [5, 1, 4, 3, 2]
    found = Histories.from_events(Table(users), Table(items), Table(times))
    assert as_lists(found) == {2: ["d", "e"], 1: ["a", "b", "c"]} and found.times is not None
    assert found.times.tolist() == [4, 5, 1, 2, 3]
    days = np.array([f"1970-01-0{day}" for day in times], dtype="datetime64[D]")
    dated = Histories.from_events(users, items, days)
    assert as_lists(dated) == as_lists(found) and dated.times is not None
    assert dated.times.tolist() == [86400 * day for day in (3, 4, 0, 1, 2)]
    assert len(split(dated, "time", validation_from=86400, test_from=3 * 86400).targets("test")[0])
    near = [2**53, 2**53 + 1, 7.0]
    assert as_lists(Histories.from_events([1, 1, 1], near)) == {1: [2**53, 2**53 + 1, 7]}
    assert as_lists(Histories.from_events(np.array([1, 1], dtype=np.int32), np.array(["x", 3], dtype=object))) == {1: ["x", "3"]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([1, 1], [1]), "equally long, with one value per event: users has 2, items has 1"),
        (([1], [1], [1, 2]), "users has 1, items has 1, times has 2"),
        (([1, 1], [1, 2], [1.0, math.nan]), r"times\[1\] is missing"),
        (([1, 1], [1, 2], np.array(["1970-01-01", "NaT"], dtype="datetime64[s]")), r"times\[1\] is missing"),
        (([1, 1], [1, 2], ["1", "2"]), "times are of type <U1, must be numbers or datetime64"),
        (([1, 1], [1, math.nan]), "item id is nan"),
        (([1], [1], [[1]]), r"times are of shape \(1, 1\), must be \(T,\)"),
        ((np.array([[1]]), [1]), r"users are of shape \(1, 1\), must be \(T,\)"),
    ],
)
def test_columns_that_are_no_events_are_refused(columns: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Histories.from_events(*columns)


@given(event_lists, st.booleans())
def test_events_are_grouped_by_user_in_time_order(pairs: list[tuple[int, int]], timed: bool) -> None:
    times = np.array([(7 * i) % 5 for i in range(len(pairs))]) if timed else None
    expected: dict[int, list[tuple[int, int, int]]] = {}
    for i, (user, item) in enumerate(pairs):
        expected.setdefault(user, []).append((0 if times is None else int(times[i]), i, item))
    assert as_lists(events_of(pairs, times)) == {user: [item for *_, item in sorted(rows)] for user, rows in expected.items()}


@given(st.lists(st.one_of(st.integers(-5, 5), st.integers(-(2**63), 2**63 - 1)), max_size=50))
def test_number_keeps_the_order_of_first_appearance(values: list[int]) -> None:
    distinct, place = number(np.array(values, dtype=np.int64))
    assert distinct.tolist() == list(dict.fromkeys(values)) and distinct[place].tolist() == values


@given(event_lists, st.integers(1, 4), st.integers(1, 4))
def test_core_drops_until_nothing_changes(pairs: list[tuple[int, int]], per_user: int, per_item: int) -> None:
    left = list(pairs)
    while True:
        users, items = [user for user, _ in left], [item for _, item in left]
        again = [pair for pair in left if users.count(pair[0]) >= per_user and items.count(pair[1]) >= per_item]
        if again == left:
            break
        left = again
    core = events_of(pairs).core(min_user_events=per_user, min_item_events=per_item)
    expected: dict[int, list[int]] = {}
    for user, item in left:
        expected.setdefault(user, []).append(item)
    assert as_lists(core) == expected
    assert sorted(core.item_ids.tolist()) == sorted({item for _, item in left})


def test_core_drops_items_that_nobody_has() -> None:
    known, left_out = events_of([(1, 5), (1, 6)]).numbered_as(np.array([9, 6]))
    assert left_out == 1 and known.core().item_ids.tolist() == [6]


@given(event_lists)
def test_collapsed_keeps_the_first_of_each_run(pairs: list[tuple[int, int]]) -> None:
    histories = events_of(pairs, np.arange(len(pairs)))
    collapsed = histories.collapsed()
    expected = {user: [x for i, x in enumerate(items) if not i or x != items[i - 1]] for user, items in as_lists(histories).items()}
    assert as_lists(collapsed) == expected
    assert collapsed.times is not None and all((np.diff(collapsed.times[a:b]) > 0).all() for a, b in _bounds(collapsed))


@given(event_lists)
def test_repeats_are_events_whose_item_the_user_had_before(pairs: list[tuple[int, int]]) -> None:
    share = 1 - len(set(pairs)) / max(len(pairs), 1)
    assert events_of(pairs).repeat_share() == pytest.approx(share)
    assert events_of(pairs).repeats() == (share > 0.01)


@given(event_lists, st.integers(1, 3))
def test_a_split_numbered_otherwise_keeps_the_targets_that_are_known(pairs: list[tuple[int, int]], n: int) -> None:
    histories = events_of(pairs)
    try:
        parts = split(histories, "last-n", n=n)
    except ValueError:
        return
    known = histories.item_ids[::2][::-1]
    numbered, unknown = parts.numbered_as(known)
    assert unknown == np.isin(histories.item_ids[histories.items], known, invert=True).sum()
    for part in ("validation", "test"):
        users, places = parts.targets(part)
        held_out = [(u, histories.item_ids[histories.of(u)[p]]) for u, p in zip(users, places, strict=True)]
        users, places = numbered.targets(part)
        kept = [(u, known[numbered.histories.of(u)[p]]) for u, p in zip(users, places, strict=True)]
        alone = {u for u in users if not len(numbered.histories.of(u))}  # nothing is left before their targets
        assert set(kept) <= {(u, item) for u, item in held_out if item in known} and not alone
        for u, item in held_out:
            before = numbered.histories.of(u)[: {"validation": numbered.train_end, "test": numbered.validation_end}[part][u]]
            assert item not in known or (u, item) in kept or not len(before)


def test_from_lists_takes_mappings_lists_and_users_without_events() -> None:
    assert as_lists(Histories.from_lists({"a": ["x", "y"], "b": [], "c": ["x"]})) == {"a": ["x", "y"], "b": [], "c": ["x"]}
    assert as_lists(Histories.from_lists([[5, 6], [5]])) == {0: [5, 6], 1: [5]}


def test_numbered_as_meets_a_catalogue_by_what_ids_look_like() -> None:
    known, left_out = Histories.from_lists({"a": [7, 8], "b": [9]}).numbered_as(np.array(["8", "7"]))
    assert known.items.tolist() == [1, 0] and known.lengths.tolist() == [2, 0] and left_out == 1


def _bounds(histories: Histories) -> list[tuple[int, int]]:
    return list(zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True))


# Splits


def _targets(parts: Split, part: str) -> list[tuple[int, int]]:
    users, places = parts.targets(part)
    return sorted(zip(users.tolist(), places.tolist(), strict=True))


@given(event_lists, st.integers(1, 3))
def test_split_of_the_last_n(pairs: list[tuple[int, int]], n: int) -> None:
    histories = events_of([*pairs, *[(9, 1)] * 7])  # one user who is long enough
    lengths = list(enumerate(histories.lengths.tolist()))
    parts = split(histories, "last-n", n=n)
    long = [(user, length) for user, length in lengths if length > 2 * n]
    assert _targets(parts, "test") == [(u, p) for u, length in long for p in range(length - n, length)]
    assert _targets(parts, "validation") == [(u, p) for u, length in long for p in range(length - 2 * n, length - n)]
    assert parts.train_end.tolist() == [length - 2 * n if length > 2 * n else length for _, length in lengths]
    if n == 1:
        assert _targets(split(histories), "test") == _targets(parts, "test")


@given(event_lists)
def test_split_by_time(pairs: list[tuple[int, int]]) -> None:
    pairs = [*pairs, (9, 1), (9, 2), (9, 3)]
    times = np.array([*[(11 * i) % 9 for i in range(len(pairs) - 3)], 0, 4, 8])
    histories = events_of(pairs, times)
    parts = split(histories, "time", validation_from=3, test_from=6)
    assert histories.times is not None
    placed = [(u, i - a, histories.times[i]) for u, (a, b) in enumerate(_bounds(histories)) for i in range(a, b)]
    assert _targets(parts, "validation") == [(u, p) for u, p, time in placed if 3 <= time < 6 and p]
    assert _targets(parts, "test") == [(u, p) for u, p, time in placed if time >= 6 and p]


def test_a_user_with_one_item_trains_only() -> None:
    parts = split(Histories.from_lists([[1], [1, 2, 3]]))
    assert parts.train_end.tolist() == [1, 1] and _targets(parts, "test") == [(1, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "random"}, "must be one of leave-one-out, last-n, time"),
        ({"how": "time"}, "needs a file with a time column"),
        ({"how": "last-n", "n": 0}, "n is 0, must be 1 or more"),
        ({"how": "last-n", "n": 2}, "leaves nothing for validation: the longest history has 3 events"),
    ],
)
def test_splits_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(Histories.from_lists([[1, 2, 3]]), **options)


# Readers


def every_format(folder: Path, header: tuple[str, str, str] = ("user_id", "item_id", "timestamp")) -> list[Path]:
    rows = [(user, item, 100 + time) for time, (user, item) in enumerate(EVENTS)]
    text = [(str(user), str(item), str(time)) for user, item, time in rows]
    delimited = {sign: "\n".join(sign.join(row) for row in [header, *text]) + "\n" for sign in ",\t;"}
    typed = "\t".join(f"{name}:{kind}" for name, kind in zip(header, ("token", "token", "float"), strict=True))
    pl.DataFrame(rows, schema=list(header), orient="row").write_parquet(folder / "a.parquet")
    return [
        saved(folder, "lines.txt", LINES),
        saved(folder, "pairs.txt", PAIRS),
        saved(folder, "windows.txt", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode()),
        saved(folder, "ragged.txt", LINES.replace(" ", " \t ").rstrip("\n")),
        saved(folder, "a.inter", typed + "\n" + delimited["\t"].split("\n", 1)[1]),
        saved(folder, "a.csv", delimited[","]),
        saved(folder, "quoted.csv", delimited[","].replace(",10,", ',"10",')),
        saved(folder, "blank.csv", delimited[","].replace("\n", "\r\n \r\n")),
        saved(folder, "a.tsv", delimited["\t"]),
        saved(folder, "semicolons.csv", delimited[";"]),
        saved(folder, "commas.txt", delimited[","]),
        saved(folder, "nothing", delimited["\t"]),
        saved(folder, "zipped.csv.gz", gzip.compress(delimited[","].encode())),
        saved(folder, "zipped.txt.gz", gzip.compress(LINES.encode())),
        folder / "a.parquet",
    ]


def test_every_format_reads_the_same(tmp_path: Path) -> None:
    for path in every_format(tmp_path):
        histories = read(path)
        assert as_lists(histories) == AS_LISTS, path.name
        assert histories.item_ids.dtype == np.int64 and same(histories, read(tmp_path / "lines.txt")), path.name
        has_times = path.name.split(".")[0] not in ("lines", "pairs", "windows", "ragged") and path.name != "zipped.txt.gz"
        assert (None if histories.times is None else histories.times.tolist()) == ([*range(100, 106)] if has_times else None)


def test_columns_may_be_named(tmp_path: Path) -> None:
    every_format(tmp_path, header=("who", "What", "when"))
    for name in ("a.csv", "a.inter", "a.tsv", "commas.txt", "a.parquet"):
        assert as_lists(read(tmp_path / name, user="who", item="what", time="WHEN")) == AS_LISTS, name


def test_a_column_that_only_looks_like_times_is_passed_over_on_demand() -> None:
    text = "user,item,runtime\n1,9,50\n1,8,40\n"
    untimed, timed = (read(io.StringIO(text), time=name) for name in ("none", "runtime"))
    assert as_lists(untimed) == {1: [9, 8]} and untimed.times is None and as_lists(timed) == {1: [8, 9]}
    assert as_lists(read(io.StringIO("user,item,none\n1,9,2\n1,8,1\n"), time="none")) == {1: [8, 9]}  # its name is its own
    assert as_lists(read(io.StringIO("user,item,ts,review_date\n1,9,1,9\n1,8,2,8\n"))) == {1: [9, 8]}  # the time is found
    assert as_lists(read(io.StringIO("user,item,candidate\n1,9,1\n"))) == {1: [9]}
    for text in ("1 9\n1 8\n2 8\n", "user,item,None\n1,9,1\n1,8,2\n"):
        assert as_lists(read(io.StringIO(text), time="none"))[1] == [9, 8]
    assert as_lists(read(io.StringIO("1 9\n1 8\n"), format="pairs", time="none")) == {1: [9, 8]}


def test_dates_by_type_are_asked_about_whatever_their_name(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [1, 1], "item": [2, 3], "bought": [2, 1]}).with_columns(pl.col("bought").cast(pl.Datetime))
    frame.write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'bought' may be the time"):
        read(tmp_path / "a.parquet")
    assert as_lists(read(tmp_path / "a.parquet", time="bought")) == {1: [3, 2]}
    assert as_lists(read(tmp_path / "a.parquet", time="none")) == {1: [2, 3]}


def test_text_of_one_line_or_of_words_has_no_header() -> None:
    assert as_lists(read(io.StringIO("u i\n"))) == {"u": ["i"]}
    assert as_lists(read(io.StringIO("u a\nb 2\n3 b\n"))) == {"u": ["a"], "b": ["2"], "3": ["b"]}
    assert as_lists(read(io.StringIO("u a\n1 2\n"), format="pairs")) == {"u": ["a"], "1": ["2"]}


@pytest.mark.parametrize("header", ["userId,movieId,timestamp", "reviewerID,asin,unixReviewTime", "Visitor ID,SID,ts"])
def test_usual_names_are_guessed(header: str) -> None:
    histories = read(io.StringIO(f"{header}\n1,8,6\n1,9,5\n"))
    assert as_lists(histories) == {1: [9, 8]} and histories.times is not None and histories.times.tolist() == [5, 6]


def test_pairs_and_lines_mean_the_same_where_no_user_returns() -> None:
    text = "1 5\n2 6\n"
    assert same(read(io.StringIO(text), format="pairs"), read(io.StringIO(text), format="lines"))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ü 1 2\n".encode())))
    assert as_lists(read("-")) == {"ü": [1, 2]}


@settings(deadline=None)
@given(st.dictionaries(ids, st.lists(ids, min_size=1, max_size=6), min_size=1, max_size=6))
def test_ids_of_any_kind_come_back(histories: dict[str, list[str]]) -> None:
    lines = "".join(f"{user} {' '.join(items)}\n" for user, items in histories.items())
    rows = "user,item\n" + "".join(f'{user},"{item}"\n' for user, items in histories.items() for item in items)
    for stream, form in ((io.StringIO(lines), "lines"), (io.BytesIO(rows.encode()), "csv")):
        back = as_lists(read(stream, format=form))
        assert {str(user): [str(item) for item in items] for user, items in back.items()} == histories


@pytest.mark.parametrize("odd", ["007", "+7", "-0", "9223372036854775808", "7.5", "é"])
def test_one_id_that_is_no_int64_keeps_all_of_its_kind_text(odd: str) -> None:
    histories = read(io.StringIO(f"1 7 {odd}\n-2 7\n"))
    assert histories.item_ids.tolist() == ["7", odd] and histories.user_ids.tolist() == [1, -2]


def test_the_ends_of_int64_are_numbers() -> None:
    assert read(io.StringIO(f"1 {2**63 - 1} {-(2**63)}\n")).item_ids.tolist() == [2**63 - 1, -(2**63)]


def test_parquet_of_any_column_types(tmp_path: Path) -> None:
    moments = pl.Series([2, 1, 3]).cast(pl.Datetime("ms"))
    users, items = pl.Series(["a", "a", "b"], dtype=pl.Categorical), pl.Series([2**64 - 1, 1, 2], dtype=pl.UInt64)
    pl.DataFrame({"user": users, "item": items, "date": moments}).write_parquet(tmp_path / "a.parquet")
    histories = read(tmp_path / "a.parquet")
    assert as_lists(histories) == {"a": ["1", str(2**64 - 1)], "b": ["2"]}
    assert histories.times is not None and histories.times.tolist() == [0.001, 0.002, 0.003]


def test_iso_dates_become_seconds() -> None:
    days = ["2020-01-01", "2020-01-01T00:00:01", "2020-01-01 00:00:02.5", "2020-01-01T00:00:03Z", "2020-01-01T01:00:04+01:00"]
    text = "user,item,time\n" + "".join(f"1,{i},{day}\n" for i, day in enumerate([*days, "2020-01-01T00:01"]))
    times = read(io.StringIO(text)).times
    assert times is not None and (times - 1577836800).tolist() == [0, 1, 2.5, 3, 4, 60]


def test_quotes_hold_separators_line_ends_and_quotes() -> None:
    text = 'user,item\n"a,b","c\nd"\n"x ""y""",e\n'
    assert as_lists(read(io.StringIO(text))) == {"a,b": ["c\nd"], 'x "y"': ["e"]}


def test_written_lines_come_back(tmp_path: Path) -> None:
    histories = read(io.StringIO("ü 5 6 5\n-1 7\n"))
    assert same(read(write(histories, tmp_path / "a.txt")), histories) and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_time_folds_follow_one_another() -> None:
    table = pl.DataFrame({"user": [n % 7 for n in range(120)], "item": [n % 5 for n in range(120)], "time": range(120)})
    folds = time_folds(table, 3, length=20)
    for nth, fold in enumerate(folds):
        times = fold.histories.times
        assert times is not None and times.max() == 119 - 20 * (2 - nth)
        users, places = fold.targets("test")
        tested = np.sort(times[fold.histories.offsets[users] + places])
        assert tested.tolist() == list(range(60 + 20 * nth, 80 + 20 * nth)) and len(fold.targets("validation")[0]) == 20
    assert [len(fold.targets("test")[0]) for fold in time_folds(table, 2)] == [30, 30]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"user": [1], "item": [1]}, {}, "time_folds needs times; these histories have none"),
        ({"user": [1, 1], "item": [1, 2], "time": [0, 9]}, {"n": 0}, "n is 0, must be 1 or more splits"),
        ({"user": [1, 1], "item": [1, 2], "time": [0, 9]}, {"length": 5}, "3 tests of length 5 must be shorter than .* 0 to 9"),
    ],
)
def test_time_folds_that_do_not_fit_are_refused(table: dict[str, list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_folds(pl.DataFrame(table), **options)
