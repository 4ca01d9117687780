"""Data from the model itself: thoughts from the prior, then sequences given them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ltm_pyro.checks import MOST_COUNT, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import door
from ltm_pyro.models.base import SITE_X, SITE_Z, LatentModel


@dataclass(frozen=True, repr=False)
class Simulated:
    """Sequences whose thoughts are known, because the model wrote them.

    Attributes:
        batch: n sequences, ids 0..n-1, with the covariates that they were made at.
        z: (n, K, D) the thoughts each was made from: one exact draw from each p(z_i | x_i).
    """

    batch: Batch
    z: Tensor

    def __repr__(self) -> str:
        return f"Simulated({self.batch!r}, z {tuple(self.z.shape)})"


@door
@torch.no_grad()
def simulate(model: LatentModel, n: int, seed: int = 0, *, like: Batch | None = None) -> Simulated:
    """`n` sequences from the prior predictive, with their thoughts.

    Args:
        model: Any model; a language model writes sequences of its full length.
        n: Sequences.
        seed: The same seed gives the same data; torch's global generator is left alone.
        like: Rows whose masks and covariates the new ones have, in turn; by default the model
            makes them up (`model.blank`).

    Raises:
        InputError: if `n` is not above 0.
    """
    whole_number("n", n, 1, MOST_COUNT)
    program: Any = poutine.trace(model)
    devices = [] if model.device.type in ("cpu", "meta") else [model.device]
    with torch.random.fork_rng(devices=devices, device_type=model.device.type):
        torch.manual_seed(seed)
        if like is not None:
            blank = _repeated(like.to(model.device), n)
        else:  # a program of one's own need not derive from `LatentModel`
            blank = model.blank(n) if isinstance(model, LatentModel) else None
        trace = program.get_trace(size=n) if blank is None else program.get_trace(blank)
    x = trace.nodes[SITE_X]["value"]
    batch = Batch(x) if blank is None else replace(blank, x=x)
    return Simulated(batch, trace.nodes[SITE_Z]["value"])


def _repeated(like: Batch, n: int) -> Batch:
    """`n` rows still to be made, with the masks and covariates of `like`'s in turn."""
    rows = like.select(torch.arange(n, device=like.device) % len(like))
    return Batch(None, rows.mask, covariates=rows.covariates)
