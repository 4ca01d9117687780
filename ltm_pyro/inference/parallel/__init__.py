"""Many processes for one fit: who they are, what they exchange, and the noise of their rows."""

from ltm_pyro.inference.parallel.clock import ReplicatedClock, ShardedClock, slow_clock
from ltm_pyro.inference.parallel.group import Parallel, join, leave, refuse_unequal, started
from ltm_pyro.inference.parallel.row_noise import RowNoise, rows_of_draws

__all__ = [
    "Parallel",
    "ReplicatedClock",
    "RowNoise",
    "ShardedClock",
    "join",
    "leave",
    "refuse_unequal",
    "rows_of_draws",
    "slow_clock",
    "started",
]
