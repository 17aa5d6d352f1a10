"""Forwards to `python -m benchmarks.gpu.run`."""

from forward import forward

if __name__ == "__main__":
    forward("gpu.run")
