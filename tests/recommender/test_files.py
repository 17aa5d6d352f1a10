"""Files have the rights of any new file, reach the disk before their names do, and leave nothing behind after a kill."""

import errno
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from awrsr import files


def test_files_get_the_rights_that_any_new_file_gets(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(old)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_a_file_and_its_name_are_on_the_disk_before_anything_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that reaches the disk before what was written leaves an empty file after a power cut."""
    steps, sync, move = [], os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        steps.append(Path(f"/dev/fd/{descriptor}").resolve().name)
        sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        steps.append("rename")
        move(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    files.write_json(tmp_path / "a.json", {})
    written, renamed, named = steps
    assert written.startswith(".a.json.awrsr-") and renamed == "rename" and named == tmp_path.name


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EIO])
def test_a_file_system_that_cannot_flush_is_written_to_and_one_that_fails_is_not(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if number != errno.EIO else pytest.raises(OSError, match="Input/output error"):
        files.write_json(tmp_path / "a.json", {})
    assert os.listdir(tmp_path) == (["a.json"] if number != errno.EIO else [])


KILLED = """
import os, signal, sys
from pathlib import Path
from awrsr.files import atomic

with atomic(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "dies" else sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["a.json", "ranks_test.parquet", "[a]*?.csv", "ä" * 120])
def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(name: str, tmp_path: Path) -> None:
    def writer(end: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-c", KILLED, str(tmp_path / name), end]
        return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    dead, living = writer("dies"), writer("lives")
    left, kept = (each.stdout.readline().strip() for each in (dead, living))  # type: ignore[union-attr]
    dead.wait()
    assert f".awrsr-{living.pid}@{files.host()}-" in kept
    assert {left, kept} <= set(os.listdir(tmp_path)) | {left}  # the second writer may have removed what the first one left
    with files.atomic(tmp_path / name) as own:
        files.sweep(tmp_path, ["*"])
        assert sorted(os.listdir(tmp_path)) == sorted([kept, own.name])
    living.communicate()
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "half"


@pytest.mark.parametrize("hours, there", [(1, True), (25, False)])
@pytest.mark.parametrize(
    "name", [".a.json.awrsr-7@elsewhere-0123abcd.json", ".a.json.0123abcd.json", "..a.json.01234567.json.89abcdef.json"]
)
def test_what_no_known_process_writes_is_removed_after_a_day(name: str, hours: int, there: bool, tmp_path: Path) -> None:
    """Of another machine, or of an older version."""
    (tmp_path / name).touch()
    since = (tmp_path / name).stat().st_mtime - 3600 * hours
    os.utime(tmp_path / name, (since, since))
    files.write_json(tmp_path / "a.json", {})
    assert (tmp_path / name).exists() == there


def test_files_of_others_that_look_similar_stay(tmp_path: Path) -> None:
    for name in (".a.json.swp", ".a.json", ".a.json.backup", ".a.json.awrsr"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    files.sweep(tmp_path, ["a.json"])
    assert len(os.listdir(tmp_path)) == 4


def test_json_with_a_checksum_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"metric": 0.25, "name": files.UNSEALED}, seal=True)
    whole = path.read_bytes()
    assert files.read_json(path)["metric"] == 0.25
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = files.read_json(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            raise AssertionError(found)
