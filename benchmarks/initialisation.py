"""Forwards to `python -m benchmarks.training.initialisation`."""

from forward import forward

if __name__ == "__main__":
    forward("training.initialisation")
