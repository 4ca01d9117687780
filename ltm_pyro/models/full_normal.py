"""A normal distribution over thoughts in which every dimension may lean on every other."""

from __future__ import annotations

import torch
from pyro.distributions import MultivariateNormal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

Shape = torch.Size | list[int] | tuple[int, ...]
_NO_SHAPE = torch.Size()


class FullNormal(TorchDistribution):
    """N(mean, covariance) over K x D thoughts: batch shape (...), event shape (K, D).

    A `MultivariateNormal` over the K * D dimensions in row order, given back its two axes.

    Args:
        loc: (..., K, D) means.
        scale_tril: (..., K * D, K * D) lower Cholesky factor of the covariance.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own interface
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None) -> None:
        self.flat = MultivariateNormal(
            loc.flatten(-2), scale_tril=scale_tril, validate_args=validate_args
        )
        super().__init__(self.flat.batch_shape, loc.shape[-2:], validate_args=validate_args)

    def _thoughts(self, flat: Tensor) -> Tensor:
        """(..., K * D) to (..., K, D)."""
        thoughts: Tensor = flat.unflatten(-1, tuple(self.event_shape))
        return thoughts

    def expand(self, batch_shape: Shape, _instance: object = None) -> FullNormal:
        """The same distribution over more rows."""
        shape = torch.Size(batch_shape)
        loc = self.mean.expand(shape + self.event_shape)
        scale_tril = self.flat.scale_tril
        return FullNormal(
            loc, scale_tril.expand(shape + scale_tril.shape[-2:]), self._validate_args
        )

    def rsample(self, sample_shape: Shape = _NO_SHAPE) -> Tensor:
        """Reparametrised draws, (*sample_shape, ..., K, D)."""
        return self._thoughts(self.flat.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, (..., K, D) to (...)."""
        log_prob: Tensor = self.flat.log_prob(value.flatten(-2))
        return log_prob

    def entropy(self) -> Tensor:
        """Differential entropy in nats, (...)."""
        entropy: Tensor = self.flat.entropy()
        return entropy

    @property
    def mean(self) -> Tensor:
        """(..., K, D)."""
        return self._thoughts(self.flat.mean)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, (..., K, D)."""
        return self._thoughts(self.flat.variance)

    @property
    def covariance(self) -> Tensor:
        """(..., K * D, K * D), dimensions in row order: (k, d) at k * D + d."""
        covariance: Tensor = self.flat.covariance_matrix
        return covariance
