"""What the attention of a trained model does, over many histories, and which predictions refinement changes.

U histories looked at, L window, H heads, n events of a history, M targets. P are first-order weights, M the refined ones; rows of M
are divided by their sum, so that those of "additive" compare. A row is the last event of a history, which predicts what comes next.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config import WATCHED
from ..data.histories import Split
from ..evaluation import significance
from ..evaluation.ranking import Evaluation, evaluate, metric
from ..recommender import AWRSR

WEIGHTS_HELD = 1 << 22  # weights of a batch held at a time
RESAMPLES = 1000
LENGTHS = (3, 5, 10, 20, 50)  # upper ends of buckets: events before the target
COUNTS = (5, 10, 20, 50, 100)  # likewise: training events of the target's item
ROLES = ("the event itself", "earlier occurrences of its item", "what followed those", "the event before", "others")


@dataclass
class Head:
    """What one head of one layer does, means over the histories: of P, and of M where a name ends in _m."""

    layer: int  # from 1
    head: int
    gate: float | None  # of additive refinement
    span: float = 0.0  # events that it attends to: exp of the entropy
    span_m: float = 0.0
    back: float = 0.0  # events back, mean distance
    back_m: float = 0.0
    moved: float = 0.0  # share of the weight that M has elsewhere than P: their total variation distance
    two_hops: float = 0.0  # of what moved, the share that went where P P is above P: the paths i -> k -> j
    two_hops_chance: float = 0.0  # that share, had it been spread over all events in sight
    followed: float = 0.0  # of what moved, the share that went to events right after those that P attends to more than to them
    followed_chance: float = 0.0
    roles: list[float] = field(default_factory=list)  # shares of P, as in ROLES
    roles_m: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)  # mean weight 0, 1, ... events back, of histories that reach so far
    distance_m: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Bucket:
    """The gain over the other model on some of the targets, with its interval over them."""

    name: str
    targets: int
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Example:
    """One history whose prediction differs."""

    user: Any
    history: list[Any]  # item ids, the last ones
    target: Any
    rank: int
    other_rank: int
    top: list[Any]
    other_top: list[Any]
    p: list[float]  # weights of the last row, mean over heads, of the last layer
    m: list[float]


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found."""

    refinement: str
    backbone: str
    part: str
    histories: int  # whose attention was looked at
    repeats: float  # share of them whose current item occurred before
    heads: list[Head]
    targets: int  # ranked by both models; 0: there is no other
    other: str  # what the other model is
    value: float  # NDCG@10 of the targets
    other_value: float
    better: int  # targets that rank higher than with the other model
    worse: int
    by_length: list[Bucket]
    by_popularity: list[Bucket]
    helped: list[Example]
    hurt: list[Example]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def analyse(
    model: AWRSR,
    split: Split,
    *,
    baseline: AWRSR | None = None,
    part: str = "test",
    users: int = 512,
    examples: int = 3,
    filter_seen: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Analysis:
    """Look at the attention on a sample of histories, and at every prediction of this model and of another.

    split: whose items are numbered as the model's. baseline: the other model, with the same items; without one it is this model
    with its refinement switched off after training, which it was not trained for. users: histories whose attention is looked at.
    examples: of predictions that got better, and of those that got worse.

    Raises:
        ValueError: part is no part of a split; the split holds no target of it; users or examples below 1; the baseline knows other
            items.
    """
    if part not in ("validation", "test"):
        raise ValueError(f"part is {part!r}, must be validation or test")
    for name, value in (("users", users), ("examples", examples)):
        if value < 1:
            raise ValueError(f"{name} is {value}, must be 1 or more")
    if baseline is not None and not np.array_equal(baseline.ids().astype(str), model.ids().astype(str)):
        raise ValueError("baseline knows other items than the model, must be trained on the same data")
    filter_seen = model.filter_seen if filter_seen is None else filter_seen  # one for both models
    targets = Histories(split, part, model.config.max_len)
    if not len(targets):
        raise ValueError(f"part {part!r} of the split holds no target with a history before it")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(targets))[:users])
    heads = look(model, targets, chosen, progress)
    c = model.config
    found: dict[str, Any] = {"refinement": c.refinement, "backbone": c.backbone, "part": part, "histories": len(chosen)}
    found |= {"heads": heads, "repeats": float(np.mean([targets.repeats(m) for m in chosen]))}
    other = baseline if baseline is not None else without_refinement(model) if c.refinement != "none" else None
    if other is None:
        nothing: dict[str, Any] = {"targets": 0, "other": "", "value": 0.0, "other_value": 0.0, "better": 0, "worse": 0}
        return Analysis(**found, **nothing, by_length=[], by_popularity=[], helped=[], hurt=[])
    name = "this model with its refinement switched off" if baseline is None else "the baseline run"
    first, second = (evaluate(each, split, part, filter_seen=filter_seen, progress=progress) for each in (model, other))
    values = metric(WATCHED, first.ranks), metric(WATCHED, second.ranks)
    order = np.lexsort((np.arange(len(first.ranks)), 1 / second.ranks - 1 / first.ranks))  # most gained first
    helped = [int(m) for m in order[:examples] if first.ranks[m] < second.ranks[m]]
    hurt = [int(m) for m in order[::-1][:examples] if first.ranks[m] > second.ranks[m]]
    popularity = trained_on(split)[first.items]
    return Analysis(
        **found,
        targets=len(first.ranks),
        other=name,
        value=float(values[0].mean()),
        other_value=float(values[1].mean()),
        better=int((first.ranks < second.ranks).sum()),
        worse=int((first.ranks > second.ranks).sum()),
        by_length=buckets(values[0] - values[1], first.places, LENGTHS),
        by_popularity=buckets(values[0] - values[1], popularity, COUNTS),
        helped=[example(model, other, split, (first, second), m, filter_seen) for m in helped],
        hurt=[example(model, other, split, (first, second), m, filter_seen) for m in hurt],
    )


class Histories:
    """The histories before the targets of a part, no more than max_len events of each."""

    def __init__(self, split: Split, part: str, max_len: int) -> None:
        self.items = split.histories.items
        users, places = split.targets(part)
        users, places = users[places > 0], places[places > 0]
        self.end = split.histories.offsets[users] + places
        self.length = np.minimum(places, max_len)

    def __len__(self) -> int:
        return len(self.end)

    def of(self, m: int) -> np.ndarray:
        """(n,) items."""
        return self.items[self.end[m] - self.length[m] : self.end[m]]

    def repeats(self, m: int) -> bool:
        items = self.of(m)
        return bool((items[:-1] == items[-1]).any())

    def batches(self, chosen: np.ndarray, heads: int) -> Iterator[np.ndarray]:
        """The chosen ones, those of like lengths together."""
        order = chosen[np.argsort(self.length[chosen], kind="stable")]
        while len(order):
            count = 1
            while count < len(order) and (count + 1) * heads * int(self.length[order[count]]) ** 2 <= WEIGHTS_HELD:
                count += 1
            yield order[:count]
            order = order[count:]


@torch.inference_mode()
def look(model: AWRSR, targets: Histories, chosen: np.ndarray, progress: bool) -> list[Head]:
    """Every head of every layer, on the chosen histories."""
    c = model.config
    layers, most = len(model.blocks), int(targets.length[chosen].max())
    sums = [[Sums(most) for _ in range(c.heads)] for _ in range(layers)]
    training, device = model.training, model.items.weight.device
    model.eval()
    bar = tqdm(total=len(chosen), desc="attention", unit="history", disable=None if progress else True, leave=False)
    for batch in targets.batches(chosen, c.heads):
        size = int(targets.length[batch].max())
        items = np.zeros((len(batch), size), dtype=np.int64)
        for row, m in enumerate(batch):
            items[row, size - targets.length[m] :] = targets.of(m)
        lengths = torch.from_numpy(targets.length[batch])
        maps = model.weights_padded(torch.from_numpy(items).to(device), lengths.to(device))
        for layer, pair in enumerate(maps):
            p, m = (each.double().cpu() for each in pair)
            for head in range(c.heads):
                sums[layer][head].add(p[:, head], m[:, head], torch.from_numpy(items), lengths)
        bar.update(len(batch))
    bar.close()
    model.train(training)
    found = []
    for layer, block in enumerate(model.blocks):
        gate = block.attention.gate
        for head in range(c.heads):
            value = gate[head] if isinstance(gate, Tensor) and gate.dim() else gate
            found.append(sums[layer][head].mean(Head(layer + 1, head + 1, None if value is None else float(value))))
    return found


class Sums:
    """What a head does, summed over histories."""

    def __init__(self, most: int) -> None:
        self.count = 0
        self.numbers: dict[str, float] = {}
        self.roles = np.zeros((2, len(ROLES)))
        self.distance, self.reached = np.zeros((2, most)), np.zeros(most)

    def add(self, p: Tensor, m: Tensor, items: Tensor, lengths: Tensor) -> None:
        """p, m: (B, L, L) of padded histories, whose last row is what predicts."""
        size = p.shape[-1]
        rows = p[:, -1], m[:, -1] / m[:, -1].sum(-1, keepdim=True).clamp(min=1e-30)
        back = torch.arange(size - 1, -1, -1)
        seen = back < lengths[:, None]
        moved = (rows[1] - rows[0]).clamp(min=0)
        two = torch.einsum("bk,bkj->bj", rows[0], p) > rows[0]
        shifted = torch.cat([rows[0].new_zeros(len(p), 1), rows[0][:, :-1]], 1) > rows[0]
        values: dict[str, Tensor] = {"moved": moved.sum(-1)}
        for name, row in zip(("", "_m"), rows, strict=True):
            values |= {"span" + name: torch.special.entr(row).sum(-1).exp(), "back" + name: (row * back).sum(-1)}
        for name, led in (("two_hops", two & seen), ("followed", shifted & seen)):
            values[name] = (moved * led).sum(-1)  # divided by what moved in all at the end
            values[name + "_chance"] = led.sum(-1) / lengths
        for name, each in values.items():
            self.numbers[name] = self.numbers.get(name, 0.0) + float(each.sum())
        role = roles(items, lengths)
        for i, row in enumerate(rows):
            self.roles[i] += np.bincount(role.flatten(), row.flatten(), len(ROLES) + 1)[: len(ROLES)]
            self.distance[i, :size] += row.sum(0).flip(0).numpy()
        self.reached[:size] += seen.sum(0).flip(0).numpy()
        self.count += len(p)

    def mean(self, head: Head) -> Head:
        for name, total in self.numbers.items():
            over = self.numbers["moved"] if name in ("two_hops", "followed") else self.count
            setattr(head, name, total / over if over > 1e-9 * self.count else 0.0)
        head.roles, head.roles_m = (self.roles / self.count).tolist()
        head.distance, head.distance_m = (self.distance / np.maximum(self.reached, 1)).tolist()
        return head


def roles(items: Tensor, lengths: Tensor) -> np.ndarray:
    """(B, L) what each event is to the last one, a place in ROLES; padding is len(ROLES). The first that fits counts."""
    size = items.shape[1]
    back = torch.arange(size - 1, -1, -1)
    seen = back < lengths[:, None]
    same = (items == items[:, -1:]) & (back > 0) & seen
    after = torch.cat([torch.zeros_like(same[:, :1]), same[:, :-1]], 1) & (back > 0) & seen
    found = torch.full(items.shape, ROLES.index("others"))
    for mask, name in ((back == 1, ROLES[3]), (after, ROLES[2]), (same, ROLES[1]), (back == 0, ROLES[0])):
        found[mask.expand_as(found)] = ROLES.index(name)
    return found.masked_fill(~seen, len(ROLES)).numpy()


def without_refinement(model: AWRSR) -> AWRSR:
    """A copy that attends by first-order weights alone. It was not trained so: it shows what refinement does in this model, not
    what a plain model would have learned."""
    plain = copy.deepcopy(model)
    for block in plain.blocks:
        block.attention.refinement, block.attention.table_names, block.attention.gate = "none", (), None
    return plain


def trained_on(split: Split) -> np.ndarray:
    """(N,) training events of each item."""
    h = split.histories
    place = np.arange(len(h.items)) - np.repeat(h.offsets[:-1], h.lengths)
    return np.bincount(h.items[place < np.repeat(split.train_end, h.lengths)], minlength=h.num_items)


def buckets(gains: np.ndarray, of: np.ndarray, ends: tuple[int, ...]) -> list[Bucket]:
    """Gains by what the targets have in common."""
    found, rng, low = [], np.random.default_rng(0), 0
    for high in (*ends, np.inf):
        inside = gains[(of >= low) & (of <= high)]
        if len(inside):
            ends_ = significance.interval(significance.resampled_means(inside[:, None], RESAMPLES, rng))
            name = f"{low} to {high}" if high < np.inf else f"{low} and more"
            found.append(Bucket(name, len(inside), float(inside.mean()), float(ends_[0][0]), float(ends_[1][0])))
        low = int(high) + 1 if high < np.inf else low
    return found


def example(
    model: AWRSR,
    other: AWRSR,
    split: Split,
    both: tuple[Evaluation, Evaluation],
    m: int,
    filter_seen: bool | None,
    most: int = 16,
) -> Example:
    """One target, with what each model would have recommended and where this one looked."""
    h, (first, second) = split.histories, both
    user, place = int(first.users[m]), int(first.places[m])
    begin = int(h.offsets[user])
    items = h.item_ids[h.items[begin : begin + place]].tolist()
    known = min(5, h.num_items)
    tops = [each.recommend([items], k=known, filter_seen=filter_seen)["item"].to_list() for each in (model, other)]
    p, refined = (x[:, -1].double().mean(0).cpu() for x in model.attention_maps(items)[-1])
    refined = refined / refined.sum().clamp(min=1e-30)
    return Example(
        user=h.user_ids[user].item(),
        history=items[-most:],
        target=h.item_ids[first.items[m]].item(),
        rank=int(first.ranks[m]),
        other_rank=int(second.ranks[m]),
        top=tops[0],
        other_top=tops[1],
        p=p[-most:].tolist(),
        m=refined[-most:].tolist(),
    )
