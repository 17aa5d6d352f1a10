"""The results of attn_bench.py: rows, ratios computed from them, and a table per problem."""

from ..common.clock import quantiles
from ..common.report import Column, Row, add_ratios, grid, spread, times
from .measure import PASSES, Entrant
from .roofline import Rates, shares
from .workloads import Task


def make_rows(task: Task, entrants: list[Entrant], passes: list[str], rates: Rates | None = None) -> list[Row]:
    """One row per entrant and pass. `ratio_to_best_rival` > 1: faster than the fastest rival of the task, in any layout.
    `graph_ratio_to_best_rival` compares only times that were replayed from CUDA graphs.

    With `rates` a row says how far from the possible it is (`roofline.shares`).
    """
    s, rows = task.shape, []
    for entrant in entrants:
        for p in passes:
            median, p20, p80 = quantiles(entrant.samples[p])
            view = task if entrant.provider.role != "floor" else task.plain
            rows.append(
                {"provider": entrant.provider.name, "role": entrant.provider.role, "backbone": task.backbone}
                | {"refinement": task.refinement, "layout": entrant.layout}
                | {"B": s.B, "H": s.H, "H_kv": s.H_kv, "L": s.L, "D": s.D, "D_v": s.D_v, "R": s.R}
                | {"dtype": task.dtype, "dropout_p": task.dropout_p, "pass": p}
                | {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "samples": len(entrant.samples[p])}
                | {"peak_mib": entrant.peak_mib[p], "first_call_ms": entrant.first_ms[p]}
                | {"seq_per_s": s.B / median * 1e3, "tflops": view.flops(p) / median / 1e9}
                | ({"host_ms": quantiles(entrant.host_samples[p])[0]} if task.device == "cuda" else {})
                | ({"graph_ms": entrant.graph_ms[p]} if p in entrant.graph_ms else {})
                | ({"graph_reason": entrant.graph_reason[p]} if p in entrant.graph_reason else {})
                | ({"kernels": entrant.kernels[p]} if p in entrant.kernels else {})
                | ({"kernels_reason": entrant.kernels_reason} if entrant.kernels_reason else {})
                | ({} if rates is None else shares(view, entrant.layout, p, median, rates))
                | {"source": task.source, "batch_size": task.batch_size or s.B, "task": task.label}
            )
    add_ratios(rows, ("task", "pass"))
    return rows


def graph_reasons(rows: list[Row]) -> list[tuple[str, str]]:
    """(provider, reason), each once, where a forward, alone or with its backward, has no CUDA-graph time."""
    return list(dict.fromkeys((r["provider"], r["graph_reason"]) for r in rows if "graph_reason" in r and r["pass"] != "bwd"))


def milliseconds(row: Row, name: str) -> str:
    return f"{row[name]:.3f}" if name in row else "-"


def percent(row: Row, name: str) -> str:
    return f"{row[name]:.1%}" if name in row else "-"


COLUMNS: list[Column] = [
    ("provider", -17, lambda r: r["provider"]),
    ("layout", -8, lambda r: r["layout"]),
    ("pass", -7, lambda r: r["pass"]),
    ("median ms", 10, lambda r: milliseconds(r, "median_ms")),
    ("p20..p80", 19, spread),
    ("host ms", 8, lambda r: milliseconds(r, "host_ms")),
    ("graph ms", 8, lambda r: milliseconds(r, "graph_ms")),
    ("peak MiB", 9, lambda r: f"{r['peak_mib']:.1f}"),
    ("seq/s", 10, lambda r: f"{r['seq_per_s']:.4g}" if r["seq_per_s"] < 1000 else f"{r['seq_per_s']:.0f}"),
    ("TFLOP/s", 8, lambda r: f"{r['tflops']:.3g}"),
    ("copy", 6, lambda r: percent(r, "copy_share")),
    ("matmul", 6, lambda r: percent(r, "matmul_share")),
    ("/floor", 7, lambda r: times(r, "to_floor", 1 if r.get("to_floor", 0) < 100 else 0)),
    ("vs rival", 8, lambda r: times(r, "ratio_to_best_rival")),
    ("vs rival by graph", 17, lambda r: times(r, "graph_ratio_to_best_rival")),
    ("first ms", 9, lambda r: f"{r['first_call_ms']:.0f}"),
]


def table(rows: list[Row], wrong: list[Row]) -> str:
    """One task: a block per pass, the fastest first."""
    empty = set() if any(r["layout"] != "padded" for r in rows) else {"layout"}
    optional = {"host ms": "host_ms", "graph ms": "graph_ms", "vs rival by graph": "graph_ratio_to_best_rival"}
    empty |= {name for name, key in optional.items() if not any(key in r for r in rows)}
    columns = [c for c in COLUMNS if c[0] not in empty]
    ordered = [row for p in PASSES for row in sorted((r for r in rows if r["pass"] == p), key=lambda r: r["median_ms"])]
    lines = [rows[0]["task"] if rows else wrong[0]["task"], *grid(columns, ordered)] if rows or wrong else []
    lines += [f"{w['provider']:<17}  WRONG, not timed ({w['layout']}): {w['reason']}" for w in wrong]
    return "\n".join(lines) + "\n"
