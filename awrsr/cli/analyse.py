"""`awrsr analyse`: a report on the attention of a run over many histories."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from ..files import atomic, write_json
from .shared import OWN_DATA, OpenRun, add_data, add_filter_seen, add_folder, add_part, add_titles, filter_seen, labels_of


def add_flags(to: ArgumentParser) -> None:
    add_folder(to)
    to.add_argument("--baseline", type=str, default="", help="Run folder of a model to compare with, such as plain attention.")
    add_data(to, f"File of histories, split as in the run {OWN_DATA}.")
    add_part(to)
    to.add_argument("--users", type=int, default=512, help="Number of histories whose attention is analysed.")
    to.add_argument("--examples", type=int, default=3, help="Show this many histories that gained most and as many that lost most.")
    to.add_argument("--output", type=str, default="", help="HTML file to write (default: analysis.html in the run folder).")
    to.add_argument("--json", type=str, default="", help="Also write the numbers to this JSON file.")
    add_titles(to)
    add_filter_seen(to)


def run(options: Any) -> None:
    """Report what attention does over many histories and which predictions refinement
    changes. The report is one HTML page. It shows how many events the heads attend to
    and how far back, between which events refinement moves weight, and which
    predictions differ from those of a baseline run. Without --baseline, the same
    model with its refinement switched off is the baseline.

      awrsr analyse runs/refined --baseline runs/plain
      awrsr analyse runs/refined --users 2000 --output report.html --json report.json
    """
    from ..analysis.analyse import analyse
    from ..analysis.page import page

    opened = OpenRun(options)
    baseline = open_baseline(opened) if options.baseline else None
    split, _ = opened.split().numbered_as(opened.model.index())
    settings = {name: options[name] for name in ("part", "users", "examples")}
    analysis = analyse(opened.model, split, baseline=baseline, filter_seen=filter_seen(options), progress=True, **settings)
    if baseline is not None:
        analysis = replace(analysis, other=f"the baseline run {Path(options.baseline).name}")
    output = Path(options.output or Path(opened.folder) / "analysis.html")
    with atomic(output) as temporary:
        ids = opened.model.ids().tolist() if options.titles else []
        labels = dict(zip(ids, labels_of(options, ids), strict=True))
        temporary.write_text(page(analysis, f"Attention of {Path(opened.folder).name}", labels), encoding="utf-8")
    if options.json:
        write_json(options.json, analysis.to_json())
    print(f"Report: {output}")


def open_baseline(opened: OpenRun) -> Any:
    """The model of --baseline. Raises ValueError unless it was trained on the same data with the same split."""
    options = opened.options
    baseline = OpenRun(options, options.baseline)
    if len({baseline.stored.get("fingerprint"), opened.stored.get("fingerprint")} - {None}) > 1:
        raise ValueError(
            f"baseline is {options.baseline}, must be trained on the data and the split of {opened.folder} ({opened.data.split}): "
            f"its data or its split ({baseline.data.split}) differs, so it may have been trained on events held out here"
        )
    return baseline.model
