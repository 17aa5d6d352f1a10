"""Full-ranking evaluation: the rank of each target among all items of the catalogue, and metrics of ranks.

M targets, N items, S features of what is multiplied for scores. One relevant item per target.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.histories import spans
from ..data.ids import as_column
from ..data.splits import Split
from ..data.synthetic import recall_answer
from ..files import atomic, write_columns
from ..models.network import AWRSRNetwork, in_evaluation
from ..progress import bar

SCORE_BLOCK = 1 << 21  # scores held at a time
LEAST_ROWS = 32  # targets of a block at least: fewer would read a large table too often, and their scores take less memory than it
CUTOFFS = (5, 10, 20)
METRICS = tuple(f"{name}@{k}" for name in ("HR", "NDCG") for k in CUTOFFS) + ("MRR",)

OF_RANKS = "checksums of ranks"  # in metrics.json: part -> checksum of the file that `write_ranks` wrote


class Recommender(Protocol):
    """A model that can be ranked with, such as `AWRSR`: a network whose items have ids. filter_seen: leave out seen items."""

    network: AWRSRNetwork
    item_ids: np.ndarray | None
    trained: np.ndarray | None
    filter_seen: bool
    sections: dict[str, Any]  # of the configuration that is saved with it


def metric(name: str, ranks: np.ndarray) -> np.ndarray:
    """(M,) values of "HR@k", "NDCG@k" or "MRR" from ranks (M,), 1 = best. MRR has no cutoff."""
    kind, _, cutoff = name.partition("@")
    if name == "MRR":
        return 1 / ranks
    if kind not in ("HR", "NDCG") or not cutoff.isdecimal() or not int(cutoff):
        raise ValueError(f"metric is {name!r}, must be HR@k, NDCG@k or MRR; others are means per user (--per user)")
    return (ranks <= int(cutoff)) * (1.0 if kind == "HR" else 1 / np.log2(1.0 + ranks))


def metrics(ranks: np.ndarray, names: tuple[str, ...] = METRICS) -> dict[str, float]:
    """Means over the targets."""
    return {name: float(metric(name, ranks).mean()) for name in names}


@dataclass(frozen=True)
class Evaluation:
    """Ranks of targets: parallel (M,) arrays of the user's index, the target's position in the history, the item and its rank."""

    users: np.ndarray
    places: np.ndarray
    items: np.ndarray
    ranks: np.ndarray
    users_per_cpu_second: float

    def metrics(self) -> dict[str, float]:
        return metrics(self.ranks)


def recall(ranked: Evaluation, split: Split) -> dict[str, float]:
    """For the targets whose current item had occurred before: their number, how often what followed it then follows again ("rule
    HR@1", which a model that knows only this rule would reach), and HR@1 of the ranks."""
    answer = recall_answer(split.histories, ranked.users, ranked.places)
    may = answer >= 0
    count = int(may.sum())
    if not count:
        return {}
    return {
        "targets": count,
        "rule HR@1": float((answer == ranked.items)[may].mean()),
        "HR@1": float((ranked.ranks == 1)[may].mean()),
    }


class Targets:
    """Targets of one part of a split, in packed batches of the histories before them."""

    def __init__(self, split: Split, part: str, max_len: int, filter_seen: bool) -> None:
        self.split, self.filter_seen = split, filter_seen
        self.users, self.places = split.targets(part)
        self.end = split.histories.offsets[self.users] + self.places  # the target's index in the flat array
        self.items = split.histories.items[self.end]
        self.length = np.minimum(self.places, max_len)

    def __len__(self) -> int:
        return len(self.users)

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> "TargetBatches":
        """The part of the targets for this process."""
        share = np.arange(len(self))[rank::world]
        return TargetBatches(self, [share[first : first + batch_size] for first in range(0, len(share), batch_size)])

    def pack(self, chosen: np.ndarray) -> Any:
        """Some targets, as an argument of `rank_batch`."""
        items = self.split.histories.items
        end, length, before = self.end[chosen], self.length[chosen], self.places[chosen]
        events, cu_seqlens = spans(end - length, length)
        seen = row = None
        if self.filter_seen:
            seen = torch.from_numpy(items[spans(end - before, before)[0]])
            row = torch.from_numpy(np.repeat(np.arange(len(chosen)), before))
        packed = torch.from_numpy(items[events]), torch.from_numpy(cu_seqlens), int(length.max())
        return packed, torch.from_numpy(self.items[chosen]), row, seen


class TargetBatches:
    """Pairs (numbers of targets, argument of `rank_batch`), for a validation loop to iterate over."""

    def __init__(self, targets: Targets, batches: list[np.ndarray]) -> None:
        self.targets, self.batches = targets, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Any]]:
        return ((chosen, self.targets.pack(chosen)) for chosen in self.batches)


def rank_batch(network: AWRSRNetwork, batch: Any, table: Tensor | None = None) -> Tensor:
    """(B,) ranks of the targets of a batch of `Targets.batches`. table: the network's `item_table`, if it was computed already."""
    device = next(network.parameters()).device
    (items, cu_seqlens, max_seqlen), targets, row, seen = batch
    last = network(items.to(device), cu_seqlens.to(device), max_seqlen, last=True)
    filtered = (None, None) if row is None else (row.to(device), seen.to(device))
    return ranks(last, network.item_table() if table is None else table, targets.to(device), *filtered)


def sampled_ranks(network: AWRSRNetwork, batch: Any, table: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(B,) ranks of the targets among `count` random other items, drawn with repeats; ties count against them."""
    (items, cu_seqlens, max_seqlen), targets, *_ = batch
    last = network(items.to(table.device), cu_seqlens.to(table.device), max_seqlen, last=True).to(table.dtype)
    others = torch.randint(max(len(table) - 1, 1), (len(targets), count), generator=generator)
    others += others >= targets[:, None]
    drawn = torch.cat([targets[:, None], others], 1).to(table.device)
    scores = torch.einsum("bs,bns->bn", last, table[drawn])
    return count + 1 - below(scores.clone(), scores[:, :1])


@torch.no_grad()
def ranks(hidden: Tensor, table: Tensor, targets: Tensor, row: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """(M,) rank of each target among the N items by the scores hidden (M, S) @ table.T, 1 = best.

    Ties count against the target: its rank is the number of candidates not scored below it, itself included. So does NaN. seen:
    items that history row[i] holds, which are not candidates; a target among them could not be recommended and is last, N.
    Scores are of the table's dtype, under autocast too: in half precision too many of them would tie.
    """
    out, hidden = torch.empty_like(targets), hidden.to(table.dtype)
    size = max(LEAST_ROWS, SCORE_BLOCK // len(table))
    held = table.new_empty(min(size, len(targets)), len(table))  # one for all blocks: new memory costs as much as the scores
    begins = None if row is None else torch.searchsorted(row, torch.arange(0, len(targets) + size, size, device=row.device))
    for nth, first in enumerate(range(0, len(targets), size)):
        target = targets[first : first + size, None]
        scores = torch.mm(hidden[first : first + size], table.T, out=held[: len(target)])
        if row is not None and seen is not None and begins is not None:
            of_block = slice(int(begins[nth]), int(begins[nth + 1]))
            scores[row[of_block] - first, seen[of_block]] = -torch.inf
        own = scores.gather(1, target)
        out[first : first + size] = len(table) - below(scores, own)
    return out


def below(scores: Tensor, own: Tensor) -> Tensor:
    """(M,) number of scores of each row of (M, N) that are below its `own`, (M, 1). Overwrites the scores with ones and zeros:
    their sum is several times faster than that of booleans, and exact as far as float32 can count."""
    return scores.lt_(own).sum(1, dtype=torch.float32 if scores.shape[1] < 1 << 24 else torch.float64).long()


@torch.inference_mode()
def evaluate(
    model: Recommender,
    split: Split,
    part: str = "test",
    *,
    filter_seen: bool | None = None,
    batch_size: int = 1024,
    progress: bool = False,
    negatives: int = 0,
) -> Evaluation:
    """Rank every target of a part of the split, "validation" or "test", whose items are numbered as the model's.

    filter_seen: leave items of the history out of the ranking, which puts a target that is one of them last; None does as the
        model was trained. negatives: rank each target among so many items that are drawn for it (seed 0) instead of all; those of
        its history are not left out.

    Raises:
        ValueError: the split has another number of items than the model.
    """
    network, item_ids = model.network, split.histories.item_ids
    if len(item_ids) != network.config.num_items or model.item_ids is not None and not np.array_equal(item_ids, model.item_ids):
        raise ValueError(
            f"split has {len(item_ids)} items, must have the model's {network.config.num_items} in the model's order; "
            "Split.numbered_as(model.ids()) numbers other data like the model's"
        )
    targets = Targets(split, part, network.config.max_len, model.filter_seen if filter_seen is None else filter_seen)
    ranked = np.empty(len(targets), dtype=np.int64)
    network, start = in_evaluation(network), time.process_time()
    shown = bar(total=len(targets), desc=f"{part} ranks", unit="user", shown=progress, leave=False)
    table, generator = network.item_table(), torch.Generator().manual_seed(0)
    for chosen, batch in targets.batches(batch_size):
        if negatives:
            ranked[chosen] = sampled_ranks(network, batch, table, negatives, generator).cpu().numpy()
        else:
            ranked[chosen] = rank_batch(network, batch, table).cpu().numpy()
        shown.update(len(chosen))
    shown.close()
    seconds = time.process_time() - start
    return Evaluation(targets.users, targets.places, targets.items, ranked, len(targets) / max(seconds, 1e-9))


def write_ranks(ranked: Evaluation, split: Split, path: Path) -> None:
    """A Parquet file with a row per target: user, item (ids of the data), position in the history, rank."""
    h = split.histories
    columns = {"user": as_column(h.user_ids[ranked.users]), "item": as_column(h.item_ids[ranked.items])}
    with atomic(path) as temporary:
        write_columns(temporary, columns | {"position": ranked.places, "rank": ranked.ranks})
