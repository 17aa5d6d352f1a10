"""One flipped bit, or a cut, in each file of a run: commands do what they did before, or name the file in one line."""

import random
import shutil
from pathlib import Path
from typing import Any

from . import child
from .kills import Case, finished

CUTS, BITS = 6, 60  # of each file
COMMANDS = {  # which commands read a file
    "model.safetensors": ("recommend", "train"),
    "last.ckpt": ("train",),
    "metrics.json": ("compare", "train"),
    "ranks_test.parquet": ("compare",),
    "config.json": ("recommend", "train"),
    "items.parquet": ("recommend",),  # of versions whose model is several files
}


def cases(home: Path, rng: random.Random) -> list[Case]:
    data = child.write_histories(home / "data.txt")
    for name, options in {"run": {}, "other": {"seed": 1}}.items():
        finished(child.run(child.awrsr, *child.training(data, home / name, epochs=2, **options)))
    expected: dict[str, Any] = {}
    for command in ("recommend", "train", "compare"):
        expected[command] = finished(child.run(answer, command, home, copied(home))).value
    found: list[Case] = []
    for name, commands in COMMANDS.items():
        path = home / "run" / name
        if not path.exists():
            continue
        size = path.stat().st_size
        changes = [("cut", rng.randrange(size)) for _ in range(CUTS)] + [("bit", rng.randrange(8 * size)) for _ in range(BITS)]
        for command in commands:
            for how, place in changes:
                case = (home, name, command, how, place, expected[command])
                found.append((f"{command}: {name} with {how} {place}", lambda case=case: check(*case)))  # type: ignore[misc]
    rng.shuffle(found)
    return found


def copied(home: Path) -> Path:
    shutil.rmtree(home / "case", ignore_errors=True)
    return Path(shutil.copytree(home / "run", home / "case"))


def check(home: Path, name: str, command: str, how: str, place: int, expected: Any) -> None:
    path = copied(home) / name
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[place:]
    else:
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    outcome = child.run(answer, command, home, home / "case")
    assert "Traceback" not in outcome.error, outcome
    if outcome.status == 0:
        assert outcome.value == expected, "another result, in silence"
        return
    said = [line for line in outcome.error.splitlines() if not line.startswith("Warning: ")]
    assert outcome.status == 1 and len(said) == 1 and said[0].startswith(f"awrsr {command}: "), outcome
    assert str(home / "case") in said[0], f"the error names no file: {said[0]}"


def answer(command: str, home: Path, folder: Path) -> Any:
    """What a command answers about a run: text, or what it leaves. Ends with its status if that is not 0."""
    arguments = {
        "recommend": ["recommend", "--run", folder, "-k", 3, "--output", home / "top.csv"],
        "compare": ["compare", folder, home / "other", "--metrics", "NDCG@10", "MRR", "--resamples", 20, "--json", home / "c.json"],
        "train": child.training(home / "data.txt", folder, epochs=3),
    }[command]
    if status := child.awrsr(*arguments):
        raise SystemExit(status)
    if command == "train":
        return child.loaded(folder), child.results(folder)
    return (home / ("top.csv" if command == "recommend" else "c.json")).read_text()
