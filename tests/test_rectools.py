"""The adapter for RecTools, against RecTools."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

rectools = pytest.importorskip("rectools", reason="needs RecTools: make test-rectools")

import pandas as pd  # noqa: E402
from rectools.dataset import Dataset  # noqa: E402
from rectools.models import BERT4RecModel, SASRecModel  # noqa: E402
from rectools.models.nn.transformers.ligr import LiGRLayers  # noqa: E402
from rectools.models.nn.transformers.net_blocks import PreLNTransformerLayers  # noqa: E402
from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers  # noqa: E402

from awrsr_kernels.integrations.rectools import (  # noqa: E402
    RefinedLiGRLayers,
    RefinedPreLNTransformerLayers,
    RefinedTransformerLayers,
)

from .recommenders import WINDOW, as_refined, following, histories, run_example  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
PAST = histories()
EVENTS = pd.DataFrame(
    [(user, item, 1, when) for user, past in enumerate(PAST) for when, item in enumerate(past)],
    columns=["user_id", "item_id", "weight", "datetime"],
)
LAYERS = [
    (SASRecTransformerLayers, RefinedTransformerLayers, True),
    (PreLNTransformerLayers, RefinedPreLNTransformerLayers, True),
    (PreLNTransformerLayers, RefinedPreLNTransformerLayers, False),
    (LiGRLayers, RefinedLiGRLayers, True),
]
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.construct(EVENTS)


def make(layers: type = RefinedTransformerLayers, model: type = SASRecModel, epochs: int = 6, **options: Any) -> Any:
    usual = {"n_blocks": 1, "n_heads": 2, "n_factors": 32, "session_max_len": WINDOW, "lr": 0.01, "batch_size": 32}
    return model(
        **usual, epochs=epochs, transformer_layers_type=layers, transformer_layers_kwargs={"max_len": WINDOW, "rank": 8} | options
    )


def hits(model: Any, dataset: Dataset) -> float:
    """Share of users whose first recommendation is the item that follows."""
    first = model.recommend(users=range(len(PAST)), dataset=dataset, k=1, filter_viewed=False)
    return float((first.set_index("user_id")["item_id"].reindex(range(len(PAST))) == following(PAST)).mean())


@pytest.mark.parametrize(
    "options", [{"refinement": "simple", "per_head": True}, {"refinement": "value"}, {"tables": "content"}, {}]
)
def test_learns_and_keeps_its_tables(options: dict[str, Any], dataset: Dataset) -> None:
    model = make(**options)
    model.fit(dataset)
    assert hits(model, dataset) > 0.9  # chance is 1/30
    attention = model.torch_model.transformer_layers.transformer_blocks[0].multi_head_attn
    if attention.w_q is not None:  # as drawn: RecTools' own drawing would leave a third of that, or less
        assert all(0.7 < table.std() < 1.5 for table in (attention.w_q, attention.w_k))
    if not options:
        assert attention.gate.abs().max() > 0.01


def test_rows_count_from_the_last_item(dataset: Dataset) -> None:
    model = make(refinement="simple", epochs=1)
    model.fit(dataset)
    backbone = model.torch_model.train()
    backbone.zero_grad()
    backbone({"x": torch.tensor([[0] * (WINDOW - 3) + [4, 5, 6], [0] * (WINDOW - 1) + [9]])}).square().sum().backward()
    attention = backbone.transformer_layers.transformer_blocks[0].multi_head_attn
    grad = attention.parametrizations.w_q.original.grad.view(WINDOW, -1).abs().amax(1)
    assert (grad[-3:] > 0).all() and (grad[:-3] == 0).all()


@pytest.mark.parametrize("refinement", ["none", "additive"])
@pytest.mark.parametrize("own, refined, causal", LAYERS)
def test_without_refinement_it_is_the_library(own: type, refined: type, causal: bool, refinement: str, dataset: Dataset) -> None:
    """A learned gate starts at 0, so that "additive" is the library, too."""
    plain = SASRecModel(n_blocks=2, n_heads=2, n_factors=32, session_max_len=WINDOW, use_key_padding_mask=True,
                        use_causal_attn=causal, transformer_layers_type=own, epochs=1)  # fmt: skip
    plain.fit(dataset)
    backbone = plain.torch_model.eval()
    ours = refined(2, 32, 2, 0.2, refinement=refinement, max_len=WINDOW, causal=causal).eval()
    weights = {as_refined(name): value for name, value in backbone.transformer_layers.state_dict().items()}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all("parametrizations" in name or "gate" in name for name in missing)
    sessions = torch.tensor([[0] * (WINDOW - n) + list(range(1, n + 1)) for n in (WINDOW, 1, 5)])
    embeddings = backbone.item_model.get_all_embeddings()
    expected = backbone.encode_sessions({"x": sessions}, embeddings)
    backbone.transformer_layers = ours
    torch.testing.assert_close(backbone.encode_sessions({"x": sessions}, embeddings)[sessions > 0], expected[sessions > 0])


def test_more_padding_changes_nothing(dataset: Dataset) -> None:
    model = make(epochs=1, refinement="value")
    model.fit(dataset)
    backbone = model.torch_model.eval()
    wide = torch.tensor([[0] * (WINDOW - n) + list(range(1, n + 1)) for n in (2, 7)])
    scores, narrow = backbone({"x": wide}), backbone({"x": wide[:, -7:]})
    torch.testing.assert_close(scores[:, -1], narrow[:, -1])


def test_saved_and_loaded(dataset: Dataset, tmp_path: Path) -> None:
    model = make(epochs=2)
    model.fit(dataset)
    model.save(tmp_path / "model.pkl")
    loaded = SASRecModel.load(tmp_path / "model.pkl")
    found, again = (m.recommend(users=range(20), dataset=dataset, k=5, filter_viewed=True) for m in (model, loaded))
    pd.testing.assert_frame_equal(found, again)


def test_serves_the_bidirectional_model_too(dataset: Dataset) -> None:
    model = make(RefinedPreLNTransformerLayers, BERT4RecModel, epochs=15, causal=False)
    model.fit(dataset)
    assert hits(model, dataset) > 0.15
    with pytest.raises(ValueError, match="use_causal_attn is False; it must be True"):
        make(RefinedPreLNTransformerLayers, BERT4RecModel).fit(dataset)


def test_says_what_does_not_fit(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="max_len"):
        make(max_len=None).fit(dataset)
    with pytest.raises(ValueError, match="max_len is 5; it must be at least the longest history, 10 items"):
        make(max_len=5).fit(dataset)
    with pytest.raises(TypeError, match="ranks"):
        make(ranks=5).fit(dataset)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_example("RecTools")
    assert "score" in capsys.readouterr().out
