"""Two processes at once: trainings into one folder, and loads beside saves."""

import random
import shutil
from pathlib import Path

from . import child
from .kills import Case, finished, save

LOADS = 60


def cases(home: Path, rng: random.Random) -> list[Case]:
    data = child.write_histories(home / "data.txt")
    alone = {}
    for seed in (0, 1):
        finished(child.run(child.awrsr, *child.training(data, home / f"alone-{seed}", epochs=2, seed=seed)))
        alone[seed] = child.run(child.loaded, home / f"alone-{seed}").value
        finished(child.run(save, home / f"saved-{seed}", seed))
    models = {child.run(child.loaded, home / f"saved-{seed}").value for seed in (0, 1)}
    found: list[Case] = []
    for nth in range(20):
        found.append((f"two trainings into one folder, {nth}", lambda: two_trainings(home, data, alone)))
        found.append((f"loads beside saves, {nth}", lambda: load_beside_save(home, models)))
    return found


def two_trainings(home: Path, data: Path, alone: dict[int, str]) -> None:
    """One ends well, and the folder holds what it would have left alone; the other one is refused in one line."""
    shutil.rmtree(home / "both", ignore_errors=True)
    waiting = [child.start(child.awrsr, *child.training(data, home / "both", epochs=2, seed=seed)) for seed in (0, 1)]
    outcomes = [wait() for wait in waiting]
    ended = [seed for seed, outcome in enumerate(outcomes) if outcome.status == 0]
    assert len(ended) == 1, f"{len(ended)} of two trainings ended well: {' and '.join(map(str, outcomes))}"
    refused = outcomes[1 - ended[0]]
    assert refused.status == 1 and refused.error.count("\n") == 1 and str(home / "both") in refused.error, refused
    assert child.run(child.loaded, home / "both").value == alone[ended[0]], "the model is not the one of the training that ended"
    assert child.results(home / "both") == child.results(home / f"alone-{ended[0]}"), "results of another training"
    assert not child.leftovers(home / "both"), child.leftovers(home / "both")


def load_beside_save(home: Path, models: set[str]) -> None:
    """A load gives one model or the other, never ids of one and weights of the other."""
    saver = child.start(save_again_and_again, home / "saved")
    found = finished(child.run(load_again_and_again, home / "saved")).value
    (home / "saved" / "enough").touch()
    finished(saver())
    (home / "saved" / "enough").unlink()
    wrong = [model for model in found if model not in models]
    assert not wrong, f"{len(wrong)} of {len(found)} loads were not of one model"


def save_again_and_again(folder: Path) -> None:
    nth = 0
    while not (folder / "enough").exists():
        save(folder, nth % 2)
        nth += 1


def load_again_and_again(folder: Path) -> list[str]:
    found: list[str] = []
    while len(found) < LOADS:
        model = child.loaded(folder)
        found += [model] if model else []
    return found
