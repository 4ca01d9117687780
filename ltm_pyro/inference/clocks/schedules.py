"""Schedules of the two clocks: pure functions of the step.

A schedule answers for step 0, 1, ..., total - 1, so nothing has to be saved to resume one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ltm_pyro.config import Fast, Slow
from ltm_pyro.random import Stream, derive_seed


def constant(step: int, total: int) -> float:
    """1 at every step."""
    return 1.0


def cosine(step: int, total: int, final_fraction: float = 0.0) -> float:
    """Half a cosine from 1 at the first step to `final_fraction` at the last, kept beyond it."""
    share = min(step / max(total - 1, 1), 1.0)
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * share))


def warmup_cosine(
    step: int, total: int, warmup: float = 0.05, final_fraction: float = 0.0
) -> float:
    """Rises linearly over the first `warmup` share of the steps, then falls as `cosine`.

    The first step already moves: with a rise of n steps its factor is 1/n.
    """
    rise = round(warmup * total)
    if step < rise:
        return (step + 1) / rise
    return cosine(step - rise, total - rise, final_fraction)


def kl_weight(step: int, total: int, start: float, hold: float, full: float) -> float:
    """Weight of the KL: `start` until the share `hold` of the steps, linear to 1 at `full`."""
    share = step / total
    if share >= full:
        return 1.0
    if share < hold:
        return start
    return start + (1.0 - start) * (share - hold) / (full - hold)


def learning_rate(clock: Fast | Slow, step: int, total: int) -> float:
    """The learning rate of one clock at `step` of `total`."""
    last = clock.final_fraction
    if last is None:
        last = 0.5 if isinstance(clock, Fast) and steps_naturally(clock) else 0.1
    if callable(clock.schedule):
        factor = clock.schedule(step, total)
    elif clock.schedule == "constant":
        factor = constant(step, total)
    elif clock.schedule == "cosine":
        factor = cosine(step, total, last)
    else:
        factor = warmup_cosine(step, total, clock.warmup, last)
    return clock.lr * factor


def slow_kl_weight(slow: Slow, step: int, total: int) -> float:
    """The KL weight of the slow clock at `step` of `total`."""
    return kl_weight(step, total, slow.kl_start, slow.kl_hold, slow.kl_full)


def thoughts_joined(slow: Slow, step: int, total: int) -> bool:
    """Whether the slow step `step` of `total` uses thoughts."""
    return step >= round(slow.thoughts_start * total)


@dataclass(frozen=True)
class Now:
    """One slow step: its number, the schedules' step and total, what they say, and its noise."""

    step: int
    scheduled: int
    total: int
    kl_weight: float
    thinks: bool
    fast_noise: int
    slow_noise: int

    @classmethod
    def at(cls, slow: Slow, step: int, total: int | None, seed: int) -> Now:
        """The slow step `step` of `total`; without a total the schedules have not begun."""
        noise = [derive_seed(seed, stream, step) for stream in (Stream.FAST, Stream.SLOW)]
        if total is None:
            return cls(step, 0, 1, 1.0, True, *noise)
        weight = slow_kl_weight(slow, step, total)
        return cls(step, step, total, weight, thoughts_joined(slow, step, total), *noise)


def steps_naturally(fast: Fast) -> bool:
    """Whether natural steps are taken where a family has units."""
    return fast.optimizer == "natural" and fast.noise == "fresh"
