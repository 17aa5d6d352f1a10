"""Reads histories as the options say, and divides them into training, validation and test."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..options import check, option
from .histories import Histories
from .ids import MISSING_IDS
from .readers import FORMATS, read
from .splits import SPLITS, Split, split
from .synthetic import make
from .times import moment as moment  # callers find it here

# Options of model and training that suit the synthetic histories. With a single layer, only a refined model can learn the task.
# Equal items attend to each other from the start, tables learn fast, and first-order weights do not drown higher-order ones.
# The epochs suffice for two plain layers to learn the task, too.
DEMO: dict[str, Any] = {"layers": 1, "init": "match", "table_std": 0.5, "refine_scale": 2.8, "gate": 4.0}
DEMO |= {"rank": 32, "table_init": "normal", "learned_scale": False, "learned_gate": False, "hidden_dropout": 0.0}
DEMO |= {"attention_dropout": 0.0, "learning_rate": 3e-3, "epochs": 30, "patience": 0}

# Options with the name of an argument of `read`
OF_READING = ("separator", "columns", "header", "missing_ids", "drop_duplicates", "where")
GIVEN = "given"
PARTS = ("train_data", "validation_data", "test_data")
OF_WHOLE = ("min_user_events", "min_item_events", "collapse")  # options that change what is divided
_MORE_THAN_GIVEN = "train_data is given, so data must not be, nor a split"
OF_SPLIT = {"holdout": "last-n", "validation_from": "time", "test_from": "time"}  # options that only one split uses


@dataclass(frozen=True)
class DataOptions:
    """Options of the data: which histories are read, and how they are divided."""

    data: str = option(
        "",
        "File of histories. If none is given, synthetic histories are made, which one refined layer can learn and one plain layer "
        "cannot.",
    )
    train_data: str = option(
        "", "File of the events that train the model, if they were divided before; then data and the options of split do not apply."
    )
    validation_data: str = option("", "File of events for validation, which follow those of train_data.")
    test_data: str = option("", "File of events for test, which follow those of train_data and validation_data.")
    format: str = option("auto", "Format of the file of histories. With auto, its name and content decide.", choices=FORMATS)
    user_column: str = option("", "Name of the column that holds the users. If it is not given, the usual names are tried.")
    item_column: str = option("", "Name of the column that holds the items. If it is not given, the usual names are tried.")
    time_column: str = option(
        "",
        "Name of the column that holds the times. If it is not given, the usual names are tried. The value none means that the "
        "lines are already in order of time.",
    )
    separator: str = option(
        "",
        "What divides the fields of a line, such as :: or tab. If it is not given, it is what the first line contains most often.",
    )
    columns: str = option(
        "", "Names for the columns of a file without a header, from the left, with commas between them: user,item,rating,time."
    )
    header: bool = option(
        True,
        "The first line holds names of columns. Without a header (--no-header) and without --columns, the columns are called 1, 2, "
        "..., and --user-column, --item-column and --time-column choose among them.",
    )
    missing_ids: str = option(
        "refuse",
        "What to do if the user or the item of an event is missing, which includes text such as NULL or nan. refuse: stop. drop: "
        "leave such events out and say how many. keep: take such text as an id.",
        choices=MISSING_IDS,
    )
    drop_duplicates: bool = option(False, "Events with the same user, item and time count as one event.")
    where: str = option(
        "",
        "Condition on the columns of the file, in the words of SQL, such as \"rating >= 4\" or \"event == 'purchase'\". Other "
        "events are left out and counted.",
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
        "how many. time, which test_from sets: all events from test_from on are held out for test, and those between "
        "validation_from and test_from for validation. none: nothing is held out or evaluated; training uses all events and runs "
        "for all epochs. given, which train_data sets: each part has its own file.",
        choices=(*SPLITS, GIVEN),
    )
    holdout: int = option(
        1, "Number of events of each user that are held out for validation, and as many for test. It needs split last-n.", least=1
    )
    validation_from: str = option(
        "",
        "Time at which validation begins: a number, or a date such as 2014-05-31. If only test_from is given, as many events "
        "before it are held out for validation as there are from it on.",
    )
    test_from: str = option("", "Time at which test begins, in the same form. It sets split time.")

    def __post_init__(self) -> None:
        check(self)
        if self.test_from and self.split == "leave-one-out":
            object.__setattr__(self, "split", "time")
        if self.train_data and self.split == "leave-one-out":
            object.__setattr__(self, "split", GIVEN)
        if (self.split == GIVEN) != bool(self.train_data) or self.train_data and self.data:
            raise ValueError("split is given, which needs train_data and no data" if not self.train_data else _MORE_THAN_GIVEN)
        if not self.train_data and (self.validation_data or self.test_data):
            raise ValueError("validation_data and test_data need train_data, the events before them")
        unlike = [name for name in OF_WHOLE if getattr(self, name) != self.__dataclass_fields__[name].default]
        if self.train_data and unlike:
            raise ValueError(f"{unlike[0]} is {getattr(self, unlike[0])!r}, which does not apply to parts in files of their own")
        for name, of in OF_SPLIT.items():
            if getattr(self, name) != self.__dataclass_fields__[name].default and self.split != of:
                raise ValueError(f"{name} is {getattr(self, name)!r}, which needs the split {of}; split is {self.split!r}")

    @property
    def name(self) -> str:
        """What to call the data: the file's name, or synthetic."""
        file = self.data or self.train_data
        return Path(file).name.split(".")[0] if file else "synthetic"

    @property
    def files(self) -> dict[str, str]:
        """The files that are given, by the option that names them."""
        names = {name: getattr(self, name) for name in ("data", *PARTS)}
        return {name: file for name, file in names.items() if file}


def prepare(options: DataOptions) -> Split:
    """The histories that the options describe, filtered and divided."""
    if options.train_data:
        files = [getattr(options, name) for name in PARTS]
        return Split.of_parts(*(read_as(options, file) if file else None for file in files))  # type: ignore[arg-type]
    return divide(histories(options), options)


def read_as(options: DataOptions, file: str) -> Histories:
    """The histories of a file, read as the options say."""
    user, item, time = (name or None for name in (options.user_column, options.item_column, options.time_column))
    table: dict[str, Any] = {name: getattr(options, name) for name in OF_READING}
    return read(file, format=options.format, user=user, item=item, time=time, **table)


def histories(options: DataOptions) -> Histories:
    """The histories that the options describe, filtered."""
    if options.train_data:
        return prepare(options).histories
    events = read_as(options, options.data) if options.data else make()
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
    moments = {name: getattr(options, name) or None for name in ("validation_from", "test_from")}
    return split(histories, options.split, n=options.holdout, **moments)
