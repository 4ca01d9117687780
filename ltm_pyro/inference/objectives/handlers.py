"""Handlers around an objective: the KL weight, and a record of what was sampled and scored."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ltm_pyro.models.base import SITE_X, SITE_Z


class KLWeight(Messenger):
    """Multiplies both log densities of `z`, and so the KL term, by a weight.

    With a weight below 1 the objective is no longer a bound; it is recorded as `objective`, and
    `elbo` always has weight 1.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == SITE_Z:
            msg["scale"] = msg["scale"] * self.weight


class TermRecorder(Messenger):
    """Remembers what was sampled and scored, so that an ELBO can be split into its terms for free.

    A Pyro ELBO returns one number. This handler sees every site of guide and model pass by, and
    answers afterwards with the reconstruction and the KL of each sequence at the same draws:
    neither weighted, nor bounded from below, nor averaged over importance weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self._likelihoods: list[tuple[TorchDistribution, Tensor]] = []
        self._thoughts: list[tuple[TorchDistribution, Tensor]] = []
        self.closed_kl: Tensor | None = None
        """The KL in closed form, (B,), where the objective asked for one."""

    def _pyro_post_closed_kl(self, msg: Any) -> None:
        # Sent by `Elbo.kl`, so that the KL is not computed again for the record.
        self.closed_kl = None if msg["value"] is None else msg["value"].detach()

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == SITE_X:
            self._likelihoods.append((msg["fn"], msg["value"]))
        elif msg["name"] == SITE_Z:
            self._thoughts.append((msg["fn"], msg["value"]))

    def nll(self) -> Tensor:
        """-log p(x | z) per sequence in nats, (B,), mean over the draws that were made."""
        return over_particles([-fn.log_prob(x).detach() for fn, x in self._likelihoods])

    def kl(self) -> Tensor:
        """Log q(z) - log p(z) per sequence in nats, (B,), mean over the draws that were made.

        The guide's site comes before the model's at each draw.
        """
        pairs = zip(self._thoughts[::2], self._thoughts[1::2], strict=True)
        with torch.no_grad():
            return over_particles([q.log_prob(z) - p.log_prob(z) for (q, z), (p, _) in pairs])

    def thoughts(self) -> list[Tensor]:
        """The guide's draws, (B, K, D) each or (S, B, K, D), without their gradient."""
        return [z.detach() for _, z in self._thoughts[::2]]


@contextmanager
def quiet_about_nan() -> Iterator[None]:
    """Silences Pyro's warnings about NaN: the clocks raise an error that names the sequences."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered (NaN|.inf)", UserWarning)
        yield


def over_particles(values: list[Tensor]) -> Tensor:
    """Mean over particles, drawn one by one or stacked in leading dimensions, to (B,)."""
    return torch.stack([v.flatten(0, -2).mean(0) if v.dim() > 1 else v for v in values]).mean(0)
