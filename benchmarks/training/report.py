"""The results of train_bench.py: rows, ratios computed from them, and a table for a terminal."""

from collections.abc import Sequence

from ..common import report
from ..common.clock import quantiles
from ..common.report import Column, Row, grid, spread, times
from .contestants import PASSES, RIVALS, Contestant, Work


def make_rows(contestants: Sequence[Contestant], pass_: str, work: Work) -> list[Row]:
    """One row per contestant: milliseconds per step, in the columns that attn_bench.py has, and what belongs to training."""
    rows = []
    for it in contestants:
        p, c, laps = it.task, it.model.config, it.samples[pass_]
        steps, sequences = len(work.batches(it, pass_)), len(work.sequences if pass_ == "train" else work.targets)
        median, p20, p80 = quantiles([seconds / steps * 1e3 for seconds, _ in laps])
        cpu = quantiles([cpu_seconds / steps * 1e3 for _, cpu_seconds in laps])[0]
        batch, loss = (p.batch_size, p.loss) if pass_ == "train" else (work.eval_batch, "")
        rows.append(
            {"provider": it.backend, "role": "rival" if it.backend in RIVALS else "ours", "backbone": c.backbone}
            | {"refinement": it.refinement, "layout": it.layout, "B": batch, "H": c.heads, "H_kv": c.heads, "L": c.max_len}
            | {"D": c.hidden // c.heads, "D_v": c.hidden // c.heads, "R": c.rank, "layers": c.layers, "dtype": "float32"}
            | {"dropout_p": c.attention_dropout, "hidden_dropout": c.hidden_dropout, "loss": loss, "pass": pass_}
            | {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "cpu_ms": cpu, "samples": len(laps), "steps": steps}
            | {"peak_mib": it.peak_mib[pass_], "first_call_ms": it.first_ms[pass_]}
            | {"seq_per_s": sequences / steps / median * 1e3, "seq_per_cpu_s": sequences / steps / max(cpu, 1e-9) * 1e3}
            | ({"kernels": it.kernels[pass_]} if pass_ in it.kernels else {})
            | {"source": p.source, "batch_size": batch, "task": task_of(it, pass_)}
        )
    add_ratios(rows)
    report.add_ratios(rows, ("task", "pass", "refinement"))
    return rows


def task_of(it: Contestant, pass_: str) -> str:
    """What is computed, in words."""
    p, c = it.task, it.task.config
    what = f"{p.loss}, batches of {p.batch_size}" if pass_ == "train" else "full ranking"
    size = f"hidden {c.hidden}, {c.layers} layer{'s' * (c.layers > 1)}, {c.heads} heads"
    return f"{p.source}, {'STOSA, ' * (c.backbone == 'stosa')}{what}, window {c.max_len}, {size}"


def add_ratios(rows: list[Row]) -> None:
    """Add `ratio_to_plain`, a row's time divided by that of refinement "none" in the same layout and backend, and
    `cpu_ratio_to_plain`, the same for processor time, which a busy machine disturbs less. Absent if that was not measured."""
    plain = {(row["task"], row["provider"], row["layout"]): row for row in rows if row["refinement"] == "none"}
    for row in rows:
        base = plain.get((row["task"], row["provider"], row["layout"]))
        if base is not None:
            row["ratio_to_plain"] = row["median_ms"] / base["median_ms"]
            row["cpu_ratio_to_plain"] = row["cpu_ms"] / max(base["cpu_ms"], 1e-9)


COLUMNS: list[Column] = [
    ("pass", -5, lambda r: r["pass"]),
    ("backend", -17, lambda r: r["provider"]),
    ("layout", -8, lambda r: r["layout"]),
    ("refinement", -10, lambda r: r["refinement"]),
    ("ms/step", 9, lambda r: f"{r['median_ms']:.2f}"),
    ("p20..p80", 17, lambda r: spread(r, 2)),
    ("CPU ms", 9, lambda r: f"{r['cpu_ms']:.2f}"),
    ("seq/s", 8, lambda r: f"{r['seq_per_s']:.0f}"),
    ("seq/CPU-s", 9, lambda r: f"{r['seq_per_cpu_s']:.0f}"),
    ("peak MiB", 9, lambda r: f"{r['peak_mib']:.1f}"),
    ("to plain", 8, lambda r: times(r, "ratio_to_plain")),
    ("CPU", 6, lambda r: times(r, "cpu_ratio_to_plain")),
    ("vs rival", 8, lambda r: times(r, "ratio_to_best_rival")),
]


def table(rows: list[Row]) -> str:
    """The rows of one task, the fastest first within each pass."""
    ordered = [row for p in PASSES for row in sorted((r for r in rows if r["pass"] == p), key=lambda r: r["median_ms"])]
    columns = [c for c in COLUMNS if c[0] != "vs rival" or any("ratio_to_best_rival" in r for r in rows)]
    return "\n".join([rows[0]["task"], *grid(columns, ordered)]) + "\n"
