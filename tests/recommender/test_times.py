"""Times as files and tables hold them, splits at a moment, and events that occur twice."""

import io
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from awrsr import DataError, DataWarning, Histories, read, split
from awrsr.cli import main
from awrsr.data.prepare import DataOptions, divide, histories

pandas = pytest.importorskip("pandas")
OCTOBER = 1569888000  # 2019-10-01 in UTC
DAY = 86400


@pytest.mark.parametrize(
    "text",
    [
        "2019-10-01 00:00:00 UTC",
        "2019-10-01T00:00:00Z",
        "2019-10-01 00:00:00 GMT",
        "2019-10-01 00:00:00.000 UTC",
        "2019-10-01 02:00:00+02:00",
        "2019-10-01 00:00",
        "2019-10-01",
        " 2019-10-01 00:00:00",
        "1569888000",
        "1569888000.0",
        " 1569888000",
    ],
)
def test_dates_of_text_are_one_moment(text: str) -> None:
    for other in ("2019-10-01 00:00:00 UTC", text):
        other = text if text.strip()[:4] == "1569" else other
        times = read(io.StringIO(f"user,item,time\n1,2,{text}\n1,3,{other}\n")).times
        assert times is not None and times.tolist() == [OCTOBER] * 2


NAIVE = pandas.Series(pandas.to_datetime(["2019-10-01 00:00:00", "2019-10-02 00:00:00"]))


@pytest.mark.parametrize(
    "times",
    [
        NAIVE,
        NAIVE.dt.tz_localize("UTC").dt.tz_convert("Asia/Tokyo"),
        NAIVE.dt.tz_localize("UTC").dt.tz_convert("America/New_York").astype(object),
        NAIVE.tolist(),
        ["2019-10-01 00:00:00 UTC", "2019-10-02T02:00:00+02:00"],
        np.array(["2019-10-01", "2019-10-02"]),
        pandas.Series(["2019-10-01", "2019-10-02"]),
        [datetime(2019, 10, 1), datetime(2019, 10, 1, 23, tzinfo=timezone(timedelta(hours=-1)))],
        [date(2019, 10, 1), date(2019, 10, 2)],
        np.array(["2019-10-01", "2019-10-02"], dtype="datetime64[ns]"),
        pl.Series([datetime(2019, 10, 1), datetime(2019, 10, 2)]).dt.replace_time_zone("UTC").dt.convert_time_zone("Asia/Tokyo"),
        pl.Series(["2019-10-01", "2019-10-02"]),
    ],
)
def test_from_events_takes_every_kind_of_date(times: Any) -> None:
    found = Histories.from_events([1, 1], [2, 3], times).times
    assert found is not None and found.tolist() == [OCTOBER, OCTOBER + DAY]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([1, float("inf")], r"times\[1\] is inf; must be a finite number"),
        ([1.0, None], r"times\[1\] is missing"),
        (pandas.Series([1, pandas.NA], dtype="Int64"), r"times\[1\] is missing"),
        ([datetime(2019, 10, 1), pandas.NaT], r"times\[1\] is missing"),
        ([timedelta(1)] * 2, "times are of type timedelta, must be numbers or datetime64"),
        (np.array([1, 2], dtype="timedelta64[s]"), r"times are of type timedelta64\[s\]"),
        (pl.Series([timedelta(1)] * 2), r"times\[0\] is of type Duration"),
        ([True, False], "times are of type bool"),
        (["soon", "later"], r"times\[0\] is 'soon'; must be a number or an ISO 8601 date"),
        ([datetime(2019, 10, 1), "2019-10-02"], "times are of type datetime, str"),
    ],
)
def test_times_that_are_none_are_refused(times: Any, message: str) -> None:
    with pytest.raises((TypeError, DataError), match=message):
        Histories.from_events([1, 1], [2, 3], times)


def test_two_units_in_one_column_are_told() -> None:
    with pytest.warns(DataWarning, match=r":3: time is 1569888000000, which looks like milliseconds .* looks like seconds"):
        read(io.StringIO("user,item,time\n1,2,1569888000\n1,3,1569888000000\n"))


# Splits at a moment


def table(unit: int) -> str:
    return "user,item,time\n" + "".join(f"{user},{day},{(OCTOBER + day * DAY) * unit}\n" for user in (1, 2) for day in range(10))


@pytest.mark.parametrize("unit", [1, 1000, 10**6, 10**9])
@pytest.mark.parametrize(
    "moment",
    ["2019-10-09", datetime(2019, 10, 9), date(2019, 10, 9), np.datetime64("2019-10-09"), pandas.Timestamp("2019-10-09", tz="UTC")],
)
def test_a_date_means_the_same_in_every_unit(unit: int, moment: Any) -> None:
    parts = split(read(io.StringIO(table(unit))), "time", validation_from="2019-10-07", test_from=moment)
    assert parts.train_end.tolist() == [6, 6] and parts.validation_end.tolist() == [8, 8]


def test_a_moment_in_another_unit_than_the_times_is_an_error() -> None:
    millis = read(io.StringIO(table(1000)))
    with pytest.raises(ValueError, match="leaves nothing for .*, and times run from 1569888000000 to"):
        split(millis, "time", validation_from=OCTOBER + 6 * DAY, test_from=OCTOBER + 8 * DAY)
    steps = Histories.from_events([1] * 10, range(10), range(10))
    with pytest.raises(ValueError, match="test_from is the date 2019-10-09, but times run from 0 to 9, which are not all dates"):
        split(steps, "time", validation_from=5, test_from="2019-10-09")
    with pytest.raises(ValueError, match="test_from is -5, but times run from 0 to 9; it must lie between them"):
        split(steps, "time", test_from=-5)
    with pytest.raises(ValueError, match="leaves nothing for training"):
        split(steps, "time", validation_from=-5, test_from=8)


def test_test_from_alone_suffices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.csv").write_text(table(1000))
    options = DataOptions(data=str(tmp_path / "a.csv"), test_from="2019-10-09")
    parts = divide(histories(options), options)
    assert options.split == "time" and parts.train_end.tolist() == [6, 6] and parts.validation_end.tolist() == [8, 8]
    small = ["--layers", "1", "--hidden", "8", "--epochs", "1", "--no-progress"]
    assert main(["train", "--data", options.data, "--test-from", "2019-10-09", "--out", str(tmp_path / "run"), *small]) == 0
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0 and "Warning" not in capsys.readouterr().err
    assert DataOptions().split == "leave-one-out"


# Events that occur twice

TWICE = "user,item,time\n1,5,1\n1,5,1\n1,6,2\n1,5,1\n2,5,1\n2,5,3\n"


def test_equal_events_are_told_and_may_count_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(
        DataWarning, match="2 of 6 events equal another in user, item and time, and count as items taken again; --drop"
    ):
        assert read(io.StringIO(TWICE)).repeats()
    once = read(io.StringIO(TWICE), drop_duplicates=True)
    assert once.offsets.tolist() == [0, 2, 4] and once.times is not None and once.times.tolist() == [1, 2, 1, 3]
    with pytest.raises(DataError, match="drop_duplicates needs times"):
        read(io.StringIO("user,item\n1,5\n1,5\n"), drop_duplicates=True)
    (tmp_path / "a.csv").write_text(TWICE)
    with pytest.warns(DataWarning, match="2 of 6 events equal another"):
        assert main(["data", "stats", str(tmp_path / "a.csv")]) == 0
    assert main(["data", "stats", str(tmp_path / "a.csv"), "--drop-duplicates"]) == 0
    assert "events                                                        4\n" in capsys.readouterr().out
