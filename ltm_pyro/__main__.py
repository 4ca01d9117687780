"""`python -m ltm_pyro COMMAND`: the command line, as `torchrun -m ltm_pyro COMMAND` starts it."""

from __future__ import annotations

import sys

from ltm_pyro.cli import main

if __name__ == "__main__":
    sys.exit(main())
