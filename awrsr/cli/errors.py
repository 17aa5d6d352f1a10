"""What the command line says when it does not fit: one line, with the nearest command or option."""

import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from ..habits import HABITS, meant
from .shared import typed

# Messages of jsonargparse and argparse.
UNKNOWN_OPTION = re.compile(r"unrecognized arguments: (\S+)")
UNKNOWN_KEY = re.compile(r"does not accept option '([^']+)'")  # of a configuration file
WRONG_CHOICE = re.compile(r"argument ([^:]+): invalid choice: '(.*)' \(choose from (.*)\)")
MISSING = re.compile(r"the following arguments are required: (?:(\S+)\.)?(\S+)")
NO_COMMAND = re.compile(r'expected "(?:(\S+)\.)?\S+" to be one of .* but it was not provided')
MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)  # of torch
FRAMES = re.compile(r"\n(?:frame #|Exception raised from|C\+\+ stack).*", re.DOTALL)  # of torch, below its message
EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError)
WRONG_TYPE = re.compile(r"""Parser key "(.+)": Expected a <class '(\w+)'>\. Got value: (.*)""")


def one_line(error: BaseException) -> str:
    """What went wrong, for a reader who knows the command but not its code."""
    said = " ".join(FRAMES.sub("", str(error)).split())
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and MEMORY.search(said):
        return f"out of memory{f' ({said})' if said else ''}; use fewer data, or smaller sizes in the options"
    if isinstance(error, EXPECTED) and said:
        return said
    said = f"{type(error).__name__}{f': {said}' if said else ''}"
    return f"{said}, which was not foreseen; with AWRSR_DEBUG=1 in the environment, the command shows where it arose"


class Parser(ArgumentParser):
    """A parser whose errors are one line each and say what may have been meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        print(explained(" ".join(message.split()), parser), file=sys.stderr)
        sys.exit(2)


def explained(message: str, parser: Any) -> str:
    """The line to print: which command cannot do what, and what may have been meant or which help to read."""
    command, said = parser.prog, message.removesuffix(".")
    if found := UNKNOWN_OPTION.search(message):
        word = found[1].partition("=")[0]
        said = f"there is no option {word}" + nearest_option(word, parser) if word[0] == "-" else one_too_many(found[1], parser)
    elif found := UNKNOWN_KEY.search(message):
        said = f"there is no option {found[1]}" + nearest_option(found[1], parser)
    elif found := WRONG_CHOICE.search(message):
        name, value, choices = found[1].split("/")[0], found[2], found[3].replace("'", "")
        said = f"{name} is {value!r}, must be one of {choices}"
        if name in ("COMMAND", "ACTION"):
            said = f"there is no command {value!r}" + nearest_command(value, choices.split(", "))
    elif found := MISSING.search(message):
        command, said = subcommand(command, found[1]), f"{required(found[2], parser)} is missing"
    elif found := NO_COMMAND.search(message):
        command, said = subcommand(command, found[1]), "a command is missing"
    elif found := WRONG_TYPE.search(message):
        said = f"{found[1]} is {found[3]!r}, must be of type {found[2]}"
    return f"{command}: {said}" + ("" if said.endswith("?") else f"; see {command} --help")


def required(name: str, parser: Any) -> str:
    """An argument that must be given, as it is typed."""
    flag = f"--{name.replace('_', '-')}"
    return flag if flag in spellings(parser) else name.upper()


def spellings(of: Any) -> set[str]:
    """Every option of a parser and of its commands, as it is typed."""
    commands = [sub for action in of._actions if isinstance(action.choices, dict) for sub in action.choices.values()]
    return set(of._option_string_actions).union(*map(spellings, commands))


def subcommand(command: str, key: str | None) -> str:
    """awrsr and data.fetch -> awrsr data fetch"""
    return f"{command} {key.replace('.', ' ')}" if key else command


def nearest_option(word: str, parser: Any) -> str:
    flags = {flag.lstrip("-").replace("-", "_"): flag for flag in parser._option_string_actions if "_" not in flag}
    found = meant(word.lstrip("-").replace("-", "_"), flags)
    return did_you_mean(flags[name] if word.startswith("-") else name for name in found)


def one_too_many(word: str, parser: Any) -> str:
    """A word without an option, which may be the path that one of them wants."""
    flag = next((flag for flag in ("--run", "--data") if flag in parser._option_string_actions and Path(word).exists()), None)
    return f"{word!r} is one word too many" + did_you_mean([typed([flag, word])] if flag else [])


def nearest_command(word: str, choices: list[str]) -> str:
    below = [name for name in HABITS if " " in name and name.split()[0] in choices]  # such as data fetch
    return did_you_mean(meant(word, [*choices, *below]))


def did_you_mean(names: Any) -> str:
    return f": did you mean {found}?" if (found := " or ".join(names)) else ""
