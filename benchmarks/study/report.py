"""Write the report of the study and its pictures, from its files.

    python benchmarks/study_report.py          # benchmarks/results/study/study.md and study_*.png

`benchmarks/study/gains.py` defines what a gain is, and when it is called better.
"""

import argparse
from pathlib import Path

from awrsr.files import atomic
from benchmarks.study.gains import gains, gather
from benchmarks.study.plots import forest, short_picture
from benchmarks.study.run import RESULTS, Results
from benchmarks.study.tables import QUESTIONS, markdown


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "Folder that contains study.json, and to which tables and pictures are written (default: %(default)s)."
    parser.add_argument("--out", type=Path, default=RESULTS, help=text)
    options = parser.parse_args(arguments)
    results = Results(options.out)
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
