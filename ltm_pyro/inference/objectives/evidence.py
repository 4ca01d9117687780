"""What an objective is: a number per sequence from explicit terms on S draws (`Terms`).

    z_s ~ q(z),  s = 1..S,     log w_s = log p(x | z_s) + c (log p(z_s) - log q(z_s))

No handler of Pyro's takes part; what its own trace of model and guide gives is the same to
rounding. Higher is better; summed over the batch and negated it is a loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.stopped import stopped_log_prob
from ltm_pyro.inference.objectives.under_svi import UnderSVI
from ltm_pyro.models.base import LatentModel

Draw = Callable[[TorchDistribution, int], Tensor]
"""(q, S) -> draws (S, B, K, D), with a path to q's parameters: usually a `Drawing`."""
_MOST_PARTICLES = 10**6


class Terms:
    """S draws from the guide for each of B sequences, and what they score, in nats.

    Each term is computed when it is first asked for, and once.

    Args:
        guide: Holds B rows.
        prior: p(z), event shape (K, D).
        batch: B sequences, possibly prepared by the model.
        z: (S, B, K, D).
        weight: c, the KL weight.
    """

    def __init__(
        self,
        model: LatentModel,
        guide: LocalGuide,
        prior: TorchDistribution,
        batch: Batch,
        q: TorchDistribution,
        z: Tensor,
        weight: float = 1.0,
    ) -> None:
        self.model, self.guide, self.prior, self.batch = model, guide, prior, batch
        self.q, self.z, self.weight = q, z, weight

    @cached_property
    def log_lik(self) -> Tensor:
        """Log p(x | z), (S, B): the decoder's pass."""
        if len(self.z) == 1:
            return self.model.log_likelihood(self.z[0], self.batch)[None]
        return self.model.log_likelihood(self.z, self.batch)

    @cached_property
    def _log_prior(self) -> Tensor:
        return self.prior.log_prob(self.z)

    @cached_property
    def _log_q(self) -> Tensor:
        return self.q.log_prob(self.z)

    @property
    def log_prior(self) -> Tensor:
        """C log p(z), (S, B)."""
        return self.weight * self._log_prior

    def log_q(self, stopped: bool = False) -> Tensor:
        """C log q(z), (S, B); with `stopped`, at parameters held constant."""
        return self.weight * (stopped_log_prob(self.guide, self.z) if stopped else self._log_q)

    def log_weight(self, stopped: bool = False) -> Tensor:
        """Log w, (S, B)."""
        return self.log_lik + self.log_prior - self.log_q(stopped)

    @cached_property
    def closed_kl(self) -> Tensor | None:
        """KL(q || p), (B,), where the guide has it in closed form."""
        return self.guide.kl(self.prior)

    def kl(self) -> Tensor:
        """C KL(q || p), (B,): closed, or the mean of log q - log p over the draws."""
        return self.weight * self._kl()

    def _kl(self) -> Tensor:
        kl = self.closed_kl
        return (self._log_q - self._log_prior).mean(0) if kl is None else kl

    @torch.no_grad()
    def report(self) -> tuple[Tensor, Tensor]:
        """(nll, kl) of each sequence at these draws, (B,) each, weight 1, nothing descended."""
        return -self.log_lik.detach().mean(0), self._kl().detach()


class Objective(UnderSVI):
    """A sum over sequences of nats to be maximised, on S draws made at once.

    An `ELBO` of Pyro's too (`UnderSVI`), so that it serves wherever one does.

    Args:
        particles: S, draws per sequence and call; each costs one evaluation of the decoder.

    Attributes:
        name: By which `build_objective` knows it.
        options: What it was built with.
    """

    name: ClassVar[str] = ""
    charges_kl: ClassVar[bool] = False
    """Whether it pays for the KL as such (`Terms.kl`), in closed form where the guide has one."""
    weighs_draws: bool = False
    """Whether draws count by their importance weights; the fast clock is then Adam's."""
    evaluations: int = 0
    """Sequences times draws that it has been computed on by the clocks."""

    def __init__(self, particles: int = 1, **options: Any) -> None:
        self.particles = whole_number("particles", particles, 1, _MOST_PARTICLES)
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=particles, max_plate_nesting=1, vectorize_particles=particles > 1
        )
        self.options = {**options, "particles": particles}

    @abstractmethod
    def per_sequence(self, terms: Terms) -> Tensor:
        """The objective of each sequence in nats, higher is better, (B,)."""

    def terms(
        self,
        model: LatentModel,
        guide: LocalGuide,
        batch: Batch,
        draw: Draw,
        weight: float = 1.0,
        prior: TorchDistribution | None = None,
    ) -> Terms:
        """Draws for the B rows that the guide holds; a `prior` that is given is not made again.

        Raises:
            InputError: if the guide's draws have no gradient.
        """
        q = guide.posterior()
        if not q.has_rsample:
            raise InputError(
                f"objective {self.name!r} needs a path from the guide's parameters to z (rsample), "
                "and this guide's distribution has none: use elbo=pyro.infer.Trace_ELBO()"
            )
        prior = model.prior() if prior is None else prior
        return Terms(model, guide, prior, batch, q, draw(q, self.particles), weight)

    def descend(self, *place: Any, **options: Any) -> tuple[Tensor, Terms]:
        """Minus the objective, summed over the batch, in nats; and its terms. See `terms`."""
        terms = self.terms(*place, **options)
        self.evaluations += terms.z.shape[:2].numel()
        return -self.per_sequence(terms).sum(), terms


class Elbo(Objective):
    """E_q log p(x | z) - KL(q || p), the KL in closed form where the guide has one.

    Elsewhere the KL is the mean of log q(z) - log p(z) over the same draws. A point mass has no
    KL: its objective is log p(x, z) at the point.
    """

    name: ClassVar[str] = "elbo"
    charges_kl: ClassVar[bool] = True

    def per_sequence(self, terms: Terms) -> Tensor:
        """(B,)."""
        return terms.log_lik.mean(0) - self.charge(terms)

    def charge(self, terms: Terms) -> Tensor:
        """What is paid for q's distance from the prior, (B,): here the KL."""
        return terms.kl()
