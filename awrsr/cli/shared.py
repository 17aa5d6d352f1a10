"""What several commands share: their flags, opening a run with its histories, warnings about changed data."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from jsonargparse import ArgumentParser

from ..data.histories import Histories, Split
from ..data.prepare import OF_SPLIT, DataOptions, divide, histories
from ..data.readers import FORMATS
from ..files import first_process, read_json

COLUMNS = ("user_column", "item_column", "time_column")
OWN_DATA = "(default: the run's own)"


def add_run(to: ArgumentParser, data_help: str = f"File of histories {OWN_DATA}.") -> None:
    to.add_argument("--run", type=str, required=True, help="Run folder that awrsr train wrote.")
    add_data(to, data_help)


def add_data(to: ArgumentParser, data_help: str) -> None:
    to.add_argument("--data", type=str, default="", help=data_help)
    add_format(to)
    to.add_argument("--threads", type=int, default=0, help="Threads of torch on the CPU; 0 leaves the number to torch.")


def add_format(to: ArgumentParser) -> None:
    to.add_argument("--format", choices=FORMATS, default="auto", help="Format of the file of histories.")
    for name in COLUMNS:
        role = name.removesuffix("_column")
        none = "; none says that the lines are in order of time" if role == "time" else ""
        to.add_argument(f"--{role}-column", type=str, default="", help=f"Name of the column of {role}s{none}.")


def add_part(to: ArgumentParser) -> None:
    to.add_argument("--part", choices=("validation", "test"), default="test", help="Which of the held-out events are ranked.")


def add_filter_seen(to: ArgumentParser) -> None:
    help = "Whether to leave items of the history out of the ranking; auto does as in the run."
    to.add_argument("--filter-seen", choices=("auto", "yes", "no"), default="auto", help=help)


def filter_seen(options: Any) -> bool | None:
    """What --filter-seen says; None: as in the run."""
    return {"auto": None, "yes": True, "no": False}[options.filter_seen]


class OpenRun:
    """The run folder of --run: its model, on a GPU where there is one, and the histories of --data or else the run's own."""

    def __init__(self, options: Any) -> None:
        import torch

        from ..recommender import AWRSR
        from ..run_folder import CONFIG

        if options.threads:
            torch.set_num_threads(options.threads)
        self.options = options
        self.model = AWRSR.load(options.run)
        self.stored = read_json(Path(options.run) / CONFIG).get("data", {})
        known = {name: value for name, value in self.stored.items() if name in DataOptions.__dataclass_fields__}
        for name, split in OF_SPLIT.items():
            if known.get("split") != split:
                known.pop(name, None)  # older runs may store it, without effect
        self.data = DataOptions(**known)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def histories(self) -> Histories:
        """Filtered as in the run."""
        options, data = self.options, self.data
        if options.data:
            alike = Path(options.data).suffix == Path(data.data).suffix  # then the run's format and columns serve
            columns: dict[str, Any] = {name: options[name] or (getattr(data, name) if alike else "") for name in COLUMNS}
            format = data.format if options.format == "auto" and alike else options.format
            return histories(replace(data, data=options.data, format=format, **columns))
        if "data" not in self.stored:
            raise ValueError(f"{options.run} was fitted in Python and does not say where its histories are; add --data FILE")
        for name in ("format", *COLUMNS):
            if options[name] not in ("", "auto"):
                raise ValueError(f"{name} is {options[name]!r}, must not be set without --data FILE: the run keeps its own")
        if data.data not in ("", "-") and not Path(data.data).exists():
            raise ValueError(f"{data.data}, the run's own data, does not exist; add --data FILE or go where the run was started")
        return histories(data)

    def split(self) -> Split:
        """Divided as in the run, with a warning where the histories are not those of the run."""
        split = divide(self.histories(), self.data)
        fingerprint = self.stored.get("fingerprint")  # older runs have none
        if fingerprint != split.fingerprint() and (fingerprint or self.options.data):
            changed = "--data differs from the run's data" if self.options.data else f"{self.data.name} has changed since the run"
            print(f"Warning: {changed}, so the model may have been trained on events held out here.", file=sys.stderr)
        if not len(split.targets(self.options.part)[0]):
            raise ValueError(f"part is {self.options.part!r}, but the run's split, {self.data.split!r}, holds nothing out to rank")
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
