"""`python benchmarks/gpu_model.py`, as pages name it, forwards to benchmarks/gpu/model.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from benchmarks.gpu.model import main

    sys.exit(main())
