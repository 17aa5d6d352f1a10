"""How tables and gate of `RefinedMultiheadAttention` should start: one layer of it learns to recall, from different starts.

    python benchmarks/initialisation.py --out bench-out/initialisation

Each sequence repeats random symbols; where the last one has occurred before, what followed it then is to be named. One layer of
plain attention cannot do that, a refined layer can (README), if it learns to: a row is a start, its columns the accuracy reached
after some steps, mean and worst over seeds. The second task asks for what plain attention can do, the symbol at a fixed distance,
where refinement must not be in the way.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from awrsr_kernels import RefinedMultiheadAttention

from ..common import report
from ..common.arguments import add_flag, make_parser, whole
from ..common.pages import INITIALISATION, markdown

SYMBOLS, LENGTH, HIDDEN, HEADS, BATCH = 16, 32, 64, 2, 64
TASKS = ("recall", "distance")
DISTANCE = 3


class Start(NamedTuple):
    """A row of the table."""

    refinement: str
    tables: str
    table_std: float
    gate: str  # of "additive": learned from 0, learned from 1, fixed at 1; else ""

    def attention(self) -> RefinedMultiheadAttention:
        gate: dict[str, Any] = {"gate": False} if self.gate == "fixed" else {"gate_init": float(self.gate == "from 1")}
        tables = self.tables if self.refinement != "none" else "position"
        options = gate | {"refinement": self.refinement, "tables": tables, "table_std": self.table_std}
        return RefinedMultiheadAttention(HIDDEN, HEADS, max_len=LENGTH, align="left", **options)


STARTS = [Start("none", "-", 1.0, "")] + [
    Start(refinement, tables, std, gate)
    for tables in ("position", "content")
    for refinement, std, gate in (
        *(("additive", std, "from 0") for std in (0.02, 0.3, 1.0, 3.0)),
        *(("additive", 1.0, gate) for gate in ("from 1", "fixed")),
        ("simple", 1.0, ""),
    )
]


class Layer(nn.Module):
    """A transformer of one layer, pre-norm, with learned positions."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.symbols, self.positions = nn.Embedding(SYMBOLS, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.attention = start.attention()
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(3))
        self.feedforward = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))
        self.head = nn.Linear(HIDDEN, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.symbols(symbols) + self.positions.weight
        x = x + self.attention(self.norms[0](x))
        x = x + self.feedforward(self.norms[1](x))
        scores: Tensor = self.head(self.norms[2](x))
        return scores


def draw(task: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(BATCH, LENGTH) symbols, and what is to be named after each; -100 where nothing is."""
    symbols = torch.randint(SYMBOLS, (BATCH, LENGTH), generator=generator)
    if task == "distance":
        return symbols, F.pad(symbols[:, :-DISTANCE], (DISTANCE, 0), value=-100)
    earlier = (symbols[:, :, None] == symbols[:, None, :]).tril(-1)
    last = torch.where(earlier, torch.arange(LENGTH), -1).amax(-1)
    return symbols, torch.where(last >= 0, symbols.gather(1, (last + 1).clamp(min=0)), -100)


def accuracy(start: Start, task: str, seed: int, steps: int) -> float:
    """The share of right answers in the last twentieth of the steps, which see each sequence once."""
    torch.manual_seed(seed)
    model, generator = Layer(start), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    right = asked = 0
    for step in range(steps):
        symbols, target = draw(task, generator)
        scores = model(symbols)
        optimizer.zero_grad()
        F.cross_entropy(scores.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
        if step >= steps - max(1, steps // 20):
            right += int((scores.argmax(-1) == target).sum())
            asked += int((target >= 0).sum())
    return right / asked


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add_flag(parser.add_argument, "--out", default=Path("bench-out/initialisation"), help="folder of results; default %(default)s")
    add_flag(parser.add_argument, "--threads", default=1, help="default %(default)s")
    parser.add_argument("--steps", type=whole(1), default=1000, help="of training; default %(default)s")
    parser.add_argument("--seeds", type=whole(1), default=3, help="runs of each start; default %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = report.about("cpu") | {"command": report.command_line("initialisation.py", arguments)}
    rows = [start._asdict() | {task: [] for task in TASKS} for start in STARTS]
    work = [(i, task, seed) for seed in range(options.seeds) for i in range(len(rows)) for task in TASKS]
    for i, task, seed in tqdm(work, unit="run", disable=None):
        rows[i][task].append(accuracy(STARTS[i], task, seed, options.steps))
    results = about | {"kind": INITIALISATION, "steps": options.steps, "seeds": options.seeds, "rows": rows}
    report.write_data(options.out, results, markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
