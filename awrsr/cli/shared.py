"""What several commands share: their flags, opening a run with its histories, warnings about changed data."""

import re
import shlex
import sys
from collections.abc import Collection, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import polars as pl
from jsonargparse import ActionYesNo, ArgumentParser

from ..data.histories import Histories
from ..data.ids import as_column, as_texts, id_text
from ..data.prepare import OF_READING, OF_SPLIT, PARTS, DataOptions, divide, histories, prepare
from ..data.splits import Split
from ..files import first_process
from ..processes import set_threads

COLUMNS = ("user_column", "item_column", "time_column", *OF_READING)  # how a file is read, besides its format
OWN_DATA = "(default: the run's own)"


def add_options(to: Any, kind: Any, names: Collection[str] = ()) -> None:
    """A flag for each field of a class of options, or for those named."""
    for each in fields(kind):
        if names and each.name not in names:
            continue
        flag, help, choices = "--" + each.name.replace("_", "-"), each.metadata["help"], each.metadata["choices"]
        if isinstance(each.default, bool):
            add_switch(to, each.name, each.default, help)
        elif each.name != "num_items":  # it is counted in the data
            values = {"choices": choices} if choices else {"type": type(each.default)}
            to.add_argument(flag, *({f"--{each.name}"} - {flag}), default=each.default, help=help, **values)


def add_switch(to: Any, name: str, default: bool | None, help: str) -> None:
    to.add_argument("--" + name.replace("_", "-"), action=ActionYesNo(no_prefix="no-"), default=default, help=help)


def options_of(kind: Any, options: Any) -> dict[str, Any]:
    """The values of the flags that `add_options` added."""
    return {each.name: options[each.name] for each in fields(kind) if each.name in options}


DASH = "\0"  # stands before an id that begins with a dash, so that argparse does not take it for an option


def identifier(word: str) -> str:
    """An id as it was typed, from what `shield_ids` made of it."""
    return word.removeprefix(DASH)


def shield_ids(arguments: list[str], options: Collection[str]) -> list[str]:
    """Arguments in which words after --user, --history and --item that begin with a dash, but are no option, begin with DASH."""
    shielded, of_ids = [], False
    for word in arguments:
        is_option = word.partition("=")[0] in options or re.fullmatch(r"-k\d+", word) is not None
        shielded.append(DASH + word if of_ids and word.startswith("-") and not is_option else word)
        of_ids = word in ("--user", "--history", "--item") if is_option else of_ids
    return shielded


class UsageError(ValueError):
    """A command line that says too little or too much."""


def add_folder(to: ArgumentParser) -> None:
    to.add_argument("folder", nargs="?", type=str, default="", metavar="RUN", help="Run folder that awrsr train wrote.")
    to.add_argument("--run", type=str, default="", help="The same, as an option.")


def folder_of(options: Any) -> str:
    """The run folder, which may be named in two ways. Raises ValueError unless it is named in one."""
    if bool(options.folder) == bool(options.run):
        twice = f"{options.folder} and --run {options.run} are two run folders; name one"
        raise UsageError(twice if options.run else "RUN is missing, the folder of a run")
    return str(options.folder or options.run)


def add_run(to: ArgumentParser, data_help: str = f"File of histories {OWN_DATA}.") -> None:
    add_folder(to)
    add_data(to, data_help)


def add_titles(to: ArgumentParser) -> None:
    help = "Table of items (CSV, Parquet or JSON lines) whose other columns are shown beside each item."
    to.add_argument("--titles", type=str, default="", help=help)


def titles_of(options: Any) -> Any:
    """The table of --titles, or None."""
    from ..data.item_files import read_titles

    return read_titles(options.titles) if options.titles else None


def add_data(to: ArgumentParser, data_help: str) -> None:
    to.add_argument("--data", type=str, default="", help=data_help)
    add_options(to, DataOptions, ("format", *COLUMNS))
    to.add_argument("--threads", type=int, default=0, help="Number of CPU threads that torch uses; 0 leaves the number to torch.")


def add_part(to: ArgumentParser) -> None:
    to.add_argument("--part", choices=("validation", "test"), default="test", help="Which held-out events to use.")


def add_filter_seen(to: ArgumentParser) -> None:
    help = "Leave the items of a history out of the ranking; auto does what the run did."
    to.add_argument("--filter-seen", choices=("auto", "yes", "no"), default="auto", help=help)


def filter_seen(options: Any) -> bool | None:
    """The value of --filter-seen; None means what the run did."""
    return {"auto": None, "yes": True, "no": False}[options.filter_seen]


def labels_of(options: Any, items: Collection[Any]) -> list[str]:
    """What to call items in pictures and reports: by the first column of --titles that has something for them, or by their ids."""
    from ..data.tables import with_titles

    titles = titles_of(options)
    if titles is None:
        return [str(item) for item in items]
    ids = as_column(np.array(list(items)))
    named = with_titles(pl.DataFrame({"item": ids}), titles).to_dict(as_series=False)
    column = next(values for name, values in named.items() if name != "item")
    return [str(item) if name is None else str(name) for item, name in zip(items, column, strict=True)]


class OpenRun:
    """A run folder, by default that of --run: its model, on a GPU where there is one, and the histories of --data or its own."""

    def __init__(self, options: Any, folder: str = "") -> None:
        import torch

        from ..recommender import AWRSR

        set_threads(options.threads)
        self.options, self.folder = options, folder or folder_of(options)
        self.model = AWRSR.load(self.folder)
        self.stored = self.model.sections.get("data", {})
        known = self.stored.keys() & DataOptions.__dataclass_fields__
        unused = {name for name, split in OF_SPLIT.items() if split != self.stored.get("split")}  # older runs may store them
        self.data = DataOptions(**{name: self.stored[name] for name in known - unused})
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def histories(self, everyone: bool = False) -> Histories:
        """All events, filtered as in the run; everyone: with users and items that the run leaves out."""
        options, data = self.options, self.data
        if everyone:
            data = replace(data, min_user_events=1, min_item_events=1)
        if options.data:
            alike = options.data == "-" or suffix(options.data) == suffix(data.data)
            alike = alike and options.format in ("auto", data.format)  # then the run's format and columns apply
            columns = {name: getattr(data if alike and is_default(name, options) else options, name) for name in COLUMNS}
            kept: dict[str, Any] = dict.fromkeys(PARTS, "") | {"split": "none"} if data.train_data else {}
            return histories(replace(data, data=options.data, format=data.format if alike else options.format, **columns, **kept))
        return histories(self.own_data(data))

    def given(self) -> Split:
        """The split of `awrsr evaluate`: that of the run, or its parts if --test-data names a file."""
        options = self.options
        before = options.train_data or options.data
        if not options.test_data:
            if options.train_data or options.validation_data:
                raise UsageError("--train-data and --validation-data need --test-data")
            return self.split()
        if options.train_data and options.data or options.part != "test":
            raise UsageError("with --test-data, name what came before by --data or --train-data, and leave --part out")
        self.data = replace(self.data, test_data="")  # of a run whose parts had files of their own
        parts: list[Histories | None] = []
        for file in (before, options.validation_data, options.test_data):
            options.data = file
            parts.append(None if parts and not file else self.histories(everyone=True))
        return Split.of_parts(*parts)  # type: ignore[arg-type]

    def own_data(self, data: DataOptions, check: bool = True) -> DataOptions:
        """The options of the run's own data, with files where they are now. check: refuse options that say how a file is read."""
        options = self.options
        if "data" not in self.stored:
            raise ValueError(f"{self.folder} was fitted in Python and does not say where its histories are; add --data FILE")
        for name in ("format", *COLUMNS) if check else ():
            if not is_default(name, options):
                raise ValueError(f"{name} is {options[name]!r}, must not be set without --data FILE: the run stores its own")
        for file in (data.files[name] for name in PARTS if name in data.files):
            if not Path(file).exists():
                raise ValueError(f"{file}, the run's own data, does not exist; add --data FILE")
        return data if data.train_data else replace(data, data=self.own_file())

    def own_file(self) -> str:
        """Where the run's own data lie: where they were when it was trained or, if they are gone from there, under the same name
        seen from here."""
        given, place = self.data.data, self.stored.get("path", "")
        if given == "-":
            raise ValueError(f"{self.folder} was trained on standard input; add --data FILE, or --data - to read it again")
        if not given or place and Path(place).exists():
            return place or given
        if not Path(given).exists():
            raise ValueError(f"{place or given}, the run's own data, does not exist; add --data FILE")
        if place:
            say(f"Warning: {place}, the run's own data, does not exist; reading {given} instead.", file=sys.stderr)
        return given

    def split(self) -> Split:
        """The histories, split as in the run. Warns if they are not those of the run."""
        if self.data.train_data and not self.options.data:
            split = prepare(self.own_data(self.data))
        elif self.data.train_data:
            raise ValueError("--data cannot be divided as in the run, whose parts had files of their own; name --test-data FILE")
        else:
            split = divide(self.histories(), self.data)
        fingerprint = self.stored.get("fingerprint")  # older runs have none
        if fingerprint != split.fingerprint() and (fingerprint or self.options.data):
            changed = "--data differs from the run's data" if self.options.data else f"{self.data.name} has changed since the run"
            print(f"Warning: {changed}, so the model may have been trained on events held out here.", file=sys.stderr)
        if not len(split.targets(self.options.part)[0]):
            raise ValueError(
                f"part is {self.options.part!r}, but the run's split, {self.data.split!r}, holds out no events to rank"
            )
        return split


def suffix(path: str) -> str:
    """Of a file name, without .gz."""
    return Path(path.removesuffix(".gz")).suffix


def is_default(name: str, options: Any) -> bool:
    """Whether an option of the data is left as it is by default."""
    return bool(options[name] == DataOptions.__dataclass_fields__[name].default)


def find_user(histories: Histories, user: str) -> int:
    """The number of the user with this id."""
    numbers = np.flatnonzero(np.array(as_texts(histories.user_ids), dtype=object) == id_text(user))
    if not len(numbers):
        raise ValueError(f"user is {user!r}, must be a user of the data")
    return int(numbers[0])


def as_flags(options: dict[str, Any]) -> str:
    """Options as one would type them."""
    flags = {name: name.replace("_", "-") for name in options}
    switches = {True: "--", False: "--no-"}
    return typed(
        part
        for name, value in options.items()
        for part in ([switches[value] + flags[name]] if isinstance(value, bool) else ["--" + flags[name], value])
    )


def typed(words: Iterable[Any]) -> str:
    """Words as one would type them, those with blanks and the like in quotation marks."""
    return shlex.join(map(str, words))


def say(text: str, file: TextIO | None = None) -> None:
    """Print, in the first of several processes only."""
    if first_process():
        print(text, file=file, flush=True)
