"""Run folders of an earlier version: they load, recommend and resume as before, and a removed option they used is named.

older_runs/ holds what `awrsr train` of that version left after two epochs on histories.txt, what it then recommended, and the
results it reached when it resumed for four.
"""

import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from awrsr import AWRSR
from awrsr.cli import main
from awrsr.config import EARLIER, without_removed_options

from .runs import flags, results

pytestmark = pytest.mark.usefixtures("one_thread")

OLDER = Path(__file__).parent / "older_runs"
RUNS = ("sasrec", "stosa")


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs, which is the working directory, with their last state unpacked."""
    shutil.copytree(OLDER, tmp_path / "older")
    for run in RUNS:
        packed = tmp_path / "older" / run / "last.ckpt.xz"
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    monkeypatch.chdir(tmp_path / "older")
    return tmp_path / "older"


def resuming(run: str, **changes: Any) -> list[str]:
    """The command that resumes a run."""
    stored = json.loads((OLDER / run / "config.json").read_text())
    removed = {"num_items", "correlation_norm", "table_rate", "seen", "fingerprint"}
    options = {name: value for section in stored.values() for name, value in section.items() if name not in removed}
    options = EARLIER["model"] | options | changes  # some defaults have changed since, and these are not stored
    switches = [f"--{'' if value else 'no-'}{name.replace('_', '-')}" for name, value in options.items() if isinstance(value, bool)]
    return ["train", "--out", run, *switches, *flags(**{k: v for k, v in options.items() if v != "" and not isinstance(v, bool)})]


def edit(run: str, section: str, **options: Any) -> None:
    path = Path(run) / "config.json"
    stored = json.loads(path.read_text())
    stored[section] |= options
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize("run", RUNS)
def test_an_older_run_recommends_and_ranks_as_before(run: str, older: Path, printed: Callable[..., str]) -> None:
    assert main(["recommend", "--run", run, "-k", "3", "--output", "top.csv"]) == 0
    found, before = pl.read_csv("top.csv"), pl.read_csv(older / run / "recommended.csv")
    assert found.drop("score").equals(before.drop("score"))
    assert found["score"].to_list() == pytest.approx(before["score"].to_list(), rel=1e-5, abs=1e-6)  # other CPUs round otherwise
    before = results(older / run)["test"]
    printed("evaluate", "--run", run, "--json", "test.json")
    after = json.loads(Path("test.json").read_text())["test"]
    assert {name: after[name] for name in before} == pytest.approx(before)


@pytest.mark.parametrize("run", RUNS)
def test_an_older_run_resumes_to_the_same_numbers(run: str, older: Path) -> None:
    assert main(resuming(run, epochs=4)) == 0
    wanted, found = json.loads((older / run / "resumed.json").read_text()), results(older / run)
    assert found["curve"][:2] == wanted["curve"][:2]
    for name in ("loss", "NDCG@10"):
        assert [each[name] for each in found["curve"]] == pytest.approx([each[name] for each in wanted["curve"]], rel=1e-5)
    for part in ("validation", "test"):
        assert found[part] == pytest.approx(wanted[part])
    config = json.loads((older / run / "config.json").read_text())
    assert "correlation_norm" not in config["model"] and "table_rate" not in config["training"]


@pytest.mark.parametrize("section, option, value", [("model", "correlation_norm", True), ("training", "table_rate", 4.0)])
def test_a_run_that_used_a_removed_option_says_so(
    section: str, option: str, value: Any, older: Path, refused: Callable[..., str]
) -> None:
    edit("sasrec", section, **{option: value})
    for command in (["recommend", "--run", "sasrec"], resuming("sasrec", epochs=4)):
        error = refused(*command)
        used = f"sasrec/config.json uses {option} (it is {value!r}), an option that was removed"
        assert f"{used}: load this run at the tag study-1 of this project" in error
    with pytest.raises(ValueError, match=f"uses {option} .*load this run at the tag study-1 of this project"):
        AWRSR.load(older / "sasrec")


@pytest.mark.parametrize("flag", [["--correlation-norm"], ["--table-rate", "4"]], ids=str)
def test_flags_of_removed_options_are_unknown(flag: list[str], stopped: Callable[..., tuple[int, str]]) -> None:
    status, text = stopped("train", *flag)
    assert status == 2 and flag[0] in text


def test_only_removed_options_are_left_out_of_what_is_stored() -> None:
    stored = {"model": {"hidden": 8, "correlation_norm": False}, "training": {"table_rate": 1}, "data": {"table_rate": 4}}
    kept = {"model": EARLIER["model"] | {"hidden": 8}, "training": {}, "data": {"table_rate": 4}}
    assert without_removed_options(stored, "x") == kept
    assert stored["model"] == {"hidden": 8, "correlation_norm": False}
    assert without_removed_options({}, "x") == {}
    for damaged in ({"model": None}, {"data": []}, []):
        with pytest.raises(ValueError, match="x is not a configuration of this model"):
            without_removed_options(damaged, "x")  # type: ignore[arg-type]
