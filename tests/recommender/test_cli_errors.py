"""The command line when something is wrong: one line that says what, nothing half-written; and help that teaches at once."""

import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from awrsr import AWRSR, AWRSRConfig
from awrsr.cli import COMMANDS, main, parser
from awrsr.progress import coloured

from . import runs
from .runs import SMALL, command, everything

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "action, name, text, message",
    [
        ("data stats", "data.txt", None, "there is no such file"),
        ("data stats", "data.csv", "user,item\nu1,i1\nu2\n", "data.csv:3: has 1 field, the header has 2"),
        ("train", "data.txt", "", "is empty"),
        ("train", "data.txt", "u1 i1\nu2 i2\n", "leaves nothing for validation: the longest history has 1 events"),
    ],
)
def test_data_that_are_no_good_are_an_error(
    action: str, name: str, text: str | None, message: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    data = tmp_path / name
    if text is not None:
        data.write_text(text)
    before = everything(tmp_path)
    arguments = command(data, tmp_path / "out") if action == "train" else ["data", "stats", data]
    assert message in refused(*arguments)
    assert everything(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_an_error(home: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").touch()
    assert "file" in refused(*command(home / "data.txt", tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.safetensors", b"", "is damaged"),
        ("model.safetensors", None, "model.safetensors is missing"),
    ],
)
@pytest.mark.parametrize("name_of_command", ["evaluate", "recommend"])
def test_a_damaged_run_is_an_error(
    name_of_command: str, name: str, content: bytes | None, message: str, run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content)
    before = everything(tmp_path)
    target = {"evaluate": ["--json", tmp_path / "out.json"], "recommend": ["--output", tmp_path / "out.csv"]}[name_of_command]
    error = refused(name_of_command, "--run", run, *target)
    assert message in error and str(run) in error
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("evaluate", "--run", "nowhere"), "nowhere holds no trained model: model.safetensors is missing"),
        (("compare", "nowhere", "RUN"), "nowhere"),
        (("recommend", "--run", "RUN", "--output", "out.xlsx"), "output is 'out.xlsx', must be - or end in one of .csv"),
        (("explain", "--run", "RUN", "--user", "nobody"), "user is 'nobody', must be a user of the data"),
        (("explain", "--run", "RUN", "--history", "i1", "zz"), "'zz', which this model does not know"),
        (("explain", "--run", "RUN", "--layer", "2"), "layer is 2, must be in 1..1"),
        (("export", "--run", "RUN", "--output", "model.bin"), "must end in .pt2"),
        (("train", "--data", "DATA", "--hidden", "15", "--heads", "2"), "hidden is 15, must be a multiple of heads (2)"),
        (("train", "--data", "DATA", "--epochs", "0"), "epochs is 0, must be at least 1"),
        (("train", "--data", "DATA", "--pvn-weight", "0.1"), "pvn_weight is 0.1, must be 0 with loss 'sampled_softmax'"),
        (
            ("train", "--data", "DATA", "--loss", "bpr", "--pvn-weight", "0.1"),
            "pvn_weight is 0.1, must be 0 with backbone 'sasrec'",
        ),
        (("train", "--data", "DATA", "--format", "inter"), "has no header"),
    ],
)
def test_a_wrong_option_is_an_error(
    arguments: tuple[str, ...],
    message: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"RUN": home / "run", "DATA": home / "data.txt"}
    assert message in refused(*(names.get(each, each) for each in arguments))
    assert everything(tmp_path) == {}


def test_options_of_a_file_want_the_file(home: Path, refused: Callable[..., str]) -> None:
    for name, value in (("item_column", "movie"), ("format", "csv")):
        message = refused("recommend", "--run", home / "run", f"--{name.replace('_', '-')}", value)
        assert f"{name} is '{value}', must not be set without --data FILE" in message


def test_no_flag_is_guessed_from_its_beginning(stopped: Callable[..., tuple[int, str]]) -> None:
    code, error = stopped("evaluate", "--run", "nowhere", "--user", "5")  # not --user-column
    assert code == 2 and "--user" in error


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("tran", "awrsr: there is no command 'tran': did you mean train?"),
        ("predict", "awrsr: there is no command 'predict': did you mean recommend?"),
        ("stats", "awrsr: there is no command 'stats': did you mean data stats?"),
        ("data fetc", "awrsr data: there is no command 'fetc': did you mean fetch?"),
        ("zzz", "awrsr: there is no command 'zzz'; see awrsr --help"),
        ("", "awrsr: a command is missing; see awrsr --help"),
        ("data", "awrsr data: a command is missing; see awrsr data --help"),
        ("train --epoch 5", "awrsr train: there is no option --epoch: did you mean --epochs?"),
        ("train --lr=0.1", "awrsr train: there is no option --lr: did you mean --learning-rate?"),
        ("train --hidden-size 64", "awrsr train: there is no option --hidden-size: did you mean --hidden?"),
        ("train --dropout 0.1", "did you mean --hidden-dropout or --attention-dropout?"),
        ("train --zzz 1", "awrsr train: there is no option --zzz; see awrsr train --help"),
        ("recommend --run RUN --topk 5", "awrsr recommend: there is no option --topk: did you mean -k?"),
        ("similar run", "awrsr similar: --item is missing; see awrsr similar --help"),
        ("train stray", "awrsr train: 'stray' is one word too many"),
        ("train --epochs many", "awrsr train: epochs is 'many', must be of type int"),
        ("train --loss bpx", "awrsr train: --loss is 'bpx', must be one of sampled_softmax, "),
    ],
)
def test_a_command_line_that_does_not_fit_is_told_what_does(
    arguments: str, message: str, stopped: Callable[..., tuple[int, str]]
) -> None:
    status, said = stopped(*arguments.split())
    assert status == 2 and message in said and said.endswith("\n") and said.count("\n") == 1, said


@pytest.mark.parametrize("name, flag", [("train", "--data")])
def test_a_path_without_its_option_is_told_which(
    name: str, flag: str, tmp_path: Path, stopped: Callable[..., tuple[int, str]]
) -> None:
    status, said = stopped(name, tmp_path)
    assert (status, said) == (2, f"awrsr {name}: '{tmp_path}' is one word too many: did you mean {flag} {tmp_path}?\n")


def test_a_configuration_file_is_told_the_nearest_option(tmp_path: Path, stopped: Callable[..., tuple[int, str]]) -> None:
    (tmp_path / "run.yaml").write_text("hidden_size: 16\n")
    status, said = stopped("train", "--config", tmp_path / "run.yaml")
    assert (status, said) == (2, "awrsr train: there is no option hidden_size: did you mean hidden?\n")


def test_ctrl_c_ends_any_command_with_130(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("awrsr.evaluation.report.evaluate", interrupted)
    assert main(["evaluate", "--run", str(home / "run")]) == 130
    assert capsys.readouterr().err == "awrsr evaluate: interrupted\n"


# Help.


@pytest.mark.parametrize("name", ["", "data", *COMMANDS])
def test_every_help_teaches_with_an_example(name: str, stopped: Callable[..., tuple[int, str]]) -> None:
    status, text = stopped(*name.split(), "--help")
    assert status == 0
    about, options = text.split("\n\n", 1)[1].split("\noptions:\n") if name != "train" else text.split("\noptions:\n")
    examples = [line.strip() for line in about.splitlines() if line.startswith("  awrsr " + name) or " | awrsr " + name in line]
    assert examples, about
    assert "default: )" not in text and "_" not in "".join(word for word in text.split() if word.startswith("--"))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_help_are_commands_that_parse(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.yaml").write_text("seed: 0\n")
    for line in stopped(*name.split(), "--help")[1].splitlines():
        if line.startswith("  ") and "awrsr " + name in line and "--print-config" not in line:
            words = shlex.split(line)
            given = parser().parse_args(words[words.index("awrsr") + 1 :])
            assert name.startswith(given.command)


def test_help_has_the_options_of_stosas_authors(stopped: Callable[..., tuple[int, str]]) -> None:
    block = stopped("train", "--help")[1].split("Options that STOSA's authors use, for backbone stosa:\n\n")[1].split("\n\n")[0]
    given = parser().parse_args(["train", "--data", "any.txt", *block.split()]).train
    assert AWRSRConfig(**{each.name: given[each.name] for each in fields(AWRSRConfig) if each.name in given}).backbone == "stosa"
    assert (given.loss, given.pvn_weight, given.learning_rate, given.hidden) == ("bpr", 0.005, 1e-3, 64)


LIGHT = """
import sys
from awrsr.cli import main

for words in ["train", "--help"], ["train", "--widht"], ["data", "stats", sys.argv[1]]:
    try:
        main(words)
    except SystemExit:
        pass
print(*sorted({"torch", "lightning", "scipy", "matplotlib"} & sys.modules.keys()), file=sys.stderr)
"""


def test_help_errors_and_reading_data_load_no_torch(home: Path) -> None:
    line = [sys.executable, "-c", LIGHT, home / "data.txt"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "" and "61" in done.stdout


def test_python_dash_m_awrsr_is_the_command_line(tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "awrsr", "data", "stats", missing], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"awrsr data stats: {missing}: there is no such file\n"


def test_a_run_fitted_in_python_does_not_know_its_data(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    AWRSR(AWRSRConfig(**SMALL)).fit(runs.histories(), epochs=1, out="run", progress=False, **runs.QUICK)
    for action in ("evaluate", "recommend", "explain"):
        assert "was fitted in Python and does not say where its histories are; add --data FILE" in refused(action, "--run", "run")


@pytest.mark.parametrize(("variables", "shown"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals(variables: dict[str, str], shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    terminal = io.StringIO()
    assert coloured("text", "red", terminal) == "text"
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert coloured("text", "red", terminal) == ("\x1b[31mtext\x1b[0m" if shown else "text")
