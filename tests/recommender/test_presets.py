"""Named bundles of options: what they set, that options take precedence, on the command line and in Python."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from awrsr import AWRSR, AWRSRConfig, Histories, split
from awrsr.cli import main, parsed
from awrsr.config import OF_SASREC
from awrsr.data.headroom import PAYS, headroom
from awrsr.presets import AUTO, NONE, PLAIN, PRESETS, suited

from .small import ITEMS

SMALL = {"num_items": ITEMS, "hidden": 8, "max_len": 9}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_the_model_and_options_take_precedence(name: str) -> None:
    model = AWRSR(preset=name, **SMALL)
    config = AWRSRConfig(**SMALL, **PRESETS[name].options)
    assert model.config == config and config.layers == 1
    assert AWRSR(AWRSRConfig(init="normal", suffix=5), preset=name, **SMALL).config.init == "normal"
    assert AWRSR(preset=name, layers=3, shift_gate=0.5, **SMALL).config.shift_gate == 0.5
    parts = {part for part, _ in model.named_parameters()}
    own = {part.rpartition(".")[2] for part in parts - {part for part, _ in AWRSR(preset="plain", **SMALL).named_parameters()}}
    tables = {"w_q", "w_k", "gate"}
    assert (
        own
        == {
            "plain": set(),
            "mean": tables,
            "shifted": {"shift_gate"},
            "smeared": {"smear"},
            "suffix": {"suffix_factors", "shift_gate", "unigram_gate"},
            "published": {"w_q", "w_k"},
            "refined": {*tables, "scale"},
            "lagged": {*tables, "scale", "lags", "shift_gate"},
            "lagged-suffix": {*tables, "scale", "lags", "shift_gate", "suffix_factors"},
        }[name]
    )


def test_presets_cover_every_option_that_decides_what_attention_computes() -> None:
    assert set(OF_SASREC) < PLAIN.keys() and all(preset.own.keys() <= {*PLAIN, "rank"} for preset in PRESETS.values())


def test_options_without_a_preset_begin_as_the_refined_model() -> None:
    assert AWRSR(preset="refined", **SMALL).config == AWRSRConfig(**SMALL)


def repeating(blocks: int, users: int = 200) -> Histories:
    """Histories in which a user's own four items recur in an order of their own, `blocks` times."""
    rng = np.random.default_rng(0)
    own = [rng.permutation(30)[:4] for _ in range(users)]
    return Histories.from_lists(
        [np.concatenate([block] + [rng.permutation(block)] * (blocks > 1) + [block] * (blocks - 2)) for block in own]
    )


def test_the_data_decide_the_preset_without_their_test_events() -> None:
    paying, flat = repeating(6), Histories.from_lists([[(user + i) % 7 for i in range(12)] for user in range(200)])
    assert headroom(split(paying).before_test())["gain"] > PAYS > headroom(split(flat).before_test())["gain"]
    assert suited(split(paying), AWRSRConfig())[0] == "lagged"
    assert suited(split(paying), AWRSRConfig(heads=1))[0] == "refined"  # one head cannot be plain and lagged
    assert suited(split(paying), AWRSRConfig(backbone="stosa"))[0] == suited(split(flat), AWRSRConfig())[0] == "published"
    assert suited(split(Histories.from_lists([[1, 2, 3]] * 3)), AWRSRConfig())[0] == "published"
    parts = split(paying)
    parts.histories.items[parts.histories.offsets[1:] - 1] = 0  # other test events
    assert suited(parts, AWRSRConfig()) == suited(split(paying), AWRSRConfig())


def test_fit_takes_the_preset_that_suits_and_keeps_the_options_that_were_given() -> None:
    quick = {"epochs": 1, "progress": False, "accelerator": "cpu"}
    model = AWRSR(hidden=8, layers=2).fit(repeating(6), **quick)
    assert model.preset == "lagged"
    assert model.config == AWRSRConfig(num_items=30, hidden=8, **PRESETS["lagged"].options | {"layers": 2})
    for given in ({"gate": 2.0}, {"refinement": "none"}, {"num_items": 30}, {"preset": "plain"}):  # a default, given, counts too
        assert AWRSR(**given).preset in (None, "plain"), given
    assert AWRSR(AWRSRConfig()).preset is None and AWRSR(refinement="additive").preset == AUTO
    with pytest.raises(ValueError, match="preset is 'auto', with which config, num_items and options that presets set must not"):
        AWRSR(preset="auto", rank=32)


def test_the_command_line_says_which_preset_suits_and_options_that_presets_set_rule_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    lines = [f"{user} {' '.join(map(str, repeating(6).of(user)))}" for user in range(200)]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    run = ["train", "--data", f"{tmp_path / 'x.txt'}", "--out", f"{tmp_path / 'run'}", "--layers", "2", "--refinement", "additive"]
    assert main([*run, "--hidden", "8", "--epochs", "1", "--no-progress", "--accelerator", "cpu"]) == 0
    assert "Refinement can be expected to pay" in (said := capsys.readouterr().out) and "Hence --preset lagged." in said
    loaded = AWRSR.load(tmp_path / "run")
    config = loaded.config
    assert loaded.preset is None  # nothing is left to choose
    assert config == AWRSRConfig(num_items=config.num_items, hidden=8, **PRESETS["lagged"].options | {"layers": 2})
    for given in (["--gate", "2"], ["--no-learned-gate"], ["--table_init=shifted"], ["--refinement", "none"], ["--rank=64"]):
        assert parsed(["train", "--data", "x", *given])[1].preset == NONE, given
    assert parsed(["train"])[1].preset == NONE  # the demonstration's options


def test_the_command_line_starts_from_a_preset_and_keeps_what_is_given() -> None:
    _, options = parsed(["train", "--data", "x", "--preset", "lagged", "--rank", "32", "--no-learned-gate"])
    wanted = PRESETS["lagged"].options | {"rank": 32, "learned_gate": False}
    assert {name: options[name] for name in wanted} == wanted
    _, options = parsed(["train", "--data", "x"])
    assert options.layers == AWRSRConfig().layers and options.preset == AUTO


def test_a_run_with_a_preset_can_be_loaded_and_its_baseline_is_plain(tmp_path: Path, one_thread: None) -> None:
    (tmp_path / "x.txt").write_text("".join(f"{user} {' '.join(str((user + i) % 5) for i in range(8))}\n" for user in range(30)))
    sizes = ["--hidden", "8", "--max-len", "9", "--epochs", "1", "--no-progress", "--accelerator", "cpu"]
    run = ["train", "--data", f"{tmp_path / 'x.txt'}", "--preset", "lagged-suffix", "--baseline", "--out", f"{tmp_path / 'run'}"]
    assert main([*run, *sizes]) == 0
    assert AWRSR.load(tmp_path / "run").config == AWRSRConfig(num_items=5, hidden=8, max_len=9, **PRESETS["lagged-suffix"].options)
    plain = AWRSR.load(tmp_path / "run/plain")
    assert {name for name, _ in plain.named_parameters()} == {
        name for name, _ in AWRSR(num_items=5, hidden=8, preset="plain").named_parameters()
    }
    assert main([*run, *sizes]) == 0  # a finished run is the same run again


def test_an_unknown_preset_is_refused_with_all_names(stopped: Callable[..., tuple[int, str]]) -> None:
    with pytest.raises(ValueError, match="preset is 'best', must be one of auto, plain, mean, .*, published, refined, lagged"):
        AWRSR(preset="best")
    assert stopped("train", "--preset", "best")[0] == 2
