"""A model is one file, model.safetensors: its weights, the ids of its items and its configuration, under one checksum.

Ids are JSON in a tensor of bytes, another tensor says how often each item occurred in training, and the configuration is JSON in
the file's metadata. Older versions wrote three files without checksums, which are read as well.
"""

import json
import warnings
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import safetensors.torch
import torch
from safetensors import SafetensorError

from .config import AWRSRConfig, without_removed_options
from .files import UNSEALED, atomic, is_whole, mark_stale, no_longer_stale, read_ids, read_json, sealed
from .models.network import AWRSRNetwork

WEIGHTS = "model.safetensors"
CONFIG, ITEMS = "config.json", "items.parquet"  # further files of a model in older versions; config.json is now a copy to read
METADATA, IDS, TRAINED = "awrsr", "item_ids", "trained_items"  # names in the file
FORMAT = 1  # the version of what they hold
OF_THE_MODEL = ("metrics.json", "ranks_*.parquet", "analysis.html", "*.pt2", "*.onnx", ITEMS)  # stale with another model
OF_THE_FILE = {"checksum", "format", "model"}  # parts of the configuration that are not sections of their own


class SavedModel(NamedTuple):
    """What the file of a model holds."""

    network: AWRSRNetwork
    item_ids: np.ndarray  # (N,)
    filter_seen: bool
    trained: np.ndarray | None  # (N,) events of each item in training; bool in older files; None if that is not known
    sections: dict[str, Any]  # further parts of the configuration: training, data, epoch


def write_model(
    folder: Path,
    network: AWRSRNetwork,
    item_ids: np.ndarray,
    filter_seen: bool,
    trained: np.ndarray | None,
    sections: dict[str, Any],
    copies: tuple[str, ...] = (),
) -> None:
    """Write the file of a model, which appears when it is complete. What was made from another model in the same folder is marked
    as stale before.

    sections: further ones of the configuration. copies: further files that are stale until they are written anew.
    """
    path, ids = folder / WEIGHTS, item_ids.tolist()
    refuse_duplicates(ids, "item_ids")
    data = sections.get("data", {}) | {"seen": not filter_seen}
    about = {"checksum": UNSEALED, "format": FORMAT, "model": asdict(network.config)} | sections | {"data": data}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    state[IDS] = torch.frombuffer(bytearray(json.dumps(ids, ensure_ascii=False).encode()), dtype=torch.uint8)
    state |= {} if trained is None else {TRAINED: torch.from_numpy(trained)}
    content = sealed(safetensors.torch.save(state, {METADATA: json.dumps(about, ensure_ascii=False)}))
    older, marked = is_older(folder), set[str]()
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(content)
            if path.exists() and tensors_of(path.read_bytes()) != tensors_of(content):
                marked = mark_stale(folder, (*OF_THE_MODEL, *copies))
    except BaseException:
        no_longer_stale(folder, marked)
        raise
    if older:  # its ids are in the new file
        (folder / ITEMS).unlink(missing_ok=True)
        no_longer_stale(folder, [ITEMS])


def read_model(folder: str | Path, **changes: Any) -> SavedModel:
    """Load what `write_model` wrote, in evaluation mode, without unpickling. changes: changed options, such as backend.

    Raises:
        FileNotFoundError: the file is missing. ValueError: it is damaged, or the weights are of another configuration.
    """
    path = Path(folder) / WEIGHTS
    content = content_of(path)
    stored, source = sections_of(path, content)
    try:
        stored_config = AWRSRConfig(**stored["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is not a configuration of this model: {error}") from error
    with torch.device("meta"):  # without weights, which would be replaced; no number is drawn, and no size fills the memory
        network = AWRSRNetwork(replace(stored_config, **changes))
    try:
        weights = safetensors.torch.load(content)
        if source == path:
            source_of_ids, ids = path, json.loads(weights.pop(IDS).numpy().tobytes())
            trained = weights.pop(TRAINED).numpy() if TRAINED in weights else None
        else:
            source_of_ids, trained = path.with_name(ITEMS), None
            ids = read_ids(source_of_ids).tolist()
    except (SafetensorError, pl.exceptions.PolarsError) as error:
        raise damaged(path, str(error)) from error
    del content
    if len(ids) != network.config.num_items:
        count = f"{len(ids)} items, must hold {network.config.num_items}"
        raise ValueError(f"{source_of_ids} does not belong to the model of {source.name}: it holds {count}")
    refuse_duplicates(ids, str(source_of_ids))
    refuse_other_shapes(path, source, network, weights)
    # As they were saved, float64 too; copied to where torch aligns memory, on which the last bits of products may depend
    network.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    if source != path:
        warnings.warn(
            f"{path.parent} was written by an older version, without checksums, so damage to it would go unnoticed; "
            "AWRSR.load(folder).save(folder) writes it anew",
            stacklevel=3,
        )
    sections = {name: value for name, value in stored.items() if name not in OF_THE_FILE}
    item_ids = np.array(ids, dtype=object if ids and isinstance(ids[0], str) else None)
    return SavedModel(network.eval(), item_ids, not stored.get("data", {}).get("seen", False), trained, sections)


def stored_sections(folder: Path) -> tuple[dict[str, Any], Path]:
    """The configuration of the model in a folder, and the file that holds it."""
    path = folder / WEIGHTS
    return sections_of(path, content_of(path))


def sections_of(path: Path, content: bytes) -> tuple[dict[str, Any], Path]:
    """The configuration in the file of a model, or in the file beside it that older versions wrote; and which file that is."""
    header = header_of(content)
    if header is None:
        raise damaged(path, "its header cannot be read")
    metadata = header.get("__metadata__")
    if metadata is None and IDS not in header:
        for name in (CONFIG, ITEMS):
            if not path.with_name(name).is_file():
                raise FileNotFoundError(f"{path.parent} holds no trained model: {name} is missing")
        source = path.with_name(CONFIG)
        return without_removed_options(read_json(source), source), source
    if not isinstance(metadata, dict) or METADATA not in metadata:
        raise damaged(path, "it has no configuration, or was not written by awrsr")
    if not is_whole(content, 8 + int.from_bytes(content[:8], "little")):
        raise damaged(path, "its checksum does not fit")
    stored = json.loads(metadata[METADATA])
    if stored["format"] > FORMAT:
        raise ValueError(f"{path} has format {stored['format']}, this version reads up to {FORMAT}: upgrade awrsr")
    return without_removed_options(stored, path), path


def content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()  # at once: the file may be replaced meanwhile
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} holds no trained model: {path.name} is missing") from None


def header_of(content: bytes) -> dict[str, Any] | None:
    """What safetensors stores before the tensors, if it can be read."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except ValueError:
        return None
    return header if isinstance(header, dict) else None


def tensors_of(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


def is_older(folder: Path) -> bool:
    """Whether a folder holds the three files of an older version."""
    if not all((folder / name).is_file() for name in (WEIGHTS, CONFIG, ITEMS)):
        return False
    header = header_of((folder / WEIGHTS).read_bytes())
    return header is not None and "__metadata__" not in header and IDS not in header


def is_model(path: Path) -> bool:
    """Whether a file is a model of this package, of any version."""
    header = header_of(path.read_bytes())
    metadata = (header or {}).get("__metadata__")
    return isinstance(metadata, dict) and METADATA in metadata or is_older(path.parent)


def damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is damaged: {reason}. Restore it from a backup, or remove {path.parent} and train again")


def refuse_duplicates(ids: list[Any], source: str) -> None:
    """Raise ValueError for an id that two items have."""
    if len(set(ids)) != len(ids):
        twice = next(name for name, count in Counter(ids).items() if count > 1)
        raise ValueError(f"{source} holds the id {twice!r} twice, but each item must have its own: which one is meant is lost")


def refuse_other_shapes(path: Path, source: Path, network: AWRSRNetwork, weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError if weights are not those of a network of this configuration."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != expected:
        differs = min(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        raise ValueError(
            f"{path} does not fit {source.name if source != path else 'its configuration'}: {differs} is "
            f"{shapes.get(differs, 'absent')}, must be {expected.get(differs, 'absent')}"
        )
