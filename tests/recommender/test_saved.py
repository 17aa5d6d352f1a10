"""What is saved comes back bit for bit; what is damaged or does not fit is refused; nothing is half-written or unpickled."""

import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch

from awrsr import AWRSR
from awrsr.model_file import CONFIG, ITEMS, WEIGHTS, read_model

from .runs import as_older, as_stored
from .small import PUBLISHED, make_model, same_weights

older_warns = pytest.mark.filterwarnings("ignore:.*written by an older version")
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
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


def version(folder: Path, name: str) -> Path:
    """A saved model, in three files if `name` is one that only older versions read."""
    saved(folder)
    return folder if name == WEIGHTS else as_older(folder)


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
    assert sorted(contents(tmp_path / "new" / "folder")) == [CONFIG, WEIGHTS]


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


@older_warns
@pytest.mark.parametrize("older", [False, True])
def test_a_model_saved_before_there_were_backbones_comes_back(older: bool, tmp_path: Path) -> None:
    model = saved(tmp_path)

    def before(stored: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in stored["model"].items() if name not in ("backbone", "mean_branch")}
        return stored | {"model": kept}

    edited(before, older)(tmp_path)
    assert AWRSR.load(tmp_path).config == model.config


@older_warns
@pytest.mark.parametrize("ids", IDS)
def test_a_model_of_three_files_loads_with_a_warning_and_is_saved_as_one(ids: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "one", ids)
    AWRSR.load(as_older(tmp_path / "one")).save(tmp_path / "two")
    with pytest.warns(UserWarning, match="was written by an older version, without checksums"):
        older = AWRSR.load(tmp_path / "one")
    assert older.ids().tolist() == model.ids().tolist() and older.config == model.config and same_weights(older, model)
    older.save(tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")  # items.parquet, which is not read any more, is gone
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AWRSR.load(tmp_path / "one")


def test_what_a_model_was_trained_on_is_saved_with_it(tmp_path: Path) -> None:
    make_model().save(tmp_path / "one", data={"data": "a.txt"}, training={"epochs": 3})
    model = AWRSR.load(tmp_path / "one")
    model.save(tmp_path / "two")
    assert AWRSR.load(tmp_path / "two").sections == model.sections
    assert model.sections == {"data": {"data": "a.txt", "seen": False}, "training": {"epochs": 3}}


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
    (version(tmp_path, name) / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no trained model: {name} is missing"):
        AWRSR.load(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere holds no trained model"):
        AWRSR.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [CONFIG, ITEMS, WEIGHTS])
def test_a_truncated_file_is_refused(name: str, tmp_path: Path) -> None:
    version(tmp_path, name)
    whole = (tmp_path / name).read_bytes().rstrip()
    for size in (0, 1, 7, 8, 9, 40, len(whole) // 2, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=str(tmp_path)):
            AWRSR.load(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, ITEMS, WEIGHTS])
def test_a_file_of_anything_is_refused(name: str, tmp_path: Path) -> None:
    version(tmp_path, name)
    for seed in range(3):
        (tmp_path / name).write_bytes(np.random.default_rng(seed).bytes(2000))
        with pytest.raises(ValueError, match=str(tmp_path)):
            AWRSR.load(tmp_path)


def test_one_flipped_bit_anywhere_in_a_model_is_noticed(tmp_path: Path) -> None:
    """In the weights, the ids, the configuration, the names of tensors, and the checksum itself."""
    saved(tmp_path)
    path, whole = tmp_path / WEIGHTS, (tmp_path / WEIGHTS).read_bytes()
    header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    rng = np.random.default_rng(0)
    for bit in [*range(0, 128), *rng.integers(header, size=400), *rng.integers(header, 8 * len(whole), 400)]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises((ValueError, FileNotFoundError), match=str(tmp_path)):
            read_model(tmp_path)


def test_a_damaged_model_says_what_to_do(tmp_path: Path) -> None:
    saved(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError) as error:
        AWRSR.load(tmp_path)
    advice = f"Restore it from a backup, or remove {tmp_path} and train again"
    assert str(error.value) == f"{tmp_path / WEIGHTS} is damaged: its checksum does not fit. {advice}"


def test_a_model_of_a_newer_version_is_not_guessed_at(tmp_path: Path) -> None:
    saved(tmp_path)
    edited(lambda c: c | {"format": 2})(tmp_path)
    with pytest.raises(ValueError, match="has format 2, this version reads up to 1: upgrade awrsr"):
        AWRSR.load(tmp_path)


@pytest.mark.parametrize("ids", [[1, 2, 2], ["a", "b", "a"], [1.5, 1.5, 2.5]])
def test_two_items_with_one_id_are_refused(ids: list[Any], tmp_path: Path) -> None:
    """Which of them is recommended would be lost."""
    make_model(num_items=3).save(tmp_path)
    pl.DataFrame({"item": ids}).write_parquet(as_older(tmp_path) / ITEMS)
    with pytest.raises(ValueError, match=f"{ITEMS} holds the id .* twice"):
        AWRSR.load(tmp_path)
    model = make_model(num_items=3)
    model.item_ids = np.array(ids)
    with pytest.raises(ValueError, match="item_ids holds the id .* twice"):
        model.save(tmp_path / "other")


def edited(change: Callable[[dict[str, Any]], Any], older: bool = False) -> Callable[[Path], None]:
    """Changes the configuration of a saved model, in its file or in that of an older version."""

    def edit(folder: Path) -> None:
        if not older:
            return as_stored(folder, change)
        config = json.loads((as_older(folder) / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(change(config)))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edited(lambda c: c | {"model": c["model"] | {"depth": 3}}), "is not a configuration of .* no option depth"),
        (edited(lambda c: c | {"model": c["model"] | {"layers": "2"}}), "is not a configuration of this model: layers is '2'"),
        (edited(lambda c: c | {"model": c["model"] | {"heads": 3}}), "is not a configuration of this model: hidden is 8"),
        (
            edited(lambda c: c | {"model": c["model"] | {"refinement": "x"}}),
            "is not a configuration of this model: refinement",
        ),
        (edited(lambda c: {"training": {}}, older=True), "is not a configuration of this model: 'model'"),
        (edited(lambda c: {"model": [1]}, older=True), "is not a configuration of this model"),
        (edited(lambda c: [c], older=True), "is not a configuration of this model"),
        (edited(lambda c: None, older=True), "is not a configuration of this model"),
        (edited(lambda c: "text", older=True), "is not a configuration of this model"),
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
@pytest.mark.parametrize("older", [False, True])
def test_weights_of_another_configuration_are_refused(older: bool, option: str, value: Any, name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    edited(lambda c: c | {"model": c["model"] | {option: value}}, older)(tmp_path)
    source = "config.json" if older else "its configuration"
    with pytest.raises(ValueError, match=f"does not fit {source}: .*{name}.* is .*, must be"):
        AWRSR.load(tmp_path)


def test_items_of_another_number_are_refused(tmp_path: Path) -> None:
    version(tmp_path, ITEMS)
    for count in (0, COUNT - 1, COUNT + 1):
        pl.DataFrame({"item": list(range(count))}).write_parquet(tmp_path / ITEMS)
        with pytest.raises(ValueError, match=f"holds {count} items, must hold {COUNT}"):
            AWRSR.load(tmp_path)


def test_items_without_their_column_are_refused(tmp_path: Path) -> None:
    version(tmp_path, ITEMS)
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
    version(tmp_path, name)
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
        "config": (json, "dumps"),
        "weights": (safetensors.torch, "save"),
        "disk full": (Path, "write_bytes"),
        "flush": (os, "fsync"),
    }[step]
    monkeypatch.setattr(owner, name, stop)


@pytest.mark.parametrize("step", ["config", "weights", "disk full", "flush"])
def test_a_save_that_fails_leaves_the_old_model(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path)
    before = contents(tmp_path)
    other = make_model(1, hidden=4)
    fail_at(step, monkeypatch)
    with pytest.raises(Stop):
        other.save(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", ["config", "weights", "disk full", "flush"])
def test_a_first_save_that_fails_leaves_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(step, monkeypatch)
    with pytest.raises(Stop):
        make_model().save(tmp_path)
    assert contents(tmp_path) == {}


def test_another_process_loads_one_model_or_the_other_never_parts_of_two(tmp_path: Path) -> None:
    """A model whose ids belong to other weights would recommend wrong items without a word."""
    saver = subprocess.Popen([sys.executable, "-c", SAVER, tmp_path], cwd=ROOT)
    try:
        found, until = Counter(), time.monotonic() + 60  # type: ignore[var-annotated]
        while min(found["even"], found["odd"]) < 15 and time.monotonic() < until and saver.poll() is None:
            with suppress(FileNotFoundError):  # before the first save
                model = AWRSR.load(tmp_path)
                parities = {int(float(w)) % 2 for w in model.items.weight.detach()[:, 0]} | {int(i) % 2 for i in model.ids()}
                assert len(parities) == 1, "ids of one model, weights of the other"
                found["odd" if parities == {1} else "even"] += 1
        assert min(found["even"], found["odd"]) >= 15, found
    finally:
        saver.kill()
        saver.wait()


SAVER = """
import sys
import numpy as np
import torch
from tests.recommender.small import make_model

models = make_model(num_items=20), make_model(num_items=20)
for parity, model in enumerate(models):
    model.item_ids = np.arange(20) * 2 + parity
    with torch.no_grad():
        model.items.weight.fill_(100.0 + parity)
while True:
    for model in models:
        model.save(sys.argv[1])
"""


def test_files_can_be_read_as_any_new_file(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "usual").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "usual").stat().st_mode}
