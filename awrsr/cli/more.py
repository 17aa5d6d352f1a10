"""`awrsr train --continue RUN`: train a finished run further on new events."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..config import TrainingOptions
from ..data.histories import Histories
from ..data.ids import as_column, many
from ..data.prepare import DataOptions, histories, read_as
from ..files import atomic, write_columns
from ..lock import locked
from .shared import OpenRun, UsageError, options_of, say, typed

EVENTS = "events.parquet"  # in the new run's folder: all events that it was trained on


def continue_run(options: Any) -> None:
    """Train a copy of the run's model on the events of --data, and write it, with all events, into a folder of its own."""
    folder, data = options["continue"], DataOptions(**options_of(DataOptions, options))
    if not data.data or data.train_data:
        raise UsageError("--continue needs --data FILE, the new events")
    out = Path(options.out or f"{Path(folder)}-more")
    if out.resolve() == Path(folder).resolve():
        raise UsageError(f"--out is {out}, the run itself; must be another folder")
    opened = OpenRun(options, folder)
    before, events = histories(opened.own_data(opened.data, check=False)), read_as(data, data.data)
    changed = {each.name: options[each.name] for each in fields(TrainingOptions) if options[each.name] != each.default}
    known, users = opened.model.known_items(), before.num_users
    model = opened.model.fit_more(events, histories=before, **changed)
    assert model.fitted is not None
    joined = model.fitted.histories
    new = f"{many(joined.num_users - users, 'new user')}, {many(model.known_items() - known, 'new item')}"
    say(f"Trained further on {many(len(events.items), 'event')} of {many(events.num_users, 'user')}: {new}.")
    with locked(out):
        path = write_events(joined, out / EVENTS)
        described = asdict(DataOptions(data=str(path), split="none", time_column="" if joined.times is not None else "none"))
        model.save(out, data=described | {"path": str(path.absolute()), "fingerprint": model.fitted.fingerprint()})
    say(f"\n{out} holds the model and all its events. Next:\n")
    say(f"  {typed(['awrsr', 'recommend', out, '-k', 5])}   # the best next items for every user")


def write_events(joined: Histories, path: Path) -> Path:
    """A Parquet file with a row per event, user by user in order of time."""
    columns = {"user": as_column(joined.user_ids[joined.owners]), "item": as_column(joined.item_ids[joined.items])}
    columns |= {} if joined.times is None else {"time": as_column(joined.times)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        write_columns(temporary, columns)
    return path
