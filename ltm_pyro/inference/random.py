"""Moved to `ltm_pyro.random`."""

from ltm_pyro.random import Stream, derive_seed, reseed, seeded

__all__ = ["Stream", "derive_seed", "reseed", "seeded"]
