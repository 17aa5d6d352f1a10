"""Tables of result files that only the tag study-1 writes: pages quote them, and a test holds the pages to the files."""

import statistics

from benchmarks.common.report import Row, page_table

SHOWN = 3  # of the best trials of a search


def initialisation(results: Row) -> str:
    """Accuracy reached from each start of tables and gate."""
    tasks = ("recall", "distance")
    about = f"mean (worst) of {results['seeds']} seeds; commit {results['commit'][:12]}."
    lines = [f"Accuracy after {results['steps']} steps, {about}", ""]
    cells = []
    for row in results["rows"]:
        std = "-" if row["refinement"] == "none" else f"{row['table_std']:g}"
        shown = [f"{statistics.fmean(row[task]):.3f} ({min(row[task]):.3f})" for task in tasks]
        cells.append([row["refinement"], row["tables"], std, row["gate"] or "-", *shown])
    return "\n".join([*lines, *page_table(["refinement", "tables", "table_std", "gate", *tasks], cells)]) + "\n"


def search(results: Row) -> str:
    """The best trials of each search, and what decided."""
    lines = [f"Searches of equal length; {results['device']}, commit {results['commit'][:12]}. Test figures decided nothing.", ""]
    trials, cells = {(row["dataset"], row["model"]): str(row["place"]) for row in results["rows"]}, []
    for row in (row for row in results["rows"] if row["place"] <= SHOWN):
        chosen = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["settings"].items())
        reached = f"{row['validation NDCG@10']:.4f}", f"{row['test']:.4f}"
        cells.append([row["dataset"], row["model"], trials[row["dataset"], row["model"]], str(row["place"]), *reached, chosen])
    lines += page_table(["data", "model", "trials", "place", "validation NDCG@10", "test NDCG@10", "settings"], cells)
    decided = {name: ", ".join(f"{k} {v:.2f}" for k, v in shares.items()) for name, shares in results["importances"].items()}
    table = page_table(["data", "model", "settings"], [[*name.split("/"), text] for name, text in decided.items()])
    return "\n".join([*lines, "", "What decided, by PED-ANOVA's importance:", "", *table]) + "\n"


RENDERERS = {"initialisation": initialisation, "search": search}
