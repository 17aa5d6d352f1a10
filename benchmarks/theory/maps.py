"""What one refined layer attends to once it has learned induction heads: `python -m benchmarks.theory.maps` trains one for half a
minute and draws P and M into results/theory/maps.png; maps.json has what it reaches."""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from awrsr.analysis.explain import picture
from awrsr.files import write_json
from awrsr.models.network import AWRSRNetwork
from benchmarks.common.report import versions
from benchmarks.theory.models import CONTESTANTS
from benchmarks.theory.tasks import Induction
from benchmarks.theory.trained import RESULTS, Run, fitted

TASK = Induction(32)
RUN = Run("induction", TASK, next(model for model in CONTESTANTS if model.name == "refined"), 3e-3, 0)


@torch.no_grad()
def draw(network: AWRSRNetwork) -> Figure:
    """P and M of the layer on a sequence that was not trained on."""
    tokens, _ = TASK.draw(1, torch.Generator().manual_seed(1 << 41))
    weights, refined = network.weights_padded(tokens, torch.tensor([TASK.length]))[0]
    return picture(weights[0, :1], refined[0, :1], tokens[0].tolist(), refinement="additive")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS.parent, help="folder for the results (default: %(default)s)")
    options = parser.parse_args(arguments)
    network, entry = fitted(RUN)
    draw(network).savefig(options.out / "maps.png", dpi=110)
    about = {"kind": "maps", "command": f"python -m {__spec__.name}", "versions": versions()}
    write_json(options.out / "maps.json", about | {"rows": [entry]})
    print(f"accuracy {entry['accuracy']:.4f} after {entry['steps']} steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
