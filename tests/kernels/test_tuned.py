"""What the tuner found: its file, who reads it, and configurations forced over it."""

import json
import threading
from pathlib import Path

import pytest
import torch

from awrsr_kernels import tuned
from awrsr_kernels.launch_config import Config, Key, choose
from awrsr_kernels.tuned import forced, read_entries, tuned_entries, tuned_for, write_entries
from awrsr_kernels.tuning import __main__ as tune

from .tuning import BACKWARD, FORWARD, H100, HERE, OTHER, TILED_FORWARD, entry


def test_cache_round_trip(path: Path) -> None:
    assert read_entries(path) == []
    write_entries(path, [entry(), entry(BACKWARD)])
    assert read_entries(path) == [entry(), entry(BACKWARD)]
    write_entries(path, [])
    assert read_entries(path) == []


def test_merging_keeps_other_gpus_versions_and_keys() -> None:
    old = [entry(), entry(BACKWARD), entry(gpu="Another"), entry(triton="3.9.0")]
    new = entry(config=Config(64, 64, 2, 1, 1))
    assert tuned.merged(old, [new], *HERE, [FORWARD]) == [*old[1:], new]
    assert tuned.merged(old, [], *HERE, [FORWARD]) == old[1:]  # the table's row was as good


def test_a_write_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entries(path, [entry()])
    with pytest.raises(TypeError):
        write_entries(path, [entry(), {"gpu": object()}])
    monkeypatch.setattr(tuned.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_entries(path, [])
    assert read_entries(path) == [entry()] and [p.name for p in path.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    "text,told",
    [
        ("{", "is not JSON"),
        ("[]", "must be an object of version 1"),
        ('{"version": 2, "entries": []}', "must be an object of version 1"),
        ('{"version": 1}', "must be an object of version 1"),
        (json.dumps({"version": 1, "entries": [entry(), 7]}), "entry 1 is 7; it must name gpu"),
        (json.dumps({"version": 1, "entries": [entry() | {"gpu": 3}]}), "entry 0 is "),
        (json.dumps({"version": 1, "entries": [entry() | {"key": [["short_fwd"], 64, 64, 2]}]}), "entry 0 is "),
        (json.dumps({"version": 1, "entries": [entry() | {"key": ["short_fwd", 63, 64, 2]}]}), "entry 0 is "),
        (json.dumps({"version": 1, "entries": [entry() | {"config": [64, 64, 4]}]}), "entry 0 is "),
        (json.dumps({"version": 1, "entries": [entry() | {"config": [64, 64, True, 1, 4]}]}), "entry 0 is "),
        (json.dumps({"version": 1, "entries": [entry(config=Config(32, 64, 4, 1, 4))]}), "entry 0 .* block_m must be from 64"),
        (json.dumps({"version": 1, "entries": [entry(config=Config(64, 64, 3, 1, 4))]}), "entry 0 .*num_warps must be"),
        (json.dumps({"version": 1, "entries": [entry(config=Config(64, 64, 4, 1, 0))]}), "entry 0 .*programs must be"),
        (json.dumps({"version": 1, "entries": [entry(TILED_FORWARD, Config(48, 64, 4, 1))]}), "entry 0 .*powers of two"),
    ],
)
def test_a_malformed_file_is_named_with_its_entry(text: str, told: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{path}.*{told}"):
        read_entries(path)
    assert tune.main(["--list"]) == 1
    assert str(path) in capsys.readouterr().err


def test_a_tuned_entry_goes_before_the_table_on_its_own_gpu_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_entries(path, [entry(gpu="Another"), entry(triton="3.0.0"), entry(BACKWARD)])
    assert tuned_entries(read_entries(path), *HERE) == {BACKWARD: OTHER}
    monkeypatch.setattr(tuned, "machine", lambda device: HERE)
    found = tuned_for(torch.device("cuda", 0))
    assert choose(BACKWARD, H100, found) == OTHER != choose(BACKWARD, H100)
    assert choose(FORWARD, H100, found) == choose(FORWARD, H100)
    write_entries(path, [entry()])  # is seen at once
    assert choose(FORWARD, H100, tuned_for(torch.device("cuda", 0))) == OTHER
    assert tuned_for(torch.device("cpu")) == {}


def test_forced_nests_and_ends_and_reaches_other_threads() -> None:
    cpu, found = torch.device("cpu"), []
    inner = Config(64, 64, 2, 1, 1)
    with forced({FORWARD: OTHER}):
        with pytest.raises(RuntimeError), forced({FORWARD: inner, BACKWARD: inner}):
            thread = threading.Thread(target=lambda: found.append(dict(tuned_for(cpu))))  # as autograd's threads do
            thread.start()
            thread.join()
            raise RuntimeError
        assert tuned_for(cpu) == {FORWARD: OTHER} and choose(FORWARD, H100, tuned_for(cpu)) == OTHER
    assert tuned_for(cpu) == {} and found == [{FORWARD: inner, BACKWARD: inner}]


def test_forcing_what_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="configs is .*block_m must be from 64"), forced({FORWARD: Config(32, 32, 4, 1, 4)}):
        pass
    with pytest.raises(ValueError, match="no such key"), forced({Key("short_fwd", 128, 64, 2): OTHER}):
        pass
