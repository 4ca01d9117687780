"""A GPU in under eight minutes: the tests that need one, then the three loops side by side.

    python benchmarks/gpu.py --json gpu.json

First `pytest -m cuda tests/test_cuda.py`; a failure ends it there. Then, for `tiny`, `ltm-small`
and `ltm-large` in bf16 at B = 8 and T = 256: the published loop, the same engine by hand, and
`DualRateSVI`, in tokens x fast steps per second, with the share of the card's own matrix rate on
the same products (see `fast_loop.py`, which measures). Nothing is read from outside.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import fast_loop
import torch

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("tiny", "ltm-small", "ltm-large")


def main() -> int:
    """Runs the tests, then measures; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this machine has no GPU that torch can use", file=sys.stderr)
        return 2
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/test_cuda.py"]
    status = subprocess.run(tests, cwd=ROOT, check=False).returncode
    if status:
        return status
    options = ["--device", "cuda", "--precision", "bf16", "--batch-size", "8", "--length", "256"]
    written = [] if args.json is None else ["--json", str(args.json)]
    fast_loop.main([*options, "--rounds", str(args.rounds), *written, "--presets", *args.presets])
    return 0


if __name__ == "__main__":
    sys.exit(main())
