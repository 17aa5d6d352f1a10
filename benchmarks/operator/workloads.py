"""The problems: shapes and presets, batches of random tensors in three layouts, and real history files.

B batch, H query heads, H_kv key and value heads, L positions, T packed rows, D head dim, D_v value dim, R refinement rank.
Items are vectors (backbone "dot-product") or Gaussians ("stochastic"), whose covariances are separate tensors.
"""

import itertools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from awrsr_kernels.checks import REFINEMENTS, STOCHASTIC_ATTENTION_REFINEMENTS

DOT, STOCHASTIC = "dot-product", "stochastic"
BACKBONES = {"dot": DOT, "stochastic": STOCHASTIC}  # as options and as results have them
OPERATOR = {DOT: REFINEMENTS, STOCHASTIC: STOCHASTIC_ATTENTION_REFINEMENTS}  # backbone: its refinements
LAGGED = "lagged"  # besides those: additive with LAGS, shift, and half of the heads plain, as the recommender's preset has it
LAGS = (0.5, 0.25)
Outputs = Tensor | tuple[Tensor, ...]  # of a call; in stochastic attention means and covariances
LAYOUTS = ("padded", "bucketed", "packed")
DTYPES = ("float32", "bfloat16", "float16", "float64")
GATE_BYTES = 4 << 30  # what the float64 reference of the correctness gate may take


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem, named as everywhere in the package."""

    B: int
    H: int
    H_kv: int
    L: int
    D: int
    D_v: int
    R: int


@dataclass(frozen=True)
class Preset:
    """Batch sizes and lengths that belong together; `tokens` fixes B * L instead of B."""

    lengths: tuple[int, ...]
    heads: int
    dim: int
    batches: tuple[int, ...] = ()
    tokens: int = 0

    def sizes(self) -> list[tuple[int, int]]:
        """(B, L) of every problem."""
        if self.tokens:
            return [(max(1, self.tokens // length), length) for length in self.lengths]
        return list(itertools.product(self.batches, self.lengths))


PRESETS = {
    "recsys": Preset(lengths=(20, 50, 100, 200), heads=2, dim=32, batches=(128, 512, 2048)),
    "long": Preset(lengths=(512, 1024, 2048, 4096, 8192), heads=4, dim=64, tokens=16384),
}
UNNAMED = {  # (backbone, --quick): what is measured on a CPU where no preset is named; for stochastic attention STOSA's sizes
    (DOT, False): replace(PRESETS["recsys"], batches=(32,)),
    (DOT, True): replace(PRESETS["recsys"], lengths=(20, 50), batches=(32,)),
    (STOCHASTIC, False): Preset(lengths=(50, 100, 200), heads=4, dim=16, batches=(128,)),
    (STOCHASTIC, True): Preset(lengths=(20, 50), heads=4, dim=16, batches=(32,)),
}


@dataclass(frozen=True)
class Task:
    """One thing to measure: providers and layouts are compared within it. B and L of `shape` are users and window if `users`."""

    shape: Shape
    refinement: str
    dtype: str
    dropout_p: float
    device: str
    users: tuple[int, ...] = ()  # history lengths, cut to the window; empty: every position is an item
    batch_size: int = 0  # users per call
    source: str = ""
    backbone: str = DOT

    @property
    def stochastic(self) -> bool:
        return self.backbone == STOCHASTIC

    @property
    def plain(self) -> "Task":
        """Plain dot-product attention of the same sizes."""
        return replace(self, refinement="none", backbone=DOT)

    @property
    def layouts(self) -> tuple[str, ...]:
        return LAYOUTS if self.users else ("padded",)

    @property
    def itemsize(self) -> int:
        return int(getattr(torch, self.dtype).itemsize)

    @property
    def features(self) -> tuple[int, int, int]:
        """D, D_v and R, which is 1 where there are no tables."""
        return self.shape.D, self.shape.D_v, 1 if self.refinement == "none" else self.shape.R

    @property
    def plain_heads(self) -> int:
        """Number of heads that are neither refined nor shifted."""
        return self.shape.H // 2 if self.refinement == LAGGED else 0

    @property
    def label(self) -> str:
        s = self.shape
        size = f"{s.B} users, window {s.L}, batches of {self.batch_size}" if self.users else f"B {s.B} L {s.L}"
        heads = f"H {s.H}" if s.H == s.H_kv else f"H {s.H}/{s.H_kv}"
        width = f"D {s.D}" if s.D == s.D_v else f"D {s.D} D_v {s.D_v}"
        drop = f" dropout {self.dropout_p:g}" if self.dropout_p else ""
        kind = f"stochastic backbone, {self.refinement}" if self.stochastic else self.refinement
        return " ".join([self.source, size, heads, width, f"R {s.R} {self.dtype} {kind}{drop}"]).strip()

    def flops(self, pass_: str) -> float:
        """Model FLOPs of the two-stage algorithm, real items only, two per multiply-add.

        Causality leaves n^2 / 2 pairs of a sequence of n items. Per head and sequence the forward takes

            none              n^2/2 * (D + D_v)                     multiply-adds
            simple            n^2/2 * (D + 2 R) + n^2/2 * (R + D_v)
            value, additive   the same plus n^2/2 * D_v             for P V
            lagged            as additive with 3 R in stage 2, in the heads that are not plain, and none in the others

        and in stochastic attention, whose points have 2 D features and whose squared weights meet covariances,

            none              n^2/2 * (2 D + 2 D_v)
            simple            n^2/2 * (2 D + 2 R) + n^2/2 * (R + 2 D_v)
            value             the same plus n^2/2 * 2 D_v           for P V_mean and (P*P) V_cov
            additive          the same as simple plus n^2/2 * 2 D   for P again, beside R, as (P + R)^2 has a cross term
            stochastic        n^2/2 * (2 D + 4 R) + n^2/2 * (2 R + 2 D_v)

        and the backward 2.5 times the forward, as in FlashAttention's convention. What a provider really executes (padding,
        recomputation, the masked half) does not count.
        """
        s = self.shape
        d, d_v = (2 * s.D, 2 * s.D_v) if self.stochastic else (s.D, s.D_v)
        width: float = d + d_v
        if self.refinement != "none":
            width += 6 * s.R if self.refinement == "stochastic" else 3 * s.R
        if self.refinement in ("value", "additive"):
            width += d if self.stochastic and self.refinement == "additive" else d_v
        if self.refinement == LAGGED:
            width += (5 * s.R + d_v - 3 * s.R) * (1 - self.plain_heads / s.H) - 3 * s.R * self.plain_heads / s.H
        pairs = sum(n * n for n in self.users) / 2 if self.users else s.B * s.L**2 / 2
        return 2 * s.H * pairs * width * {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}[pass_]


COVARIANCES = ("q_cov", "k_cov", "v_cov", "w_q_cov", "w_k_cov", "dout_cov")


@dataclass(frozen=True)
class Batch:
    """Tensors of one call. Padding lies on the right, where causality alone keeps it out of the items' results.

    Between Gaussians q, k, v and dout are those of the means, w_q and w_k the tables of the means, and what belongs to the
    covariances has the same shapes.
    """

    q: Tensor  # (B, H, L, D), packed (T, H, D)
    k: Tensor  # (B, H_kv, L, D), packed (T, H_kv, D)
    v: Tensor  # (B, H_kv, L, D_v), packed (T, H_kv, D_v)
    w_q: Tensor  # (L, R)
    w_k: Tensor  # (L, R)
    gate: Tensor  # (H,), for "additive"
    dout: Tensor  # gradient of the output, zero at padding
    refinement: str
    dropout_p: float
    bounds: Tensor | None = None  # lengths (B,), packed cu_seqlens (B + 1,); None: no padding
    packed: bool = False
    positions: Tensor | None = None  # (T,), packed: each row's place in its sequence
    dropout_seed: int | None = None
    lags: Tensor | None = None  # (A,) factors of earlier rows, for LAGGED
    plain_heads: int = 0
    q_cov: Tensor | None = None  # this and those below: of the stochastic backbone alone, whose batches have all of them
    k_cov: Tensor | None = None
    v_cov: Tensor | None = None
    w_q_cov: Tensor | None = None
    w_k_cov: Tensor | None = None
    dout_cov: Tensor | None = None

    @property
    def stochastic(self) -> bool:
        return self.q_cov is not None

    @property
    def plain(self) -> "Batch":
        """The batch for plain dot-product attention."""
        without: dict[str, Any] = dict.fromkeys(COVARIANCES)
        return replace(self, refinement="none", lags=None, plain_heads=0, **without)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient."""
        names = ["q", "k", "v"]
        if self.refinement != "none":
            names += ["w_q", "w_k"]
        if self.stochastic:
            names += ["q_cov", "k_cov", "v_cov"]
        if self.refinement == "stochastic":
            names += ["w_q_cov", "w_k_cov"]
        if self.refinement in ("additive", LAGGED):
            names.append("gate")
        if self.refinement == LAGGED:
            names.append("lags")
        return {name: getattr(self, name) for name in names}

    @property
    def douts(self) -> dict[str, Tensor]:
        """Gradients of the outputs, by the outputs' names."""
        return {"out": self.dout} if self.dout_cov is None else {"out_mean": self.dout, "out_cov": self.dout_cov}

    @property
    def max_len(self) -> int:
        return self.w_q.shape[0]

    def excerpt(self) -> tuple[Tensor, int, int, Tensor | None]:
        """Which entries (packed: rows), query heads and kv heads the gate compares, and the bounds of that part.

        The first and the last sequence, or the first two under dropout, whose mask counts sequences from 0. All heads, if the
        reference's matrices then fit in GATE_BYTES; otherwise fewer sequences, then fewer heads.
        """
        count = self.q.shape[0] if not self.packed else len(self.bounds) - 1  # type: ignore[arg-type]
        chosen = sorted({0, min(1, count - 1) if self.dropout_p else count - 1})
        heads, kv_heads = self.q.shape[1], self.k.shape[1]
        matrices = 12 if self.q_cov is None else 12 + 4 * self.q.shape[-1]  # differences of means and deviations, and their like
        per_head = matrices * 8 * self.max_len**2
        if len(chosen) * heads * per_head > GATE_BYTES:
            chosen = chosen[:1]
        kept = kv_heads if self.plain_heads else min(kv_heads, max(1, GATE_BYTES // (per_head * heads // kv_heads)))
        heads = heads // kv_heads * kept
        if not self.packed:
            index = torch.tensor(chosen, device=self.q.device)
            return index, heads, kept, None if self.bounds is None else self.bounds[index]
        assert self.bounds is not None
        starts = self.bounds.tolist()
        rows = [torch.arange(starts[b], starts[b + 1], device=self.q.device) for b in chosen]
        return torch.cat(rows), heads, kept, cumulative([len(r) for r in rows], self.q.device)


def cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def calls(task: Task, layout: str) -> list[tuple[tuple[int, ...], int]]:
    """(items of each sequence, window) of every call that a layout makes of a task."""
    length = task.shape.L
    if not task.users:
        return [((length,) * task.shape.B, length)]
    users = tuple(sorted(task.users)) if layout == "bucketed" else task.users
    groups = [users[i : i + task.batch_size] for i in range(0, len(users), task.batch_size)]
    return [(group, max(group) if layout == "bucketed" else length) for group in groups]


def build(task: Task, layout: str) -> list[Batch]:
    """The batches of one layout: a single one without padding, or the users' in the order of the layout."""
    s, device, dtype = task.shape, torch.device(task.device), getattr(torch, task.dtype)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)

    tables, gate = [new(s.L, s.R).requires_grad_() for _ in range(2)], new(s.H).requires_grad_()
    cov_tables = [new(s.L, s.R).requires_grad_() for _ in range(2)] if task.stochastic else []

    def items(lengths: list[int], window: int, covariance: bool = False) -> list[Tensor]:
        """q, k, v and dout, of the means or of the covariances; those are drawn by ELU + 1, as STOSA makes them."""
        widths = ((s.H, s.D), (s.H_kv, s.D), (s.H_kv, s.D_v), (s.H, s.D_v))
        tensors = [new(sum(lengths), h, f) if layout == "packed" else new(len(lengths), h, window, f) for h, f in widths]
        if covariance:
            tensors[:3] = [(F.elu(x.float()) + 1).to(dtype) for x in tensors[:3]]
        if layout != "packed":
            bounds = torch.tensor(lengths, device=device)
            tensors[3] *= (torch.arange(window, device=device) < bounds[:, None])[:, None, :, None]
        return [*(x.requires_grad_() for x in tensors[:3]), tensors[3]]

    def batch(lengths: list[int], window: int) -> Batch:
        q, k, v, dout = items(lengths, window)
        w_q, w_k = (w.detach()[:window].requires_grad_() for w in tables)
        bounds, places = None, None
        if layout == "packed":
            bounds = cumulative(lengths, device)
            places = torch.cat([torch.arange(n) for n in lengths]).to(device)
        elif task.users:
            bounds = torch.tensor(lengths, device=device)
        made = Batch(q, k, v, w_q, w_k, gate, dout, task.refinement, task.dropout_p, bounds, layout == "packed", places)
        if task.refinement == LAGGED:
            made = replace(made, lags=torch.tensor(LAGS, device=device, dtype=dtype).requires_grad_(), plain_heads=task.plain_heads)
        if not task.stochastic:
            return made
        *covs, dout_cov = items(lengths, window, covariance=True)
        covs += [w.detach()[:window].requires_grad_() for w in cov_tables]
        beside: dict[str, Any] = dict(zip(COVARIANCES, [*covs, dout_cov], strict=True))
        return replace(made, **beside)

    return [batch(list(lengths), window) for lengths, window in calls(task, layout)]


def read_histories(path: Path) -> list[int]:
    """Number of items of each user, in a file of any format that awrsr reads. ValueError if it is none."""
    from awrsr.data.readers import read  # which needs packages that a GPU machine may lack

    return read(path).lengths.tolist()


def sample_users(lengths: list[int], count: int, window: int) -> tuple[int, ...]:
    """`count` users in a random order that is the same in every run, each cut to the window."""
    return tuple(min(n, window) for n in random.Random(0).sample(lengths, min(count, len(lengths))))
