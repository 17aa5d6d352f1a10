"""The contestants of train_bench.py: one model, trained and evaluated in three layouts, and the gate that all of them must pass.

packed      histories one after another, AWRSRNetwork.forward: the model's own
bucketed    histories sorted by length, each batch padded to its longest, AWRSRNetwork.forward_padded
padded      batches in random order, padded to the window

Backends that are rivals replace the model's call of attention alone. "stosa", for stochastic attention: as STOSA's code
has it, eager and padded. FORMS: torch's own attention calls, `two_calls`. Those pad on the right, where causality alone
hides padding and no mask keeps a kernel from running; in the layout "packed" only attention pads, and the rest of the model stays
packed. All have identical parameters, sequences, targets and negatives; the loss is taken on real events alone in each of them.
B sequences of a batch, L window, T real events, K negatives, E hidden size.
"""

import copy
import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from awrsr.config import NEGATIVES, AWRSRConfig
from awrsr.data.splits import Split
from awrsr.evaluation.ranking import Targets, rank_batch, ranks
from awrsr.models import attention
from awrsr.models.network import AWRSRNetwork
from awrsr.training.batches import Batch, Batches, Windows
from awrsr.training.losses import LOSSES, draw_negatives

from ..common.clock import WrongResult, reason_of, traced, turns, wait
from ..common.kernels import seen
from ..common.stock import FORMS, by_stock
from ..common.stosa import stosa

PASSES = ("train", "eval")
RIVALS = ("stosa", *FORMS)
LEARNING_RATE = 1e-3
GATE_STEPS = 30
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}  # of the loss at every step, relative; Adam magnifies rounding
RANK_TOLERANCE = 1e-4  # of a score, relative to the largest: ranks may differ where scores are this close


@dataclass(frozen=True)
class TrainingTask:
    """What all contestants compute. The head of the results holds `threads` and the device."""

    split: Split
    config: AWRSRConfig
    loss: str
    batch_size: int
    device: torch.device
    seed: int
    source: str

    @functools.cached_property
    def windows(self) -> Windows:
        return Windows(self.split, self.config.max_len)

    @functools.cached_property
    def targets(self) -> Targets:
        return Targets(self.split, "test", self.config.max_len, filter_seen=not self.split.histories.repeats())


@dataclass
class Contestant:
    """One way of computing a task, its model, and its measurements."""

    task: TrainingTask
    refinement: str
    layout: str
    backend: str
    model: AWRSRNetwork
    optimizer: torch.optim.Optimizer
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {p: [] for p in PASSES})  # seconds, CPU seconds
    first_ms: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, list[str]] = field(default_factory=dict)  # that a step ran, of those with stock attention

    @property
    def name(self) -> str:
        return f"{self.backend} {self.layout} {self.refinement}"


def contestant(task: TrainingTask, refinement: str, layout: str, backend: str, *, dropout: float | None = None) -> Contestant:
    """A contestant with the parameters that the task's seed gives. dropout: instead of the configuration's."""
    changes: dict[str, Any] = {"refinement": refinement, "backend": "reference" if backend in RIVALS else backend}
    if dropout is not None:
        changes |= {"hidden_dropout": dropout, "attention_dropout": dropout}
    torch.manual_seed(task.seed)
    model = AWRSRNetwork(replace(task.config, **changes)).to(task.device)
    return Contestant(task, refinement, layout, backend, model, torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True))


def eager_attention(
    *, refinement: str, gate: Any, dropout_p: float, lengths: Tensor, refine_scale: float | None, backend: str, **tensors: Tensor
) -> tuple[Tensor, Tensor]:
    """`stosa` under the operator's names."""
    assert refine_scale is None
    items = tuple(tensors[name] for name in ("q_mean", "q_cov", "k_mean", "k_cov", "v_mean", "v_cov"))
    tables = tuple(w for name in attention.TABLES if (w := tensors.get(name)) is not None)
    return stosa(items, tables, 1.0 if gate is None else gate, refinement, dropout_p, lengths)


class RightPadded(NamedTuple):
    """`attention.Padded` with padding on the right. x is (B, L, E)."""

    lengths: Tensor  # (B,)

    def places(self, x: Tensor, size: int) -> Tensor:
        """(B, L) positions in a window of `size` that end with their history; padding has some position or other."""
        return (torch.arange(size, size + x.shape[1], device=x.device) - self.lengths[:, None]).clamp(max=size - 1)


def stock_attention(
    q: Tensor, k: Tensor, v: Tensor, *, w_q: Any, w_k: Any, refinement: str, gate: Any, refine_scale: float | None, causal: bool,
    dropout_p: float, lengths: Tensor, form: str, padding_side: str, backend: str, softmax_scale: float, **unused: Any,
) -> Tensor:  # fmt: skip
    """One of FORMS under the operator's names, for items (B, H, L, D) that are padded on the right.

    w_q, w_k: tables by position, (N, R) or (..., H, N, R). Each history's last item has their last row.
    """
    assert causal and refine_scale is None and not (dropout_p and refinement == "additive") and not any(unused.values())
    assert softmax_scale == q.shape[-1] ** -0.5

    def by_item(w: Tensor) -> Tensor:
        """(B, 1 or H, L, R)"""
        w = w.view(-1, *w.shape[-2:]).transpose(0, 1)  # (N, 1 or H, R)
        rows = RightPadded(lengths).places(q[:, 0, :, 0], len(w))
        return F.embedding(rows, w.flatten(1)).unflatten(-1, w.shape[1:]).transpose(1, 2)

    tables = (w_q, w_k) if refinement == "none" else (by_item(w_q), by_item(w_k))
    return by_stock(FORMS[form], (q, k, v, *tables, 1.0 if gate is None else gate), refinement, dropout_p)


def stock_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor, max_seqlen: int, align: str, **options: Any
) -> Tensor:
    """The same for packed items (T, H, D), which are padded for it."""
    lengths = cu_seqlens.diff()
    sequence = torch.repeat_interleave(lengths, output_size=len(q))  # (T,)
    shift = torch.arange(len(lengths), device=q.device) * max_seqlen - cu_seqlens[:-1]
    cell = torch.arange(len(q), device=q.device) + shift[sequence]  # (T,) where each item is in the padded rows

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros(len(lengths) * max_seqlen, *x.shape[1:]).index_copy(0, cell, x)
        return rows.unflatten(0, (-1, max_seqlen)).transpose(1, 2)

    out = stock_attention(padded(q), padded(k), padded(v), lengths=lengths, padding_side="right", **options)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, cell)


def replaced(it: Contestant) -> AbstractContextManager[Any]:
    """Within it the contestant's model attends as its backend says."""
    if it.backend == "stosa":
        return mock.patch.object(attention, "stochastic_refined_attention", eager_attention)
    if it.backend in FORMS:
        packed = "refined_attention_varlen", stock_attention_varlen
        name, call = packed if it.layout == "packed" else ("refined_attention", stock_attention)
        return mock.patch.object(attention, name, functools.partial(call, form=it.backend))  # type: ignore[operator]
    return nullcontext()


def hidden(it: Contestant, items: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """(T, E) hidden states of the events, and (B,) where those of each history's last event are."""
    last = cu_seqlens[1:] - 1
    if it.layout == "packed":
        with replaced(it):
            return it.model(items, cu_seqlens, longest), last
    width = longest if it.layout == "bucketed" else it.task.config.max_len
    lengths = cu_seqlens.diff()
    right = it.backend in FORMS
    columns = torch.arange(width, device=items.device)
    real = columns < lengths[:, None] if right else columns >= width - lengths[:, None]
    padded = items.new_zeros(real.shape)
    padded[real] = items
    with replaced(it):
        where: Any = (RightPadded if right else attention.Padded)(lengths)
        return it.model.encode(padded, where)[real], last


def train_step(it: Contestant, batch: Batch, step: int) -> Tensor:
    """Forward, loss over events with the negatives that belong to this step, backward, optimizer; returns the loss before it."""
    task, device = it.task, it.task.device
    it.model.train()
    generator = torch.Generator(device).manual_seed(task.seed * 1_000_003 + step)
    items, targets, cu_seqlens = (x.to(device) for x in (batch.items, batch.targets, batch.cu_seqlens))
    out, _ = hidden(it, items, cu_seqlens, batch.max_seqlen)
    negatives = draw_negatives(task.loss, targets, task.config.num_items, NEGATIVES[task.loss], generator)
    loss: Tensor = LOSSES[task.loss](out, targets, it.model.item_table(), negatives).mean()
    it.optimizer.zero_grad()
    loss.backward()
    it.optimizer.step()
    return loss.detach()


@torch.inference_mode()
def rank_step(it: Contestant, chosen: np.ndarray) -> Tensor:
    """(B,) ranks of these test targets among all items."""
    it.model.eval()
    batch = it.task.targets.pack(chosen)
    if it.layout == "packed":
        with replaced(it):
            return rank_batch(it.model, batch)
    (items, cu_seqlens, longest), targets, row, seen = batch
    device = it.task.device
    out, last = hidden(it, items.to(device), cu_seqlens.to(device), longest)
    move = (None, None) if row is None else (row.to(device), seen.to(device))
    return ranks(out[last], it.model.item_table(), targets.to(device), *move)


@dataclass(frozen=True)
class Work:
    """What one sample consists of: (S,) training sequences and (M,) test targets, the same for every contestant."""

    sequences: np.ndarray
    targets: np.ndarray
    eval_batch: int = 512

    def batches(self, it: Contestant, pass_: str) -> list[np.ndarray]:
        """The batches of a pass in the contestant's layout: as they come, bucketed sorted by length."""
        task = it.task
        train = self.sequences, task.windows.length, task.batch_size
        chosen, length, size = train if pass_ == "train" else (self.targets, task.targets.length, self.eval_batch)
        order = np.argsort(length[chosen], kind="stable") if it.layout == "bucketed" else np.arange(len(chosen))
        return [chosen[part] for part in np.array_split(order, max(1, round(len(chosen) / size)))]


def one_step(it: Contestant, pass_: str, chosen: np.ndarray, step: int) -> None:
    """Make a batch, pad it if the layout pads, and use it. All of this is timed."""
    if pass_ == "train":
        train_step(it, next(iter(Batches(it.task.windows, [chosen], rank=0, world=1))), step)
    else:
        rank_step(it, chosen)


def race(contestants: Sequence[Contestant], pass_: str, work: Work, reps: int | None, budget_s: float) -> None:
    """Fill in samples round-robin."""
    for i in turns(len(contestants), reps, budget_s):
        it = contestants[i]
        batches = work.batches(it, pass_)
        wait(it.task.device)
        start, cpu = time.perf_counter(), time.process_time()
        for step, chosen in enumerate(batches):
            one_step(it, pass_, chosen, step)
        wait(it.task.device)
        it.samples[pass_].append((time.perf_counter() - start, time.process_time() - cpu))


def measure_memory(it: Contestant, pass_: str, work: Work) -> None:
    """Peak bytes of the batch with most events, above parameters and optimizer state; and `first_ms`, one batch before all else."""
    lengths = it.task.windows.length if pass_ == "train" else it.task.targets.length
    batches = work.batches(it, pass_)
    packed = it.layout == "packed"
    largest = max(batches, key=lambda chosen: lengths[chosen].sum() if packed else len(chosen) * lengths[chosen].max())
    start = time.perf_counter()
    one_step(it, pass_, batches[0], 0)
    wait(it.task.device)
    it.first_ms[pass_] = (time.perf_counter() - start) * 1e3
    it.optimizer.zero_grad()
    it.peak_mib[pass_] = traced([lambda _: one_step(it, pass_, largest, 0)], it.task.device)[0] / 2**20
    it.optimizer.zero_grad()


def name_kernels(it: Contestant, pass_: str, work: Work) -> None:
    """Fill in `kernels` from one step. After everything is timed: profiling costs time."""
    chosen = work.batches(it, pass_)[0]
    if it.backend in FORMS and (found := seen(lambda: one_step(it, pass_, chosen, 0), it.task.device)):
        it.kernels[pass_] = found


def cannot_run(task: TrainingTask, refinement: str, layout: str, backend: str) -> str | None:
    """Why a contestant that is pinned to one of stock attention's kernels cannot take a training step; None if it can."""
    it = contestant(task, refinement, layout, backend)
    try:
        train_step(it, next(iter(task.windows.batches(2, task.seed, 0))), 0)
    except RuntimeError as error:
        return reason_of(error)
    return None


@dataclass(frozen=True)
class Yardstick:
    """What the definition gives in float64, padded: a loss curve, the model at its end, bounds of the ranks with it."""

    batches: list[Batch]
    losses: Tensor  # (GATE_STEPS,)
    model: dict[str, Tensor]
    chosen: np.ndarray  # (M,) test targets
    least: Tensor  # (M,) rank if all scores close to the target's were below it
    most: Tensor  # (M,) rank if all of them were above


def yardstick(task: TrainingTask, refinement: str, batch_size: int = 64, targets: int = 256) -> Yardstick:
    """backend="reference", float64, every batch padded to the window."""
    it = contestant(task, refinement, "padded", "reference", dropout=0.0)
    it.model.double()
    epochs = (task.windows.batches(batch_size, task.seed, epoch) for epoch in range(GATE_STEPS))
    batches = [batch for _, batch in zip(range(GATE_STEPS), (b for epoch in epochs for b in epoch), strict=False)]
    losses = torch.stack([train_step(it, batch, step) for step, batch in enumerate(batches)]).cpu()
    chosen = np.random.default_rng(task.seed).permutation(len(task.targets))[:targets]
    it.model.eval()
    with torch.no_grad():
        (items, cu_seqlens, longest), wanted, row, seen = task.targets.pack(chosen)
        out, last = hidden(it, items.to(task.device), cu_seqlens.to(task.device), longest)
        scores = (out[last] @ it.model.item_table().T).cpu()
    own = scores.gather(1, wanted[:, None])
    margin = RANK_TOLERANCE * scores.abs().amax(1, keepdim=True)
    if row is not None:
        scores[row, seen] = -torch.inf
    scores.scatter_(1, wanted[:, None], -torch.inf)
    least, most = (1 + (scores >= own + sign * margin).sum(1) for sign in (1, -1))
    return Yardstick(batches, losses, copy.deepcopy(it.model.state_dict()), chosen, least, most)


def check(it: Contestant, wanted: Yardstick, dtype: torch.dtype) -> float:
    """The largest relative deviation of the contestant's loss curve, computed in `dtype`.

    Raises WrongResult if that is more than TOLERANCE, or if ranks with the yardstick's model are not those that it gives.
    """
    it.model.to(dtype)
    losses = torch.stack([train_step(it, batch, step) for step, batch in enumerate(wanted.batches)]).double().cpu()
    off, allowed = ((losses - wanted.losses) / wanted.losses).abs(), TOLERANCE[dtype]
    if not bool((off <= allowed).all()):  # NaN too
        step = int((~(off <= allowed)).nonzero()[0])
        raise WrongResult(
            f"{it.name}, {dtype}: the loss of step {step + 1} is {losses[step]:.10g}, "
            f"must be {wanted.losses[step]:.10g} within {allowed:g} of it"
        )
    it.model.load_state_dict(wanted.model)
    ranks = rank_step(it, wanted.chosen).cpu()
    wrong = ((ranks < wanted.least) | (ranks > wanted.most)).nonzero().flatten()
    if len(wrong):
        place = int(wrong[0])
        raise WrongResult(
            f"{it.name}, {dtype}: {len(wrong)} of {len(ranks)} ranks differ; the first is {ranks[place]}, "
            f"must be in {wanted.least[place]}..{wanted.most[place]}"
        )
    return float(off.max())
