"""The files of a run folder: which they are, whether they are this package's, and whether they hold a run that can be resumed."""

import json
import os
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from .config import MAY_CHANGE, earlier_values, without_removed_options
from .data.prepare import DataOptions
from .files import SEAL, STALE, STALE_NOTE, UNSEALED, read_json, write_json
from .model_file import CONFIG, WEIGHTS, is_model, stored_sections, write_model
from .models.network import AWRSRNetwork

STATE, METRICS, RANKS = "last.ckpt", "metrics.json", "ranks_{part}.parquet"  # what training adds to a model
SEAL_LENGTH = len(UNSEALED)


def save_model(
    folder: str | Path,
    network: AWRSRNetwork,
    item_ids: np.ndarray,
    filter_seen: bool,
    trained: np.ndarray | None = None,
    **sections: Any,
) -> None:
    """Write model.safetensors, and config.json as a copy of its configuration to read.

    trained: (N,) events of each item in training. sections: further ones of the configuration.

    Raises:
        ValueError: files of these names are there that awrsr did not write.
    """
    folder = Path(folder)
    refuse_foreign(folder, (WEIGHTS, CONFIG))
    write_model(folder, network, item_ids, filter_seen, trained, sections, copies=(CONFIG,))
    data = sections.get("data", {}) | {"seen": not filter_seen}
    write_json(folder / CONFIG, {"model": asdict(network.config)} | sections | {"data": data})


def refuse_foreign(folder: Path, names: Iterable[str] = (CONFIG, WEIGHTS, METRICS, STALE)) -> None:
    """Raise ValueError if a file of these names is there that awrsr did not write, or that is damaged: it is not overwritten."""
    for name in names:
        path = folder / name
        if path.exists() and not is_own(path):
            raise ValueError(f"{path} was not written by awrsr, or is damaged: choose another folder, or move this file away")


def is_own(path: Path) -> bool:
    """Whether a file that has the name of one of this package's looks like it."""
    if path.name == WEIGHTS:
        return is_model(path)
    if path.name == STALE:
        return path.read_text(encoding="utf-8", errors="replace").startswith(STALE_NOTE)
    try:
        stored = json.loads(path.read_bytes())
    except ValueError:
        return False
    if path.name == CONFIG:
        return isinstance(stored, dict) and isinstance(stored.get("model"), dict) and "max_len" in stored["model"]
    return isinstance(stored, dict) and {"config", "curve", "best_epoch"} <= stored.keys()


def seal_state(path: Path) -> None:
    """Append a checksum to a file that torch.save wrote, as the comment of the ZIP archive that it is."""
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)  # the length of the comment, which torch leaves empty
        file.write(SEAL_LENGTH.to_bytes(2, "little"))
        file.write(b"sha256:" + digest_before(file, file.tell()))


def digest_before(file: BinaryIO, end: int) -> bytes:
    """The SHA-256 of a file up to a place, where its position then is."""
    digest, place = sha256(), file.seek(0)
    while place < end:
        digest.update(part := file.read(min(1 << 20, end - place)))
        place += len(part)
    return digest.hexdigest().encode()


def check_state(file: BinaryIO) -> None:
    """Raise BadZipFile if a state is damaged. torch itself reads damaged tensors without a word."""
    end = max(file.seek(0, os.SEEK_END) - SEAL_LENGTH, 0)
    file.seek(end)
    if SEAL.fullmatch(seal := file.read()):
        if seal != b"sha256:" + digest_before(file, end):
            raise zipfile.BadZipFile("its checksum does not fit")
        return
    with zipfile.ZipFile(file) as parts:  # older versions: the checksums that torch writes, which leave out the archive's directory
        if (part := parts.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {part} does not fit")


def read_state(path: str | Path) -> dict[str, Any]:
    """The state of a training, without unpickling code.

    Raises:
        ValueError: it is damaged, holds code, or is not a state of awrsr.
    """
    again = "remove it to start again, or restore it from a backup"
    try:
        with open(path, "rb") as file:
            check_state(file)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")  # torch's on a file that it then refuses
                state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): {again}") from error
    if not isinstance(state, dict) or not {"awrsr", "state_dict"} <= state.keys():
        raise ValueError(f"{path} is not a state of awrsr: choose another folder, or {again}")
    return state


def state_to_resume(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The state of the run with this configuration, if the folder holds one.

    Raises:
        ValueError: it holds another run, or its model; files in it are damaged, or were not written by awrsr.
    """
    state = read_state(folder / STATE) if (folder / STATE).exists() else None
    in_state = state is not None and "config" in state["awrsr"]  # older versions have it in config.json alone
    if state and not in_state and not (folder / CONFIG).exists():
        raise ValueError(f"{folder / STATE} is the state of a run whose {CONFIG} is missing: restore it, or choose another folder")
    refuse_foreign(folder)
    if state is None and not (folder / WEIGHTS).exists():
        return None
    if state is None:
        stored, _ = stored_sections(folder)
    else:
        source = folder / (STATE if in_state else CONFIG)
        stored = without_removed_options(state["awrsr"]["config"] if in_state else read_json(source), source)
    refuse_another_run(folder, stored, config, "another run" if state else "the model of another run")
    return state


def refuse_another_run(folder: Path, stored: dict[str, Any], config: dict[str, Any], what: str) -> None:
    """Raise ValueError if two configurations differ in what decides the results of a run."""
    defaults = flat(earlier_values() | {"data": asdict(DataOptions())})
    old, new = (defaults | flat(json.loads(json.dumps(each))) for each in (stored, config))
    fixed = {"epochs"} if config["training"]["schedule"] == "cosine" else set()  # the learning rate of each step depends on them
    ignored = MAY_CHANGE - fixed | {"checksum", "format", "epoch"}
    differs = sorted(
        name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and name.split(".")[-1] not in ignored
    )
    if differs:
        changes = "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in differs[:3])
        why = " (with schedule 'cosine' the learning rate of each step depends on it)" if differs == ["training.epochs"] else ""
        raise ValueError(f"{folder} holds {what}: {changes}{why}. Choose another folder, or remove this one")


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Section.name -> value; a value outside a section keeps its name."""
    sections = {name: values if isinstance(values, dict) else {"": values} for name, values in config.items()}
    return {f"{section}.{name}".rstrip("."): value for section, values in sections.items() for name, value in values.items()}
