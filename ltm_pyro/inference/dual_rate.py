"""Moved to `ltm_pyro.inference.clocks.svi`."""

from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.course import Metrics

__all__ = ["DualRateSVI", "Metrics"]
