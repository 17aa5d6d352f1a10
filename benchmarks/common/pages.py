"""Result files as tables for a page, by their kind: the text that README, docs and results/*/*.md quote."""

from collections.abc import Callable

from .report import RATIOS, Row, device_ms, is_gpu, page_table, times, versus

TRAINING, DECODING = "training", "decoding"  # kinds; the operator's files have none
ROLES = "rival", "floor", "ours"  # in this order where all stand side by side
LAYOUTS = ("packed", "bucketed", "padded")  # in the order of a training table's columns


def markdown(results: Row) -> str:
    """The table of a result file."""
    return RENDERERS[results.get("kind")](results)


def measured_on(results: Row) -> str:
    return f"{results['device']}, torch {results['versions']['torch']}, commit {results['commit'][:12]}."


def operator(results: Row) -> str:
    """Forward and backward: time relative to ours in the same run, and peak MiB; on a GPU the host's and the fastest rival, too."""
    rows = [r for r in results["rows"] if r["pass"] == "fwd+bwd"]
    roles = {r["provider"]: r["role"] for r in rows}
    names = sorted(roles, key=lambda name: ROLES.index(roles[name]))
    ours = next((name for name in ("triton", "torch") if name in names), None)
    if ours is None:
        return ""
    lines = [f"Forward and backward, {measured_on(results)}"]
    if any("host_ms" in row for row in rows):
        lines += [f"Time on the device, replayed from a CUDA graph, relative to `{ours}` (below 1 is faster); peak MiB above the"]
        lines += ["inputs; and the milliseconds of the host per call without a graph.", ""]
    else:
        lines += [f"Time relative to `{ours}` (below 1 is faster), and peak MiB above the inputs.", ""]
    shown = list(RATIOS.values()) if any(RATIOS["graph_ms"][0] in row for row in rows) else []  # files older than it have neither
    if shown:
        lines[-1:] = ["Last: the time of the fastest rival over ours, called eagerly and replayed from a graph.", ""]
    names = [ours, *(name for name in names if name != ours)]
    calls: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        calls.setdefault((row["task"], row["layout"]), {})[row["provider"]] = row

    def cell(row: Row, base: float) -> str:
        host = f", {row['host_ms']:.2f}" if "host_ms" in row else ""
        return f"{device_ms(row) / base:.2f}, {row['peak_mib']:.3g}{host}"

    cells = [
        [*call, *(cell(by_name[n], device_ms(by_name[ours])) if n in by_name else "-" for n in names)]
        + [versus(by_name[ours], *of) for of in shown]
        for call, by_name in calls.items()
        if ours in by_name
    ]
    head = ["problem", "layout", *(f"`{name}`" for name in names), *["vs rival", "vs rival by graph"][: len(shown)]]
    return "\n".join([*lines, *page_table(head, cells)]) + "\n"


def decoding(results: Row) -> str:
    """Milliseconds of a step, and the other providers' times relative to it."""
    lines = [f"One decoding step, {measured_on(results)}"]
    lines += ["Milliseconds of `step`; the others' times relative to it (below 1 is faster).", ""]
    tasks: dict[str, dict[str, float]] = {}
    for row in results["rows"]:
        tasks.setdefault(row["task"], {})[row["provider"]] = row["median_ms"]
    names = list(dict.fromkeys(row["provider"] for row in results["rows"]))[1:]
    cells = [[task, f"{ms['step']:.3f}", *(f"{ms[name] / ms['step']:.2f}" for name in names)] for task, ms in tasks.items()]
    return "\n".join([*lines, *page_table(["problem", "`step` ms", *(f"`{name}`" for name in names)], cells)]) + "\n"


def training(results: Row) -> str:
    """Speed, memory and ratios, a table per task."""
    gpu = is_gpu(results["device"])
    speed, unit, share = ("seq_per_s", "second", "ratio_to_plain") if gpu else ("seq_per_cpu_s", "CPU-second", "cpu_ratio_to_plain")
    layouts = [name for name in LAYOUTS if any(r["layout"] == name for r in results["rows"])]
    lines = [f"Training steps and full-ranking evaluation, {measured_on(results)}"]
    lines += [f"Sequences per {unit}, and peak MiB above parameters and optimizer."]
    rivals = any("ratio_to_best_rival" in row for row in results["rows"])  # files older than it have none
    last = ["to plain", *["vs rival"] * rivals]
    which = "To plain" if rivals else "Last column"
    lines += [f"{which}: {'time' if gpu else 'CPU time'} of a step over that of refinement none, {layouts[0]}."]
    lines += [f"Vs rival: time of the fastest rival's step, in any layout, over that of the row, {layouts[0]}."] * rivals
    tasks: dict[str, dict[tuple[str, ...], dict[str, Row]]] = {}
    for row in results["rows"]:
        contestant = row["pass"], row["refinement"], row["provider"]
        tasks.setdefault(row["task"], {}).setdefault(contestant, {})[row["layout"]] = row
    for task, contestants in tasks.items():
        cells = []
        for (pass_, refinement, provider), of in contestants.items():
            shown = [f"{of[n][speed]:,.0f}, {of[n]['peak_mib']:.3g}" if n in of else "-" for n in layouts]
            first = of.get(layouts[0], {})
            shown += [times(first, share), *[versus(first, *RATIOS["median_ms"])] * rivals]
            cells.append([pass_, refinement, f"`{provider}`", *shown])
        lines += ["", f"{task}:", "", *page_table(["pass", "refinement", "backend", *layouts, *last], cells)]
    if results.get("end_to_end"):
        lines += ["", "Whole runs, per CPU-second:", "", "| | training sequences | users evaluated | |", "|--|--|--|--|"]
    for row in results.get("end_to_end", ()):  # of files that the tag study-1 wrote
        train, users = row["train_sequences_per_cpu_second"], row["eval_users_per_cpu_second"]
        origin = "quoted, not measured here" if row["quoted"] else "this run"
        lines.append(f"| {row['who']} | {train:,.0f} | {users:,.0f} | {origin} |")
    return "\n".join(lines) + "\n"


RENDERERS: dict[str | None, Callable[[Row], str]] = {None: operator, TRAINING: training, DECODING: decoding}
