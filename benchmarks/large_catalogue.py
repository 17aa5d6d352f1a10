"""`python benchmarks/large_catalogue.py`, as pages name it, forwards to benchmarks/training/large_catalogue.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from benchmarks.training.large_catalogue import main

    sys.exit(main())
