"""`awrsr`, and `python -m awrsr`: the command line, which Ctrl-C ends quietly while its imports still run."""

import sys


def main() -> int:
    """Run a command; see `awrsr.cli.main`."""
    try:
        from .cli import main as command_line

        return command_line()
    except KeyboardInterrupt:
        print("awrsr: interrupted", file=sys.stderr)
        return 130
    except MemoryError:
        print("awrsr: out of memory", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
