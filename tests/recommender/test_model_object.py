"""A model as a Python object: a module among modules, copies, attributes of its network, and nothing left behind by `fit`."""

import copy
import logging
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from awrsr import AWRSR

from .runs import QUICK, config, histories
from .small import make_model, same_weights

pytestmark = pytest.mark.usefixtures("one_thread")


def test_weights_go_by_the_names_that_files_give_them(tmp_path: Path) -> None:
    model, other = make_model(), make_model(1)
    model.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = stored.keys() - {"item_ids"}
    assert model.state_dict().keys() == names == dict(model.named_parameters()).keys() and "items.weight" in names
    other.load_state_dict(stored)
    assert same_weights(model, other)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"items.weight": stored["items.weight"]})


def test_a_model_may_be_part_of_another_module() -> None:
    one, other = (torch.nn.ModuleDict({"model": make_model(seed), "more": torch.nn.Linear(2, 2)}) for seed in (0, 1))
    assert {"model.items.weight", "more.weight"} <= one.state_dict().keys()
    other.load_state_dict(one.state_dict())
    assert same_weights(one["model"], other["model"])
    assert len(list(one.parameters())) == len(one.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_their_own(copied: Callable[[AWRSR], AWRSR]) -> None:
    model, other = make_model(), make_model(1)
    twin = copied(model)
    assert twin.recommend([[1, 2, 3]], 5).equals(model.recommend([[1, 2, 3]], 5))
    twin.load_state_dict(other.state_dict())
    assert same_weights(twin, other) and not same_weights(twin, model)


def test_the_attributes_of_the_network_are_those_of_the_model() -> None:
    model = make_model()
    assert model.items is model.network.items and model.config is model.network.config
    items, lengths = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    assert torch.equal(model.scores_padded(items, lengths), model.network.scores_padded(items, lengths))
    with pytest.raises(AttributeError, match="no attribute 'itms'"):
        model.itms  # noqa: B018


def test_fit_without_a_folder_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))

    def surroundings() -> list[Any]:
        level = logging.getLogger("lightning.pytorch").level
        numpy = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
        return [torch.get_rng_state().tolist(), numpy, random.getstate(), list(warnings.filters), level]

    model = AWRSR(config())
    before = surroundings()
    model.fit(histories(), epochs=2, **QUICK)
    assert surroundings() == before
    assert list(tmp_path.rglob("*")) == [tmp_path / "here", tmp_path / "temporary"]
    assert not model.training and model.config.num_items == 24
