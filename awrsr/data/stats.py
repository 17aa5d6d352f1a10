"""Statistics of histories, to read before a model is trained on them."""

from typing import Any

import numpy as np

from .headroom import rows as rows_of_headroom
from .histories import Histories
from .synthetic import recall_answer
from .times import as_date

WINDOW = 50  # the usual longest input of a model


def stats(histories: Histories) -> dict[str, Any]:
    """Counts and shares of histories, as plain numbers; None if a share would divide by 0.

    users, items, events, density (events divided by users times items); length_mean, _median, _p90, _p99, _longest.
    repeat_share: share of events whose item occurs earlier in the history. run_share: share of events with the item of the event
    before. recall_share: share of events for which the item of the event before also occurs earlier. recall_holds: share of these
    events whose item is the one that followed at that time. top_item_share: share of the most popular item. gini: 0 if all items
    are equally popular, almost 1 if one has all events. padding_share: empty slots in rows of 50, one per user. time_first,
    time_last: only with times.
    """
    lengths, events = histories.lengths, len(histories.items)
    position = np.arange(events) - np.repeat(histories.offsets[:-1], lengths)
    answer = recall_answer(histories, histories.owners, position)
    counts = np.sort(np.bincount(histories.items, minlength=histories.num_items))
    distinct = histories.pairs()
    runs = np.count_nonzero((histories.items[1:] == histories.items[:-1]) & (position[1:] > 0))
    quantiles = {"length_median": 0.5, "length_p90": 0.9, "length_p99": 0.99}
    result: dict[str, Any] = {
        "users": histories.num_users,
        "items": histories.num_items,
        "events": events,
        "density": _share(events, histories.num_users * histories.num_items),
        "length_mean": _share(events, histories.num_users),
        **{name: float(np.quantile(lengths, q)) if len(lengths) else None for name, q in quantiles.items()},
        "length_longest": int(lengths.max(initial=0)),
        "repeat_share": _share(events - distinct, events),
        "run_share": _share(runs, events),
        "recall_share": _share(np.count_nonzero(answer >= 0), events),
        "recall_holds": _share(np.count_nonzero(answer == histories.items), np.count_nonzero(answer >= 0)),
        "top_item_share": _share(counts[-1] if len(counts) else 0, events),
        "gini": _gini(counts),
        "padding_share": _share(np.maximum(WINDOW - lengths, 0).sum(), WINDOW * histories.num_users),
    }
    if histories.times is not None and events:
        result |= {"time_first": histories.times.min().item(), "time_last": histories.times.max().item()}
    return result


def table(values: dict[str, Any]) -> str:
    """The result of `stats` as text, and that of `headroom` if it is among the values under this name."""
    rows = [
        *((name, f"{values[name]:,}") for name in ("users", "items", "events")),
        ("density", _percent(values["density"])),
        ("events per user: mean", _number(values["length_mean"])),
        ("  median, 90 %, 99 %", ", ".join(_number(values[f"length_{name}"]) for name in ("median", "p90", "p99"))),
        ("  longest", f"{values['length_longest']:,}"),
        ("events that repeat an item", _percent(values["repeat_share"])),
        ("  of the event right before", _percent(values["run_share"])),
        ("events after an item that occurred before", _percent(values["recall_share"])),
        ("  that are what followed then", _percent(values["recall_holds"])),
        ("events of the most popular item", _percent(values["top_item_share"])),
        ("Gini coefficient of items", "-" if values["gini"] is None else f"{values['gini']:.3f}"),
        (f"padding in rows of {WINDOW}", _percent(values["padding_share"])),
    ]
    if "time_first" in values:
        rows += [("first event", _moment(values["time_first"])), ("last event", _moment(values["time_last"]))]
    rows += rows_of_headroom(values["headroom"]) if "headroom" in values else []
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value:>20}" for label, value in rows)


def _share(part: Any, whole: Any) -> float | None:
    return float(part) / float(whole) if whole else None


def _gini(counts: np.ndarray) -> float | None:
    """From 0 (all items equally popular) to almost 1 (a single item has all events). counts must be sorted."""
    size, total = len(counts), counts.sum()
    return float(((2 * np.arange(1, size + 1) - size - 1) * counts).sum() / (size * total)) if total else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}".removesuffix(".0")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %" if value < 0.1 else f"{100 * value:.1f} %"


def _moment(value: float) -> str:
    """A date, if the value can be one between 1980 and 2100 in seconds, or in thousandths of them; otherwise the number."""
    return as_date(value) or f"{value:,}"
