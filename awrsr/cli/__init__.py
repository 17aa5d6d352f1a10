"""The command line: `awrsr`, or `python -m awrsr`. What each command does is in `commands`."""

import os
import sys
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Callable
from copy import copy
from dataclasses import fields
from typing import Any

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, DefaultHelpFormatter

from ..config import AWRSRConfig, TrainingOptions
from ..data import synthetic
from ..data.fetch import REGISTRY
from ..data.prepare import DEMO, DataOptions
from ..data.readers import FORMATS
from . import commands

HELP = {
    "data": "fetch public data, make synthetic data, look at a file",
    "data fetch": "download a public data set, check it and keep it",
    "data make": "draw synthetic histories in which what followed before follows again",
    "data stats": "a table of what is in a file",
    "train": "train a model and evaluate it",
    "evaluate": "rank the whole catalogue for every held-out event",
    "recommend": "the best next items for histories",
    "compare": "are the differences between runs more than chance?",
    "explain": "a picture of what a model pays attention to in one history",
    "analyse": "a report on what attention does over many histories, and which predictions refinement changes",
    "export": "the scoring path for other runtimes: torch.export or ONNX",
}
MORE = {  # what --help of a command begins with
    "": """Sequential recommendation with refined attention: from a file of histories to
recommendations.

  awrsr train                                  what refinement is for
  awrsr data fetch beauty                      public data
  awrsr train --data beauty.txt --out runs/b   a model, its metrics and ranks
  awrsr recommend --run runs/b -k 5            the best next items""",
    "data": """Fetch public data, make synthetic data, look at a file.

  awrsr data fetch beauty
  awrsr data make --output recall.txt
  awrsr data stats recall.txt""",
    "data fetch": """Download a public data set with a progress bar, check its SHA-256 and keep it in
a cache.

  awrsr data fetch beauty""",
    "data make": """Draw synthetic histories in which what followed the last occurrence of the
current item follows again, mixed with noise and popularity. One refined layer
learns this rule, one plain layer cannot.

  awrsr data make --users 1000 --output recall.txt
  awrsr train --data recall.txt --baseline""",
    "data stats": """Print how many users, items and events a file holds, how long histories are and
how popular items. Says of a malformed file which line is wrong.

  awrsr data stats beauty.txt
  awrsr data stats ratings.csv --json stats.json""",
    "train": """Train a model on a file of histories, stop when validation no longer improves,
and evaluate the best epoch on held-out events, ranking the whole catalogue.
Without --data it trains on synthetic histories, and a plain model beside the
refined one to show what refinement is for, with options that suit such histories
where none is given: see the end of this text.

  awrsr train
  awrsr train --data beauty.txt --refinement additive --epochs 20 --out runs/beauty
  awrsr train --data beauty.txt --refinement none --print-config > plain.yaml
  awrsr train --config plain.yaml --seed 1

The run folder then holds model.safetensors, config.json, items.parquet,
metrics.json and the rank of every held-out event. Ctrl-C or a kill loses the
current epoch alone: the same command goes on, and ends with the same numbers;
with more --epochs it goes on further.

Options of STOSA's authors, for that backbone:

  --backbone stosa --refinement none --max-len 100 --layers 1 --heads 4
  --feedforward 4 --activation elu --norm post --init normal
  --hidden-dropout 0.3 --attention-dropout 0 --loss bpr --pvn-weight 0.005
  --batch-size 256

Defaults without --data; what is given wins over them:
""",
    "evaluate": """Rank the whole catalogue for every held-out event, as training did at its end,
and print HR, NDCG and MRR. Ties count against the model.

  awrsr evaluate --run runs/beauty
  awrsr evaluate --run runs/beauty --data later.txt --json later.json""",
    "recommend": """Write the best next items for every history, with the ids of the data: columns
user, item, rank, score. Users need not be known from training; items that the
model does not know are passed over.

  awrsr recommend --run runs/beauty -k 5
  awrsr recommend --run runs/beauty --user 17 42
  awrsr recommend --run runs/beauty --data new.txt --output top.parquet
  echo "me 4 8 15" | awrsr recommend --run runs/beauty --data - --format lines""",
    "compare": """Tell whether runs differ by more than chance: paired tests and confidence
intervals over users, and over seeds where there are several. Runs that differ
in nothing but the seed count as one variant.

  awrsr compare runs/plain runs/refined
  awrsr compare runs/plain-* runs/refined-* --metrics NDCG@10 --json comparison.json""",
    "explain": """Draw what a model pays attention to in one history: first-order weights P,
refined weights M and their difference, with items on the axes; and print what
the last event attends to most.

  awrsr explain --run runs/beauty --user 17 --output attention.svg
  awrsr explain --run runs/beauty --history 4 8 15 16 23""",
    "analyse": """Write a report, one HTML page, about the attention of a run: how many events its heads
attend to and how far back, what refinement moves and where to, and which
predictions it changes, beside a baseline run or, without one, beside the same
model with its refinement switched off.

  awrsr analyse runs/refined --baseline runs/plain
  awrsr analyse runs/refined --users 2000 --output report.html --json report.json""",
    "export": """Write the scoring path as a file that runs without this package, and compare its
scores with the model's first.

  awrsr export --run runs/beauty
  awrsr export --run runs/beauty --format onnx --output beauty.onnx""",
}


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Descriptions as they are written, each flag in one spelling, and a default where there is one to tell."""

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        return text if action.default in (None, "", SUPPRESS, []) or "default" in text else f"{text} (default: %(default)s)"

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy(action)
        shown.option_strings = [name for name in action.option_strings if "_" not in name]
        return super()._format_action_invocation(shown)


def parser(demo: bool = False) -> ArgumentParser:
    """All commands and their options. demo: defaults of train that suit the made-up histories."""
    top = ArgumentParser(prog="awrsr", description=MORE[""], formatter_class=Help, allow_abbrev=False)
    subcommands = top.add_subcommands(dest="command", metavar="COMMAND")

    def add(name: str, to: Any = subcommands, usage: str | None = None) -> ArgumentParser:
        options: dict[str, Any] = {"formatter_class": Help, "usage": usage, "allow_abbrev": False}
        sub = ArgumentParser(description=MORE[name], print_config="--print-config", **options)
        to.add_subcommand(name.split()[-1], sub, help=HELP[name])
        sub.prog = f"awrsr {name}"
        return sub

    add_data(add)
    train = add("train", usage="awrsr train [--data FILE] [--out DIR] [--config FILE] [OPTION ...]")
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
    train.description = f"{train.description}  {commands.flags(DEMO)}"
    if demo:
        train.set_defaults(DEMO)
    add_use(add)
    return top


def add_data(add: Callable[..., ArgumentParser]) -> None:
    data = add("data")
    actions = data.add_subcommands(dest="action", metavar="ACTION")
    fetch = add("data fetch", to=actions)
    fetch.add_argument("name", choices=tuple(REGISTRY), help="which")
    fetch.add_argument("--base-url", type=str, default="", help="where the files lie (default: the repositories they are from)")
    fetch.add_argument("--cache", type=str, default="", help="folder to keep it in (default: the user's cache, or $AWRSR_CACHE)")
    make = add("data make", to=actions)
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
    stats = add("data stats", to=actions)
    stats.add_argument("file", type=str, help="file of histories")
    add_format(stats)
    stats.add_argument("--json", type=str, default="", help="file to write the figures to, too")


def add_use(add: Callable[..., ArgumentParser]) -> None:
    evaluate = add("evaluate")
    add_run(evaluate, "file of histories, divided as in the run (default: the run's own)")
    evaluate.add_argument("--json", type=str, default="", help="file for the metrics")
    evaluate.add_argument("--ranks", type=str, default="", help="Parquet file for the rank of every held-out event")
    evaluate.add_argument("--part", choices=("validation", "test"), default="test", help="which held-out events")
    add_seen(evaluate)

    recommend = add("recommend")
    add_run(recommend, "file of histories, - for standard input (default: the run's own)")
    recommend.add_argument("--user", nargs="+", type=str, default=[], help="ids of the users to recommend to (default: all)")
    recommend.add_argument("-k", type=int, default=10, help="items for each user")
    recommend.add_argument("--output", type=str, default="-", help=".csv, .jsonl or .parquet; - writes CSV to standard output")
    add_seen(recommend)

    compare = add("compare")
    compare.add_argument(
        "runs", nargs="+", type=str, help="run folders; those that differ in nothing but the seed count as one variant"
    )
    compare.add_argument("--metrics", nargs="+", type=str, default=["HR@10", "NDCG@10", "MRR"], help="HR@k, NDCG@k or MRR")
    compare.add_argument("--baseline", type=str, default="", help="run or variant that others are held to (default: the first)")
    compare.add_argument("--part", choices=("validation", "test"), default="test", help="which held-out events")
    compare.add_argument("--resamples", type=int, default=2000, help="of the bootstrap, and the least of the permutation test")
    compare.add_argument("--json", type=str, default="", help="file for the results")

    explain = add("explain")
    add_run(explain, "file of histories (default: the run's own)")
    explain.add_argument("--user", type=str, default="", help="id of the user (default: the first with a history of some length)")
    explain.add_argument("--history", nargs="+", type=str, default=[], help="item ids, instead of a user's")
    explain.add_argument("--layer", type=int, default=1, help="which block, from 1")
    explain.add_argument("--output", type=str, default="attention.png", help=".png, .svg or .pdf")

    analyse = add("analyse")
    analyse.add_argument("run", type=str, help="run folder that awrsr train wrote")
    analyse.add_argument("--baseline", type=str, default="", help="run folder of the model to hold it to, such as a plain one")
    add_source(analyse, "file of histories, divided as in the run (default: the run's own)")
    analyse.add_argument("--part", choices=("validation", "test"), default="test", help="which held-out events")
    analyse.add_argument("--users", type=int, default=512, help="histories whose attention is looked at")
    analyse.add_argument("--examples", type=int, default=3, help="histories to show of those that got better, and of the others")
    analyse.add_argument("--output", type=str, default="", help="page to write (default: analysis.html in the run folder)")
    analyse.add_argument("--json", type=str, default="", help="file for the numbers")
    add_seen(analyse)

    export = add("export")
    export.add_argument("--run", type=str, required=True, help="run folder")
    export.add_argument("--format", choices=("torch", "onnx"), default="torch", help="torch.export or ONNX")
    export.add_argument("--output", type=str, default="", help="file to write (default: model.pt2 or model.onnx in the run folder)")


def add_run(to: ArgumentParser, data_help: str) -> None:
    to.add_argument("--run", type=str, required=True, help="run folder that awrsr train wrote")
    add_source(to, data_help)


def add_source(to: ArgumentParser, data_help: str) -> None:
    to.add_argument("--data", type=str, default="", help=data_help)
    add_format(to)
    to.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0 leaves it to torch")


def add_format(to: ArgumentParser) -> None:
    to.add_argument("--format", choices=FORMATS, default="auto", help="of the file of histories")
    for role in ("user", "item", "time"):
        none = "; none says that lines are in order of time" if role == "time" else ""
        to.add_argument(f"--{role}-column", type=str, default="", help=f"name of the column of {role}s{none}")


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


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status: 0, 1 for bad input, 130 when interrupted, 141 when nobody reads its output any longer."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser().parse_args([each for each in arguments if not each.startswith("--print-config")])
    name = given.command
    demo = name == "train" and not given.train.data
    if demo or "--print-config" in " ".join(arguments):
        given = parser(demo).parse_args(arguments)
    if demo:
        suited = {option: value for option, value in DEMO.items() if given.train[option] == value}
        commands.say(f"No --data: made-up histories, and options that suit them: {commands.flags(suited)}")
    options = given[name]
    if name == "data":
        name, options = f"data {options.action}", options[options.action]
    try:
        commands.COMMANDS[name](options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        return 141
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        if os.environ.get("AWRSR_DEBUG"):
            raise
        print(f"awrsr {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        commands.say(f"awrsr {name}: interrupted", file=sys.stderr)
        return 130
    return 0
