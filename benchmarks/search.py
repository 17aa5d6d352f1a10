"""Forwards to `python -m benchmarks.study.search`."""

from forward import forward

if __name__ == "__main__":
    forward("study.search")
