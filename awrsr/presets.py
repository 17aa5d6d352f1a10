"""Named bundles of model options: refined models and their rivals; and which one suits data."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from .config import AWRSRConfig
from .data.headroom import headroom, sentence
from .data.splits import Split

# What a preset sets, besides its own: a single layer of plain attention
PLAIN: dict[str, Any] = {"refinement": "none", "layers": 1, "tables": "position", "table_std": 1.0, "table_init": "normal"}
PLAIN |= {"sharpness": 0.0, "refine_scale": 0.0, "learned_scale": False, "gate": 1.0, "learned_gate": False, "lags": 0}
PLAIN |= {"suffix": 1, "smeared_keys": False, "shift": "off", "shift_gate": 1.0, "plain_heads": 0, "unigram": False}

REFINED = {"refinement": "additive", "rank": 64, "sharpness": 25.0, "learned_scale": True, "learned_gate": True}
HALVES = {"shift": "heads", "plain_heads": 1}  # of two heads, one says where events attend, one what followed there


AUTO, NONE = "auto", "none"  # the data decide; the defaults of options, and what is given


class Preset(NamedTuple):
    """A line that says what it computes and costs, and the options that differ from PLAIN."""

    about: str
    own: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        return PLAIN | self.own


PRESETS = {
    "plain": Preset("plain attention: one pass", {}),
    "mean": Preset(
        "plain attention and the mean of the history (refinement with equal weights, tables of zeros that are never trained): two "
        "passes, a factor per head",
        {"refinement": "additive", "table_std": 0.0, "rank": 1, "gate": 2.0, "learned_gate": True},
    ),
    "shifted": Preset(
        "plain attention to events and to what followed them: one pass of twice as many heads, a factor per head",
        {"shift": "added", "shift_gate": 2.0},
    ),
    "smeared": Preset(
        "plain attention whose keys know the event before (token shift): one pass, a factor per head", {"smeared_keys": True}
    ),
    "suffix": Preset(
        "plain attention that compares the last three events and, in half of the heads, passes on what followed: one pass, three "
        "times as wide in what it compares and of half as many heads more, a handful of factors per head",
        {"suffix": 3, "unigram": True, "shift_gate": 2.0} | HALVES,
    ),
    "published": Preset(
        "refined attention that starts at random: two passes, two tables of max_len x 32", {"refinement": "additive", "rank": 32}
    ),
    "refined": Preset(
        "refined attention that starts at what followed: two passes, two tables of max_len x 64 and two factors per head",
        {"table_init": "shifted", "gate": 2.0} | REFINED,
    ),
    "lagged": Preset(
        "refined attention that compares where the last three events attended and, in half of the heads, passes on what followed: "
        "two passes, the second three times as wide, two tables of max_len x 64 and a handful of factors per head",
        {"table_init": "identity", "gate": 2.0, "lags": 2} | REFINED | HALVES,
    ),
    "lagged-suffix": Preset(
        "lagged, and the first pass compares the last three events, too: two passes, both three times as wide",
        {"table_init": "identity", "lags": 2, "suffix": 3, "shift_gate": 2.0} | REFINED | HALVES,
    ),
}


def preset_options(name: str) -> dict[str, Any]:
    """The options of a preset. Raises ValueError for a name that is none."""
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}, must be one of {', '.join((AUTO, *PRESETS))}")
    return PRESETS[name].options


DECIDES = {"rank", *PLAIN} - {"refinement", "layers"}  # whoever gives one of these has chosen a model


def undecided(values: Mapping[str, Any], given: Collection[str] = ()) -> bool:
    """Whether the data may decide the preset: no option of presets is given, or has another value than its default."""
    usual = asdict(AWRSRConfig())
    return DECIDES.isdisjoint(given) and all(values[name] == usual[name] for name in (*DECIDES, "refinement"))


def suited(split: Split, config: AWRSRConfig, progress: bool = False) -> tuple[str, str]:
    """The preset that suits histories, and a sentence that says why. Test events are not looked at.

    Where knowing what followed the last one or two items earlier adds PAYS or more to first-order predictions
    (`awrsr.data.headroom`), it is "lagged", or "refined" with a single head; elsewhere, and with backbone stosa, "published".
    """
    if config.backbone != "sasrec":
        return "published", f"The others are not for backbone {config.backbone}."
    found = headroom(split.before_test(), progress=progress)
    name = ("lagged" if config.heads > 1 else "refined") if found["pays"] else "published"
    return name, sentence(found)


PRESET_HELP = (
    "Start from a named bundle of model options; options that are given as well take precedence. Each is one layer, unless "
    "--layers says otherwise, and all but plain, mean, published and refined need backbone sasrec. auto: lagged if awrsr data "
    "stats, without test events, expects refinement to pay, otherwise published. none: the defaults of the options; auto means "
    "this, too, if you give options that presets set, other than --layers and --refinement additive. "
    + " ".join(f"{name}: {preset.about}." for name, preset in PRESETS.items())
)
