"""Time of a decoding step, compared with the full causal call and with two stock attention calls on a cache.

examples, from the repository root:
  python benchmarks/decode_bench.py --threads 1 --out out      a minute; writes out/results.json and results.md
  python benchmarks/decode_bench.py --length 128 4096 --batch 1 --refinement additive

providers: step (ours, on a cache of L - 1 items); full (ours, all L rows, although only the last is needed); sdpa2 (two stock
attention calls for one query, with [W_q | W_k | V] joined in their own cache); sdpa2-split (one stock call per block of values,
each with its own cache). A provider is timed only if its result is the last row of the definition. Removing the new item from a
cache between two samples is not timed. GB/s counts the bytes that a step must move: the cache and the tables once.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from awrsr_kernels import RefinedCache, refined_attention, refined_attention_prefill, refined_attention_step
from awrsr_kernels.checks import REFINEMENTS
from awrsr_kernels.reference import rounded_at_every_step
from awrsr_kernels.tolerance import wrong_results
from awrsr_kernels.tuning.arguments import whole
from awrsr_kernels.tuning.clock import Clock

from ..common import report
from ..common.arguments import add_flag, make_parser, settle_machine
from ..common.clock import WrongResult, quantiles, turns
from ..common.pages import DECODING, markdown
from .roofline import step_counts
from .workloads import Shape

TABLES = ("position", "content")


class DecodingInputs(NamedTuple):
    """One shape: items of whole sequences, (B, H, L, D), and tables, (L, D) or (B, H, L, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    w_q: Tensor
    w_k: Tensor
    refinement: str

    @property
    def content(self) -> bool:
        return self.w_q.dim() == 4

    @property
    def label(self) -> str:
        (batch, heads, length, d), dtype = self.q.shape, str(self.q.dtype).removeprefix("torch.")
        tables = "" if self.refinement == "none" else f", {TABLES[self.content]} tables"
        return f"{self.refinement}{tables}, {dtype}: B {batch}, H {heads}, L {length}, D = D_v = R = {d}"

    def rows(self, first: int, end: int | None = None) -> list[Tensor]:
        """The call's tensors cut to some rows; position tables stay whole."""
        return [x[:, :, first:end] if x.dim() == 4 else x for x in self[:5]]

    def definition(self, dtype: torch.dtype) -> Tensor:
        """The last row, (B, H, 1, D), entry by entry to save memory."""
        rows = []
        for b in range(self.q.shape[0]):
            tensors = [(x[b : b + 1] if x.dim() == 4 else x).to(dtype) for x in self[:5]]
            rows.append(refined_attention(*tensors, refinement=self.refinement, backend="reference")[:, :, -1:])
        return torch.cat(rows)


class Provider(NamedTuple):
    """A call that gives the last row, and a function that removes its item from the cache again."""

    name: str
    role: str
    call: Callable[[], Tensor]
    undo: Callable[[], None]


def step(inputs: DecodingInputs, backend: str = "auto") -> tuple[Provider, RefinedCache]:
    (batch, heads, length, d), refinement = inputs.q.shape, inputs.refinement
    d_v, r = inputs.v.shape[-1], inputs.w_q.shape[-1]
    sizes: dict[str, Any] = {"kv_heads": inputs.k.shape[1], "head_dim": d, "value_dim": d_v, "rank": r}
    options: dict[str, Any] = {"refinement": refinement, "tables": TABLES[inputs.content], "dtype": inputs.q.dtype}
    cache = RefinedCache(batch, length, heads=heads, device=inputs.q.device, **sizes, **options)
    q, k, v, w_q, w_k = inputs.rows(0, length - 1)
    refined_attention_prefill(q, k, v, w_q, w_k, cache)
    q, k, v, w_q, w_k = inputs.rows(length - 1)

    def call() -> Tensor:
        return refined_attention_step(q, k, v, w_q, w_k, cache, backend=backend)

    return Provider("step", "ours", call, lambda: cache.crop(length - 1)), cache


def stock(inputs: DecodingInputs, cache: RefinedCache, split: bool) -> Provider:
    """Two stages of stock attention for one query. cache: the state of earlier positions."""
    q, k, v, w_q, w_k = (x.expand(*inputs.k.shape[:3], -1) for x in inputs[:5])
    at, refinement, rank = k.shape[2] - 1, inputs.refinement, w_q.shape[-1]
    new_q, keys = q[:, :, at:], cache.k.clone()
    tables = [] if refinement == "none" else [w_q, w_k]
    direct = [] if refinement == "simple" else [v]
    fixed, growing = ([], [*tables, *direct]) if inputs.content else (tables, direct)  # a step brings a row of what grows
    appended = [(keys, k)]
    if split:
        blocks = [*fixed, *(x.clone() for x in growing)]
        appended += zip(blocks[len(fixed) :], growing, strict=True)
    else:
        blocks, width = [torch.cat([*fixed, *growing], -1)], sum(x.shape[-1] for x in fixed)
        appended += [(blocks[0][..., width:], torch.cat(growing, -1))] if growing else []
    k_a = None if cache.k_a is None else cache.k_a.clone()
    values = blocks[-1] if refinement == "additive" and split else (cache.v if cache.y is None else cache.y).clone()
    if refinement == "simple" or (refinement == "additive" and not split):
        appended.append((values, v))

    def call() -> Tensor:
        for rows, new in appended:
            rows[:, :, at] = new[:, :, at]
        parts = [F.scaled_dot_product_attention(new_q, keys, x) for x in blocks]
        if not split:
            parts = list(parts[0].split([x.shape[-1] for x in (*tables, *direct)], -1))
        if k_a is None:
            return parts[0]
        k_a[:, :, at:] = parts[1]
        if refinement == "value":
            values[:, :, at:] = parts[2]
        out = F.scaled_dot_product_attention(parts[0], k_a, values, scale=rank**-0.5)
        return parts[2] + out if refinement == "additive" else out

    return Provider("sdpa2-split" if split else "sdpa2", "rival", call, lambda: None)


def measure(inputs: DecodingInputs, reps: int | None, budget: float) -> list[report.Row]:
    """Rows of one shape, all providers side by side. Raises WrongResult."""
    exact = inputs.definition(torch.float64)
    with rounded_at_every_step():
        same = inputs.definition(inputs.q.dtype)
    ours, cache = step(inputs)

    def full() -> Tensor:
        return refined_attention(*inputs[:5], refinement=inputs.refinement)[:, :, -1:]

    rivals = (stock(inputs, cache, split) for split in (False, True))
    providers = [ours, Provider("full", "ours", full, lambda: None), *rivals]
    for provider in providers:
        lines = wrong_results({"out": provider.call()}, {"out": exact}, {"out": same}, same.dtype)
        provider.undo()
        if lines:
            raise WrongResult(f"{provider.name}: {lines[0]}")
    clock = Clock(inputs.q.device)
    samples: list[list[float]] = [[] for _ in providers]
    for i in turns(len(providers), reps, budget):
        spans = []
        for _ in range(1 if providers[i].name == "full" else 8):
            spans.append(clock.timed(providers[i].call)[1])
            providers[i].undo()
        samples[i].append(clock.total_ms(spans) / len(spans))
    batch, heads, length, d = inputs.q.shape
    shape = {"B": batch, "H": heads, "L": length, "D": d, "D_v": d, "R": d, "dtype": str(inputs.q.dtype)[6:]}
    rows: list[report.Row] = []
    for provider, milliseconds in zip(providers, samples, strict=True):
        median, p20, p80 = quantiles(milliseconds)
        named = {"provider": provider.name, "role": provider.role, "refinement": inputs.refinement, "task": inputs.label}
        times = {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(milliseconds)}
        rows.append(named | {"tables": TABLES[inputs.content]} | shape | times)
    sizes = Shape(batch, heads, heads, length, d, d, d)
    rows[0]["bytes"], _ = step_counts(sizes, inputs.refinement, inputs.q.itemsize, inputs.content)
    for row in rows:
        row["ratio_to_full"] = rows[1]["median_ms"] / row["median_ms"]
    return rows


COLUMNS: list[report.Column] = [
    ("provider", -12, lambda r: r["provider"]),
    ("median ms", 10, lambda r: f"{r['median_ms']:.3f}"),
    ("p20..p80", 19, report.spread),
    ("GB/s", 7, lambda r: f"{r['bytes'] / r['median_ms'] / 1e6:.1f}" if "bytes" in r else "-"),
    ("vs full", 8, lambda r: f"{r['ratio_to_full']:.1f}x"),
]


def options_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--batch", type=whole(1), nargs="+", default=[1, 8], metavar="B", help="batch sizes (default 1 and 8)")
    add(
        "--length",
        type=whole(2),
        nargs="+",
        default=[1024],
        metavar="L",
        help="numbers of items, including the new one (default 1024)",
    )
    add("--heads", type=whole(1), default=4, metavar="H", help="number of heads (default 4)")
    add("--dim", type=whole(1, 256), default=64, metavar="D", help="value of D, D_v and R (default 64)")
    add("--refinement", nargs="+", choices=REFINEMENTS, default=list(REFINEMENTS), help="refinements to measure (default all)")
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES), help="kinds of tables to measure (default both)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="data type (default float32)")
    for name in ("--device", "--threads", "--reps", "--out"):
        add_flag(add, name)
    add_flag(add, "--budget", default=4.0, help="seconds of timing per problem (default 4)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = options_parser()
    options = parser.parse_args(argv)
    settle_machine(parser, options)
    begin = time.perf_counter()
    rows: list[report.Row] = []
    about = report.about(options.device) | {"kind": DECODING, "command": report.command_line("decode_bench.py", argv)}
    kinds = [(r, t) for r in options.refinement for t in options.tables if r != "none" or t == options.tables[0]]
    for length, batch, (refinement, tables) in itertools.product(options.length, options.batch, kinds):
        torch.manual_seed(0)
        size = (batch, options.heads, length, options.dim)
        shapes = [size] * 3 + [size if tables == "content" else size[2:]] * 2
        q, k, v, w_q, w_k = (torch.randn(s, device=options.device).to(getattr(torch, options.dtype)) for s in shapes)
        inputs = DecodingInputs(q, k, v, w_q, w_k, refinement)
        try:
            with torch.no_grad():
                of_it = measure(inputs, options.reps, options.budget)
        except WrongResult as error:
            print(f"decode_bench.py: WRONG, nothing was written: {inputs.label}: {error}", file=sys.stderr)
            return 1
        rows += of_it
        print("\n".join([inputs.label, *report.grid(COLUMNS, of_it)]) + "\n", flush=True)
    results = about | {"rows": rows}
    report.finish(results, begin, options.out, markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
