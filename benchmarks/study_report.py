"""Forwards to `python -m benchmarks.study.report`."""

from forward import forward

if __name__ == "__main__":
    forward("study.report")
