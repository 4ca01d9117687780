"""Data from the model itself: thoughts from the prior, then sequences given them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ltm_pyro.checks import MOST_COUNT, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.models.base import SITE_X, SITE_Z, LatentModel
from ltm_pyro.models.doors import door


@dataclass(frozen=True)
class Simulated:
    """Sequences whose thoughts are known, because the model wrote them.

    Attributes:
        batch: n sequences, ids 0..n-1.
        z: (n, K, D) the thoughts each was made from: one exact draw from each p(z_i | x_i).
    """

    batch: Batch
    z: Tensor


@door
@torch.no_grad()
def simulate(model: LatentModel, n: int, seed: int = 0) -> Simulated:
    """`n` sequences from the prior predictive, with their thoughts.

    Args:
        model: Any model; a language model writes sequences of its full length.
        n: Sequences.
        seed: The same seed gives the same data; torch's global generator is left alone.

    Raises:
        InputError: if `n` is not above 0.
    """
    whole_number("n", n, 1, MOST_COUNT)
    program: Any = poutine.trace(model)
    devices = [] if model.device.type in ("cpu", "meta") else [model.device]
    with torch.random.fork_rng(devices=devices, device_type=model.device.type):
        torch.manual_seed(seed)
        trace = program.get_trace(size=n)
    return Simulated(Batch(trace.nodes[SITE_X]["value"]), trace.nodes[SITE_Z]["value"])
