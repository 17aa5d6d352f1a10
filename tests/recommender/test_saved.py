"""What is saved comes back bit for bit; what is damaged or does not fit is refused; nothing is half-written or unpickled."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch

from awrsr import AWRSR, files
from awrsr.run_folder import CONFIG, ITEMS, WEIGHTS

from .small import PUBLISHED, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 23
IDS = {
    "none": None,
    "int64": np.arange(COUNT) * 10**15 - 5,
    "text": np.array([f'é,\n"{i}' for i in range(COUNT)]),
    "float": np.arange(COUNT) + 0.5,
}


def saved(folder: Path, ids: str = "text", seed: int = 0, **changes: Any) -> AWRSR:
    model = make_model(seed, **changes)
    model.item_ids = IDS[ids]
    model.save(folder)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Round trips


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"refinement": "none"},
        {"tables": "content", "learned_gate": True},
        {"per_head": False, "norm": "post", "activation": "gelu", "feedforward": 3},
        {"backbone": "stosa", "refinement": "stochastic", "norm": "post"},
        PUBLISHED,
    ],
    ids=str,
)
def test_a_model_comes_back_bit_for_bit(ids: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = saved(tmp_path / "new" / "folder", ids, **changes)
    other = AWRSR.load(tmp_path / "new" / "folder")
    assert other.config == model.config and not other.training
    assert other.ids().tolist() == model.ids().tolist()
    state = other.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    history = model.ids()[:4].tolist()
    assert other.recommend([history], 7).equals(model.recommend([history], 7))
    assert sorted(contents(tmp_path / "new" / "folder")) == sorted([CONFIG, ITEMS, WEIGHTS])


def test_precision_comes_back(tmp_path: Path) -> None:
    model = make_model().double()
    model.save(tmp_path)
    other = AWRSR.load(str(tmp_path))
    for name, weight in model.state_dict().items():
        assert other.state_dict()[name].dtype == torch.float64 and torch.equal(other.state_dict()[name], weight), name


def test_a_loaded_model_can_be_trained_on(tmp_path: Path) -> None:
    saved(tmp_path)
    model = AWRSR.load(tmp_path).train()
    assert all(weight.requires_grad and weight.is_leaf for weight in model.parameters())
    before = contents(tmp_path)
    model(torch.tensor([1, 2]), torch.tensor([0, 2]), 2).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert contents(tmp_path) == before  # weights are no view of the file


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    AWRSR.load(tmp_path / "one").save(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_configuration_is_json_with_further_sections(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path, training={"epochs": 3})
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    assert config["training"] == {"epochs": 3} and config["model"]["max_len"] == model.config.max_len
    assert AWRSR.load(tmp_path).config == model.config


def test_a_model_saved_before_there_were_backbones_comes_back(tmp_path: Path) -> None:
    model = saved(tmp_path)
    edited(lambda c: {"model": {name: value for name, value in c["model"].items() if name not in ("backbone", "mean_branch")}})(
        tmp_path
    )
    assert AWRSR.load(tmp_path).config == model.config


def test_the_backend_may_be_changed_on_loading(tmp_path: Path) -> None:
    model = saved(tmp_path)
    other = AWRSR.load(tmp_path, backend="reference")
    assert other.config.backend == "reference"
    one, two = (each.recommend([model.ids()[:5].tolist()], 5)["score"].to_list() for each in (model, other))
    assert one == pytest.approx(two, rel=1e-4)


def test_weights_shared_or_not_contiguous_are_saved(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.blocks[0].widen.weight = torch.nn.Parameter(model.blocks[0].widen.weight.T)  # type: ignore[index]
    model.save(tmp_path)
    name = "blocks.0.widen.weight"
    assert torch.equal(AWRSR.load(tmp_path).state_dict()[name], model.state_dict()[name])


# What is refused


@pytest.mark.parametrize("name", [CONFIG, ITEMS, WEIGHTS])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no trained model: {name} is missing"):
        AWRSR.load(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere holds no trained model"):
        AWRSR.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [CONFIG, ITEMS, WEIGHTS])
def test_a_truncated_file_is_refused(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    whole = (tmp_path / name).read_bytes().rstrip()
    for size in (0, 1, 7, 8, 9, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(tmp_path)):
            AWRSR.load(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, ITEMS, WEIGHTS])
def test_a_file_of_anything_is_refused(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    for seed in range(3):
        (tmp_path / name).write_bytes(np.random.default_rng(seed).bytes(2000))
        with pytest.raises(ValueError, match=str(tmp_path)):
            AWRSR.load(tmp_path)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(change(config)))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(lambda c: {"model": c["model"] | {"depth": 3}}), "is not a configuration of .* no option depth"),
        (edited(lambda c: {"model": c["model"] | {"layers": "2"}}), "is not a configuration of this model: layers is '2'"),
        (edited(lambda c: {"model": c["model"] | {"heads": 3}}), "is not a configuration of this model: hidden is 8"),
        (
            edited(lambda c: {"model": c["model"] | {"refinement": "x"}}),
            "is not a configuration of this model: refinement",
        ),
        (edited(lambda c: {"training": {}}), "is not a configuration of this model: 'model'"),
        (edited(lambda c: {"model": [1]}), "is not a configuration of this model"),
        (edited(lambda c: [c]), "is not a configuration of this model"),
        (edited(lambda c: None), "is not a configuration of this model"),
        (edited(lambda c: "text"), "is not a configuration of this model"),
    ],
)
def test_another_configuration_is_refused(edit: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path)
    with pytest.raises(ValueError, match=message):
        AWRSR.load(tmp_path)


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("hidden", 16, "attention.out.bias"),
        ("layers", 3, "blocks.2"),
        ("layers", 1, "blocks.1"),
        ("max_len", 10, "w_k"),
        ("rank", 4, "w_k"),
        ("refinement", "none", "w_k"),
        ("tables", "content", "to_tables"),
        ("backbone", "stosa", "attention.cov_out.bias"),
    ],
)
def test_weights_of_another_configuration_are_refused(option: str, value: Any, name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    edited(lambda c: {"model": c["model"] | {option: value}})(tmp_path)
    with pytest.raises(ValueError, match=f"does not fit config.json: .*{name}.* is .*, must be"):
        AWRSR.load(tmp_path)


def test_items_of_another_number_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    for count in (0, COUNT - 1, COUNT + 1):
        pl.DataFrame({"item": list(range(count))}).write_parquet(tmp_path / ITEMS)
        with pytest.raises(ValueError, match=f"holds {count} items, must hold {COUNT}"):
            AWRSR.load(tmp_path)


def test_items_without_their_column_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    pl.DataFrame({"items": list(range(COUNT))}).write_parquet(tmp_path / ITEMS)
    with pytest.raises(ValueError, match="is damaged: .*item"):
        AWRSR.load(tmp_path)


def test_an_unknown_change_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(TypeError, match="depth"):
        AWRSR.load(tmp_path, depth=3)
    with pytest.raises(ValueError, match="^backend is 'cuda'"):
        AWRSR.load(tmp_path, backend="cuda")


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    before = torch.get_rng_state()
    AWRSR.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [CONFIG, ITEMS, WEIGHTS])
@pytest.mark.parametrize(
    "write", [lambda trap, path: path.write_bytes(pickle.dumps(trap)), torch.save], ids=["pickle", "torch.save"]
)
def test_nothing_is_unpickled(name: str, write: Callable[[Trap, Path], Any], tmp_path: Path) -> None:
    saved(tmp_path)
    write(Trap(tmp_path / "sprung"), tmp_path / name)
    with pytest.raises(ValueError, match=str(tmp_path)):
        AWRSR.load(tmp_path)
    assert not (tmp_path / "sprung").exists()


# Nothing half-written


class Stop(Exception):
    pass


def stop(*_: Any, **__: Any) -> None:
    raise Stop


def fail_at(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name = {
        "items": (pl.DataFrame, "write_parquet"),
        "config": (json, "dumps"),
        "weights": (safetensors.torch, "save"),
        "disk full": (Path, "write_bytes"),
    }[step]
    monkeypatch.setattr(owner, name, stop)


@pytest.mark.parametrize("step", ["items", "config", "weights", "disk full"])
def test_a_save_that_fails_leaves_the_old_model(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    before = contents(tmp_path)
    other = make_model(1, hidden=4)
    fail_at(step, monkeypatch)
    with pytest.raises(Stop):
        other.save(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", ["items", "config", "weights", "disk full"])
def test_a_first_save_that_fails_leaves_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(step, monkeypatch)
    with pytest.raises(Stop):
        make_model().save(tmp_path)
    assert contents(tmp_path) == {}


def test_files_take_their_place_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies before that leaves the old model, whatever else it leaves."""
    model, moved = saved(tmp_path), []
    before, move = contents(tmp_path), os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name in (CONFIG, ITEMS, WEIGHTS):
            moved.append(Path(target).name)
            if len(moved) == 1:
                assert {name: data for name, data in contents(tmp_path).items() if name in before} == before
                assert len(contents(tmp_path)) == 6
        move(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    model.save(tmp_path)
    assert sorted(moved) == sorted([CONFIG, ITEMS, WEIGHTS]) and len(contents(tmp_path)) == 3


def test_files_can_be_read_as_any_new_file(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "usual").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "usual").stat().st_mode}
