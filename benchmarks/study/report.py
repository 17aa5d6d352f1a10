"""Write the report of the study and its pictures, from its files.

    python benchmarks/study_report.py                          # benchmarks/results/study/study.md and study_*.png, second_order.*
    python benchmarks/study_report.py --only second-order      # second_order.md and .png
    python benchmarks/study_report.py --pages docs/study.md    # and the part of that page between its marks

`benchmarks/study/gains.py` defines what a gain is, and when it is called better; `second_gains.py` the same for the second order.
"""

import argparse
from pathlib import Path

from awrsr.files import atomic
from benchmarks.study import second_tables
from benchmarks.study.gains import gains, gather
from benchmarks.study.plots import forest, short_picture
from benchmarks.study.run import RESULTS, Results
from benchmarks.study.second_gains import Second
from benchmarks.study.second_order import GROUPS
from benchmarks.study.tables import QUESTIONS, markdown


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "Folder that contains study.json, and to which tables and pictures are written (default: %(default)s)."
    parser.add_argument("--out", type=Path, default=RESULTS, help=text)
    parser.add_argument("--only", choices=("study", "second-order"), help="Write only one of the two reports (default: both).")
    text = "Pages whose parts between <!-- second order: begin --> and end, or second order in brief, are replaced by tables."
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help=text)
    options = parser.parse_args(arguments)
    results = Results(options.out)
    if options.only != "study":
        second_order(results, options.out, options.pages)
    if options.only == "second-order":
        return 0
    cells = gather(results)
    if not cells:
        parser.error(f"{options.out} contains no runs of the plan; run python benchmarks/study.py first")
    compared = gains(cells)
    page = markdown(results, cells, compared)
    with atomic(options.out / "study.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    for group in ("short", *QUESTIONS):
        figure = short_picture(compared) if group == "short" else forest(compared, group)
        if figure is not None:
            with atomic(options.out / f"study_{group}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=150)
    print(page)
    return 0


def second_order(results: Results, out: Path, pages: list[Path]) -> None:
    """Write tables and picture of the second order, and its part of the pages."""
    second = Second.of(results)
    if not any(runs.cell.group in GROUPS for runs in second.runs.values()):
        return
    short = second_tables.short(second)
    page = second_tables.markdown(second, short)
    parts = dict(zip(second_tables.PARTS, (short, second_tables.brief(second)), strict=True))
    texts = {path: second_tables.marked(path.read_text(encoding="utf-8"), parts) for path in pages}
    for path, text in {out / "second_order.md": page, **texts}.items():
        with atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if (figure := second_tables.picture(second)) is not None:
        with atomic(out / "second_order.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    print(page)
