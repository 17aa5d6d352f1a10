"""Names that people bring from other recommenders: the model, its options and its methods say what to write instead."""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from awrsr import AWRSR, AWRSRConfig, TrainingOptions, habits
from awrsr.cli import COMMANDS
from awrsr.recommender import METHODS

LISTS = [[1, 2, 3, 4]] * 3


def said(call: Callable[[], Any]) -> str:
    with pytest.raises(TypeError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize(
    "name, instead",
    [
        ("hidden_size", "hidden"),
        ("d_model", "hidden"),
        ("num_layers", "layers"),
        ("num_heads", "heads"),
        ("maxlen", "max_len"),
        ("n_items", "num_items"),
        ("dropout", "hidden_dropout or attention_dropout"),
        ("refinment", "refinement"),
    ],
)
def test_an_option_of_the_model_by_another_name_is_told_its_own(name: str, instead: str) -> None:
    for call, make in {"AWRSR": AWRSR, "AWRSRConfig": AWRSRConfig}.items():
        assert said(lambda make=make: make(**{name: 1})) == f"{call} has no option {name}: did you mean {instead}?"  # type: ignore[misc]
    assert said(lambda: replace(AWRSRConfig(), **{name: 1})).endswith(f"did you mean {instead}?")


@pytest.mark.parametrize(
    "name, advice",
    [
        ("lr", "did you mean learning_rate?"),
        ("epoch", "did you mean epochs?"),
        ("max_epochs", "did you mean epochs?"),
        ("n_epochs", "did you mean epochs?"),
        ("batch", "did you mean batch_size?"),
        ("random_state", "did you mean seed?"),
        ("output_dir", "did you mean out?"),
        ("hidden", "it is an option of the model: AWRSR(hidden=...)"),
        ("layers", "it is an option of the model: AWRSR(layers=...)"),
        ("hidden_size", "did you mean hidden? It is an option of the model: AWRSR(hidden=...)"),
        ("zzz", "its options are loss, negatives, "),
    ],
)
def test_an_option_that_fit_does_not_have_is_told_its_name_and_place(name: str, advice: str) -> None:
    assert said(lambda: AWRSR().fit(LISTS, **{name: 1})).startswith(f"fit has no option {name}: {advice}")
    if name != "output_dir":
        assert said(lambda: TrainingOptions(**{name: 1})).startswith(f"TrainingOptions has no option {name}: {advice}")


def test_an_option_of_training_is_sent_on_to_fit() -> None:
    assert said(lambda: AWRSR(epochs=3)) == "AWRSR has no option epochs: it is an option of training: fit(histories, epochs=...)"
    assert said(lambda: AWRSRConfig(lr=3)).endswith(  # type: ignore[call-arg]
        "did you mean learning_rate? It is an option of training: fit(histories, learning_rate=...)"
    )


@pytest.mark.parametrize(
    "options, instead",
    [
        (10, "options is 10, must be TrainingOptions; options go by name: fit(histories, epochs=10)"),
        ({"epochs": 3}, "options is of type dict, must be TrainingOptions; options go by name: fit(histories, **options)"),
        (np.arange(3), "options is of type ndarray, must be TrainingOptions; options go by name: fit(histories, epochs=20)"),
        (AWRSRConfig(), "options is of type AWRSRConfig, must be TrainingOptions; options go by name: fit(histories, epochs=20)"),
    ],
)
def test_what_stands_where_training_options_do_is_told_its_name(options: Any, instead: str) -> None:
    assert said(lambda: AWRSR().fit(LISTS, options)) == instead


@pytest.mark.parametrize(
    "config, instead",
    [
        ("additive", "config is 'additive', must be AWRSRConfig; options go by name: AWRSR(refinement='additive')"),
        (9, "config is 9, must be AWRSRConfig; options go by name: AWRSR(num_items=9)"),
        ({"layers": 1}, "config is of type dict, must be AWRSRConfig; options go by name: AWRSR(**options)"),
        (TrainingOptions(), "config is of type TrainingOptions, must be AWRSRConfig; options go by name: AWRSR(layers=1)"),
    ],
)
def test_what_stands_where_a_configuration_does_is_told_its_name(config: Any, instead: str) -> None:
    assert said(lambda: AWRSR(config)) == instead


def test_options_by_name_make_the_model_of_their_configuration() -> None:
    by_name = AWRSR(refinement="value", layers=1, num_items=5)
    assert by_name.config == AWRSRConfig(refinement="value", layers=1, num_items=5)
    assert AWRSR(by_name.config, heads=1).config == replace(by_name.config, heads=1)
    assert AWRSR(by_name.config).config == by_name.config and AWRSR().config == AWRSRConfig()
    with pytest.raises(ValueError, match="hidden is 15, must be a multiple of heads"):
        AWRSR(hidden=15)


@pytest.mark.parametrize("name", ["topk", "top_k", "n"])
def test_the_number_of_recommendations_by_another_name_is_told_its_own(name: str) -> None:
    assert said(lambda: AWRSR(num_items=5).recommend(LISTS, **{name: 3})) == f"recommend has no option {name}: did you mean k?"
    assert said(lambda: AWRSR(num_items=5).similar_items([1], **{name: 3})).endswith("did you mean k?")


@pytest.mark.parametrize(
    "name, method", [("predict", "recommend"), ("recomend", "recommend"), ("most_similar", "similar_items"), ("sav", "save")]
)
def test_a_method_by_another_name_is_told_its_own(name: str, method: str) -> None:
    model = AWRSR(num_items=5)
    with pytest.raises(AttributeError, match=f"^AWRSR has no attribute {name}: did you mean {method}\\?$"):
        getattr(model, name)
    assert not hasattr(model, "zzz") and hasattr(model, "blocks")


def test_who_asks_for_arguments_sees_the_real_ones() -> None:
    assert list(inspect.signature(AWRSR.recommend).parameters) == [
        "self", "histories", "k", "users", "candidates", "exclude", "titles", "fallback", "filter_seen", "filter_untrained",
        "batch_size", "user", "item", "time",
    ]  # fmt: skip
    for kind in (AWRSRConfig, TrainingOptions):
        assert list(inspect.signature(kind).parameters) == [each.name for each in fields(kind)]


def test_habits_lead_to_names_that_exist_and_take_none_away() -> None:
    calls = [[each.name for each in fields(kind)] for kind in (AWRSRConfig, TrainingOptions)]
    calls += [list(inspect.signature(call).parameters) for call in (AWRSR.fit, AWRSR.recommend, AWRSR.similar_items)]
    calls += [[*COMMANDS, *(name.split()[-1] for name in COMMANDS)]]
    calls += [list(METHODS), ["data", "run", "user", "output", *(f"{name}_column" for name in ("user", "item", "time"))]]
    for name, others in habits.HABITS.items():
        assert any(name in own for own in calls), name
        assert not any(name in own and other in own for own in calls[:5] for other in others.split()), name
