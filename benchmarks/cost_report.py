"""Forwards to `python -m benchmarks.operator.cost_report`."""

from forward import forward

if __name__ == "__main__":
    forward("operator.cost_report")
