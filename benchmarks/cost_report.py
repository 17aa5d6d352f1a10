"""`python benchmarks/cost_report.py`, as pages name it, forwards to benchmarks/operator/cost_report.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from benchmarks.operator.cost_report import main

    sys.exit(main())
