"""Pictures of the attention, what they show and what they say; the scoring path as a file that gives the model's scores."""

import builtins
import json
import subprocess
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
from awrsr.analysis.explain import picture, save, summary
from awrsr.export import export
from awrsr.models.attention import RefinedAttention

ITEMS = 30
WINDOW = 9


def weights(n: int = 6, heads: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Causal weights whose rows sum to 1, and others that sum to 2."""
    rng = np.random.default_rng(0)
    first, higher = (np.tril(x) / np.tril(x).sum(-1, keepdims=True) for x in rng.random((2, heads, n, n)))
    return first, first + higher


def names(n: int) -> list[str]:
    return [f"item {i}" for i in range(n)]


def draw(P: Any, M: Any, labels: list[Any], refinement: str = "simple", title: str = "") -> Any:
    return picture(P, M, labels, refinement=refinement, title=title)


def maps(figure: Any) -> list[np.ma.MaskedArray]:
    return [image.get_array() for axis in figure.axes for image in axis.get_images()]


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Imports of these packages fail."""
    real = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] in packages:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)


# Pictures.


def test_a_picture_has_p_m_and_their_difference_for_every_head() -> None:
    first, refined = weights()
    found = maps(draw(first, refined, names(6), refinement="additive", title="user 7"))
    assert len(found) == 2 * 3
    for head, images in enumerate((found[:3], found[3:])):
        for image, wanted in zip(images, (first[head], refined[head], refined[head] - first[head]), strict=True):
            np.testing.assert_allclose(np.tril(image.filled(0)), np.tril(wanted))


def test_the_future_is_blank_and_a_weight_of_zero_is_not() -> None:
    first, refined = weights()
    first[:, 3, 1] = 0
    for image in maps(draw(first, refined, names(6))):
        assert (image.mask == ~np.tril(np.ones((6, 6), dtype=bool))).all()


def test_p_and_m_share_a_scale_and_the_difference_is_centred_at_zero() -> None:
    first, refined = weights()
    images = [image for axis in draw(first, refined, names(6)).axes for image in axis.get_images()]
    p, m, difference = images[:3]
    assert (p.norm.vmin, p.norm.vmax) == (m.norm.vmin, m.norm.vmax) == (0, refined[0].max())
    assert difference.norm.vmin == -difference.norm.vmax == -np.abs(refined[0] - first[0]).max()
    assert float(difference.norm(0)) == pytest.approx(0.5)


def test_without_refinement_there_is_only_p_and_the_picture_says_so() -> None:
    first, _ = weights()
    figure = draw(first, first, names(6), refinement="none")
    assert len(maps(figure)) == 2
    assert "no refinement: M is P" in figure.get_supxlabel()


def test_the_last_row_is_marked() -> None:
    axis = draw(*weights(), names(6)).axes[0]
    (mark,) = axis.patches
    assert (mark.get_x(), mark.get_y(), mark.get_width(), mark.get_height()) == (-0.5, 4.5, 6, 1)
    last, before = axis.get_yticklabels()[-1], axis.get_yticklabels()[-2]
    assert (last.get_text(), last.get_fontweight()) == ("item 5", "bold")
    assert last.get_color() != before.get_color()


def test_items_are_on_the_outer_axes_alone() -> None:
    axes = [axis for axis in draw(*weights(), names(6)).axes if axis.get_images()]
    on_x, on_y = ([any(label.get_text() for label in getattr(axis, f"get_{way}ticklabels")()) for axis in axes] for way in "xy")
    assert on_x == [False] * 3 + [True] * 3
    assert on_y == [True, False, False] * 2


def test_labels_are_cut_and_never_read_as_mathematics(tmp_path: Path) -> None:
    labels = ["a name of a great many characters", "$\\frac$", "two\nlines"]
    figure = draw(*weights(3, 1), labels, title="$\\frac$")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a name of a great…", "$\\frac$", "two lines"]
    assert save(figure, tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(("n", "shown"), [(50, 50), (100, 50), (200, 50)])
def test_names_of_long_histories_are_thinned_and_do_not_touch(n: int, shown: int) -> None:
    figure = draw(*weights(n, 1), names(n))
    figure.draw_without_rendering()
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) == shown
    assert labels[-1].get_text() == f"item {n - 1}"
    boxes = [label.get_window_extent() for label in labels]
    assert all(upper.y0 >= lower.y1 - 0.5 for upper, lower in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize(("n", "heads"), [(1, 1), (5, 1), (12, 3), (50, 2)])
def test_nothing_of_a_picture_overlaps(n: int, heads: int) -> None:
    figure = draw(*weights(n, heads), names(n), refinement="additive", title="user 7, layer 1")
    figure.draw_without_rendering()
    axes = figure.axes[: 3 * heads]
    remark, title = (text.get_window_extent() for text in (figure._supxlabel, figure._suptitle))
    assert min(label.get_window_extent().y0 for axis in axes for label in axis.get_xticklabels()) > remark.y1
    assert max(axis.title.get_window_extent().y1 for axis in axes) < title.y0


def test_pictures_leave_pyplot_alone() -> None:
    code = (
        "import sys, numpy as np\nfrom awrsr.analysis.explain import picture\n"
        "assert 'matplotlib' not in sys.modules\n"
        "picture(np.ones((1, 1, 1)), np.ones((1, 1, 1)), ['a'], refinement='simple', title='')\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensors_with_gradients_are_taken() -> None:
    p, m = (torch.tensor(x, dtype=torch.bfloat16, requires_grad=True) for x in weights())
    assert len(maps(draw(p, m, names(6)))) == 6


@pytest.mark.parametrize(
    ("p", "m", "labels", "message"),
    [
        (np.ones((2, 3, 3)), np.ones((2, 3, 3)), 4, r"P has shape \(2, 3, 3\), must be \(heads, n, n\) for 4 labels"),
        (np.ones((3, 3)), np.ones((2, 3, 3)), 3, "P has shape"),
        (np.ones((2, 3, 3)), np.ones((1, 3, 3)), 3, r"P has shape \(2, 3, 3\) and M \(1, 3, 3\), must be the same"),
        (np.ones((2, 0, 0)), np.ones((2, 0, 0)), 0, "with an event or more"),
        (np.ones((1, 2, 2)), np.full((1, 2, 2), np.nan), 2, "M has weights that are NaN"),
    ],
)
def test_weights_that_do_not_fit_are_named(p: np.ndarray, m: np.ndarray, labels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(p, m, names(labels))


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "matplotlib")
    with pytest.raises(ImportError, match="pictures need matplotlib: pip install matplotlib"):
        draw(*weights(), names(6))


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")])
def test_the_suffix_says_the_format(suffix: str, start: bytes, tmp_path: Path) -> None:
    path = save(draw(*weights(), names(6)), tmp_path / f"a{suffix}")
    assert path.read_bytes().startswith(start)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.gif", "a"])
def test_another_suffix_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in one of \.png, \.svg, \.pdf"):
        save(draw(*weights(), names(6)), tmp_path / name)


def test_a_picture_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_text("old")
    figure = draw(*weights(), names(6))

    def stop(name: Path, **_: Any) -> None:
        name.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", stop)
    with pytest.raises(OSError, match="disk full"):
        save(figure, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_summary_names_the_strongest_weights_of_the_last_event() -> None:
    p, m = np.zeros((1, 3, 3)), np.zeros((1, 3, 3))
    p[0, -1], m[0, -1] = [0.1, 0.6, 0.3], [0.75, 0.25, 1.0]
    assert summary(p, m, ["tea", "pot", "cup"], top=2).splitlines() == [
        "The last event, cup, attends most to",
        "",
        "P of head 1             M of head 1",
        "0.600  pot    1 back    1.000  cup    itself",
        "0.300  cup    itself    0.750  tea    2 back",
    ]


def test_the_summary_says_that_without_refinement_m_is_p() -> None:
    first, _ = weights()
    text = summary(first, first, names(6))
    assert "(M is P)" in text and "M of head" not in text


@pytest.mark.parametrize("options", [{}, {"backbone": "stosa", "refinement": "stochastic"}], ids=str)
def test_the_maps_of_a_model_can_be_drawn(options: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(**options)
    history = [3, 5, 3, 8]
    for p, m in model.attention_maps(history):
        figure = draw(p, m, history, refinement=model.config.refinement)
        assert len(maps(figure)) == 6
        assert "The last event, 8" in summary(p, m, history)


# Export.


def small_model(**options: Any) -> AWRSR:
    torch.manual_seed(1)
    config = {"num_items": ITEMS, "max_len": WINDOW, "hidden": 16, "layers": 1, "heads": 2, "rank": 4} | options
    model = AWRSR(AWRSRConfig(**config)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # as far from the start as training goes, so that every part matters
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


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
def few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=["torch", "onnx"])
def format(request: pytest.FixtureRequest) -> str:
    if request.param == "onnx":
        pytest.importorskip("onnxscript", reason="needs onnx and onnxscript")
    return str(request.param)


def file(tmp_path: Path, format: str) -> Path:
    return tmp_path / f"model{exporting.SUFFIXES[format]}"


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("torch", {"refinement": "none", "norm": "post", "activation": "gelu"}),
        ("torch", {"refinement": "simple", "per_head": False}),
        ("torch", {"refinement": "value", "tables": "content"}),
        ("torch", {"refinement": "additive", "learned_gate": True, "layers": 2}),
        ("torch", {"refinement": "additive", "max_len": 1}),
        ("torch", {"backbone": "stosa", "refinement": "stochastic", "norm": "post", "activation": "elu"}),
        ("torch", {"backbone": "stosa", "refinement": "value", "tables": "content", "layers": 2}),
        ("torch", {"backbone": "stosa", "refinement": "none", "mean_branch": "published", "norm": "post"}),
        ("onnx", {"refinement": "value", "tables": "content"}),
        ("onnx", {"refinement": "additive", "learned_gate": True, "layers": 2, "learned_scale": True}),
        ("onnx", {"backbone": "stosa", "refinement": "stochastic", "norm": "post", "layers": 2}),
    ],
    indirect=["format"],
    ids=str,
)
def test_the_file_gives_the_models_scores_for_any_batch_and_window(format: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = small_model(**options)
    path = export(model, file(tmp_path, format), format=format)
    for size, window in ((1, 1), (1, WINDOW), (7, WINDOW), (3, 4)):
        items, lengths = batch(size, min(window, model.config.max_len))
        with torch.no_grad():
            wanted = model.scores_padded(items, lengths)
        torch.testing.assert_close(RUN[format](path, items, lengths), wanted, rtol=1e-4, atol=1e-4)


def test_the_file_gives_what_the_packed_model_gives(format: str, tmp_path: Path) -> None:
    model = small_model()
    path = export(model, file(tmp_path, format), format=format)
    history = torch.tensor([4, 1, 9, 4])
    with torch.no_grad():
        hidden = model(history, torch.tensor([0, 4], dtype=torch.int32), 4)
        wanted = hidden[-1] @ model.items.weight.T
    items = torch.full((2, WINDOW), 7)
    items[:, -4:] = history
    items[1, :-4] = torch.arange(WINDOW - 4)  # what stands before a history has no effect
    for row in RUN[format](path, items, torch.tensor([4, 4])):
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-4)


def test_configuration_and_item_ids_travel_in_the_file(format: str, tmp_path: Path) -> None:
    model = small_model()
    model.item_ids = np.array([f"é{i}" for i in range(ITEMS)])
    path = export(model, file(tmp_path, format), format=format, check=False)
    if format == "torch":
        found = {exporting.ABOUT: ""}
        torch.export.load(path, extra_files=found)
        about = json.loads(found[exporting.ABOUT])
    else:
        onnx = pytest.importorskip("onnx")
        about = json.loads({x.key: x.value for x in onnx.load(path).metadata_props}[exporting.ABOUT])
    assert about["item_ids"] == [f"é{i}" for i in range(ITEMS)]
    assert about["config"]["max_len"] == WINDOW


def test_onnx_inputs_are_named_with_their_dimensions(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(export(small_model(), tmp_path / "model.onnx", format="onnx", check=False)).graph
    shapes = {x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in (*graph.input, *graph.output)}
    assert shapes == {"items": ["batch", "length"], "lengths": ["batch"], "scores": ["batch", ITEMS]}


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = small_model(backend="torch").train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    export(model, tmp_path / "model.pt2")
    assert model.training and all(x.requires_grad for x in model.parameters())
    assert {module.backend for module in model.modules() if isinstance(module, RefinedAttention)} == {"torch"}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_scores_that_differ_from_the_models_are_not_written(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file(tmp_path, format)
    path.write_text("old")
    load = getattr(exporting, f"_load_{format}")
    monkeypatch.setattr(exporting, f"_load_{format}", lambda name: lambda *args: load(name)(*args) * 1.001)
    with pytest.raises(RuntimeError, match=r"was not written: its scores differ from the model's by"):
        export(small_model(), path, format=format)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_scores_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    model = small_model()
    with torch.no_grad():
        model.items.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="was not written"):
        export(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_the_check_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_compare", lambda *_: pytest.fail("compared"))
    assert export(small_model(), tmp_path / "model.pt2", check=False).is_file()


def test_the_check_sees_empty_and_full_histories_in_every_window() -> None:
    batches = list(exporting._batches(ITEMS, WINDOW))
    assert {items.shape[1] for items, _ in batches} == {1, 2, 5, WINDOW}
    assert all({0, 1, window} <= {int(n) for items, x in batches if items.shape[1] == window for n in x} for window in (1, 2, 5, 9))


def test_without_onnxruntime_a_warning_says_that_nothing_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    without(monkeypatch, "onnxruntime")
    with pytest.warns(UserWarning, match="was not checked against the model"):
        assert export(small_model(), tmp_path / "model.onnx", format="onnx").is_file()


def test_missing_onnx_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxscript")
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        export(small_model(), tmp_path / "model.onnx", format="onnx")
    assert not list(tmp_path.iterdir())


def test_export_is_quiet(format: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(small_model(), file(tmp_path, format), format=format)
    assert capfd.readouterr() == ("", "")


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
