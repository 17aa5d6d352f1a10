"""Sequential recommendation with refined attention: from a file of histories to
recommendations.

  awrsr train                                  show on synthetic data what refinement does
  awrsr data fetch beauty                      download public data
  awrsr train --data beauty.txt --out runs/b   train a model and evaluate it
  awrsr recommend runs/b -k 5                  list the best next items of every user
"""

import os
import sys
import warnings
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from collections.abc import Callable
from copy import copy
from importlib.metadata import version
from inspect import getdoc
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from polars.exceptions import PanicException

from ..data.prepare import DEMO
from ..presets import AUTO, NONE, preset_options, undecided
from ..progress import coloured
from . import analyse, compare, data, evaluate, explain, export, recommend, search, similar, train
from .errors import Parser, one_line, spellings
from .shared import UsageError, as_flags, say, shield_ids


class Command(NamedTuple):
    """A command. The docstring of `run` opens its --help; the first sentence also appears in the list of commands."""

    add_flags: Callable[[ArgumentParser], None]
    run: Callable[[Any], None]


COMMANDS = {
    "data fetch": Command(data.add_fetch_flags, data.fetch),
    "data make": Command(data.add_make_flags, data.make),
    "data stats": Command(data.add_stats_flags, data.stats),
    "train": Command(train.add_flags, train.run),
    "search": Command(search.add_flags, search.run),
    "evaluate": Command(evaluate.add_flags, evaluate.run),
    "recommend": Command(recommend.add_flags, recommend.run),
    "similar": Command(similar.add_flags, similar.run),
    "compare": Command(compare.add_flags, compare.run),
    "explain": Command(explain.add_flags, explain.run),
    "analyse": Command(analyse.add_flags, analyse.run),
    "export": Command(export.add_flags, export.run),
}


class Help(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of descriptions, shows each flag in one spelling, and shows defaults unless they are empty."""

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        required = action.required and action.option_strings
        if not required and (action.default in (None, "", SUPPRESS, []) or "default" in text):
            return text
        return text.removesuffix(".") + (" (required)" if required else " (default: %(default)s)") + "." * text.endswith(".")

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy(action)
        shown.option_strings = [name for name in action.option_strings if "_" not in name]
        return super()._format_action_invocation(shown)


class PrintCompletion(Action):
    """Prints what a shell needs to complete commands, options and their values."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        import shtab

        print(shtab.complete(parser, shell=values))
        parser.exit()


def parser(demo: bool = False, preset: str = "") -> ArgumentParser:
    """All commands and their flags. demo: give train the defaults that suit the synthetic histories. preset: and those of a
    preset."""
    release = version("awrsr-kernels")
    top = Parser(prog="awrsr", description=__doc__, version=release, formatter_class=Help, allow_abbrev=False)
    help = "Print what your shell needs to complete commands and options: awrsr --print-completion bash > FILE, then source FILE."
    top.add_argument("--print-completion", action=PrintCompletion, choices=("bash", "zsh", "fish"), default=SUPPRESS, help=help)
    commands = top.add_subcommands(dest="command", metavar="COMMAND")
    actions = add(commands, "data", data).add_subcommands(dest="action", metavar="ACTION")
    for name, command in COMMANDS.items():
        sub = add(actions if name.startswith("data ") else commands, name, command.run)
        command.add_flags(sub)
        if demo and name == "train":
            sub.set_defaults(DEMO)
        if preset and name == "train":
            sub.set_defaults(preset_options(preset))
    return top


def add(to: Any, name: str, documented: Any) -> ArgumentParser:
    """Add a parser to a group of commands, with the docstring of `documented` as its help."""
    description = getdoc(documented) or ""
    sub = Parser(description=description, print_config="--print-config", formatter_class=Help, allow_abbrev=False)
    to.add_subcommand(name.split()[-1], sub, help=" ".join(description.partition(".")[0].split()) + ".")
    sub.prog = f"awrsr {name}"
    return sub


def option_names(arguments: list[str]) -> set[str]:
    """The options that are typed, by their names in Python."""
    flags = (word.partition("=")[0] for word in arguments if word.startswith("--"))
    return {flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags}


def parsed(arguments: list[str] | None) -> tuple[str, Any]:
    """The name of the command, and its options."""
    top = parser()
    arguments = shield_ids(sys.argv[1:] if arguments is None else arguments, spellings(top))
    found = top.parse_args([each for each in arguments if not each.startswith("--print-config")])
    name = found.command
    demo = name == "train" and not (found.train.data or found.train.train_data)
    preset = found.train.preset if name == "train" else ""
    named = "" if preset in (AUTO, NONE) else preset
    if demo or named or "--print-config" in " ".join(arguments):
        found = parser(demo, named).parse_args(arguments)
    if preset == AUTO and not undecided(found.train, option_names(arguments)):
        found.train.preset = NONE
    if demo:
        defaults = {option: value for option, value in DEMO.items() if found.train[option] == value}
        say(f"No --data: training on synthetic histories, with options that suit them: {as_flags(defaults)}")
    options = found[name]
    return (f"data {options.action}", options[options.action]) if name == "data" else (name, options)


def _warning(message: Any, *_: Any) -> str:
    """A warning without source lines."""
    return f"{coloured('Warning', 'yellow', sys.stderr)}: {message}\n"


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Exit status: 0; 1 for bad input; 2 for a wrong command line; 130 when interrupted; 141 when the reader of its
    output has gone."""
    who = "awrsr"
    # Before torch is imported: threads that spin for long while they wait made training 25 times as slow beside other work, and
    # threads that sleep at once made it slower by half where there was none
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    formatted, warnings.formatwarning = warnings.formatwarning, _warning  # type: ignore[assignment]
    try:
        name, options = parsed(arguments)
        who = f"awrsr {name}"
        COMMANDS[name].run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it exits
        return 141
    except (Exception, PanicException) as error:
        if os.environ.get("AWRSR_DEBUG"):
            raise
        usage = isinstance(error, UsageError)
        print(f"{coloured(who, 'red', sys.stderr)}: {one_line(error)}" + f"; see {who} --help" * usage, file=sys.stderr)
        return 1 + usage
    except KeyboardInterrupt:
        say(f"{who}: interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = formatted
    return 0
