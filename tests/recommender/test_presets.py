"""Named bundles of options: what they set, that options take precedence, on the command line and in Python."""

from collections.abc import Callable
from pathlib import Path

import pytest

from awrsr import AWRSR, AWRSRConfig
from awrsr.cli import main, parsed
from awrsr.config import OF_SASREC
from awrsr.presets import PLAIN, PRESETS

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
    assert own == {
        "plain": set(),
        "mean": tables,
        "shifted": {"shift_gate"},
        "smeared": {"smear"},
        "suffix": {"suffix_factors", "shift_gate", "unigram_gate"},
        "refined": {*tables, "scale"},
        "lagged": {*tables, "scale", "lags", "shift_gate"},
        "lagged-suffix": {*tables, "scale", "lags", "shift_gate", "suffix_factors"},
    }[name]


def test_presets_cover_every_option_that_decides_what_attention_computes() -> None:
    assert set(OF_SASREC) < PLAIN.keys() and all(preset.own.keys() <= {*PLAIN, "rank"} for preset in PRESETS.values())


def test_the_model_without_a_preset_is_the_refined_one() -> None:
    assert AWRSR(preset="refined", **SMALL).config == AWRSRConfig(**SMALL)


def test_the_command_line_starts_from_a_preset_and_keeps_what_is_given() -> None:
    _, options = parsed(["train", "--data", "x", "--preset", "lagged", "--rank", "32", "--no-learned-gate"])
    wanted = PRESETS["lagged"].options | {"rank": 32, "learned_gate": False}
    assert {name: options[name] for name in wanted} == wanted
    _, options = parsed(["train", "--data", "x"])
    assert options.layers == AWRSRConfig().layers and options.preset == ""


def test_a_run_with_a_preset_can_be_loaded_and_its_baseline_is_plain(tmp_path: Path, one_thread: None) -> None:
    (tmp_path / "x.txt").write_text("".join(f"{user} {' '.join(str((user + i) % 5) for i in range(8))}\n" for user in range(30)))
    sizes = ["--hidden", "8", "--max-len", "9", "--epochs", "1", "--no-progress", "--accelerator", "cpu"]
    run = ["train", "--data", f"{tmp_path / 'x.txt'}", "--preset", "lagged-suffix", "--baseline", "--out", f"{tmp_path / 'run'}"]
    assert main([*run, *sizes]) == 0
    assert AWRSR.load(tmp_path / "run").config == AWRSRConfig(
        num_items=5, hidden=8, max_len=9, **PRESETS["lagged-suffix"].options
    )
    plain = AWRSR.load(tmp_path / "run/plain")
    assert {name for name, _ in plain.named_parameters()} == {
        name for name, _ in AWRSR(num_items=5, hidden=8, preset="plain").named_parameters()
    }
    assert main([*run, *sizes]) == 0  # a finished run is the same run again


def test_an_unknown_preset_is_refused_with_all_names(stopped: Callable[..., tuple[int, str]]) -> None:
    with pytest.raises(ValueError, match="preset is 'best', must be one of plain, mean, shifted, smeared, suffix, refined, lagged"):
        AWRSR(preset="best")
    assert stopped("train", "--preset", "best")[0] == 2
