"""Normal distributions over thoughts whose dimensions may lean on each other.

Against a factorised normal prior the cross-entropy needs the posterior's marginal moments alone, so

    KL(q || p) = -H(q) + 1/2 sum_kd [ log 2 pi s_kd^2 + (v_kd + (m_kd - a_kd)^2) / s_kd^2 ]

for ANY q with entropy H, marginal means m and variances v, and p = prod_kd N(a_kd, s_kd^2). What
differs between normals is the entropy, half the log determinant of the covariance: the sum of log
variances for mean field, of the Cholesky diagonals for full and block-diagonal covariances, and the
determinant lemma for low rank, log |D + F F'| = log |D| + log |I + F' D^-1 F| (Rasmussen & Williams
2006, eq. A.9 and A.10).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import LowRankMultivariateNormal, MultivariateNormal, TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, register_kl

from ltm_pyro.models.shaped import Shaped


class FullNormal(Shaped):
    """N(mean, covariance) over K x D thoughts: batch shape (...), event shape (K, D).

    Args:
        loc: (..., K, D) means.
        scale_tril: (..., K * D, K * D) lower Cholesky factor of the covariance.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        flat = MultivariateNormal(
            loc.flatten(-2), scale_tril=scale_tril, validate_args=validate_args
        )
        super().__init__(flat, loc.shape[-2:], validate_args=validate_args)

    @property
    def covariance(self) -> Tensor:
        """(..., K * D, K * D), dimensions in row order: (k, d) at k * D + d."""
        return self.flat.covariance_matrix  # type: ignore[attr-defined]


class BlockNormal(Shaped):
    """A normal over K x D thoughts in which dimensions lean on each other within equal blocks only.

    Args:
        loc: (..., K, D) means.
        scale_tril: (..., M, N, N) lower Cholesky factors of the covariances of M blocks, each of N
            neighbours in row order; M * N = K * D.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        blocks = loc.reshape(loc.shape[:-2] + scale_tril.shape[-3:-1])
        each = MultivariateNormal(blocks, scale_tril=scale_tril, validate_args=validate_args)
        flat: Any = Independent(each, 1, validate_args=validate_args)
        super().__init__(flat, loc.shape[-2:], validate_args=validate_args)

    @property
    def covariance(self) -> Tensor:
        """(..., K * D, K * D), zero between blocks."""
        blocks: Tensor = self.flat.base_dist.covariance_matrix  # type: ignore[attr-defined]
        count, size = blocks.shape[-3], blocks.shape[-1]
        # Block m, row i is dimension m * N + i; only m = m' is filled.
        out = blocks.new_zeros((*blocks.shape[:-3], count, size, count, size))
        at = torch.arange(count, device=blocks.device)
        out[..., at, :, at, :] = blocks.movedim(-3, 0)
        return out.reshape((*blocks.shape[:-3], count * size, count * size))


class LowRankNormal(Shaped):
    """N(loc, S (I + A A') S) over K x D thoughts, S diagonal and A of R columns.

    Density, entropy and draws cost K * D * R + R^3 (Woodbury's identity and the determinant
    lemma). The R x R matrix they factor is I + A'A, whose eigenvalues are 1 or more.

    Args:
        loc: (..., K, D) means.
        scale: (..., K, D) the diagonal of S.
        factor: (..., K, D, R) the columns of A.
    """

    def __init__(
        self, loc: Tensor, scale: Tensor, factor: Tensor, validate_args: bool | None = None
    ) -> None:
        columns = (scale[..., None] * factor).flatten(-3, -2)
        flat: Any = LowRankMultivariateNormal(
            loc.flatten(-2), columns, scale.square().flatten(-2), validate_args=validate_args
        )
        super().__init__(flat, loc.shape[-2:], validate_args=validate_args)

    @property
    def covariance(self) -> Tensor:
        """(..., K * D, K * D), dimensions in row order."""
        return self.flat.covariance_matrix  # type: ignore[attr-defined]


def is_factorised_normal(p: Distribution) -> bool:
    """Whether all dimensions of `p`'s event are independent and normal."""
    return (
        isinstance(p, Independent)
        and isinstance(p.base_dist, Normal)
        and len(p.event_shape) == p.reinterpreted_batch_ndims
    )


def gaussian_kl(q: Distribution, prior: TorchDistribution) -> Tensor | None:
    """KL(q || prior) in nats, (...), for any q with entropy, mean and variance in closed form.

    `None` where the prior is not a factorised normal over the same event (K, D).
    """
    if not is_factorised_normal(prior) or prior.event_shape != q.event_shape:
        return None
    return _cross_entropy(q, prior).flatten(-len(prior.event_shape)).sum(-1) - q.entropy()


def _cross_entropy(q: Distribution, prior: Distribution) -> Tensor:
    """-E_q log p of each dimension, (..., K, D), for a factorised normal p."""
    squares = (q.variance + (q.mean - prior.mean).square()) / prior.variance
    return 0.5 * (squares + prior.variance.log() + math.log(2 * math.pi))


def _registered(q: Distribution, prior: TorchDistribution) -> Tensor:
    kl = gaussian_kl(q, prior)
    if kl is None:
        raise NotImplementedError
    return kl


# Known to torch, so that guides and `TraceMeanField_ELBO` take the closed form.
for _normal in (FullNormal, BlockNormal, LowRankNormal):
    register_kl(_normal, Independent)(_registered)


def kl_by_group(
    q: TorchDistribution, prior: TorchDistribution, z: Tensor, groups: int
) -> Tensor | None:
    """KL in nats of each of `groups` equal blocks of thoughts, (B, groups).

    Against a factorised normal prior in closed form, since the cross-entropy needs q's marginal
    moments alone; else the mean over draws `z` (S, B, K, D) from q. `None` where q or the prior is
    not a product over groups.
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
            return _grouped(_cross_entropy(q, prior), 1, groups) - entropy
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
