"""`python benchmarks/initialisation.py`, as pages name it, forwards to benchmarks/training/initialisation.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from benchmarks.training.initialisation import main

    sys.exit(main())
