"""What an evaluation says: the metrics of a model beside those of simple baselines, per event or per user."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from ..data.histories import Histories, spans, sums
from ..data.ids import many, warn
from ..data.splits import Split
from ..recommending import Rules, best_items
from .baselines import MARKOV, POPULARITY, Counts, baselines
from .lists import EMPTY, NAMES, Catalogue, Lists, list_metrics
from .ranking import METRICS, Evaluation, evaluate, metrics

SAMPLED = (
    "the sampled metrics rank each event among {} random items, not the catalogue: they may order models wrongly (Krichene and "
    "Rendle, KDD 2020)"
)


class Metrics(dict[str, float]):
    """The metrics of a model by name, such as "NDCG@10". Printed, it is a table with the baselines.

    Args:
        values: of the model.
        others: those of the baselines, by their name.
        targets: the number of held-out events, or of users, that they are means over.
        noun: which of the two.
        ranked: the rank of each event.
    """

    def __init__(
        self,
        values: dict[str, float],
        others: dict[str, dict[str, float]],
        targets: int,
        noun: str = "held-out event",
        ranked: Evaluation | None = None,
    ) -> None:
        super().__init__(values)
        self.baselines, self.targets, self.noun, self.ranked = others, targets, noun, ranked

    def table(self) -> pl.DataFrame:
        """A row for the model and for each baseline: model, and a column per metric."""
        return pl.DataFrame([{"model": name} | row for name, row in {"this model": dict(self), **self.baselines}.items()])

    def __repr__(self) -> str:
        return "\n".join([*table_lines({"this model": self, **self.baselines}), f"means over {many(self.targets, self.noun)}"])


def table_lines(rows: dict[str, dict[str, float]], corner: str = "") -> list[str]:
    """Metrics as a table for people: a line per model."""
    width = max(map(len, (corner, *rows))) + 2
    columns = {name: max(len(name) + 2, 9) for name in next(iter(rows.values()))}
    head = corner.ljust(width) + "".join(name.rjust(wide) for name, wide in columns.items())
    lines = ("".join(f"{values[name]:{wide}.4f}" for name, wide in columns.items()) for values in rows.values())
    return [head, *(row.ljust(width) + line for row, line in zip(rows, lines, strict=True))]


def event_metrics(
    model: Any,
    split: Split,
    part: str,
    names: Sequence[str],
    filter_seen: bool,
    batch_size: int = 1024,
    negatives: int = 0,
    progress: bool = False,
) -> Metrics:
    """Each event of the part is predicted from all before it. negatives: the number of random items to rank it among, instead of
    the catalogue; then there are no baselines."""
    chosen = tuple(names) or METRICS
    options: dict[str, Any] = {"filter_seen": filter_seen, "batch_size": batch_size, "negatives": negatives, "progress": progress}
    ranked = evaluate(model, split, part, **options)
    values = metrics(ranked.ranks, chosen)
    if negatives:
        warn(SAMPLED.format(negatives))
        return Metrics({f"sampled {name}": value for name, value in values.items()}, {}, len(ranked.ranks), ranked=ranked)
    return Metrics(values, baselines(split, ranked, filter_seen, chosen), len(ranked.ranks), ranked=ranked)


def user_metrics(
    model: Any, split: Split, part: str, names: Sequence[str], filter_seen: bool, batch_size: int = 1024
) -> Metrics:
    """Each user with events in the part and before it gets one list."""
    chosen = tuple(names) or NAMES
    h, k = split.histories, max(int(name.partition("@")[2] or 0) for name in chosen)
    ends = split.train_end if part == "validation" else split.validation_end
    stops = split.validation_end if part == "validation" else h.lengths
    users = np.flatnonzero((ends > 0) & (stops > ends))
    events, offsets = spans(h.offsets[users], ends[users])
    before = replace(h, items=h.items[events], offsets=offsets, user_ids=h.user_ids[users], times=None)
    after, counts = spans(h.offsets[users] + ends[users], stops[users] - ends[users])
    owner = np.repeat(np.arange(len(users)), np.diff(counts))
    pairs = np.unique(owner * h.num_items + h.items[after])
    offsets_taken = sums(np.bincount(pairs // h.num_items, minlength=len(users)))
    rules = Rules(filter_seen=filter_seen, filter_untrained=False, fallback="none")
    lists = np.full((len(users), max(k, 1)), EMPTY)
    for user, item, rank, *_ in best_items(model, before, k, rules, batch_size):
        lists[user, rank - 1] = item
    seen = np.unique(before.owners * h.num_items + before.items)
    catalogue = Catalogue(
        split.trained_items(), np.bincount(seen % h.num_items, minlength=h.num_items), len(users),
        model.network.item_table().detach().float().cpu().numpy(),
    )  # fmt: skip
    simple = {name: simple_lists(split, before, max(k, 1), filter_seen, name == MARKOV) for name in (POPULARITY, MARKOV)}
    own, *others = (
        list_metrics(chosen, Lists(each, pairs % h.num_items, offsets_taken), catalogue) for each in (lists, *simple.values())
    )
    return Metrics(own, dict(zip(simple, others, strict=True)), len(users), "user")


def simple_lists(split: Split, before: Histories, k: int, filter_seen: bool, chain: bool) -> np.ndarray:
    """(U, k) the most popular items; with `chain`, after those that followed the last item of each history most often."""
    counts = Counts(split)
    popular = np.lexsort((np.arange(counts.size), -counts.uses))
    found = np.full((before.num_users, k), EMPTY)
    for user in range(before.num_users):
        own = before.of(user)
        left_out = set(own.tolist()) if filter_seen else set()
        first = counts.best_after(own[-1]).tolist() if chain else []
        chosen: list[int] = []
        for item in (*first[: k + len(left_out)], *popular[: 2 * k + len(left_out)].tolist()):
            if item not in left_out:
                chosen.append(item)
                left_out.add(item)
            if len(chosen) == k:
                break
        found[user, : len(chosen)] = chosen
    return found
