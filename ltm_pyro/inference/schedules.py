"""Moved to `ltm_pyro.inference.clocks.schedules`."""

from ltm_pyro.inference.clocks.schedules import (
    constant,
    cosine,
    fast_reach,
    kl_floor_per_sequence,
    kl_weight,
    learning_rate,
    slow_kl_weight,
    thoughts_joined,
    warmup_cosine,
)

__all__ = [
    "constant",
    "cosine",
    "fast_reach",
    "kl_floor_per_sequence",
    "kl_weight",
    "learning_rate",
    "slow_kl_weight",
    "thoughts_joined",
    "warmup_cosine",
]
