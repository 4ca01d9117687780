"""Moved to `ltm_pyro.inference.clocks.slow`."""

from ltm_pyro.inference.clocks.slow import SlowClock, embedding_weights

__all__ = ["SlowClock", "embedding_weights"]
