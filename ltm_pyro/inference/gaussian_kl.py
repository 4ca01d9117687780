"""KL divergences in closed form from a normal posterior to a normal prior.

Against such a prior the cross-entropy needs the posterior's marginal moments alone, so

    KL(q || p) = -H(q) + 1/2 sum_kd [ log 2 pi s_kd^2 + (v_kd + (m_kd - a_kd)^2) / s_kd^2 ]

for ANY q with entropy H, marginal means m and variances v, and p = prod_kd N(a_kd, s_kd^2). What
differs between normals is the entropy, half the log determinant of the covariance: the sum of log
variances for mean field, of the Cholesky diagonals for full and block-diagonal covariances, and the
determinant lemma for low rank, log |D + F F'| = log |D| + log |I + F' D^-1 F| (Rasmussen & Williams
2006, eq. A.9 and A.10).
"""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence, register_kl

from ltm_pyro.models.full_normal import BlockNormal, FullNormal, LowRankNormal
from ltm_pyro.models.priors.autoregressive import StationaryAR1


def is_factorised_normal(p: torch.distributions.Distribution) -> bool:
    """Whether all dimensions of `p`'s event are independent and normal."""
    return (
        isinstance(p, Independent)
        and isinstance(p.base_dist, Normal)
        and len(p.event_shape) == p.reinterpreted_batch_ndims
    )


def gaussian_kl(q: torch.distributions.Distribution, prior: TorchDistribution) -> Tensor | None:
    """KL(q || prior) in nats.

    Args:
        q: Batch shape (...), event shape (K, D), with `entropy`, `mean` and `variance` in closed
            form.
        prior: Event shape (K, D).

    Returns:
        (...), or `None` where the prior is not a factorised normal over the same event.
    """
    if not is_factorised_normal(prior) or prior.event_shape != q.event_shape:
        return None
    variance = prior.variance
    squares = (q.variance + (q.mean - prior.mean).square()) / variance
    cross = 0.5 * (squares + variance.log() + math.log(2 * math.pi))
    kl: Tensor = cross.flatten(-len(prior.event_shape)).sum(-1) - q.entropy()
    return kl


def independent_normal_kl(q: TorchDistribution, prior: TorchDistribution) -> Tensor | None:
    """KL(q || prior) in nats, (...), for q of independent normals.

    Returns:
        `None` where the prior is neither a factorised normal nor an autoregressive process.
    """
    if isinstance(prior, StationaryAR1):
        return kl_divergence(q, prior.expand(q.batch_shape))
    if not is_factorised_normal(prior):
        return None
    each: Tensor = kl_divergence(q.base_dist, prior.base_dist)
    return each.flatten(-len(prior.event_shape)).sum(-1)


def _registered(q: torch.distributions.Distribution, prior: TorchDistribution) -> Tensor:
    kl = gaussian_kl(q, prior)
    if kl is None:
        raise NotImplementedError
    return kl


# Known to torch, so that `TraceMeanField_ELBO` takes the closed form; it would otherwise fall back
# to a Monte Carlo estimate without a word.
for _normal in (FullNormal, BlockNormal, LowRankNormal):
    register_kl(_normal, Independent)(_registered)
