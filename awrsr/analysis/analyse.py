"""Measures what the attention of a trained model does over many histories, and which predictions refinement changes.

B histories of a batch, L window, n events of a history. P are first-order weights, M the refined ones. Rows of M are divided by
their sum, so that "additive" can be compared. "The row" is that of the last event of a history, which predicts the next item.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import WATCHED
from ..data.histories import spans
from ..data.splits import Split
from ..evaluation import significance
from ..evaluation.ranking import Evaluation, Targets, evaluate, metric
from ..models.network import in_evaluation
from ..progress import bar
from ..recommender import AWRSR

WEIGHTS_HELD = 1 << 22  # most weights of a batch
RESAMPLES = 1000
TOP = 5  # items to show of what a model recommends
EVENTS_SHOWN = 16  # of the history of an example
LENGTHS = (3, 5, 10, 20, 50)  # buckets end at so many events before the target
COUNTS = (5, 10, 20, 50, 100)  # buckets end at so many training events of the target's item
ROLES = ("the event itself", "earlier occurrences of its item", "what followed those", "the event before", "others")


@dataclass(frozen=True)
class Head:
    """Means over the histories of what one head of one layer does: of P, or of M if the name ends in _m."""

    layer: int  # from 1
    head: int
    gate: float | None  # of additive refinement
    span: float  # number of events that the head attends to: exp of the entropy
    span_m: float
    back: float  # mean distance of what it attends to, in events
    back_m: float
    moved: float  # share of the weight that differs between M and P: their total variation distance
    two_hops: float  # share of the moved weight that went to events where P P is above P: the paths i -> k -> j
    two_hops_chance: float  # the same share if the weight were spread evenly over all visible events
    followed: float  # share of the moved weight that went to events whose predecessor has more of P than they have
    followed_chance: float
    roles: list[float]  # shares of P, as in ROLES
    roles_m: list[float]
    distance: list[float]  # mean weight 0, 1, ... events back, over histories that are long enough
    distance_m: list[float]


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
    """One history for which the two models predict differently."""

    user: Any
    history: list[Any]  # its last item ids
    target: Any
    rank: int
    other_rank: int
    top: list[Any]
    other_top: list[Any]
    p: list[float]  # weights of the last row of the last layer, mean over heads
    m: list[float]


@dataclass(frozen=True)
class Analysis:
    """The result of `analyse`."""

    refinement: str
    backbone: str
    part: str
    histories: int  # number of histories whose attention was measured
    repeats: float  # share of these histories whose current item occurred before
    heads: list[Head]
    targets: int = 0  # number of targets that both models ranked; 0: there is no other model
    other: str = ""  # what the other model is
    value: float = 0.0  # NDCG@10 of the targets
    other_value: float = 0.0
    better: int = 0  # targets that rank higher than with the other model
    worse: int = 0
    by_length: list[Bucket] = field(default_factory=list)
    by_popularity: list[Bucket] = field(default_factory=list)
    helped: list[Example] = field(default_factory=list)
    hurt: list[Example] = field(default_factory=list)

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
    """Measure the attention on a sample of histories, and compare every prediction with that of another model.

    split: histories with items numbered as in the model. baseline: the other model, with the same items. Without one, it is this
    model with its refinement switched off after training, which it was not trained for. users: size of the sample. examples:
    number of predictions to keep that gained most, and that lost most.

    Raises:
        ValueError: part is not a part of the split, or has no targets; users or examples is below 1; the baseline knows other
            items.
    """
    for name, value in (("users", users), ("examples", examples)):
        if value < 1:
            raise ValueError(f"{name} is {value}, must be 1 or more")
    if baseline is not None and list(map(str, baseline.ids())) != list(map(str, model.ids())):
        raise ValueError("baseline knows other items than the model, must have been trained on the same data")
    filter_seen = model.filter_seen if filter_seen is None else filter_seen  # the same for both models
    refinement = model.config.refinement
    targets = Targets(split, part, model.config.max_len, filter_seen)
    if not len(targets):
        raise ValueError(f"part {part!r} of the split holds no target that has a history before it")
    sample = np.sort(np.random.default_rng(seed).permutation(len(targets))[:users])
    histories = [split.histories.items[targets.end[m] - targets.length[m] : targets.end[m]] for m in sample]
    repeats = float(np.mean([(items[:-1] == items[-1]).any() for items in histories]))
    heads = measure(model, histories, progress)
    attention = Analysis(refinement, model.config.backbone, part, len(sample), repeats, heads)
    if baseline is None and refinement == "none":
        return attention
    other = without_refinement(model) if baseline is None else baseline
    both = first, second = [evaluate(each, split, part, filter_seen=filter_seen, progress=progress) for each in (model, other)]
    values, other_values = (metric(WATCHED, each.ranks) for each in both)
    order = np.argsort(1 / second.ranks - 1 / first.ranks, kind="stable")  # largest gain first
    helped = [m for m in order[:examples] if first.ranks[m] < second.ranks[m]]
    hurt = [m for m in order[::-1][:examples] if first.ranks[m] > second.ranks[m]]
    return replace(
        attention,
        targets=len(first.ranks),
        other="this model with its refinement switched off" if baseline is None else "the baseline run",
        value=float(values.mean()),
        other_value=float(other_values.mean()),
        better=int((first.ranks < second.ranks).sum()),
        worse=int((first.ranks > second.ranks).sum()),
        by_length=buckets(values - other_values, first.places, LENGTHS),
        by_popularity=buckets(values - other_values, training_counts(split)[first.items], COUNTS),
        helped=[example((model, other), both, split, m, filter_seen) for m in helped],
        hurt=[example((model, other), both, split, m, filter_seen) for m in hurt],
    )


@torch.inference_mode()
def measure(model: AWRSR, histories: list[np.ndarray], progress: bool) -> list[Head]:
    """Measure every head of every layer on these histories."""
    heads, window = model.config.heads, max(map(len, histories))
    totals: list[dict[str, Any]] = [{} for _ in model.blocks]
    device, network = model.items.weight.device, in_evaluation(model.network)
    shown = bar(total=len(histories), desc="attention", unit="history", shown=progress, leave=False)
    for batch in batches(histories, heads):
        lengths = torch.tensor([len(history) for history in batch])
        items = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
        for row, history in zip(items, batch, strict=True):
            row[len(row) - len(history) :] = torch.from_numpy(history)
        role = roles(items, lengths)
        for total, maps in zip(totals, network.weights_padded(items.to(device), lengths.to(device)), strict=True):
            p, m = (each.double().cpu() for each in maps)
            for name, values in layer_sums(p, m, role, lengths, window).items():
                total[name] = total.get(name, 0) + values
        shown.update(len(batch))
    shown.close()
    results = []
    reach = (torch.arange(window) < torch.tensor([len(history) for history in histories])[:, None]).sum(0)
    for layer, (block, total) in enumerate(zip(model.blocks, totals, strict=True)):
        moved = total["moved"].where(total["moved"] > 1e-9 * len(histories), torch.inf)
        divisors = {"two_hops": moved, "followed": moved, "distance": reach, "distance_m": reach}
        means = {name: values / divisors.get(name, len(histories)) for name, values in total.items()}
        gate = block.attention.gate
        for head in range(heads):
            value = gate[head] if isinstance(gate, Tensor) and gate.dim() else gate
            numbers = {name: mean[head].tolist() for name, mean in means.items()}
            results.append(Head(layer + 1, head + 1, None if value is None else float(value), **numbers))
    return results


def batches(histories: list[np.ndarray], heads: int) -> Iterator[list[np.ndarray]]:
    """The histories in batches of bounded memory and similar lengths."""
    rest = sorted(histories, key=len)
    while rest:
        count = 1
        while count < len(rest) and (count + 1) * heads * len(rest[count]) ** 2 <= WEIGHTS_HELD:
            count += 1
        yield rest[:count]
        rest = rest[count:]


def layer_sums(p: Tensor, m: Tensor, role: Tensor, lengths: Tensor, window: int) -> dict[str, Tensor]:
    """Sums over histories of what the heads of a layer do, under the names in `Head`, (H, ...) each.

    p, m: (B, H, L, L) of padded histories, whose last row makes the prediction. role: (B, L), from `roles`.
    """
    back, visible = looking_back(p.shape[-1], lengths)
    p_row, m_row = p[:, :, -1], m[:, :, -1] / m[:, :, -1].sum(-1, keepdim=True).clamp(min=1e-30)  # (B, H, L)
    moved = (m_row - p_row).clamp(min=0)
    sums = {"moved": moved.sum((0, 2))}
    for suffix, row in (("", p_row), ("_m", m_row)):
        sums["span" + suffix] = torch.special.entr(row).sum(-1).exp().sum(0)
        sums["back" + suffix] = (row * back).sum((0, 2))
        sums["roles" + suffix] = torch.einsum("bhl,blr->hr", row, nn.functional.one_hot(role, len(ROLES) + 1).to(row))[:, :-1]
        sums["distance" + suffix] = nn.functional.pad(row.sum(0).flip(-1), (0, window - p.shape[-1]))
    for name, weight in (("two_hops", torch.einsum("bhk,bhkj->bhj", p_row, p)), ("followed", shifted(p_row))):
        reached = (weight > p_row) & visible[:, None]
        sums[name] = (moved * reached).sum((0, 2))
        sums[name + "_chance"] = (reached.sum(-1, dtype=p.dtype) / lengths[:, None]).sum(0)
    return sums


def looking_back(size: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(L,) number of events from each column to the last one, and (B, L) whether the column is an event of the history."""
    back = torch.arange(size - 1, -1, -1)
    return back, back < lengths[:, None]


def shifted(row: Tensor) -> Tensor:
    """(..., L) shifted by one event."""
    return torch.cat([torch.zeros_like(row[..., :1]), row[..., :-1]], -1)


def roles(items: Tensor, lengths: Tensor) -> Tensor:
    """(B, L) relation of each event to the last one: the first that fits, as an index of ROLES; len(ROLES) at padding."""
    back, visible = looking_back(items.shape[1], lengths)
    same_item = (items == items[:, -1:]) & (back > 0) & visible
    fits = [(back == 0).expand_as(visible), same_item, shifted(same_item) & (back > 0), (back == 1).expand_as(visible)]
    first = torch.stack([*fits, torch.ones_like(visible)]).int().argmax(0)
    return first.masked_fill(~visible, len(ROLES))


def without_refinement(model: AWRSR) -> AWRSR:
    """A copy of the model that uses only first-order weights. It was not trained that way, so it shows what refinement does in
    this model, not what a plain model would have learned."""
    weights = model.state_dict()
    with torch.random.fork_rng(devices=[]):  # the random weights are replaced
        plain = AWRSR(replace(model.config, refinement="none"))
    plain.load_state_dict({name: weights[name].clone() for name in plain.state_dict()}, assign=True)
    plain.item_ids, plain.filter_seen = model.item_ids, model.filter_seen
    return plain.train(model.training)


def training_counts(split: Split) -> np.ndarray:
    """(N,) number of training events of each item."""
    events, _ = spans(split.histories.offsets[:-1], split.train_end)
    return np.bincount(split.histories.items[events], minlength=split.histories.num_items)


def buckets(gains: np.ndarray, counts: np.ndarray, ends: tuple[int, ...]) -> list[Bucket]:
    """Gains of the targets, grouped by a count of each target."""
    rng, low = np.random.default_rng(0), 0
    result = []
    for high in (*ends, None):
        inside = gains[(counts >= low) & (counts <= (np.inf if high is None else high))]
        if len(inside):
            (lower,), (upper,) = significance.interval(significance.resampled_means(inside[:, None], RESAMPLES, rng))
            name = f"{low} and more" if high is None else f"{low} to {high}"
            result.append(Bucket(name, len(inside), float(inside.mean()), float(lower), float(upper)))
        low = (high or 0) + 1
    return result


def example(models: tuple[AWRSR, AWRSR], evaluations: list[Evaluation], split: Split, m: int, filter_seen: bool | None) -> Example:
    """Target m, with the recommendations of both models and the attention of the first one."""
    h, (first, second) = split.histories, evaluations
    user = int(first.users[m])
    items = h.item_ids[h.of(user)[: first.places[m]]].tolist()
    k = min(TOP, h.num_items)
    top, other_top = (each.recommend([items], k=k, filter_seen=filter_seen)["item"].to_list() for each in models)
    p_row, m_row = (x[:, -1].double().mean(0).cpu() for x in models[0].attention_maps(items)[-1])
    m_row = m_row / m_row.sum().clamp(min=1e-30)
    return Example(
        user=h.user_ids[user : user + 1].tolist()[0],
        history=items[-EVENTS_SHOWN:],
        target=h.item_ids[first.items[[m]]].tolist()[0],
        rank=int(first.ranks[m]),
        other_rank=int(second.ranks[m]),
        top=top,
        other_top=other_top,
        p=p_row[-EVENTS_SHOWN:].tolist(),
        m=m_row[-EVENTS_SHOWN:].tolist(),
    )
