"""Report what refinement costs, from committed results: the operator, training, decoding, and rooflines.

    python -m benchmarks.operator.cost_report      # results/operator/cost.md, cost.json, cost_{operator,roofline,quality}.png

The roof of a device is set by the best rates measured on it, of a copy and of a matrix product. A call with I operations per byte
of device memory reaches at most min(I * copy, matmul) operations per second. Below the ridge, I = matmul / copy, memory limits it;
above it, arithmetic does. Bytes and operations are those of the problem (`roofline.py`); the rates were measured in the same run.
On a GPU, the times are those of calls replayed from a CUDA graph, in which the host causes no delay.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from awrsr.files import atomic
from awrsr_kernels.tuned import replace_file

from ..common import pages
from ..common.arguments import make_parser
from ..common.report import ROOT, Row, device_ms, is_gpu, page_table
from . import plots
from .roofline import Point, Rates, step_counts
from .workloads import STOCHASTIC, Shape

RESULTS = ROOT / "benchmarks/results"
SHOWN = ("simple", "stochastic")  # refinements that have a panel against L
NOT_YET = "not measured yet"
OURS, LAYOUTS = ("torch", "triton"), ("padded", "packed")  # the calls in the rooflines


def rates_of(results: Row) -> Rates:
    return Rates(results["rates"]["copy_gb_per_s"] * 1e9, results["rates"]["matmul_tflops"] * 1e12)


def measured(files: list[Row]) -> list[Point]:
    """Our calls in every file of attn_bench.py, then steps of decode_bench.py, on whatever device."""
    operators = [results for results in files if results.get("rates")]
    points = [p for results in operators for p in passes(results)]
    for results in (x for x in files if x.get("kind") == pages.DECODING):
        beside = [x for x in operators if (x["device"], x["commit"]) == (results["device"], results["commit"])]
        if beside:  # a file of steps has no rates of its own: those of the same device and commit
            points += steps(results, rates_of(beside[0]))
    return points


def passes(results: Row) -> Iterator[Point]:
    for row in results["rows"]:
        alone = "graph_ms" in row if is_gpu(results["device"]) else row["pass"] != "fwd+bwd"  # a backward alone has no graph
        chosen = row["provider"] in OURS and row["layout"] in LAYOUTS and alone
        if not chosen or row["dtype"] != results["rates"]["matmul_dtype"] or "bytes" not in row:
            continue
        stochastic = row["backbone"] == STOCHASTIC
        group = ("stochastic" if stochastic else "dot-product") + " attention" + (", real histories" if row["source"] else "")
        group = f"{row['provider']}, {group}" if is_gpu(results["device"]) else group  # on a CPU there is one of ours
        where = f"{row['source']}, {row['layout']}, {row['B']} users" if row["source"] else f"B {row['B']}"
        problem = f"{where} H {row['H']} L {row['L']} D {row['D']} R {row['R']}"
        call = f"`{row['provider']}`, {row['refinement']}{', stochastic attention' * stochastic}"
        counts, rates = (float(row["bytes"]), float(row["operations"])), rates_of(results)
        yield Point(results["device"], group, problem, call, row["pass"], *counts, device_ms(row), rates)


def steps(results: Row, rates: Rates) -> Iterator[Point]:
    for row in (x for x in results["rows"] if x["provider"] == "step"):
        s = Shape(row["B"], row["H"], row["H"], row["L"], row["D"], row["D_v"], row["R"])
        _, operations = step_counts(s, row["refinement"], 1, False)
        tables = "" if row["refinement"] == "none" else f", {row['tables']} tables"
        problem, call = f"B {s.B} H {s.H} L {s.L} D {s.D} R {s.R}", f"`step`, {row['refinement']}{tables}"
        counts = float(row["bytes"]), float(operations)
        yield Point(results["device"], "decoding steps", problem, call, "step", *counts, row["median_ms"], rates)


def measured_table(points: list[Point]) -> list[str]:
    """A row per call, its passes in each cell."""
    calls: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        calls.setdefault((p.problem, p.call), []).append(p)
    shown: list[Callable[[Point], str]] = [
        lambda p: p.part, lambda p: f"{p.moved / 1e6:.3g}", lambda p: f"{p.intensity:.3g}", lambda p: p.side,
        lambda p: f"{p.ms:.3g}", lambda p: f"{p.share:.0%}",
    ]  # fmt: skip
    rows = [[*key, *(", ".join(map(show, of)) for show in shown)] for key, of in calls.items()]
    return page_table(["problem", "call", "pass", "MB", "operations per byte", "side", "ms", "share of the roof"], rows)


def roof(points: list[Point]) -> list[str]:
    """A table for each device."""
    lines: list[str] = []
    for device in dict.fromkeys(p.device for p in points):
        of = [p for p in points if p.device == device]
        ridges = [f"{x:.3g}" for x in sorted({p.ridge for p in of})]
        ridge = " to ".join(dict.fromkeys((ridges[0], ridges[-1])))
        lines += ["", f"**{device}**: measured; the ridge is at {ridge} operations per byte.", "", *measured_table(of)]
    return lines


def markdown(files: list[Row], points: list[Point]) -> str:
    """The tables of the page: those of every benchmark, then the rooflines."""
    lines: list[str] = []
    for title, kind in (("Operator", None), ("Training", pages.TRAINING), ("Decoding", pages.DECODING)):
        of = [results for results in files if results.get("kind") == kind]
        lines += ["", f"## {title}"]
        for results in of:
            lines += ["", pages.markdown(results).strip()]
        if not any(is_gpu(results["device"]) for results in of):
            lines += ["", f"On a GPU: {NOT_YET}."]
    lines += ["", "## Under the roof", *roof(points)]
    return "\n".join(lines).strip() + "\n"


def load(folder: Path) -> list[Row]:
    """Result files with rows, in the order of their names."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"), key=lambda path: path.name)]
    return [results for results in files if isinstance(results, dict) and results.get("rows")]


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    where = "folder of results, in which the report is written as well (default %(default)s)"
    parser.add_argument("--results", type=Path, default=RESULTS, help=where)
    folder = parser.parse_args(arguments).results
    files, study = load(folder), folder / "study/study.json"
    points = measured(files)
    entries = json.loads(study.read_text(encoding="utf-8")) if study.exists() else []
    pictures = {
        "cost_operator.png": plots.against_length([x for x in files if x.get("kind") is None], SHOWN),
        "cost_roofline.png": plots.roofline(points),
        "cost_quality.png": plots.quality(entries),
    }
    texts = {"cost.md": markdown(files, points), "cost.json": json.dumps([p.row() for p in points], indent=1) + "\n"}
    out = folder / "operator"
    for name, text in texts.items():
        replace_file(out / name, text)
    for name, figure in pictures.items():
        if figure is not None:
            with atomic(out / name) as temporary:
                figure.savefig(temporary, format="png", dpi=130)
    print(f"wrote {', '.join([*texts, *(name for name, figure in pictures.items() if figure is not None)])} to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
