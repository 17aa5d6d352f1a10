"""What tests tune: keys and cases, entries of the tuner's file, an instrument whose clock is invented."""

from collections.abc import Callable

import torch

from awrsr_kernels.launch_config import TILED, Config, Key
from awrsr_kernels.tuning.timing import TuningCase

H100 = 232448
FORWARD, BACKWARD = Key("short_fwd", 64, 64, 2), Key("short_bwd", 64, 64, 2)
TILED_FORWARD = Key("tiled_fwd", TILED, 64, 2)
OTHER = Config(64, 64, 8, 1, 2)
CASES = [TuningCase(8, 2, 50, 48, 48, torch.bfloat16), TuningCase(8, 2, 50, 64, 64, torch.bfloat16)]
HERE = ("A GPU", "3.6.0")


def entry(key: Key = FORWARD, config: Config = OTHER, gpu: str = HERE[0], triton: str = HERE[1]) -> dict:
    return {"gpu": gpu, "triton": triton, "key": list(key), "config": list(config), "source": "a test"}


class Fake:
    """An instrument whose times and refusals are functions of case and configuration."""

    def __init__(
        self, ms: Callable[[TuningCase, Config], float], refusal: Callable[[TuningCase, Config], str | None] | None = None
    ) -> None:
        self.ms, self.refuse = ms, refusal or (lambda case, config: None)
        self.checked: list[tuple[TuningCase, Config]] = []
        self.timed: list[tuple[TuningCase, Config]] = []

    def refusal(self, case: TuningCase, key: Key, config: Config) -> str | None:
        self.checked.append((case, config))
        return self.refuse(case, config)

    def time(self, case: TuningCase, key: Key, config: Config) -> float:
        assert (case, config) in self.checked, "timed before it was checked"
        self.timed.append((case, config))
        return self.ms(case, config)


def quietly(line: str) -> None:
    pass
