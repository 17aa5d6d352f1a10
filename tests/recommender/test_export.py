"""The scoring path as a file: it gives the model's scores, or is not written."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from awrsr import AWRSR, AWRSRConfig
from awrsr import export as exporting
from awrsr.export import export
from awrsr.models.attention import RefinedAttention

from .small import ITEMS, WINDOW, make_model


def small_model(**options: Any) -> AWRSR:
    return make_model(**({"layers": 1} | options))


def batch(size: int, window: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(ITEMS, (size, window), generator=generator)
    return items, torch.randint(0, window + 1, (size,), generator=generator)


def run_onnx(path: Path, items: Tensor, lengths: Tensor) -> Tensor:
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return torch.from_numpy(session.run(["scores"], {"items": items.numpy(), "lengths": lengths.numpy()})[0])


def run_torch(path: Path, items: Tensor, lengths: Tensor) -> Tensor:
    return torch.export.load(path).module()(items, lengths)


RUN = {"torch": run_torch, "onnx": run_onnx}


@pytest.fixture(autouse=True)
def few_threads(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module", params=["torch", "onnx"])
def format(request: pytest.FixtureRequest) -> str:
    if request.param == "onnx":
        pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    return str(request.param)


@pytest.fixture(scope="module")
def exported(format: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[AWRSR, Path]:
    """A model in training mode, and its file, written without a check."""
    model = small_model().train()
    model.item_ids = np.array([f"é{i}" for i in range(ITEMS)])
    path = tmp_path_factory.mktemp("exported") / f"model{exporting.SUFFIXES[format]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_compare", lambda *_: pytest.fail("compared"))
        return model, export(model, path, format=format, check=False)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("torch", {"refinement": "simple", "per_head": False, "norm": "post", "activation": "gelu"}),
        ("torch", {"refinement": "additive", "learned_gate": True, "layers": 2}),
        ("torch", {"lags": 2, "suffix": 3, "smeared_keys": True, "shift": "heads", "plain_heads": 1, "learned_scale": True}),
        ("onnx", {"refinement": "none", "suffix": 3, "shift": "heads", "plain_heads": 1, "unigram": True}),
        ("torch", {"refinement": "additive", "max_len": 1}),
        ("torch", {"backbone": "stosa", "refinement": "stochastic", "norm": "post", "activation": "elu"}),
        ("torch", {"backbone": "stosa", "refinement": "value", "tables": "content"}),
        ("onnx", {"refinement": "value", "tables": "content"}),
        ("onnx", {"refinement": "additive", "learned_gate": True}),
        ("onnx", {"backbone": "stosa", "refinement": "stochastic", "norm": "post"}),
    ],
    indirect=["format"],
    ids=str,
)
def test_the_file_gives_the_models_scores_for_any_batch_and_window_and_its_writing_is_quiet(
    format: str, options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = small_model(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = export(model, tmp_path / f"model{exporting.SUFFIXES[format]}", format=format)
    assert capfd.readouterr() == ("", "")
    for size, window in ((1, 1), (1, WINDOW), (7, WINDOW), (3, 4)):
        items, lengths = batch(size, min(window, model.config.max_len))
        with torch.no_grad():
            wanted = model.scores_padded(items, lengths)
        torch.testing.assert_close(RUN[format](path, items, lengths), wanted, rtol=1e-4, atol=1e-4)


def test_the_file_gives_what_the_packed_model_gives(format: str, exported: tuple[AWRSR, Path]) -> None:
    model, history = small_model(), torch.tensor([4, 1, 9, 4])
    with torch.no_grad():
        hidden = model(history, torch.tensor([0, 4], dtype=torch.int32), 4)
        wanted = hidden[-1] @ model.items.weight.T
    items = torch.full((2, WINDOW), 7)
    items[:, -4:] = history
    items[1, :-4] = torch.arange(WINDOW - 4)  # what stands before a history has no effect
    for row in RUN[format](exported[1], items, torch.tensor([4, 4])):
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)


def test_configuration_and_item_ids_travel_in_the_file(format: str, exported: tuple[AWRSR, Path]) -> None:
    if format == "torch":
        found = {exporting.ABOUT: ""}
        torch.export.load(exported[1], extra_files=found)
        about = json.loads(found[exporting.ABOUT])
    else:
        stored = pytest.importorskip("onnx").load(exported[1])
        about = json.loads({x.key: x.value for x in stored.metadata_props}[exporting.ABOUT])
        ends = (*stored.graph.input, *stored.graph.output)
        shapes = {x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in ends}
        assert shapes == {"items": ["batch", "length"], "lengths": ["batch"], "scores": ["batch", ITEMS]}
    assert about["item_ids"] == [f"é{i}" for i in range(ITEMS)]
    assert about["config"]["max_len"] == WINDOW


def test_exporting_leaves_the_model_alone(exported: tuple[AWRSR, Path]) -> None:
    model, before = exported[0], small_model().state_dict()
    assert model.training and all(x.requires_grad for x in model.parameters())
    assert {module.backend for module in model.modules() if isinstance(module, RefinedAttention)} == {"torch"}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_scores_that_differ_from_the_models_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("old")
    load = exporting._load_torch
    monkeypatch.setattr(exporting, "_load_torch", lambda name: lambda *args: load(name)(*args) * 1.001)
    with pytest.raises(RuntimeError, match=r"was not written: its scores differ from the model's by"):
        export(small_model(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_scores_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.items.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="was not written"):
        export(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_the_check_sees_empty_and_full_histories_in_every_window() -> None:
    batches = list(exporting._batches(ITEMS, WINDOW))
    assert {items.shape[1] for items, _ in batches} == {1, 2, 5, WINDOW}
    assert all({0, 1, window} <= {int(n) for items, x in batches if items.shape[1] == window for n in x} for window in (1, 2, 5, 9))


def test_without_onnxruntime_a_warning_says_that_nothing_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match="was not checked against the model"):
        assert export(small_model(), tmp_path / "model.onnx", format="onnx").is_file()


def test_missing_onnx_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        export(small_model(), tmp_path / "model.onnx", format="onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_too_large_for_onnx_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "ONNX_LIMIT", 1000)
    with pytest.raises(ValueError, match="must be below 2 GiB for ONNX"):
        export(small_model(), tmp_path / "model.onnx", format="onnx")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.pt2", {"format": "tflite"}, "format is 'tflite', must be one of torch, onnx"),
        ("model.pt", {}, r"must end in \.pt2 for format 'torch'"),
        ("model.pt2", {"format": "onnx"}, r"must end in \.onnx for format 'onnx'"),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(small_model(), tmp_path / name, **options)


def test_a_model_that_was_not_fitted_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model has no items"):
        export(AWRSR(AWRSRConfig()), tmp_path / "model.pt2")
