"""`python benchmarks/every_kernel.py`, as pages name it, forwards to benchmarks/gpu/every_kernel.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from benchmarks.gpu.every_kernel import main

    sys.exit(main())
