"""Forwards to `python -m benchmarks.training.train_bench`."""

from forward import forward

if __name__ == "__main__":
    forward("training.train_bench")
