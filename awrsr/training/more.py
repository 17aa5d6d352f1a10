"""Training a fitted model further on new events: of users it knows and of new ones, with items it knows and with new ones.

N items so far, S features of an item.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import TrainingOptions
from ..data.histories import Histories, spans
from ..data.ids import Index
from ..data.splits import Split, split
from ..models.network import AWRSRNetwork
from .run import train

COMPANY = 2  # events on each side of a new item whose items are its company
EPOCHS = 2  # over the histories that have new events, and as many others
SLOWER = 0.3  # of the learning rate of the first training


def train_more(model: Any, before: Histories, events: Histories, replay: float, changes: dict[str, Any], **more: Any) -> Split:
    """Train a fitted model in place on histories that have new events, and on others that are drawn at random.

    Args:
        model: an `AWRSR`.
        before: all earlier events. events: the new ones, which come after them.
        replay: how many of the other histories, as a multiple of those with new events.
        changes: training options that differ from those of the first training, with EPOCHS epochs and SLOWER its learning rate.
        more: callbacks and logger, as for `train`.

    Returns:
        All events, of which the next call's `before` consists.
    """
    options = settings_of(model, changes)
    joined, _ = Split.of_parts(before, None, events).histories.numbered_as(_all_ids(model, before, events))
    network, known = model.network, model.network.config.num_items
    if joined.num_items > known:
        model.network = with_more_items(network, joined)
        model.item_ids = joined.item_ids
    whole = split(joined, "none")
    model.trained = whole.trained_items()
    fresh = np.unique(Index(joined.user_ids).find(events.user_ids))
    others = np.setdiff1d(np.arange(joined.num_users), fresh)
    drawn = np.random.default_rng(options.seed).permutation(others)[: round(replay * len(fresh))]
    chosen = np.sort(np.concatenate([fresh, drawn]))
    chosen_events, offsets = spans(joined.offsets[chosen], joined.lengths[chosen])
    part = replace(joined, items=joined.items[chosen_events], offsets=offsets, user_ids=joined.user_ids[chosen], times=None)
    train(model, split(part, "none"), options, **more)
    return whole


def settings_of(model: Any, changes: dict[str, Any]) -> TrainingOptions:
    """The options of the first training, as far as they are known, with those of further training."""
    own = {each.name for each in fields(TrainingOptions)}
    stored = {name: value for name, value in model.sections.get("training", {}).items() if name in own}
    first = TrainingOptions(**stored)
    usual: dict[str, Any] = {"epochs": EPOCHS, "learning_rate": SLOWER * first.learning_rate, "schedule": "constant"}
    usual |= {"average": 0.0, "patience": 0, "item_init": "normal", "filter_seen": "yes" if model.filter_seen else "no"}
    return replace(first, **usual | changes)


def _all_ids(model: Any, before: Histories, events: Histories) -> np.ndarray:
    """The model's items, and then new ones in the order of their first appearance."""
    ids, index = model.ids(), model.index()
    new: Sequence[Any] = [each for part in (before, events) for each in part.item_ids[index.find(part.item_ids) < 0].tolist()]
    new = list(dict.fromkeys(new))
    if not new:
        return np.asarray(ids)
    if ids.dtype.kind == "i" and all(isinstance(each, int) for each in new):
        return np.concatenate([ids, np.array(new, dtype=np.int64)])
    return np.array([*map(str, ids.tolist()), *map(str, new)], dtype=object)


def with_more_items(network: AWRSRNetwork, histories: Histories) -> AWRSRNetwork:
    """The same network with rows for the items that it does not have yet: each begins as the mean of its company."""
    with torch.random.fork_rng(devices=[]):
        larger = AWRSRNetwork(replace(network.config, num_items=histories.num_items))
    state = network.state_dict()
    table = state["items.weight"]
    state["items.weight"] = torch.cat([table, company(table, histories)])
    larger.load_state_dict(state)
    return larger.to(table.device).train(network.training)


def company(table: Tensor, histories: Histories) -> Tensor:
    """(N' - N, S) means of the rows (N, S) of what stands at most COMPANY events from each new item, the nearer the heavier; of all
    rows, for an item that stands beside new ones alone."""
    known, items, owners = len(table), histories.items, histories.owners
    new = histories.num_items - known
    sums, weights = torch.zeros(new, table.shape[1], dtype=torch.float64), torch.zeros(new, dtype=torch.float64)
    for apart in range(1, COMPANY + 1):
        here = owners[apart:] == owners[:-apart]
        for own, other in ((items[apart:][here], items[:-apart][here]), (items[:-apart][here], items[apart:][here])):
            pairs = (own >= known) & (other < known)
            row = torch.from_numpy(own[pairs] - known)
            sums.index_add_(0, row, table[torch.from_numpy(other[pairs])].double().cpu() / apart)
            weights.index_add_(0, row, torch.full((len(row),), 1 / apart, dtype=torch.float64))
    found = torch.where(weights[:, None] > 0, sums / weights[:, None].clamp(min=1e-9), table.double().cpu().mean(0))
    return found.to(table)
