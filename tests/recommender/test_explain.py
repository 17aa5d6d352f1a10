"""Pictures of the attention: what they show and what they say."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from awrsr.analysis.explain import picture, save, summary

from .small import make_model


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


@pytest.mark.parametrize(("n", "shown"), [(50, 50), (200, 50)])
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
        (np.ones((2, 0, 0)), np.ones((2, 0, 0)), 0, "at least one event"),
        (np.ones((1, 2, 2)), np.full((1, 2, 2), np.nan), 2, "M has weights that are NaN"),
    ],
)
def test_weights_that_do_not_fit_are_named(p: np.ndarray, m: np.ndarray, labels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(p, m, names(labels))


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
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
def test_the_maps_of_a_model_can_be_drawn(options: dict[str, Any]) -> None:
    model, history = make_model(**options), [3, 5, 3, 8]
    for p, m in model.attention_maps(history):
        figure = draw(p, m, history, refinement=model.config.refinement)
        assert len(maps(figure)) == 6
        assert "The last event, 8" in summary(p, m, history)
