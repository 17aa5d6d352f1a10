"""One refined layer that solves induction heads by construction: nothing is learned, and the operator computes it in float64.

    python -m benchmarks.theory.construction              # two minutes; writes results/theory/construction.json and .md

The task: after x_1 .. x_n, name an item that followed an earlier occurrence of x_n. The layer, of one head:

    q_i = k_i = v_i = e(x_i)    random unit rows, one per item, so that P falls evenly on the positions with the same item
    W_q[m] = u_m                random unit rows, one per position; exactly orthogonal with as many columns as positions
    W_k[j] = u_(j-1)
    answer                      the item whose row is nearest to the output R V

Row n of Q_A is then the mean of u over the occurrences of x_n, row j of K_A the mean of u over the positions before each occurrence
of x_j, and their product T_nj the share of the pairs of the two that coincide: how often x_j had followed x_n, divided by how often
either had occurred. With exact tables T is 0 wherever x_j never followed x_n; random rows add noise.

With `recency`, P falls by that factor of e for each mean distance between occurrences, by one more feature of q and k.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from awrsr.files import write_json
from awrsr_kernels import refined_attention
from benchmarks.common.report import commit, versions

RESULTS = Path(__file__).resolve().parents[1] / "results/theory"
FEATURES = 255  # of e: products of different rows are so small, and SHARP is so large, that P is even to 1e-9
SHARP = 200.0  # softmax_scale
SHARPER = 1e6  # refine_scale: decides between almost equal shares
LENGTHS = (16, 64, 256, 512, 1024, 2048, 4096)
EARLIER = (1, 3, 7)  # how often each item occurred before
COLUMNS = (64, 128, 256)
ANSWERS = 2000  # of each row of the table, at least
SUFFICES = 0.99


class Layer(NamedTuple):
    """The construction. columns: of the tables; 0: as many as positions."""

    columns: int = 0
    recency: float = 0.0
    features: int = FEATURES
    backend: str = "torch"
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    def __call__(self, items: Tensor, generator: torch.Generator) -> Tensor:
        """(n,) what the layer answers after each of (n,) items."""
        length, count = len(items), int(items.max()) + 1
        e, u = unit_rows(count, self.features, generator), unit_rows(length, self.columns or length, generator)
        before = torch.cat([torch.zeros_like(u[:1]), u[:-1]])
        place = torch.arange(length, dtype=torch.float64)[:, None]
        q = torch.cat([SHARP * e[items], torch.ones_like(place)], 1)
        k = torch.cat([e[items], self.recency / count * place], 1)
        q, k, v, w_q, w_k = (x.to(self.device, self.dtype) for x in (q, k, e[items], u, before))
        how: dict[str, Any] = {"refinement": "simple", "softmax_scale": 1.0, "refine_scale": SHARPER, "backend": self.backend}
        out = refined_attention(q[None, None], k[None, None], v[None, None], w_q, w_k, **how)[0, 0]
        return (out.to(e.device, e.dtype) @ e.T).argmax(1)


def unit_rows(count: int, columns: int, generator: torch.Generator) -> Tensor:
    """(count, columns) rows of length 1, at random; unit vectors of their own if there are enough columns."""
    if columns >= count:
        return torch.eye(count, columns, dtype=torch.float64)
    rows = torch.randn(count, columns, generator=generator, dtype=torch.float64)
    return rows / rows.norm(dim=1, keepdim=True)


def sequence(length: int, earlier: int, generator: torch.Generator) -> Tensor:
    """(length,) items in a random order, of which each occurs `earlier` + 1 times."""
    items = torch.arange(-(-length // (earlier + 1))).repeat_interleave(earlier + 1)
    return items[torch.randperm(len(items), generator=generator)][:length]


def chosen(items: Tensor) -> list[set[int]]:
    """What exact tables without recency answer after each item, as the largest T: those successors of it of whose occurrences, up
    to one of them, the item preceded the largest share. Empty if it has no successor yet."""
    found: list[set[int]] = []
    seen: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    largest: dict[tuple[int, int], float] = {}
    for place, item in enumerate(items.tolist()):
        seen[item] += 1
        if place:
            pairs[int(items[place - 1]), item] += 1
        for pair in [pair for pair in pairs if pair[1] == item]:
            largest[pair] = max(largest.get(pair, 0.0), pairs[pair] / seen[item])
        shares = {after: share for (before, after), share in largest.items() if before == item}
        found.append({after for after, share in shares.items() if share > max(shares.values()) - 1e-9})
    return found


def judge(items: Tensor, answers: Tensor) -> tuple[int, int, int]:
    """At the second half of the positions, where the item occurred before: how often the answer is some successor, how often the
    successor of the last occurrence, and how many answers there are."""
    known: set[tuple[int, int]] = set()
    last: dict[int, int] = {}
    some = latest = asked = 0
    before = None
    for place, (item, answer) in enumerate(zip(items.tolist(), answers.tolist(), strict=True)):
        if before is not None:
            known.add((before, item))
            last[before] = item
        before = item
        if 2 * place >= len(items) and item in last:
            asked += 1
            some += (item, answer) in known
            latest += last[item] == answer
    return some, latest, asked


def enough_columns(length: int, earlier: int, error: float) -> int:
    """Random columns with which an answer is no successor with a chance of at most about `error`, if no item occurred more than
    c = `earlier` times before.

    Some successor has T of at least s = 1 / (c + 1)^2, with noise of variance s / R at most for R columns. For any other item T is
    the product of two independent means, of c + 1 rows and of one at least: noise of variance 1 / ((c + 1) R) at most. All are
    sub-Gaussian, so one of n others is above with a chance of at most n exp(-s^2 / (2 v)), v the sum of the variances.
    """
    return math.ceil(2 * (earlier + 1) ** 2 * (earlier + 2) * math.log(length / error))


def row(length: int, earlier: int, layer: Layer, seed: int) -> dict[str, Any]:
    """A row of the table, from as many sequences as give ANSWERS."""
    generator = torch.Generator().manual_seed(seed)
    some = latest = asked = 0
    while asked < ANSWERS:
        items = sequence(length, earlier, generator)
        counts = judge(items, layer(items, generator))
        some, latest, asked = some + counts[0], latest + counts[1], asked + counts[2]
    shares = {"some": some / asked, "last": latest / asked, "answers": asked}
    return {"length": length, "earlier": earlier, "columns": layer.columns, "recency": layer.recency} | shares


def problems() -> list[tuple[int, int, Layer]]:
    """Random tables at all lengths, exact ones as far as the operator has columns, and exact ones with recency."""
    found = [(n, c, Layer(r)) for c in EARLIER for n in LENGTHS for r in COLUMNS if r < n]
    exact = [(n, c) for c in EARLIER for n in LENGTHS if n <= max(COLUMNS)]
    return found + [(n, c, Layer(recency=recency)) for recency in (0.0, 4.0) for n, c in exact]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Shares of right answers, a line per number of earlier occurrences and kind of tables."""
    lines = [
        f"| earlier occurrences | tables | {' | '.join(f'n = {n:,}' for n in LENGTHS)} |",
        f"|--|--|{'--|' * len(LENGTHS)}",
    ]
    for earlier in EARLIER:
        for columns, recency, share in (*((r, 0.0, "some") for r in (*COLUMNS, 0)), (0, 0.0, "last"), (0, 4.0, "last")):
            of = {r["length"]: r for r in rows if (r["earlier"], r["columns"], r["recency"]) == (earlier, columns, recency)}
            cells = [f"{of[n][share]:.3f}" if n in of else "" for n in LENGTHS]
            kind = f"{columns} random columns" if columns else "exact, recent occurrences weigh more" if recency else "exact"
            wanted = {"some": "some successor", "last": "the last one"}[share]
            lines.append(f"| {earlier} | {kind}: {wanted} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    wanted = problems()
    rows = [
        row(length, earlier, layer, seed) for seed, (length, earlier, layer) in enumerate(tqdm(wanted, unit="row", disable=None))
    ]
    about = {"kind": "construction", "command": f"python -m {__spec__.name}", "commit": commit(), "versions": versions()}
    write_json(options.out / "construction.json", about | {"rows": rows})
    (options.out / "construction.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
