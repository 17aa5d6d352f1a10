"""The adapter for RecTools, against RecTools."""

import copy
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

from awrsr_kernels import RefinedMultiheadAttention  # noqa: E402
from awrsr_kernels.integrations.packed import Packed  # noqa: E402
from awrsr_kernels.integrations.rectools import (  # noqa: E402
    RefinedLiGRLayers,
    RefinedPreLNTransformerLayers,
    RefinedTransformerLayers,
)

from .recommenders import (  # noqa: E402
    WINDOW,
    as_refined,
    check_autocast,
    check_nothing_to_encode,
    following,
    histories,
    run_example,
)

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


def recommendations(model: Any, dataset: Dataset) -> pd.DataFrame:
    return model.recommend(users=range(20), dataset=dataset, k=5, filter_viewed=True)


def attention_of(model: Any) -> Any:
    return model.torch_model.transformer_layers.transformer_blocks[0].multi_head_attn


@pytest.mark.parametrize(
    "options", [{"refinement": "simple", "per_head": True}, {"refinement": "value"}, {"tables": "content"}, {}]
)
def test_learns_and_keeps_its_tables(options: dict[str, Any], dataset: Dataset) -> None:
    model = make(**options)
    model.fit(dataset)
    assert hits(model, dataset) > 0.9  # chance is 1/30
    attention = attention_of(model)
    if attention.w_q is not None:  # as drawn: RecTools' own drawing would leave a third of that, or less
        assert all(0.7 < table.std() / attention.table_std < 1.5 for table in (attention.w_q, attention.w_k))
    if not options:
        assert attention.gate.abs().max() > 0.01


@pytest.mark.parametrize("options", [{"per_head": True, "gate_init": 0.5, "learned_scale": True, "lags": 2}, {"tables": "content"}])
def test_tables_and_gate_stay_as_drawn(options: dict[str, Any], dataset: Dataset) -> None:
    """As training starts, RecTools draws all it knows of two dimensions or more: linear maps, but no tables."""
    model = make(epochs=1, **options)
    model.fit(dataset)
    module, attention = model.lightning_model, attention_of(model)
    before = {name: value.clone() for name, value in attention.state_dict().items()}
    module.is_fitted = False
    module.on_train_start()
    kept = {name for name, value in attention.state_dict().items() if torch.equal(value, before[name])}
    assert kept == set(before) - {"qkv.weight", "out.weight"} and {"w_q", "to_tables"} & kept


@pytest.mark.parametrize("tables", ["position", "content"])
def test_state_dict_is_that_of_the_module(tables: str) -> None:
    layers = RefinedTransformerLayers(1, 32, 2, 0.2, max_len=WINDOW, rank=8, per_head=True, tables=tables)
    attention = layers.transformer_blocks[0].multi_head_attn
    plain = RefinedMultiheadAttention(32, 2, max_len=WINDOW, rank=8, per_head=True, tables=tables)
    rows = torch.randn(1, 7, 32)
    expected, where = plain.eval()(rows), Packed(torch.tensor([0, 7]), 7)
    for assign in (False, True):
        attention.load_state_dict({name: value.clone() for name, value in plain.state_dict().items()}, assign=assign)
        torch.testing.assert_close(attention.eval()(rows, rows, rows, attn_mask=where)[0], expected)
        assert all(value.dim() == 1 for name, value in attention.named_parameters() if "w" in name[:2] or "tables" in name)
    found = attention.state_dict()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in plain.state_dict().items()}
    plain.load_state_dict(found)
    with pytest.raises(RuntimeError, match="size mismatch for (w_q|to_tables)"):
        attention.load_state_dict(RefinedMultiheadAttention(32, 2, max_len=9, rank=4, tables=tables).state_dict(), strict=False)


def test_the_whole_network_is_copied_and_pickled(dataset: Dataset, tmp_path: Path) -> None:
    model = make(epochs=1)
    model.fit(dataset)
    network = model.torch_model.eval()
    torch.save(network, tmp_path / "network.pt")
    sessions = {"x": torch.tensor([[0] * (WINDOW - n) + list(range(1, n + 1)) for n in (2, 7)])}
    for again in (torch.load(tmp_path / "network.pt", weights_only=False), copy.deepcopy(network)):
        assert torch.equal(again(sessions), network(sessions))
        assert again.state_dict().keys() == network.state_dict().keys()


def test_rows_count_from_the_last_item(dataset: Dataset) -> None:
    model = make(refinement="simple", epochs=1)
    model.fit(dataset)
    backbone = model.torch_model.train()
    backbone.zero_grad()
    backbone({"x": torch.tensor([[0] * (WINDOW - 3) + [4, 5, 6], [0] * (WINDOW - 1) + [9]])}).square().sum().backward()
    attention = backbone.transformer_layers.transformer_blocks[0].multi_head_attn
    grad = dict(attention.named_parameters())["w_q"].grad.view(WINDOW, -1).abs().amax(1)
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
    assert not unexpected and all(name.rsplit(".")[-1] in ("w_q", "w_k", "gate") for name in missing)
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
    model.fit_trainer.save_checkpoint(tmp_path / "model.ckpt")
    resumed, fresh = SASRecModel.load_from_checkpoint(tmp_path / "model.ckpt"), make(epochs=1)
    fresh.fit(dataset).load_weights_from_checkpoint(tmp_path / "model.ckpt")
    expected, *others = (recommendations(m, dataset) for m in (model, loaded, resumed, fresh))
    for found in others:
        pd.testing.assert_frame_equal(found, expected)
    resumed.fit_partial(dataset, min_epochs=1, max_epochs=1)
    assert hits(resumed, dataset) > 0.5


def test_nothing_to_encode() -> None:
    layers, future = RefinedTransformerLayers(2, 32, 2, 0.2, max_len=WINDOW), torch.ones(WINDOW, WINDOW).triu(1).bool()
    check_nothing_to_encode(layers, lambda x, real: layers(x, real[..., None], future, None))


def test_the_timeline_mask_may_be_numbers() -> None:
    layers, future = RefinedTransformerLayers(2, 32, 2, 0.2, max_len=WINDOW).eval(), torch.ones(7, 7).triu(1).bool()
    x, real = torch.randn(2, 7, 32), torch.arange(7).expand(2, -1)[..., None] >= torch.tensor([3, 5])[:, None, None]
    torch.testing.assert_close(layers(x, real.float(), future, None), layers(x, real, future, None))


@pytest.mark.parametrize("layers", [RefinedTransformerLayers, RefinedPreLNTransformerLayers, RefinedLiGRLayers])
def test_half_precision(layers: type, dataset: Dataset) -> None:
    model = make(layers, epochs=1, gate_init=0.5)
    model.fit(dataset)
    sessions = {"x": torch.tensor([[0] * (WINDOW - n) + list(range(1, n + 1)) for n in (WINDOW, 1, 5)])}
    check_autocast(model.torch_model, attention_of(model), lambda: model.torch_model(sessions)[sessions["x"] > 0])


def test_serves_the_bidirectional_model_too(dataset: Dataset) -> None:
    model = make(RefinedPreLNTransformerLayers, BERT4RecModel, epochs=60, causal=False)
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
