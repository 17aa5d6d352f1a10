"""What several commands share: their flags, opening a run with its histories, warnings about changed data."""

import sys
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from jsonargparse import ActionYesNo, ArgumentParser

from ..data.histories import Histories, Split
from ..data.prepare import OF_SPLIT, DataOptions, divide, histories
from ..files import first_process, read_json

COLUMNS = ("user_column", "item_column", "time_column")
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


def add_run(to: ArgumentParser, data_help: str = f"File of histories {OWN_DATA}.") -> None:
    to.add_argument("--run", type=str, required=True, help="Run folder that awrsr train wrote.")
    add_data(to, data_help)


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


class OpenRun:
    """A run folder, by default that of --run: its model, on a GPU where there is one, and the histories of --data or its own."""

    def __init__(self, options: Any, folder: str = "") -> None:
        import torch

        from ..recommender import AWRSR
        from ..run_folder import CONFIG

        if options.threads:
            torch.set_num_threads(options.threads)
        self.options = options
        self.model = AWRSR.load(folder or options.run)
        self.stored = read_json(Path(folder or options.run) / CONFIG).get("data", {})
        known = self.stored.keys() & DataOptions.__dataclass_fields__
        unused = {name for name, split in OF_SPLIT.items() if split != self.stored.get("split")}  # older runs may store them
        self.data = DataOptions(**{name: self.stored[name] for name in known - unused})
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def histories(self) -> Histories:
        """Filtered as in the run."""
        options, data = self.options, self.data
        if options.data:
            alike = Path(options.data).suffix == Path(data.data).suffix  # then the run's format and columns apply
            columns: dict[str, Any] = {name: options[name] or (getattr(data, name) if alike else "") for name in COLUMNS}
            format = data.format if options.format == "auto" and alike else options.format
            return histories(replace(data, data=options.data, format=format, **columns))
        if "data" not in self.stored:
            raise ValueError(f"{options.run} was fitted in Python and does not say where its histories are; add --data FILE")
        for name in ("format", *COLUMNS):
            if options[name] not in ("", "auto"):
                raise ValueError(f"{name} is {options[name]!r}, must not be set without --data FILE: the run stores its own")
        if data.data not in ("", "-") and not Path(data.data).exists():
            raise ValueError(
                f"{data.data}, the run's own data, does not exist; add --data FILE or run this where the run was started"
            )
        return histories(data)

    def split(self) -> Split:
        """The histories, split as in the run. Warns if they are not those of the run."""
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


def find_user(histories: Histories, user: str) -> int:
    """The number of the user with this id."""
    numbers = np.flatnonzero(histories.user_ids.astype(str) == user)
    if not len(numbers):
        raise ValueError(f"user is {user!r}, must be a user of the data")
    return int(numbers[0])


def as_flags(options: dict[str, Any]) -> str:
    """Options as one would type them."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items())


def say(text: str, file: TextIO | None = None) -> None:
    """Print, in the first of several processes only."""
    if first_process():
        print(text, file=file, flush=True)
