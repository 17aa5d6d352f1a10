"""What comes out of train_bench.py: rows, ratios computed from them, tables for a terminal and for a page."""

from collections.abc import Sequence
from typing import Any

from ..common.report import Column, Row, grid
from ..operator.measure import quantiles
from .contestants import LAYOUTS, PASSES, Contestant, Work

KIND = "training"  # of a results.json, so that its table is made here


def make_rows(contestants: Sequence[Contestant], pass_: str, work: Work, task: str) -> list[Row]:
    """One row per contestant: milliseconds per step, in the columns that attn_bench.py has, and what belongs to training."""
    rows = []
    for it in contestants:
        p, c, laps = it.problem, it.model.config, it.samples[pass_]
        steps, sequences = len(work.batches(it, pass_)), len(work.sequences if pass_ == "train" else work.targets)
        median, p20, p80 = quantiles([lap.seconds / steps * 1e3 for lap in laps])
        cpu = quantiles([lap.cpu_seconds / steps * 1e3 for lap in laps])[0]
        rows.append(
            {
                "provider": it.backend,
                "role": "rival" if it.backend == "stosa" else "ours",
                "backbone": c.backbone,
                "refinement": it.refinement,
                "layout": it.layout,
            }
            | {"B": p.batch_size if pass_ == "train" else work.eval_batch, "H": c.heads, "H_kv": c.heads, "L": c.max_len}
            | {"D": c.hidden // c.heads, "D_v": c.hidden // c.heads, "R": c.rank, "layers": c.layers}
            | {
                "dtype": "float32",
                "dropout_p": c.attention_dropout,
                "hidden_dropout": c.hidden_dropout,
                "loss": p.loss if pass_ == "train" else "",
                "pass": pass_,
            }
            | {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "cpu_ms": cpu, "samples": len(laps), "steps": steps}
            | {"peak_mib": it.peak_mib[pass_], "first_call_ms": it.first_ms[pass_]}
            | {"seq_per_s": sequences / steps / median * 1e3, "seq_per_cpu_s": sequences / steps / max(cpu, 1e-9) * 1e3}
            | {"source": p.source, "batch_size": p.batch_size if pass_ == "train" else work.eval_batch, "task": task}
        )
    add_ratios(rows)
    return rows


def add_ratios(rows: list[Row]) -> None:
    """Adds `ratio_to_plain`, a row's time over that of refinement "none" beside it, `ratio_to_packed`, over that of the packed
    layout, and the same of the processor's time, `cpu_ratio_...`, which others on the machine disturb less. Absent where that was
    not measured. Within one task and pass."""
    by = {tuple(row[k] for k in ("task", "pass", "provider", "refinement", "layout")): row for row in rows}
    for row in rows:
        task, pass_, provider = row["task"], row["pass"], row["provider"]
        plain = by.get((task, pass_, provider, "none", row["layout"]))
        packed = by.get((task, pass_, provider, row["refinement"], "packed"))
        for name, base in (("plain", plain), ("packed", packed)):
            if base is not None:
                row[f"ratio_to_{name}"] = row["median_ms"] / base["median_ms"]
                row[f"cpu_ratio_to_{name}"] = row["cpu_ms"] / max(base["cpu_ms"], 1e-9)


def ratio(row: Row, name: str) -> str:
    return f"{row[name]:.2f}x" if name in row else "-"


COLUMNS: list[Column] = [
    ("pass", -5, lambda r: r["pass"]),
    ("backend", -9, lambda r: r["provider"]),
    ("layout", -8, lambda r: r["layout"]),
    ("refinement", -10, lambda r: r["refinement"]),
    ("ms/step", 9, lambda r: f"{r['median_ms']:.2f}"),
    ("p20..p80", 17, lambda r: f"{r['p20_ms']:.2f}..{r['p80_ms']:.2f}"),
    ("CPU ms", 9, lambda r: f"{r['cpu_ms']:.2f}"),
    ("seq/s", 8, lambda r: f"{r['seq_per_s']:.0f}"),
    ("seq/CPU-s", 9, lambda r: f"{r['seq_per_cpu_s']:.0f}"),
    ("peak MiB", 9, lambda r: f"{r['peak_mib']:.1f}"),
    ("to plain", 8, lambda r: ratio(r, "ratio_to_plain")),
    ("CPU", 6, lambda r: ratio(r, "cpu_ratio_to_plain")),
    ("to packed", 9, lambda r: ratio(r, "ratio_to_packed")),
    ("CPU", 6, lambda r: ratio(r, "cpu_ratio_to_packed")),
]


def table(rows: list[Row]) -> str:
    """The rows of one task, the fastest first within each pass."""
    ordered = [row for p in PASSES for row in sorted((r for r in rows if r["pass"] == p), key=lambda r: r["median_ms"])]
    return "\n".join([rows[0]["task"], *grid(COLUMNS, ordered)]) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """Speed, memory and ratios as tables for a page."""
    gpu = not results["device"].startswith("CPU")
    speed, unit, share = ("seq_per_s", "second", "ratio_to_plain") if gpu else ("seq_per_cpu_s", "CPU-second", "cpu_ratio_to_plain")
    layouts = [name for name in LAYOUTS if any(r["layout"] == name for r in results["rows"])]
    lines = [
        f"Training steps and full-ranking evaluation, {results['device']}, torch {results['versions']['torch']}, "
        f"commit {results['commit'][:12]}.",
        f"Sequences per {unit}, and peak MiB above parameters and optimizer.",
        f"Last column: {'time' if gpu else 'CPU time'} of a step over that of refinement none, {layouts[0]}.",
    ]
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in results["rows"]:
        cells.setdefault((row["task"], row["pass"], row["refinement"], row["provider"]), {})[row["layout"]] = row
    task = ""
    for (of, pass_, refinement, provider), found in cells.items():
        if of != task:
            task = of
            lines += ["", f"{task}:", "", f"| pass | refinement | backend | {' | '.join(layouts)} | to plain |"]
            lines += ["|--|--|--|" + "--|" * (len(layouts) + 1)]
        shown = [f"{found[n][speed]:,.0f}, {found[n]['peak_mib']:.3g}" if n in found else "-" for n in layouts]
        to_plain = ratio(found.get(layouts[0], {}), share)
        lines.append(f"| {pass_} | {refinement} | `{provider}` | {' | '.join(shown)} | {to_plain} |")
    if results["end_to_end"]:
        lines += ["", "Whole runs, per CPU-second:", ""]
        lines += ["| | training sequences | users evaluated | |", "|--|--|--|--|"]
        for row in results["end_to_end"]:
            origin = "quoted, not measured here" if row["quoted"] else "this run"
            train, users = row["train_sequences_per_cpu_second"], row["eval_users_per_cpu_second"]
            lines.append(f"| {row['who']} | {train:,.0f} | {users:,.0f} | {origin} |")
    return "\n".join(lines) + "\n"
