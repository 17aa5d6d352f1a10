"""Forwards to `python -m benchmarks.study.run`."""

from forward import forward

if __name__ == "__main__":
    forward("study.run")
