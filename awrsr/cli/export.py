"""`awrsr export`: the scoring path of a run as a file for other runtimes."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from .shared import add_folder, folder_of


def add_flags(to: ArgumentParser) -> None:
    add_folder(to)
    to.add_argument("--format", choices=("torch", "onnx"), default="torch", help="Format of the file: torch.export or ONNX.")
    to.add_argument("--output", type=str, default="", help="File to write (default: model.pt2 or model.onnx in the run folder).")


def run(options: Any) -> None:
    """Export a model to a file that scores items without this package. The file is
    kept only if its scores agree with those of the model.

      awrsr export --run runs/beauty
      awrsr export --run runs/beauty --format onnx --output beauty.onnx
    """
    from ..export import SUFFIXES, export
    from ..recommender import AWRSR

    folder = folder_of(options)
    output = options.output or Path(folder) / f"model{SUFFIXES[options.format]}"
    path = export(AWRSR.load(folder), output, format=options.format)
    print(f"Wrote {path}; its scores are those of the model.")
