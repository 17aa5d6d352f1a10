"""Files of histories with random bytes changed: they are read, or refused in one line; never a traceback, never a hang."""

import json
import random
import sys
from pathlib import Path

from . import child
from .kills import Case

EACH, TOGETHER, SECONDS = 1500, 25, 20  # files of each format; files that one process reads, and the time it has
EDITS = (b"", b"\0", b"\xff", b"\n", b"\r", b",", b"\t", b'"', b" ", b"-", b"\xef\xbb\xbf", b"9" * 40, b"\xed\xa0\x80", b"nan")


def cases(home: Path, rng: random.Random) -> list[Case]:
    found: list[Case] = []
    for name, content in valid(home).items():
        for _ in range(EACH // TOGETHER):
            seed = rng.randrange(1 << 30)
            found.append((f"{name}, seed {seed}", lambda n=name, c=content, s=seed: check(home, n, c, s)))  # type: ignore[misc]
    rng.shuffle(found)
    return found


def valid(home: Path) -> dict[str, bytes]:
    """A file of every format, by name."""
    child.write_histories(home / "lines.txt")
    rows = [line.split() for line in (home / "lines.txt").read_text().splitlines()]
    events = [(user, item, 1_000_000 + 60 * n) for user, *items in rows for n, item in enumerate(items)]
    files = {"lines.txt": (home / "lines.txt").read_bytes()}
    files["pairs.txt"] = "".join(f"{user} {item}\n" for user, item, _ in events).encode()
    for name, comma in {"events.csv": ",", "events.tsv": "\t"}.items():
        files[name] = "\n".join(comma.join(map(str, row)) for row in [("user", "item", "timestamp"), *events]).encode()
    files["events.inter"] = files["events.tsv"].replace(b"user\titem\ttimestamp", b"user_id:token\titem_id:token\ttimestamp:float")
    objects = ({"user": user, "item": item, "timestamp": time} for user, item, time in events)
    files["events.jsonl"] = "".join(json.dumps(each) + "\n" for each in objects).encode()
    child.run(write_parquet, home / "events.parquet", events)
    files["events.parquet"] = (home / "events.parquet").read_bytes()
    return files


def write_parquet(path: Path, events: list[tuple[str, str, int]]) -> None:
    import polars as pl

    pl.DataFrame(events, schema=["user", "item", "timestamp"], orient="row").write_parquet(path)


def edited(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(data) + 1)
        how = rng.randrange(4)
        if how == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif how == 1:
            data[place:place] = rng.choice(EDITS)
        elif how == 2:
            del data[place : place + rng.choice((1, 1, 3, 30, 300))]
        elif data:
            data[place : place + 1] = bytes([data[place % len(data)] ^ 1 << rng.randrange(8)])
    return bytes(data)


def check(home: Path, name: str, content: bytes, seed: int) -> None:
    """Files are read in one process; the number of the one being read tells which of them ended it."""
    outcome = child.run(read_all, home, name, content, seed, seconds=SECONDS)
    nth = (home / "nth").read_text()
    assert outcome.status == 0, f"file {nth} of this seed: {'no end in sight' if outcome.status == -14 else outcome}"
    assert not outcome.value, f"{len(outcome.value)} files are answered wrongly, file {outcome.value[0]}"


def read_all(home: Path, name: str, content: bytes, seed: int) -> list[str]:
    """Numbers of the files that are neither read nor refused in one line, with what was said instead."""
    import io
    from contextlib import redirect_stderr, redirect_stdout

    rng, wrong = random.Random(seed), []
    for nth in range(TOGETHER):
        (home / "nth").write_text(str(nth))
        path = home / name
        path.write_bytes(edited(content, rng))
        said = io.StringIO()
        try:
            with redirect_stderr(said), redirect_stdout(io.StringIO()):
                status = child.awrsr("data", "stats", path)
        except BaseException as error:
            wrong.append(f"{nth}: {type(error).__name__}: {str(error)[:300]}")
            continue
        lines = [line for line in said.getvalue().splitlines() if not line.startswith("Warning: ")]
        if status not in (0, 1) or len(lines) != status or status and not lines[0].startswith("awrsr data stats: "):
            wrong.append(f"{nth}: status {status}, {lines[:3]}")
    sys.stdout.flush()
    return wrong
