"""Handlers around an objective: the KL weight, a record of its terms, leave to skip Pyro's own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from ltm_pyro.models.base import SITE_X, SITE_Z, LatentModel, is_standard_program


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
        """The KL in closed form, (B,), put here by an objective that charges it."""

    def _pyro_post_sample(self, msg: Any) -> None:
        self.add(msg["name"], msg["fn"], msg["value"])

    def add(self, site: str, fn: TorchDistribution, value: Tensor) -> None:
        """Takes note of a site."""
        if site == SITE_X:
            self._likelihoods.append((fn, value))
        elif site == SITE_Z:
            self._thoughts.append((fn, value))

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


def recorders() -> list[TermRecorder]:
    """Those around, the outermost first."""
    return [handler for handler in _PYRO_STACK if isinstance(handler, TermRecorder)]


def kl_weight() -> float:
    """The product of all KL weights around."""
    return math.prod(handler.weight for handler in _PYRO_STACK if isinstance(handler, KLWeight))


class Repeat(Messenger):
    """Inside the block, model and guide are those that Pyro has run before.

    An objective may then sample their sites itself (`Objective.draw`): the same numbers to the bit,
    without what Pyro does around each site, which a fast step of a small decoder feels.

    Args:
        prior: p(z), which has no weights or frozen ones.
    """

    def __init__(self, prior: TorchDistribution) -> None:
        super().__init__()
        self.prior = prior

    @staticmethod
    def of(model: LatentModel, guide: nn.Module) -> Repeat | None:
        """The block around this call; `None` where there is none, or Pyro has work to do.

        It has where a program is none of the standard ones, and where a handler listens that is not
        of this module, which must see every site.
        """
        ours = (Repeat, KLWeight, TermRecorder)
        blocks = [handler for handler in _PYRO_STACK if type(handler) is Repeat]
        if not blocks or any(type(handler) not in ours for handler in _PYRO_STACK):
            return None
        known = is_standard_program(model) and is_standard_program(guide)
        return blocks[-1] if known else None


@contextmanager
def repeating(prior: TorchDistribution) -> Iterator[None]:
    """Inside the block programs are taken as checked: by Pyro, by torch, and see `Repeat`.

    Args:
        prior: p(z).
    """
    with pyro.validation_enabled(False), Repeat(prior):
        yield


@contextmanager
def quiet_about_nan() -> Iterator[None]:
    """Silences Pyro's warnings about NaN: the clocks raise an error that names the sequences."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered (NaN|.inf)", UserWarning)
        yield


def over_particles(values: list[Tensor]) -> Tensor:
    """Mean over particles, drawn one by one or stacked in leading dimensions, to (B,)."""
    means = [v.flatten(0, -2).mean(0) if v.dim() > 1 else v for v in values]
    return means[0] if len(means) == 1 else torch.stack(means).mean(0)
