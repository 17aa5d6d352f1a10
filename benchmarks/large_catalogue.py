"""Forwards to `python -m benchmarks.training.large_catalogue`."""

from forward import forward

if __name__ == "__main__":
    forward("training.large_catalogue")
