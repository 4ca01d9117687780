"""Relatives of the ELBO that change what is charged for the KL."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent

from ltm_pyro.checks import finite_number
from ltm_pyro.errors import InputError, unknown_name
from ltm_pyro.inference.objectives.evidence import Elbo, Terms
from ltm_pyro.models.full_normal import is_factorised_normal
from ltm_pyro.models.shaped import Shaped


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

    def charge(self, terms: Terms) -> Tensor:
        """C weight KL, (B,)."""
        return self.beta * terms.kl()


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

    def charge(self, terms: Terms) -> Tensor:
        """C sum_g max(nats, KL_g), (B,)."""
        if self.level == "total":
            free = torch.as_tensor(
                self.nats * terms.weight, dtype=terms.z.dtype, device=terms.z.device
            )
            return torch.maximum(terms.kl(), free)
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


def kl_by_group(
    q: TorchDistribution, prior: TorchDistribution, z: Tensor, groups: int
) -> Tensor | None:
    """KL in nats of each of `groups` equal blocks of thoughts, (B, groups).

    Against a factorised normal prior in closed form, since the cross-entropy needs q's marginal
    moments alone; else the mean over the draws `z`.

    Args:
        q: Batch shape (B,), event shape (K, D).
        prior: Event shape (K, D).
        z: (S, B, K, D) draws from q.
        groups: G, a divisor of K.

    Returns:
        `None` where q or the prior is not a product over groups.
    """
    q_factors = _factors(q, groups)
    if q_factors is None:
        return None
    if is_factorised_normal(prior):
        try:
            entropy = _grouped(q_factors.entropy(), 1, groups)
        except NotImplementedError:
            pass
        else:
            squares = (q.variance + (q.mean - prior.mean).square()) / prior.variance
            cross = 0.5 * (squares + prior.variance.log() + math.log(2 * math.pi))
            return _grouped(cross, 1, groups) - entropy
    p = prior.expand(q.batch_shape)
    p_factors = _factors(p, groups)
    if p_factors is None:
        return None
    log_q = q_factors.log_prob(_flat(q, z))
    log_p = p_factors.log_prob(_flat(p, z))
    return (_grouped(log_q, 2, groups) - _grouped(log_p, 2, groups)).mean(0)


def _factors(d: Distribution, groups: int) -> Distribution | None:
    """`d` with its independent parts as batch dimensions, if none of them spans two groups."""
    whole = d.flat if isinstance(d, Shaped) else d
    if not isinstance(whole, Independent):
        return None
    parts = whole.base_dist.batch_shape[len(d.batch_shape) :].numel()
    return None if parts % groups else whole.base_dist


def _flat(d: Distribution, z: Tensor) -> Tensor:
    """`z` in the shape that `d`'s parts score."""
    return d.flatten(z) if isinstance(d, Shaped) else z


def _grouped(values: Tensor, lead: int, groups: int) -> Tensor:
    """Sums what follows the `lead` leading dimensions into equal groups."""
    return values.flatten(lead).unflatten(-1, (groups, -1)).sum(-1)
