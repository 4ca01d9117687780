"""Relatives of the ELBO that change what is charged for the KL."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from torch import Tensor

from ltm_pyro.checks import finite_number, one_of
from ltm_pyro.errors import InputError
from ltm_pyro.inference.objectives.evidence import Elbo, Terms
from ltm_pyro.models.full_normal import kl_by_group


class BetaElbo(Elbo):
    """E_q log p(x | z) - weight KL(q || p) (Higgins et al. 2017, eq. 4): no bound below weight 1.

    Args:
        weight: Of the KL, 0 or more; above 1 it buys compression, below 1 reconstruction.
        particles: S.
    """

    name: ClassVar[str] = "beta"

    def __init__(self, weight: float = 1.0, particles: int = 1) -> None:
        weight = finite_number("weight", weight, at_least=0)
        super().__init__(particles, weight=weight)
        self.beta = weight

    def charge(self, terms: Terms) -> Tensor:
        """C weight KL, (B,)."""
        return self.beta * terms.kl()


Level = Literal["total", "layer", "thought"]


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
        nats = finite_number("nats", nats, at_least=0)
        one_of("level of free_bits", level, get_args(Level))
        super().__init__(particles, nats=nats, level=level)
        self.nats = nats
        self.level = level

    def charge(self, terms: Terms) -> Tensor:
        """C sum_g max(nats, KL_g), (B,)."""
        if self.level == "total":
            return terms.kl().clamp(min=self.nats * terms.weight)
        by_group = kl_by_group(terms.q, terms.prior, terms.z, self._groups(terms))
        if by_group is None:
            raise InputError(
                f"free_bits at level {self.level!r} needs a q and a prior that are independent "
                f"between {self.level}s, which guide {terms.guide.family!r} or the prior is not: "
                "use level 'total'"
            )
        return terms.weight * by_group.clamp(min=self.nats).sum(-1)

    def _groups(self, terms: Terms) -> int:
        """Layers or thoughts."""
        if self.level == "thought":
            return int(terms.z.shape[-2])
        if terms.model.n_layers is None:
            raise InputError(
                "free_bits at level 'layer': this model has no layers; use level 'total' or "
                "'thought'"
            )
        return terms.model.n_layers
