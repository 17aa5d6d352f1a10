"""Forwards to `python -m benchmarks.study.run`."""

if __name__ == "__main__":  # its runs import this file, too
    from forward import forward

    forward("study.run")
