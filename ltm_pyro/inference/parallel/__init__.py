"""Many processes for one fit: who they are, and what they exchange."""

from ltm_pyro.inference.parallel.clock import ReplicatedClock, ShardedClock, slow_clock
from ltm_pyro.inference.parallel.group import Parallel, join, leave, refuse_unequal, started

__all__ = [
    "Parallel",
    "ReplicatedClock",
    "ShardedClock",
    "join",
    "leave",
    "refuse_unequal",
    "slow_clock",
    "started",
]
