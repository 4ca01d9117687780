"""Objectives that charge the KL as such: the ELBO, and its relatives that change the charge."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.errors import InputError, unknown_name
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives.base import Draws, Objective, finite_number
from ltm_pyro.inference.objectives.group_kl import kl_by_group
from ltm_pyro.inference.objectives.handlers import recorders


class Elbo(Objective):
    """E_q log p(x | z) - KL(q || p), the KL in closed form where the guide has one.

    Elsewhere the KL is the mean of log q(z) - log p(z) over the same draws. A point mass has no
    KL: its objective is log p(x, z) at the point.
    """

    name: ClassVar[str] = "elbo"

    def per_sequence(self, draws: Draws) -> Tensor:
        """(B,)."""
        # First, while small operations are at it; then the decoder's pass.
        charge = self.charge(draws)
        return draws.log_lik.mean(0) - charge

    def charge(self, draws: Draws) -> Tensor:
        """What is paid for q's distance from the prior, (B,): here the KL."""
        return self.kl(draws)

    def kl(self, draws: Draws) -> Tensor:
        """C KL(q || p), (B,)."""
        closed = self.closed_kl(draws.guide, draws.prior)
        if closed is not None:
            for recorder in recorders():
                recorder.closed_kl = closed.detach()
            return draws.weight * closed
        return (draws.log_q() - draws.log_prior).mean(0)

    def closed_kl(self, guide: LocalGuide, prior: TorchDistribution) -> Tensor | None:
        """The guide's closed form, (B,); Pyro's own guides have none."""
        return guide.kl(prior) if isinstance(guide, LocalGuide) else None


class StickingTheLanding(Objective):
    """The ELBO, its gradient taken through z alone (Roeder, Wu & Duvenaud 2017, eq. 7).

    Log q is evaluated at stopped parameters, which leaves out the score of q, whose expectation is
    zero. The gradient stays unbiased; at the exact posterior log w is constant in z, so that every
    single draw's gradient is zero. Far from it the variance may be the larger one.
    """

    name: ClassVar[str] = "stl"

    def per_sequence(self, draws: Draws) -> Tensor:
        """(B,)."""
        return draws.log_weight(stopped=True).mean(0)


class BetaElbo(Elbo):
    """E_q log p(x | z) - weight KL(q || p) (Higgins et al. 2017, eq. 4): no bound below weight 1.

    Args:
        weight: Of the KL, 0 or more; above 1 it buys compression, below 1 reconstruction.
        particles: S.
    """

    name: ClassVar[str] = "beta"

    def __init__(self, weight: float = 1.0, particles: int = 1) -> None:
        weight = finite_number("weight", weight)
        if weight < 0:
            raise InputError(f"weight is {weight}: must be 0 or more")
        super().__init__(particles, weight=weight)
        self.beta = weight

    def charge(self, draws: Draws) -> Tensor:
        """C weight KL, (B,)."""
        return self.beta * self.kl(draws)


Level = Literal["total", "layer", "thought"]
LEVELS = ("total", "layer", "thought")


class FreeBits(Elbo):
    """The ELBO in which a group's KL costs at least `nats` (Kingma et al. 2016, eq. 15).

    E_q log p(x | z) - sum_g max(nats, KL_g): below `nats` a group's KL is free, and q has no reason
    to fall back on the prior. The maximum is taken per sequence and not of the batch's mean, so
    that no sequence's posterior depends on its neighbours. Never above the ELBO.

    Where the KL is a Monte Carlo estimate the maximum is of the mean over the draws, which is
    larger on average than that of the KL itself: use several particles.

    Args:
        nats: Free nats per group, 0 or more.
        level: Groups: all thoughts together (`total`), those that feed one decoder layer (`layer`),
            or each thought vector (`thought`). The last two need a q and a prior that factorise
            over thoughts.
        particles: S.
    """

    name: ClassVar[str] = "free_bits"

    def __init__(self, nats: float = 1.0, level: Level = "total", particles: int = 1) -> None:
        nats = finite_number("nats", nats)
        if nats < 0:
            raise InputError(f"nats is {nats}: must be 0 or more")
        if level not in LEVELS:
            raise unknown_name("level of free_bits", str(level), LEVELS)
        super().__init__(particles, nats=nats, level=level)
        self.nats = nats
        self.level = level

    def charge(self, draws: Draws) -> Tensor:
        """C sum_g max(nats, KL_g), (B,)."""
        if self.level == "total":
            free = torch.as_tensor(
                self.nats * draws.weight, dtype=draws.z.dtype, device=draws.z.device
            )
            return torch.maximum(self.kl(draws), free)
        by_group = kl_by_group(draws.guide.posterior(), draws.prior, draws.z, self._groups(draws))
        if by_group is None:
            raise InputError(
                f"free_bits at level {self.level!r} needs a q and a prior that are independent "
                f"between {self.level}s, which guide {draws.guide.family!r} or the prior is not: "
                "use level 'total'"
            )
        return draws.weight * by_group.clamp(min=self.nats).sum(-1)

    def _groups(self, draws: Draws) -> int:
        """Layers or thoughts."""
        if self.level == "thought":
            return int(draws.z.shape[-2])
        if draws.n_layers is None:
            raise InputError(
                "free_bits at level 'layer': this model has no layers; use level 'total' or "
                "'thought'"
            )
        return draws.n_layers
