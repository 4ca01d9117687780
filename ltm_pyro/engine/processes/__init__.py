"""Many processes for one fit: who they are, and what they exchange."""

from ltm_pyro.engine.processes.group import Parallel, join, leave, refuse_unequal, started

__all__ = [
    "Parallel",
    "join",
    "leave",
    "refuse_unequal",
    "started",
]
