"""The adapter for RecBole, against RecBole."""

from pathlib import Path
from typing import Any

import pytest
import torch

recbole = pytest.importorskip("recbole", reason="needs RecBole: make test-recbole")

from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.model.sequential_recommender import SASRec  # noqa: E402
from recbole.trainer import Trainer  # noqa: E402

from awrsr_kernels.integrations.recbole import DEFAULTS, RefinedSASRec  # noqa: E402

from .recommenders import WINDOW, check_autocast, check_nothing_to_encode, histories, run_example  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
SETTINGS = {
    "data_path": ".", "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "MAX_ITEM_LIST_LENGTH": WINDOW,
    "train_neg_sample_args": None, "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "hidden_size": 32, "inner_size": 32, "hidden_dropout_prob": 0.1, "attn_dropout_prob": 0.1, "learning_rate": 0.01,
    "train_batch_size": 128, "use_gpu": False, "show_progress": False, "epochs": 5,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """RecBole reads from and writes to the working directory; it loads checkpoints that hold objects."""
    path = tmp_path_factory.mktemp("recbole")
    (path / "made").mkdir()
    rows = [f"{user}\t{item}\t{when}" for user, past in enumerate(histories()) for when, item in enumerate(past)]
    (path / "made/made.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr("sys.argv", ["test"])  # RecBole reads the command line
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        yield path


def make(model: type = RefinedSASRec, **options: Any) -> tuple[Any, Any, tuple[Any, Any, Any]]:
    """The model, its configuration, and data for training, validation and test."""
    config = Config(model, "made", [DEFAULTS], SETTINGS | {"refined": {"rank": 8} | options})
    data = data_preparation(config, create_dataset(config))
    return model(config, data[0].dataset), config, data


def sequences(*lengths: int, window: int = WINDOW) -> tuple[torch.Tensor, torch.Tensor]:
    """Items of histories of so many, padded on the right as RecBole does, and the lengths."""
    return torch.tensor([list(range(1, n + 1)) + [0] * (window - n) for n in lengths]), torch.tensor(lengths)


@pytest.mark.parametrize(
    "options", [{"refinement": "simple", "per_head": True}, {"refinement": "value"}, {"tables": "content"}, {}]
)
def test_learns_saves_and_loads(options: dict[str, Any]) -> None:
    model, config, (train, valid, test) = make(**options)
    attention = model.trm_encoder.layer[0].multi_head_attention.attention
    before = {name: value.clone() for name, value in attention.named_parameters()}
    trainer = Trainer(config, model)
    trainer.fit(train, valid, verbose=False)
    assert trainer.evaluate(test)["hit@10"] > 0.9  # chance is 1/3; evaluate loads the best checkpoint
    for name, value in attention.named_parameters():
        assert not torch.equal(value, before[name]), name
    again, config, _ = make(**options)
    Trainer(config, again).resume_checkpoint(trainer.saved_model_file)
    torch.testing.assert_close(again.eval()(*sequences(3, 5)), model.eval()(*sequences(3, 5)))


def test_nothing_to_encode() -> None:
    encoder = make()[0].trm_encoder
    check_nothing_to_encode(encoder, lambda x, real: encoder(x, real)[-1])


def test_the_mask_may_be_numbers() -> None:
    encoder, real = make()[0].trm_encoder.eval(), sequences(3, 5)[0] != 0
    x = torch.randn(2, WINDOW, 32)
    torch.testing.assert_close(encoder(x, real.float())[-1], encoder(x, real)[-1])


def test_half_precision() -> None:
    model, *_ = make(gate_init=0.5)
    attention = model.trm_encoder.layer[0].multi_head_attention.attention
    check_autocast(model, attention, lambda: model(*sequences(WINDOW, 1, 6)))


@pytest.mark.parametrize("refinement", ["none", "additive"])
def test_without_refinement_it_is_the_library(refinement: str) -> None:
    """A learned gate starts at 0, so that "additive" is the library, too."""
    ours, plain = make(refinement=refinement)[0].eval(), make(SASRec)[0].eval()
    with torch.no_grad():
        for own in plain.parameters():
            own.add_(torch.randn_like(own) * 0.1)
    weights = plain.state_dict()
    for prefix in {name.split("query.")[0] for name in weights if "query." in name}:
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{prefix}{part}.{kind}") for part in ("query", "key", "value")]
            weights[f"{prefix}attention.qkv.{kind}"] = torch.cat(parts)
            weights[f"{prefix}attention.out.{kind}"] = weights.pop(f"{prefix}dense.{kind}")
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.rsplit(".")[-1] in ("w_q", "w_k", "gate") for name in missing)
    torch.testing.assert_close(ours(*sequences(WINDOW, 1, 6)), plain(*sequences(WINDOW, 1, 6)), rtol=1e-4, atol=1e-5)


def test_more_padding_changes_nothing_and_rows_count_from_the_last_item() -> None:
    model, *_ = make(refinement="simple")
    model.eval()
    wide, narrow = (model(*sequences(2, 6, window=window)) for window in (WINDOW, 6))
    torch.testing.assert_close(wide, narrow)
    wide.square().sum().backward()
    grad = model.trm_encoder.layer[0].multi_head_attention.attention.w_q.grad.abs().amax(1)
    assert (grad[-6:] > 0).all() and (grad[:-6] == 0).all()


def test_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="max_len is 5; it must be at least the longest history, 9 items"):
        make(max_len=5)[0](*sequences(9))
    with pytest.raises(TypeError, match="ranks"):
        make(ranks=5)


def test_the_example_runs(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    run_example("RecBole")
    assert "ndcg@10" in capsys.readouterr().out
