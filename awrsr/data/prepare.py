"""Reads histories as the options say, and divides them into training, validation and test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ..options import check, option
from ..processes import unforked
from ._read_columns import DataError, to_times
from .histories import SPLITS, Histories, Split, split
from .readers import FORMATS, read
from .synthetic import make

# Options of model and training that suit the synthetic histories. With a single layer, only a refined model can learn the task.
# Equal items attend to each other from the start, tables learn fast, and first-order weights do not drown higher-order ones.
# The epochs suffice for two plain layers to learn the task, too.
DEMO: dict[str, Any] = {"layers": 1, "init": "match", "table_std": 0.5, "refine_scale": 2.8, "gate": 4.0}
DEMO |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "learning_rate": 3e-3, "epochs": 30, "patience": 0}

OF_SPLIT = {"holdout": "last-n", "validation_from": "time", "test_from": "time"}  # options that only one split uses


@dataclass(frozen=True)
class DataOptions:
    """Options of the data: which histories are read, and how they are divided."""

    data: str = option(
        "",
        "File of histories. If none is given, synthetic histories are made, which one refined layer can learn and one plain layer "
        "cannot.",
    )
    format: str = option("auto", "Format of the file of histories. With auto, its name and content decide.", choices=FORMATS)
    user_column: str = option("", "Name of the column that holds the users. If it is not given, the usual names are tried.")
    item_column: str = option("", "Name of the column that holds the items. If it is not given, the usual names are tried.")
    time_column: str = option(
        "",
        "Name of the column that holds the times. If it is not given, the usual names are tried. The value none means that the "
        "lines are already in order of time.",
    )
    min_user_events: int = option(
        1,
        "Users with fewer events are left out. If min_item_events is set too, both rules are applied in turn until nothing changes "
        "(k-core).",
        least=1,
    )
    min_item_events: int = option(1, "Items with fewer events are left out, in the same way.", least=1)
    collapse: bool = option(False, "Consecutive events of a user with the same item count as one event.")
    split: str = option(
        "leave-one-out",
        "Which events are held out. leave-one-out: each user's last event is held out for test, and the one before it for "
        "validation. last-n: each user's last events are held out for test, and as many before them for validation; holdout sets "
        "how many. time: all events from test_from on are held out for test, and those between validation_from and test_from for "
        "validation. none: nothing is held out or evaluated; training uses all events and runs for all epochs.",
        choices=SPLITS,
    )
    holdout: int = option(
        1, "Number of events of each user that are held out for validation, and as many for test. It needs split last-n.", least=1
    )
    validation_from: str = option(
        "", "Time at which validation begins: a number, or a date such as 2014-05-31. It needs split time."
    )
    test_from: str = option("", "Time at which test begins, in the same form. It needs split time.")

    def __post_init__(self) -> None:
        check(self)
        for name, of in OF_SPLIT.items():
            if getattr(self, name) != self.__dataclass_fields__[name].default and self.split != of:
                raise ValueError(f"{name} is {getattr(self, name)!r}, which needs the split {of}; split is {self.split!r}")

    @property
    def name(self) -> str:
        """What to call the data: the file's name, or synthetic."""
        return Path(self.data).name.split(".")[0] if self.data else "synthetic"


def histories(options: DataOptions) -> Histories:
    """The histories that the options describe, filtered."""
    if options.data:
        user, item, time = (name or None for name in (options.user_column, options.item_column, options.time_column))
        events = read(options.data, format=options.format, user=user, item=item, time=time)
    else:
        events = make()
    if options.collapse:
        events = events.collapsed()
    kept = events.core(options.min_user_events, options.min_item_events)
    if not kept.num_users:
        raise ValueError(
            f"min_user_events={options.min_user_events}, min_item_events={options.min_item_events} leave nothing of {options.name}"
        )
    return kept


def divide(histories: Histories, options: DataOptions) -> Split:
    """Divide histories as the options say."""
    moments: dict[str, Any] = {name: moment(name, getattr(options, name)) for name in ("validation_from", "test_from")}
    return split(histories, options.split, n=options.holdout, **moments)


@unforked
def moment(name: str, text: str) -> float | None:
    """Seconds since 1970 of a date, or a number in the unit of the data; read like the times of a file."""
    try:
        return float(to_times(pl.Series([text]), lambda _: name)[0]) if text else None
    except DataError:
        raise ValueError(f"{name} is {text!r}, must be a number, as times are in the data, or a date such as 2014-05-31") from None
