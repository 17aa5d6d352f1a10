"""The adapter for RePlay, against RePlay."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

replay = pytest.importorskip("replay", reason="needs RePlay: make test-replay")

import lightning  # noqa: E402
import pandas as pd  # noqa: E402
from replay.data import FeatureHint, FeatureType  # noqa: E402
from replay.data.nn import ParquetModule, TensorFeatureInfo, TensorSchema  # noqa: E402
from replay.nn.lightning import LightningModule  # noqa: E402
from replay.nn.lightning.callback import PandasTopItemsCallback  # noqa: E402
from replay.nn.lightning.optimizer import OptimizerFactory  # noqa: E402
from replay.nn.mask import DefaultAttentionMask  # noqa: E402
from replay.nn.sequential import SasRec  # noqa: E402
from replay.nn.transform.template import make_default_sasrec_transforms  # noqa: E402

from awrsr_kernels.integrations.replay import NoAttentionMask, RefinedEncoder  # noqa: E402

from .recommenders import (  # noqa: E402
    ITEMS,
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
HINTS = {"feature_type": FeatureType.CATEGORICAL, "feature_hint": FeatureHint.ITEM_ID}
ITEM = TensorFeatureInfo("item_id", is_seq=True, embedding_dim=32, cardinality=ITEMS, padding_value=ITEMS, **HINTS)
SCHEMA = TensorSchema([ITEM])
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ParquetModule:
    path = str(tmp_path_factory.mktemp("replay") / "histories.parquet")
    pd.DataFrame({"user_id": range(len(PAST)), "item_id": PAST}).to_parquet(path)
    read = {
        name: {"user_id": {}, "item_id": {"shape": WINDOW + more, "padding": ITEMS}}
        for name, more in (("train", 1), ("predict", 0))
    }
    transforms = make_default_sasrec_transforms(SCHEMA)
    return ParquetModule(32, read, transforms, train_path=path, predict_path=path)


def make(refined: bool = True, window: int = WINDOW, **options: Any) -> SasRec:
    model = SasRec.from_params(SCHEMA, embedding_dim=32, num_heads=2, num_blocks=2, max_sequence_length=window, dropout=0.1)
    if refined:
        model.body.encoder = RefinedEncoder(32, 2, 2, 0.1, "relu", **{"max_len": window, "rank": 8} | options)
        model.body.attn_mask_builder = NoAttentionMask()
        model.reset_parameters()
    return model


def trained(model: SasRec, data: ParquetModule, epochs: int = 8) -> tuple[LightningModule, lightning.Trainer, Any]:
    """The model after training by RePlay's module and Lightning's trainer; the trainer; the first recommendation of each user."""
    module, first = LightningModule(model, OptimizerFactory(learning_rate=0.01)), PandasTopItemsCallback(1, "user_id", "item_id")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, limit_val_batches=0, callbacks=[first], accelerator="cpu", **quiet)
    trainer.fit(module, data)
    trainer.predict(module, data)
    return module, trainer, first.get_result().sort_values("user_id")["item_id"].tolist()


def batch(*lengths: int, window: int = WINDOW) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Features and padding mask of histories of so many items, padded on the left."""
    items = torch.tensor([[ITEMS] * (window - n) + list(range(n)) for n in lengths])
    return {"item_id": items}, items != ITEMS


@pytest.mark.parametrize(
    "options", [{"refinement": "simple", "per_head": True}, {"refinement": "value"}, {"tables": "content"}, {}]
)
def test_learns_what_follows(options: dict[str, Any], data: ParquetModule) -> None:
    model = make(**options)
    before = {name: value.clone() for name, value in model.body.encoder.named_parameters()}
    *_, found = trained(model, data)
    assert sum(a == b for a, b in zip(found, following(PAST), strict=True)) > 0.9 * len(PAST)  # chance is 1/30
    for name, value in model.body.encoder.named_parameters():
        assert not torch.equal(value, before[name]), name


def test_resetting_draws_tables_at_their_own_scale() -> None:
    attention = make(refinement="simple").body.encoder.attention_layers[0]
    assert 0.7 < attention.w_q.std() / attention.table_std < 1.5  # Xavier's would be a tenth of that


@pytest.mark.parametrize("refinement", ["none", "additive"])
@pytest.mark.parametrize("masks", ["none", "RePlay's"])
def test_without_refinement_it_is_the_library(refinement: str, masks: str) -> None:
    """A learned gate starts at 0, so that "additive" is the library, too. RePlay's mask says the same as none."""
    plain, ours = make(refined=False).eval(), make(refinement=refinement).eval()
    if masks != "none":
        ours.body.attn_mask_builder = DefaultAttentionMask("item_id", num_heads=2)
    missing, unexpected = ours.load_state_dict(
        {as_refined(name): value for name, value in plain.state_dict().items()}, strict=False
    )
    assert not unexpected and all(name.rsplit(".")[-1] in ("w_q", "w_k", "gate") for name in missing)
    features, real = batch(WINDOW, 1, 6)
    torch.testing.assert_close(ours.body(features, real)[real], plain.body(features, real)[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(features, real)["logits"], plain(features, real)["logits"], rtol=1e-4, atol=1e-5)


def test_more_padding_changes_nothing() -> None:
    model = make(refinement="value").eval()
    wide, narrow = (model(*batch(2, 6, window=window))["logits"] for window in (WINDOW, 6))
    torch.testing.assert_close(wide, narrow)


def test_a_history_may_be_empty() -> None:
    assert make(refinement="simple").eval()(*batch(0))["logits"].isfinite().all()


def test_nothing_to_encode() -> None:
    encoder, own = make().body.encoder, DefaultAttentionMask("item_id", num_heads=2)
    check_nothing_to_encode(encoder, lambda x, real: encoder({}, x, real, None))
    check_nothing_to_encode(encoder, lambda x, real: encoder({}, x, real, own({"item_id": real}, real)))


def test_a_step_of_empty_histories_has_gradients() -> None:
    """As with RePlay's own encoder: no parameter is left without a gradient."""
    features, real = batch(0, 0)
    for model in (make(), make(refined=False)):
        model.train().body(features, real).sum().backward()
        assert all(value.grad is not None for value in model.body.parameters())


def test_the_padding_mask_may_be_numbers() -> None:
    encoder, (_, real) = make().eval().body.encoder, batch(3, 5)
    x = torch.randn(2, WINDOW, 32)
    torch.testing.assert_close(encoder({}, x, real.float(), None), encoder({}, x, real, None))


def test_half_precision() -> None:
    model = make(gate_init=0.5)
    features, real = batch(WINDOW, 1, 6)
    check_autocast(model, model.body.encoder.attention_layers[0], lambda: model.body(features, real)[real])


def test_saved_and_loaded(data: ParquetModule, tmp_path: Path) -> None:
    module, trainer, _ = trained(make(), data, epochs=2)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LightningModule.load_from_checkpoint(tmp_path / "model.ckpt", model=make(), weights_only=False)
    features, real = batch(3, 5)
    expected, found = (one.eval().model(features, real)["logits"] for one in (module, loaded))
    torch.testing.assert_close(found, expected)


def test_says_what_does_not_fit() -> None:
    features, real = batch(4, 9)
    model = make()
    with pytest.raises(ValueError, match="attention_mask is another"):
        model.body.encoder(features, torch.zeros(2, WINDOW, 32), real, torch.zeros(4, WINDOW, WINDOW))  # sees the future
    for shape in ((WINDOW, WINDOW), (3, WINDOW, WINDOW), (4, 5, 5)):
        with pytest.raises(ValueError, match="attention_mask is of shape .* with B = 2, L = 16"):
            model.body.encoder(features, torch.zeros(2, WINDOW, 32), real, torch.zeros(shape))
    with pytest.raises(ValueError, match="max_len is 5; it must be at least the longest history, 9 items"):
        make(max_len=5).body(features, real)
    with pytest.raises(TypeError, match="ranks"):
        make(ranks=5)


def test_the_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_example("RePlay")
    assert "rating" in capsys.readouterr().out
