"""Guide families held against each other: same decoder, sequences, seeds and budget."""

from ltm_pyro.diagnostics.compare.comparison import compare
from ltm_pyro.diagnostics.compare.table import Comparison

__all__ = ["Comparison", "compare"]
