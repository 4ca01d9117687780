"""Moved to `ltm_pyro.inference.clocks.fast`."""

from ltm_pyro.inference.clocks.fast import frozen, local_optimizer

__all__ = ["frozen", "local_optimizer"]
