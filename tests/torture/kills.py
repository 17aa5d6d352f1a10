"""Kills and power cuts at every operation on files: of a training, of one that goes on, of a save and of recommendations."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import child

Case = tuple[str, Callable[[], None]]


def cases(home: Path, rng: random.Random) -> list[Case]:
    """All cases, in an order that mixes them."""
    data = child.write_histories(home / "data.txt")
    training = Training(home, data)
    scenarios = [training, Further(training), Saving(home), Recommending(home, data)]
    found: list[Case] = []
    for scenario in scenarios:
        log = finished(child.run(child.killed, scenario.folder("count"), 0, False, *scenario.call(scenario.folder("count")))).value
        for nth in range(1, len(log) + 1):
            for power in (False, True):
                how = "power cut" if power else "kill"
                name = f"{type(scenario).__name__.lower()}: {how} before operation {nth} of {len(log)}, {log[nth - 1]}"
                found.append((name, lambda scenario=scenario, nth=nth, power=power: scenario.check(nth, power)))  # type: ignore[misc]
    rng.shuffle(found)
    return found


def finished(outcome: child.Outcome) -> child.Outcome:
    assert outcome.status == 0 and "Traceback" not in outcome.error, outcome
    return outcome


class Scenario:
    """Something that writes into a folder. `before` is its state at the start, which is copied for each case."""

    def __init__(self, home: Path) -> None:
        self.home, self.before = home, home / f"{type(self).__name__.lower()}-before"
        self.before.mkdir()

    def folder(self, name: str) -> Path:
        folder = self.home / f"{type(self).__name__.lower()}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.before, folder))

    def call(self, folder: Path) -> tuple[Any, ...]:
        """Function and arguments."""
        raise NotImplementedError

    def after_the_kill(self, folder: Path) -> None:
        raise NotImplementedError

    def at_the_end(self, folder: Path) -> None:
        raise NotImplementedError

    def check(self, nth: int, power: bool) -> None:
        folder = self.folder("case")
        outcome = child.run(child.killed, folder, nth, power, *self.call(folder))
        assert outcome.status in (0, -signal.SIGKILL), outcome
        finished(child.run(self.afterwards, folder))

    def afterwards(self, folder: Path) -> None:
        """In a process of its own: look, do the same again, and look again."""
        self.after_the_kill(folder)
        function, *arguments = self.call(folder)
        assert not function(*arguments), "the same command fails"
        left = child.leftovers(folder)
        assert not left, f"left behind: {left}"
        self.at_the_end(folder)


def known(folder: Path, states: set[str | None]) -> str | None:
    """The model in a folder, which must be one of these."""
    model = child.loaded(folder)
    assert model in states, "the model is one that was never saved"
    return model


class Training(Scenario):
    """Two epochs from the start. A kill leaves a model of one of its epochs; the same command ends with the same results."""

    def __init__(self, home: Path, data: Path) -> None:
        super().__init__(home)
        self.data = data
        self.models: set[str | None] = {None}
        for epochs in (1, 2):
            finished(child.run(child.awrsr, *child.training(data, home / f"whole-{epochs}", epochs=epochs)))
            self.models.add(child.run(child.loaded, home / f"whole-{epochs}").value)
        self.whole = home / "whole-2"

    def call(self, folder: Path) -> tuple[Any, ...]:
        return child.awrsr, *child.training(self.data, folder / "run", epochs=2)

    def after_the_kill(self, folder: Path) -> None:
        known(folder / "run", self.models)

    def at_the_end(self, folder: Path) -> None:
        assert known(folder / "run", self.models) == child.loaded(self.whole), "another model"
        assert child.results(folder / "run") == child.results(self.whole), "other results"


class Further(Training):
    """A finished run of one epoch, trained for two: its results stay until others replace them, and are marked when stale."""

    def __init__(self, whole: Training) -> None:
        Scenario.__init__(self, whole.home)
        self.data, self.models, self.whole = whole.data, whole.models, whole.whole
        shutil.copytree(self.home / "whole-1", self.before / "run")
        (self.before / "run" / "model.onnx").write_text("exported before")
        self.first = child.run(child.loaded, self.before / "run").value

    def after_the_kill(self, folder: Path) -> None:
        model = known(folder / "run", self.models - {None})
        found = child.results(folder / "run")
        assert found in (child.results(self.home / "whole-1"), child.results(self.whole)), "results of neither training"
        notes = folder / "run" / "stale.txt"
        stale = notes.read_text().splitlines() if notes.exists() else []
        if model != self.first:
            old = {"model.onnx"} | ({"metrics.json"} if found["epochs"] == 1 else set())
            assert old <= set(stale), f"{old} are of an earlier model, stale.txt has {stale}"


class Saving(Scenario):
    """A model saved over one with other items and weights: either the old one is there or the new one, never parts of both."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        finished(child.run(save, self.before, 0))
        finished(child.run(save, home / "saved", 1))
        self.models: set[str | None] = {child.run(child.loaded, each).value for each in (self.before, home / "saved")}

    def call(self, folder: Path) -> tuple[Any, ...]:
        return save, folder, 1

    def after_the_kill(self, folder: Path) -> None:
        known(folder, self.models)

    def at_the_end(self, folder: Path) -> None:
        known(folder, {child.loaded(self.home / "saved")})


def save(folder: Path, seed: int) -> None:
    import numpy as np
    import torch

    from awrsr import AWRSR

    torch.manual_seed(seed)
    model = AWRSR(num_items=12, hidden=8, layers=1, rank=4, max_len=6)
    model.item_ids = np.array([f"{'ab'[seed]}{i}" for i in range(12)])
    model.save(folder)


class Recommending(Scenario):
    """Recommendations written over older ones: a file is complete, old or new."""

    def __init__(self, home: Path, data: Path) -> None:
        super().__init__(home)
        self.data = data
        (self.before / "top.csv").write_text("older\n")
        whole = self.folder("whole")
        finished(child.run(*self.call(whole)))
        self.texts = {"older\n", (whole / "top.csv").read_text()}

    def call(self, folder: Path) -> tuple[Any, ...]:
        return child.awrsr, "recommend", "--run", self.home / "whole-2", "-k", 3, "--output", folder / "top.csv"

    def after_the_kill(self, folder: Path) -> None:
        assert (folder / "top.csv").read_text() in self.texts, "top.csv is incomplete"

    def at_the_end(self, folder: Path) -> None:
        assert (folder / "top.csv").read_text() in self.texts - {"older\n"}

