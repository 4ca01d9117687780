"""Posteriors as ArviZ reads them: an `xarray.DataTree`, and its files.

Two dimensions carry ArviZ's names and mean this here: `chain` is an independent restart of the fit,
`draw` a draw from the guide that this restart ended with. Draws from a guide are independent, so
within one restart effective sample size and r-hat say nothing about the fit: ArviZ gives NaN for an
r-hat of one chain, and for the effective size of a few dozen draws a noisy number. With several
restarts r-hat shows whether they found the same posterior; `khat` and the scores show whether it is
the right one.
"""

from __future__ import annotations

from ltm_pyro.export.files import load_datatree, save_datatree, write_datatree
from ltm_pyro.export.tree import to_datatree

__all__ = ["load_datatree", "save_datatree", "to_datatree", "write_datatree"]
