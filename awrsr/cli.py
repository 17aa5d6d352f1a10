"""The command line: `awrsr`, or `python -m awrsr`. What each command does is in `commands`."""

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser

from .data import synthetic
from .data.fetch import REGISTRY
from .data.prepare import DEMO, DataOptions
from .data.readers import FORMATS
from .model import AWRSRConfig
from .train import TrainingOptions

DESCRIPTION = "Sequential recommendation with refined attention: from a file of histories to recommendations."
HELP = {
    "data": "fetch public data, make synthetic data, look at a file",
    "train": "train a model and evaluate it",
    "evaluate": "rank the whole catalogue for every held-out event",
    "recommend": "the best next items for histories",
    "compare": "are the differences between runs more than chance?",
    "explain": "a picture of what a model pays attention to in one history",
    "export": "the scoring path for other runtimes: torch.export or ONNX",
}
TRAIN = """Train a model on a file of histories, stop when validation no longer improves, and evaluate the best epoch on
held-out events, ranking the whole catalogue. Without --data it trains on synthetic histories, and a plain model beside
the refined one to show what refinement is for, with options that suit such histories where
none is given (see below).

  awrsr train
  awrsr train --data beauty.txt --refinement additive --epochs 20 --out runs/beauty
  awrsr train --config beauty.yaml --seed 1         --print-config prints such a file

The run folder then holds model.safetensors, config.json, items.parquet, metrics.json and the rank of every held-out
event. Ctrl-C or a kill loses the current epoch alone: the same command goes on, and ends with the same numbers.

Without --data these are the defaults, and what is given wins over them:
"""


def parser(demo: bool = False) -> ArgumentParser:
    """All commands and their options. demo: defaults of train that suit the made-up histories."""
    top = ArgumentParser(prog="awrsr", description=DESCRIPTION)
    commands = top.add_subcommands(dest="command", metavar="COMMAND")

    def add(name: str, description: str = "", to: Any = commands, help: str = "") -> ArgumentParser:
        help = help or HELP[name]
        sub = ArgumentParser(description=description or help[0].upper() + help[1:] + ".", print_config="--print-config")
        to.add_subcommand(name, sub, help=help)
        return sub

    add_data(add)
    train = add("train", f"{TRAIN}  {flags(DEMO)}")
    train.add_argument("--config", action=ActionConfigFile, help="YAML file with options, as --print-config prints it")
    train.add_argument(
        "--out", type=str, default="", help="run folder (default: runs/<data>-<backbone>-<refinement>-<loss>-<seed>)"
    )
    add_switch(train, "baseline", None, "train plain attention beside it, in <out>/plain (default: where no --data is given)")
    for title, options, but in (
        ("data", DataOptions, ()),
        ("model", AWRSRConfig, ("num_items",)),
        ("training", TrainingOptions, ()),
    ):
        add_options(train.add_argument_group(title), options, but)
    if demo:
        train.set_defaults(DEMO)
    add_use(add)
    return top


def add_data(add: Callable[..., ArgumentParser]) -> None:
    data = add("data")
    actions = data.add_subcommands(dest="action", metavar="ACTION")
    fetch = add("fetch", to=actions, help="download a public data set, check it and keep it")
    fetch.add_argument("name", choices=tuple(REGISTRY), help="which")
    fetch.add_argument("--cache", type=str, default="", help="folder to keep it in (default: the user's cache, or $AWRSR_CACHE)")
    make = add("make", to=actions, help="draw synthetic histories in which what followed before follows again")
    make.add_argument("--output", type=str, default="synthetic.txt", help="file to write, one user per line")
    for name, help in (
        ("users", "users"),
        ("items", "items of the catalogue"),
        ("length", "events of a user"),
        ("noise", "how often the rule is broken"),
        ("popularity", "exponent of the popularity law"),
        ("gap", "least distance of a repeat that no rule made"),
        ("seed", "of the draw"),
    ):
        default = (synthetic.make.__kwdefaults__ or {})[name]
        make.add_argument(f"--{name}", type=type(default), default=default, help=help)
    stats = add("stats", to=actions, help="a table of what is in a file")
    stats.add_argument("file", type=str, help="file of histories")
    stats.add_argument("--format", choices=FORMATS, default="auto", help="of the file")
    stats.add_argument("--json", type=str, default="", help="file to write the figures to, too")


def add_use(add: Callable[..., ArgumentParser]) -> None:
    evaluate = add("evaluate")
    add_run(evaluate, "file of histories, divided as in the run (default: the run's own)")
    evaluate.add_argument("--json", type=str, default="", help="file for the metrics")
    evaluate.add_argument("--part", choices=("validation", "test"), default="test", help="which held-out events")
    add_seen(evaluate)

    recommend = add("recommend")
    add_run(recommend, "file of histories, - for standard input (default: the run's own)")
    recommend.add_argument("--format", choices=FORMATS, default="auto", help="of the histories")
    recommend.add_argument("-k", type=int, default=10, help="items for each user")
    recommend.add_argument("--output", type=str, default="-", help=".csv, .jsonl or .parquet; - writes CSV to standard output")
    add_seen(recommend)

    compare = add("compare")
    compare.add_argument(
        "runs", nargs="+", type=str, help="run folders; those that differ in nothing but the seed count as one variant"
    )
    compare.add_argument("--metrics", nargs="+", type=str, default=["HR@10", "NDCG@10", "MRR"], help="HR@k, NDCG@k or MRR")
    compare.add_argument("--part", choices=("validation", "test"), default="test", help="which held-out events")
    compare.add_argument("--resamples", type=int, default=2000, help="of the bootstrap")
    compare.add_argument("--json", type=str, default="", help="file for the results")

    explain = add("explain")
    add_run(explain, "file of histories (default: the run's own)")
    explain.add_argument("--user", type=str, default="", help="id of the user (default: the first with a history of some length)")
    explain.add_argument("--history", nargs="+", type=str, default=[], help="item ids, instead of a user's")
    explain.add_argument("--layer", type=int, default=1, help="which block, from 1")
    explain.add_argument("--output", type=str, default="attention.png", help=".png, .svg or .pdf")

    export = add("export")
    export.add_argument("--run", type=str, required=True, help="run folder")
    export.add_argument("--format", choices=("torch", "onnx"), default="torch", help="torch.export or ONNX")
    export.add_argument("--output", type=str, default="", help="file to write (default: model.pt2 or model.onnx in the run folder)")


def add_run(to: ArgumentParser, data_help: str) -> None:
    to.add_argument("--run", type=str, required=True, help="run folder that awrsr train wrote")
    to.add_argument("--data", type=str, default="", help=data_help)
    to.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0 leaves it to torch")


def add_seen(to: ArgumentParser) -> None:
    to.add_argument(
        "--filter-seen", choices=("auto", "yes", "no"), default="auto", help="leave out items of the history (auto: as in the run)"
    )


def add_options(group: Any, options: type, but: tuple[str, ...] = ()) -> None:
    """A flag per field of a dataclass of `option`s."""
    for each in fields(options):
        if each.name in but:
            continue
        if isinstance(each.default, bool):
            add_switch(group, each.name, each.default, each.metadata["help"])
            continue
        flag = "--" + each.name.replace("_", "-")
        choices = {"choices": each.metadata["choices"]} if each.metadata["choices"] else {"type": type(each.default)}
        group.add_argument(flag, *({f"--{each.name}"} - {flag}), default=each.default, help=each.metadata["help"], **choices)


def add_switch(group: Any, name: str, default: bool | None, help: str) -> None:
    group.add_argument("--" + name.replace("_", "-"), action=ActionYesNo(no_prefix="no-"), default=default, help=help)


def flags(options: dict[str, Any]) -> str:
    """Options as one would give them."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 for bad input, 130 when interrupted."""
    from . import commands

    given = parser().parse_args(arguments)
    name = given.command
    if name == "train" and not given.train.data:
        given = parser(demo=True).parse_args(arguments)
        suited = {name: value for name, value in DEMO.items() if given.train[name] == value}
        print(f"No --data: made-up histories, and options that suit them: {flags(suited)}")
    options = given[name]
    if name == "data":
        name, options = f"data {options.action}", options[options.action]
    try:
        commands.COMMANDS[name](options)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"awrsr {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"awrsr {name}: interrupted", file=sys.stderr)
        return 130
    return 0
