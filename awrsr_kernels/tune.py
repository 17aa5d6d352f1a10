"""`python -m awrsr_kernels.tune`: forwards to `python -m awrsr_kernels.tuning`."""

import sys

from .tuning.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
