"""The tuner's command, `python -m awrsr_kernels.tune`; its code is in `tuning/`."""

import sys

from .tuning.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
