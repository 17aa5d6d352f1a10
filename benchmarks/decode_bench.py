"""Forwards to `python -m benchmarks.operator.decode_bench`."""

from forward import forward

if __name__ == "__main__":
    forward("operator.decode_bench")
