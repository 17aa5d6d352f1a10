"""Histories from elsewhere: public data sets by download, the recall task; and what `stats` says of them."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from awrsr.data import _convert
from awrsr.data.fetch import REGISTRY, FetchError, Remote, fetch
from awrsr.data.histories import Histories
from awrsr.data.public import made
from awrsr.data.readers import read
from awrsr.data.stats import stats, table
from awrsr.data.synthetic import make, recall_answer

CONTENT = b"1 2 3\n2 3 4\n"
TUNES = {
    "/data/abc/one.abc": b"X: 1\nT: one\nK:D\n|: d2 A2 :|\n",
    "/data/abc/two.abc": b"X: 1\nd2 f d2\n",
}  # d2 is the most frequent
TUNE_LINES = b"1 1 2\n2 1 3 1\n"
SMALL = {"small": Remote("Small.txt", hashlib.sha256(CONTENT).hexdigest()), "gone": Remote("Gone.txt", "0" * 64)}

# Downloads


class Server(ThreadingHTTPServer):
    content = CONTENT
    busy = 0  # requests to refuse
    missing = 0  # bytes that are announced and never sent

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/data/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = {"/data/Small.txt": self.server.content, **TUNES}.get(self.path)
        if self.server.busy or content is None:
            self.send_error(429 if self.server.busy else 404)
            self.server.busy -= self.server.busy > 0
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + self.server.missing))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def small(server: Server, cache: Path | None, name: str = "small", **options: Any) -> Path:
    return fetch(name, cache=cache, base_url=server.address, registry=SMALL, **options)


def test_a_second_fetch_asks_nobody(server: Server, tmp_path: Path) -> None:
    path = small(server, tmp_path)
    assert path.read_bytes() == CONTENT and read(path).num_users == 2
    assert small(server, tmp_path) == path and server.asked == ["/data/Small.txt"]
    assert [left.name for left in tmp_path.iterdir()] == ["small.txt"]


def test_the_cache_is_where_the_environment_says(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWRSR_CACHE", str(tmp_path / "deep" / "cache"))
    assert small(server, None) == tmp_path / "deep" / "cache" / "small.txt"


def test_a_damaged_file_in_the_cache_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_bytes(CONTENT[:-1])
    assert small(server, tmp_path).read_bytes() == CONTENT and len(server.asked) == 1


def test_another_checksum_is_not_kept(server: Server, tmp_path: Path) -> None:
    server.content = CONTENT + b"3 4\n"
    with pytest.raises(FetchError, match=f"must have {SMALL['small'].sha256}; the download was not kept"):
        small(server, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_old_file_survives_a_failed_download(server: Server, tmp_path: Path) -> None:
    server.content = b"other"
    (tmp_path / "small.txt").write_bytes(b"older")
    with pytest.raises(FetchError):
        small(server, tmp_path)
    assert (tmp_path / "small.txt").read_bytes() == b"older"


def test_a_file_that_is_not_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="404 .* put it at .*gone.txt"):
        small(server, tmp_path, "gone")
    assert not list(tmp_path.iterdir())


def test_a_connection_that_breaks_off(server: Server, tmp_path: Path) -> None:
    server.missing = 5
    with pytest.raises(FetchError, match="cannot reach .*Small.txt .* try again"):
        small(server, tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_connection(server: Server, tmp_path: Path) -> None:
    address = server.address
    server.shutdown()
    server.server_close()
    with pytest.raises(FetchError, match=f"cannot reach {address}Small.txt .ConnectionError.. Check the connection"):
        fetch("small", cache=tmp_path, base_url=address, registry=SMALL)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match="cannot write to the cache .* AWRSR_CACHE"):
        small(server, tmp_path / "file")


def test_the_bar_goes_to_a_terminal_alone(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small(server, tmp_path / "piped")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    small(server, tmp_path / "terminal")
    seen = capsys.readouterr()
    assert seen.out == "" and "100%" in seen.err
    small(server, tmp_path / "silent", progress=False)
    assert capsys.readouterr() == ("", "")


def test_unknown_names_are_told_what_there_is() -> None:
    with pytest.raises(ValueError, match="data set is 'books', must be one of beauty, toys, sports, yelp, lastfm"):
        fetch("books")


def test_public_sets_are_pinned_and_described() -> None:
    for name, remote in REGISTRY.items():
        assert {len(remote.sha256), len(remote.kept_sha256)} == {64} and bool(remote.convert) == bool(remote.made_sha256), name
        assert remote.about and remote.licence and remote.sizes, name
        assert remote.base_url.startswith("https://raw.githubusercontent.com/") and remote.base_url.endswith("/"), name


def tunes(server: Server, cache: Path, source: bytes = b"".join(TUNES.values()), result: bytes = TUNE_LINES) -> Path:
    sums = [hashlib.sha256(content).hexdigest() for content in (source, result)]
    remote = Remote("abc/one.abc abc/two.abc", sums[0], convert=made(_convert.notes), made_sha256=sums[1])
    return fetch("tunes", cache=cache, base_url=server.address, registry={"tunes": remote})


def test_several_files_are_checked_and_converted_once(server: Server, tmp_path: Path) -> None:
    server.busy = 1  # asked too often: the same file is asked for again
    path = tunes(server, tmp_path)
    assert path.read_bytes() == TUNE_LINES and tunes(server, tmp_path) == path
    assert server.asked == ["/data/abc/one.abc", *TUNES]


@pytest.mark.parametrize(
    ("wrong", "message"), [("source", "2 files below .* has SHA-256 .* not kept"), ("result", "conversion of 2 fi")]
)
def test_nothing_is_kept_of_a_conversion_gone_wrong(server: Server, tmp_path: Path, wrong: str, message: str) -> None:
    with pytest.raises(FetchError, match=f"{message}.* take tunes.txt from elsewhere"):
        tunes(server, tmp_path, **{wrong: b"other"})
    assert not list(tmp_path.iterdir())


# The recall task


def brute_answer(items: list[int], place: int) -> int:
    """What the rule puts at `place`, by looking back."""
    for earlier in range(place - 2, -1, -1):
        if items[earlier] == items[place - 1]:
            return items[earlier + 1]
    return -1


@given(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=5))
def test_recall_answer_looks_back(lists: list[list[int]]) -> None:
    histories = Histories.from_lists(lists)
    asked = [(user, place) for user, items in enumerate(lists) for place in range(len(items) + 1)]
    users, places = np.array(asked).T
    expected = [brute_answer(histories.of(user).tolist(), place) for user, place in asked]
    assert recall_answer(histories, users, places).tolist() == expected


def test_recall_answer_of_a_place_beyond_the_history() -> None:
    with pytest.raises(ValueError, match=r"places\[1\] is 4, must be from 0 to 3"):
        recall_answer(Histories.from_lists([[1, 2, 1]]), np.array([0, 0]), np.array([3, 4]))


def test_without_noise_every_answer_holds() -> None:
    values = stats(make(users=200, noise=0.0, length=40))
    assert values["recall_share"] > 0.5 and values["recall_holds"] == 1


def test_noise_is_how_often_the_rule_is_broken() -> None:
    for noise in (0.2, 0.7, 1.0):
        assert stats(make(noise=noise))["recall_holds"] == pytest.approx(1 - noise, abs=0.01)


def test_fresh_items_follow_zipf_and_keep_the_gap() -> None:
    histories = make(users=20000, items=50, length=2, popularity=1.0, gap=1)
    first = np.sort(histories.item_ids[histories.items[histories.offsets[:-1]]])
    share = np.bincount(first, minlength=51)[1:] / len(first)
    np.testing.assert_allclose(share, 1 / np.arange(1, 51) / (1 / np.arange(1, 51)).sum(), atol=0.01)
    rows = make(users=500, length=30, noise=1.0, gap=6).items.reshape(500, 30)
    assert all((rows[:, step:] != rows[:, :-step]).all() for step in range(1, 7))


def test_the_same_seed_makes_the_same_histories(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (make(users=300, items=64, length=32, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(getattr(first, f), getattr(again, f)) for f in ("items", "offsets", "item_ids", "user_ids"))
    assert not np.array_equal(first.items, other.items)
    assert (first.num_users, first.num_items, set(first.lengths)) == (300, 64, {32})
    monkeypatch.setattr("awrsr.data.synthetic.BLOCK", 100)
    assert np.array_equal(make(users=300, length=20).items[:2000], make(users=100, length=20).items)


def test_shortcuts_stay_far_below_recall() -> None:
    """On the planted answers of the last place, as a test set has them: what needs no composition of two steps."""
    histories = make()
    count, size, length = histories.num_users, histories.num_items, int(histories.lengths[0])
    rows, target = histories.items.reshape(count, length)[:, :-1], histories.items.reshape(count, length)[:, -1]
    answer = recall_answer(histories, np.arange(count), np.full(count, length - 1))
    planted = answer >= 0
    pairs = np.zeros((size, size), dtype=np.int64)
    np.add.at(pairs, (rows[:, :-1], rows[:, 1:]), 1)
    own = np.stack([np.bincount(row, minlength=size) + np.eye(size)[row[-8]] / 2 for row in rows])
    shortcuts = {f"{back} steps back": rows[:, -back] for back in range(1, length)}
    popular = np.full(count, np.bincount(rows.ravel()).argmax())
    shortcuts |= {"popular": popular, "Markov": pairs.argmax(1)[rows[:, -1]], "own": own.argmax(1)}
    hits = {name: float((guess == target)[planted].mean()) for name, guess in shortcuts.items()}
    assert planted.mean() > 0.6 and (answer == target)[planted].mean() > 0.75
    assert max(hits.values()) < 0.25, hits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"users": 0}, "users is 0, must be at least 1"),
        ({"items": 5}, "items is 5, must be 6 or more"),
        ({"noise": 1.5}, "noise is 1.5, must be at least 0 and at most 1"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"popularity": -1.0}, "popularity is -1.0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


# Statistics


def test_stats_of_a_case_worked_by_hand() -> None:
    values = stats(Histories.from_lists({"a": [1, 1, 2, 1, 1], "b": [2, 3, 2, 3, 2]}))
    lengths = dict.fromkeys(("length_mean", "length_median", "length_p90", "length_p99", "length_longest"), 5)
    counts = {"users": 2, "items": 3, "events": 10, "density": 10 / 6}
    shares = {"repeat_share": 0.6, "run_share": 0.2, "top_item_share": 0.4, "padding_share": 0.9}
    recall = {"recall_share": 0.4, "recall_holds": 0.5}  # a: third and fifth event, both otherwise; b: fourth and fifth, both again
    gini = {"gini": 8 / (2 * 9 * 10 / 3)}  # of 2, 4, 4: differences of all pairs over twice their number times the mean
    assert values == pytest.approx(counts | lengths | shares | recall | gini)


def test_stats_of_lengths_and_times() -> None:
    sizes = np.arange(1, 101)
    users = np.repeat(sizes, sizes)
    values = stats(Histories.from_events(users, np.zeros_like(users), 1.5e9 + np.arange(len(users))))
    quantiles = [values[f"length_{name}"] for name in ("mean", "median", "p90", "p99", "longest")]
    assert quantiles == pytest.approx([50.5, 50.5, 90.1, 99.01, 100])
    assert values["padding_share"] == pytest.approx(sum(range(50)) / 5000)
    assert (values["time_first"], values["time_last"]) == (1.5e9, 1.5e9 + 5049)
    assert "first event" in table(values) and "2017-07-14 02:40:00" in table(values)


def test_stats_of_nothing() -> None:
    values = stats(Histories.from_lists([]))
    assert values["users"] == values["events"] == 0 and values["density"] is None and values["gini"] is None
    assert "users" in table(values) and "nan" not in table(values)


def test_the_table_is_in_columns() -> None:
    lines = table(stats(make(users=1500, length=32))).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[0].split() == ["users", "1,500"] and lines[2].split()[1] == "48,000"
