"""Random numbers that belong to a sequence: functions of (seed, purpose, step, id, draw, index).

A generator that is read in turn gives a sequence other numbers whenever another stands before it.
Here every number is computed from its place instead (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"): a counter, mixed until nothing of its pattern is left. So a sequence meets the
same noise alone, in any batch, in any place of it and in any process; a resumed fit needs no saved
state; and families that are fitted to one sequence are compared on common noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from ltm_pyro.exclusive import exclusively


class Stream(IntEnum):
    """What random numbers are used for; streams of one seed do not overlap."""

    FAST = 1
    SLOW = 2
    SCORE = 3
    SAMPLE = 4
    INITIAL = 5
    BATCH = 6
    MCMC = 7
    CALIBRATE = 8
    DROPOUT = 9
    TOKENS = 10
    HELD_OUT = 11


def derive_seed(seed: int, stream: Stream, step: int = 0) -> int:
    """A seed for one purpose at one step, well mixed, the same on every machine."""
    state = np.random.SeedSequence([seed, int(stream), step]).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, 2^64 over the golden ratio
_MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15))  # 0xBF58476D1CE4E5B9, 0x94D0...11EB


def _mixed(counter: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), in place, int64 to int64."""
    for shift, factor in _MIX:
        counter ^= (counter >> shift) & ((1 << (64 - shift)) - 1)  # `>>` keeps the sign
        counter *= factor
    counter ^= (counter >> 31) & ((1 << 33) - 1)
    return counter


class Noise:
    """The random numbers of B sequences for one purpose.

    A number's place is (row id, draw, index); rows with the same id have the same numbers.

    Args:
        seed: From `derive_seed`.
        ids: (B,) int64, the stable ids of the sequences.
    """

    def __init__(self, seed: int, ids: Tensor) -> None:
        self.seed, self.ids = seed, ids
        start = _mixed(torch.full_like(ids, seed).mul_(_GOLDEN))
        self._rows = _mixed(ids * _GOLDEN + start)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: slice | Tensor) -> Noise:
        """That of the rows at `index`."""
        return Noise(self.seed, self.ids[index])

    def _draws(self, draws: int, first: int) -> Tensor:
        """A number for each draw and row, (S, B)."""
        draw = torch.arange(first + 1, first + draws + 1, device=self.ids.device)
        return _mixed(self._rows + (draw * _GOLDEN)[:, None])

    def _bits(self, size: int, draws: int, first: int) -> Tensor:
        """(S, B, size) numbers of 64 bits."""
        index = torch.arange(1, size + 1, device=self.ids.device)
        return _mixed(self._draws(draws, first)[..., None] + index * _GOLDEN)

    def uniform(self, size: int, draws: int = 1, first: int = 0) -> Tensor:
        """Numbers from the open interval (0, 1), (S, B, size) float64.

        Args:
            size: Numbers of a draw; what they are does not depend on how many are asked for.
            draws: S.
            first: The first draw's number.
        """
        bits = self._bits(size, draws, first)
        return (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53

    def normal(self, size: int, draws: int = 1, first: int = 0) -> Tensor:
        """Standard normal numbers, (S, B, size) float64, none beyond 6.7; arguments as above.

        Two from every 64 bits (Box & Muller 1958), computed in double precision whatever they are
        for, so that devices differ in the last digits alone.
        """
        bits = self._bits((size + 1) // 2, draws, first)
        high, low = ((bits >> 32) & 0xFFFFFFFF).double(), (bits & 0xFFFFFFFF).double()
        radius = high.add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = low.add_(0.5).mul_(2.0**-32 * 2.0 * math.pi)
        pairs = torch.stack((angle.cos() * radius, angle.sin() * radius), dim=-1)
        return pairs.flatten(-2)[..., :size]

    def generators(self, draw: int) -> list[torch.Generator]:
        """A generator for each row, for what has to be drawn by one."""
        seeds = self._draws(1, draw)[0].tolist()
        return [torch.Generator(self.ids.device).manual_seed(seed & (2**63 - 1)) for seed in seeds]


def fresh_seed() -> int:
    """A seed from torch's global generator."""
    return int(torch.randint(2**62, ()))


def reseed(seed: int, device: torch.device) -> None:
    """Seeds torch's global generators, as far as `seeded` puts them back.

    `torch.manual_seed` would seed an accelerator's too, which a program on the CPU has no business
    with, and is slow where there is none: it notes down who asked, for when one appears.
    """
    if device.type in ("cpu", "meta"):
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded inside the block and put back afterwards.

    Other threads wait for the block's end: they draw from the same generators.

    Raises:
        RuntimeError: if something else seeded the generator meanwhile, e.g. `torch.manual_seed` in
            another thread: the numbers drawn are not those of `seed` then.
    """
    if device.type in ("cpu", "meta"):
        fork = torch.random.fork_rng(devices=[])
    else:
        fork = torch.random.fork_rng(devices=[device], device_type=device.type)
    with exclusively(), fork:
        reseed(seed, device)
        yield
        # The C++ generator wraps negative seeds round.
        if torch.default_generator.initial_seed() != seed % 2**64:
            raise RuntimeError(
                "torch's global generator was seeded by something else while numbers were drawn "
                "from it: in threads, call torch.manual_seed and build models inside "
                "`with ltm_pyro.exclusively():`"
            )
