"""Writes files under a temporary name and then renames them, so that a file is either complete or absent."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .processes import unforked

if TYPE_CHECKING:
    import numpy as np


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder and with the same suffix. At the end of the block the file is renamed to `path`, or
    removed after an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sweep(folder: Path, names: Iterable[str]) -> None:
    """Remove temporary files left by a killed process that was writing files with these names (patterns)."""
    for name in names:
        for temporary in folder.glob(f".{name}.*"):
            temporary.unlink(missing_ok=True)


def first_process() -> bool:
    """Whether this is the first of several processes, or the only one, according to the variables that launchers set."""
    return not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def write_json(path: str | Path, value: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises FileNotFoundError, or ValueError naming the file if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


@unforked
def write_columns(path: str | Path, columns: "dict[str, np.ndarray]") -> None:
    """Write a Parquet file at this very path."""
    import polars as pl

    pl.DataFrame(columns).write_parquet(path)


@unforked
def read_ids(path: str | Path) -> "np.ndarray":
    """The column "item" of a Parquet file: numbers, or text of one width. Raises polars' errors."""
    import numpy as np
    import polars as pl

    return np.array(pl.read_parquet(path)["item"].to_list())
