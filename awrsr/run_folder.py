"""The files of a run folder: saves and loads a model, and checks whether the folder holds a run that can be resumed."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import safetensors.torch
import torch
from safetensors import SafetensorError

from .config import AWRSRConfig, before_averaging, without_removed_options
from .files import atomic, read_ids, read_json, write_columns, write_json
from .models.network import AWRSRNetwork

CONFIG, ITEMS, WEIGHTS = "config.json", "items.parquet", "model.safetensors"  # a model
STATE, METRICS, RANKS = "last.ckpt", "metrics.json", "ranks_{part}.parquet"  # what training adds
MAY_CHANGE = {"epochs", "patience", "progress", "logger", "threads", "data", "path"}  # in a run that is resumed


class SavedModel(NamedTuple):
    """The content of the files of a model."""

    network: AWRSRNetwork
    item_ids: np.ndarray  # (N,)
    filter_seen: bool


def save_model(folder: str | Path, network: AWRSRNetwork, item_ids: np.ndarray, filter_seen: bool, **sections: Any) -> None:
    """Write config.json, items.parquet and model.safetensors. They appear in the folder only when all are complete.

    sections: further ones of config.json.
    """
    folder = Path(folder)
    with atomic(folder / ITEMS) as items, atomic(folder / CONFIG) as config, atomic(folder / WEIGHTS) as weights:
        write_columns(items, {"item": item_ids})
        data = sections.get("data", {}) | {"seen": not filter_seen}
        write_json(config, {"model": asdict(network.config)} | sections | {"data": data})
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        weights.write_bytes(safetensors.torch.save(state))


def load_model(folder: str | Path, **changes: Any) -> SavedModel:
    """Load what `save_model` wrote, in evaluation mode, without unpickling. changes: changed options, such as backend.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a file is damaged, or the weights are of another configuration.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS, ITEMS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no trained model: {name} is missing")
    stored = without_removed_options(read_json(folder / CONFIG), folder / CONFIG)
    try:
        stored_config = AWRSRConfig(**stored["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} is not a configuration of this model: {error}") from error
    with torch.device("meta"):  # without weights, which would be replaced; no number is drawn, and no size fills the memory
        network = AWRSRNetwork(replace(stored_config, **changes))
    try:
        item_ids = read_ids(folder / ITEMS)
        weights = safetensors.torch.load_file(folder / WEIGHTS)
    except (SafetensorError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    if len(item_ids) != network.config.num_items:
        count = f"{len(item_ids)} items, must hold {network.config.num_items}"
        raise ValueError(f"{folder / ITEMS} does not belong to the model of {CONFIG}: it holds {count}")
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != expected:
        differs = min(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        raise ValueError(
            f"{folder / WEIGHTS} does not fit {CONFIG}: {differs} is {shapes.get(differs, 'absent')}, "
            f"must be {expected.get(differs, 'absent')}"
        )
    # As they were saved, float64 too; copied to where torch aligns memory, on which the last bits of products may depend
    network.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    return SavedModel(network.eval(), item_ids, not stored.get("data", {}).get("seen", False))


def can_resume(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the folder holds a state of the run with this config.json. Raises ValueError if it holds another run or its model."""
    has_state = (folder / STATE).exists()
    if not (folder / CONFIG).exists() or not (has_state or (folder / WEIGHTS).exists()):
        return False
    defaults = flat({"model": asdict(AWRSRConfig()), "training": asdict(before_averaging())})
    old = defaults | flat(without_removed_options(read_json(folder / CONFIG), folder / CONFIG))
    new = defaults | flat(json.loads(json.dumps(config)))
    fixed = {"epochs"} if config["training"]["schedule"] == "cosine" else set()  # the learning rate of each step depends on them
    differs = sorted(
        name for name in old.keys() | new.keys() if old.get(name) != new.get(name) and name.split(".")[-1] not in MAY_CHANGE - fixed
    )
    if differs:
        changes = "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in differs[:3])
        why = " (with schedule 'cosine' the learning rate of each step depends on it)" if differs == ["training.epochs"] else ""
        run = "another run" if has_state else "the model of another run"
        raise ValueError(f"{folder} holds {run}: {changes}{why}. Choose another folder, or remove this one")
    return has_state


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Section.name -> value; a value outside a section keeps its name."""
    sections = {name: values if isinstance(values, dict) else {"": values} for name, values in config.items()}
    return {f"{section}.{name}".rstrip("."): value for section, values in sections.items() for name, value in values.items()}
