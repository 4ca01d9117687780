"""Random numbers as a function of (seed, purpose, step), so that resuming needs no saved state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch

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


def derive_seed(seed: int, stream: Stream, step: int = 0) -> int:
    """A seed for one purpose at one step, well mixed, the same on every machine."""
    state = np.random.SeedSequence([seed, int(stream), step]).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


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
