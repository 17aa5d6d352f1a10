"""The tuner's command line: options, listing, a run from options to file, and what it reports."""

from pathlib import Path

import pytest
import torch

from awrsr_kernels import tuned
from awrsr_kernels.launch_config import TABLE, Config, Key
from awrsr_kernels.tuned import read_entries, tuned_entries, write_entries
from awrsr_kernels.tuning import __main__ as tune
from awrsr_kernels.tuning.timing import TuningCase

from .tuning import BACKWARD, CASES, FORWARD, H100, HERE, OTHER, Fake, entry

ALONE = ("--processes", "1")


def test_without_a_gpu_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    told = capsys.readouterr()
    assert "tuning needs a GPU (NVIDIA of compute capability 8.0 or newer, or AMD)" in told.err and not told.out


@pytest.mark.parametrize(
    "options,told",
    [
        (["--shapes", "1,2,3"], "was '1,2,3', must be B,H,L,D"),
        (["--shapes", "1,2,3,257"], "D and R up to 256"),
        (["--dropout", "1"], "must be a number in [0, 1)"),
        (["--seconds", "soon"], "was 'soon', must be a number"),
        (["--processes", "0"], "was 0, must be at least 1"),
        (["--preset", "long", "--shapes", "1,1,1,1"], "leave out one of them"),
        (["--kernel", "short"], "invalid choice: 'short'"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(options)
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_help_teaches_by_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--help"])
    examples = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  python -m")]
    assert len(examples) == 5
    for line in examples:
        tune.make_parser().parse_args(line.split()[3:])


def test_the_list_shows_table_and_source(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_entries(path, [entry()])
    assert tune.main(["--list"]) == 0
    told = capsys.readouterr().out
    assert "tuned for A GPU, Triton 3.6.0: 64x64 warps 8 programs 2\n      a test" in told and str(path) in told
    assert told.count("tiled_bwd_tables") == sum(key.kernel == "tiled_bwd_tables" for key in TABLE)


@pytest.fixture
def pretended(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU as far as the command line looks at one."""
    monkeypatch.setattr(tune, "missing_gpu", lambda cases: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "shared_memory", lambda device: H100)
    for module in (tune, tuned):
        monkeypatch.setattr(module, "machine", lambda device: HERE)
    return path


def test_a_run_from_options_to_file(pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    winner, stale = {FORWARD: OTHER, BACKWARD: TABLE[BACKWARD][0].config}, Key("short_fwd", 32, 64, 2)
    old = [entry(BACKWARD), entry(stale, Config(32, 32, 1, 1, 1)), entry(gpu="Another")]
    write_entries(pretended, old)
    bench = Fake(lambda case, config: 0.5 if config in winner.values() and config.num_warps > 4 else 1.0)
    monkeypatch.setattr(tune, "Bench", lambda device: bench)
    shapes = ["--shapes", "8,2,50,32", "8,2,50,64,16", "--refinement", "simple", "additive", "--kernel", "short_fwd", "short_bwd"]
    assert tune.main([*shapes, *ALONE]) == 0
    found = read_entries(pretended)
    assert found[:2] == old[1:]
    mine = tuned_entries(found, *HERE)
    assert mine[FORWARD] == OTHER and mine[stale] == Config(32, 32, 1, 1, 1)
    source = found[-1]["source"] if found[-1]["key"][0] == "short_fwd" else found[-2]["source"]
    assert "B 8 H 2 L 50 D 64 R 16 bfloat16 additive: 0.5000 ms, table 1.0000 ms" in source and "torch" in source
    told = capsys.readouterr().out
    assert "100.0%" in told and str(pretended) in told


@pytest.mark.parametrize("name", ["tuned.json", "another.json"])
def test_what_the_file_has_is_tried_again_wherever_it_lies(name: str, pretended: Path) -> None:
    path = pretended.with_name(name) if name != pretended.name else pretended
    write_entries(path, [entry()])
    bench = Fake(lambda case, config: 0.5 if config == OTHER else 1.0)
    tune.tune({FORWARD: CASES[:1]}, torch.device("cuda"), bench, path, HERE, 0.0)  # no time for any but those known
    assert tuned_entries(read_entries(path), *HERE)[FORWARD] == OTHER


def test_a_kernel_that_no_shape_reaches_is_told(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--preset", "long", "--kernel", "short_fwd"])
    assert "none of the shapes uses" in capsys.readouterr().err


def test_a_broken_row_of_the_table_is_an_error(
    pretended: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = TABLE[FORWARD][0].config
    monkeypatch.setattr(tune, "Bench", lambda device: Fake(lambda *_: 1.0, lambda case, c: "WRONG" if c == table else None))
    assert tune.main(["--shapes", "8,2,50,64", "--kernel", "short_fwd", *ALONE]) == 1
    assert "please report it" in capsys.readouterr().err and len(read_entries(pretended)) == 1


def test_interrupted_it_keeps_what_it_found(pretended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Fake):
        def refusal(self, case: TuningCase, key: Key, config: Config) -> str | None:
            if key == BACKWARD:
                raise KeyboardInterrupt
            return super().refusal(case, key, config)

    monkeypatch.setattr(tune, "Bench", lambda device: Interrupted(lambda case, config: 0.5 if config == OTHER else 1.0))
    assert tune.main(["--shapes", "8,2,50,64", *ALONE]) == 130
    assert tuned_entries(read_entries(pretended), *HERE) == {FORWARD: OTHER}


def test_a_file_that_cannot_be_written_is_told_before_the_work(pretended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretended.parent.write_text("a file where the folder should be", encoding="utf-8")
    assert tune.main(["--shapes", "8,2,50,64", *ALONE]) == 1
    assert "awrsr_kernels.tune: " in capsys.readouterr().err
