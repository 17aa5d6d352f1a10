"""A slice of the torture, a few cases of each kind; `make torture` runs more."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_few_kills_damages_races_and_fuzzed_files_lose_nothing() -> None:
    line = [sys.executable, "-m", "tests.torture", "--minutes", "0.03"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [line.split() for line in done.stdout.splitlines()]
    assert [words[0] for words in counts] == ["kills", "damage", "races", "fuzz"] and all(int(words[1]) > 0 for words in counts)
