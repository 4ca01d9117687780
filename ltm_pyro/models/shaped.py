"""A distribution over flat thoughts, given back the two axes of (K, D)."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from ltm_pyro.models.drawn import NO_SHAPE, Shape
from ltm_pyro.random import from_noise, noise_size


class Shaped(TorchDistribution):
    """`flat`, with draws of its event shape seen as draws of `event_shape`.

    Most distributions that correlate dimensions know one axis only. Reshaping keeps the density,
    the entropy and the order of the dimensions: (k, d) is number k * D + d.

    Args:
        flat: Batch shape (...), and an event of as many dimensions as `event_shape` has, of one
            axis or more.
        event_shape: (K, D).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own interface

    def __init__(
        self, flat: Distribution, event_shape: Shape, validate_args: bool | None = None
    ) -> None:
        shape = torch.Size(event_shape)
        if shape.numel() != flat.event_shape.numel():
            raise ValueError(f"an event of {tuple(flat.event_shape)} cannot be seen as {shape}")
        self.flat = flat
        super().__init__(flat.batch_shape, shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """As `flat`."""
        return bool(self.flat.has_rsample)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """All real thoughts."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def shape_up(self, flat: Tensor) -> Tensor:
        """A tensor (..., *flat.event_shape) as (..., *event_shape)."""
        lead = flat.shape[: flat.dim() - len(self.flat.event_shape)]
        return flat.reshape(lead + self.event_shape)

    def flatten(self, value: Tensor) -> Tensor:
        """The way back: (..., *event_shape) as (..., *flat.event_shape)."""
        lead = value.shape[: value.dim() - len(self.event_shape)]
        return value.reshape(lead + self.flat.event_shape)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Shaped:
        """The same distribution over more rows; `flat` expands without copying its factors."""
        # Of the same class, so that what a subclass adds, and its closed-form KL, stay.
        new: Shaped = type(self).__new__(type(self)) if _instance is None else _instance
        flat = self.flat.expand(torch.Size(batch_shape))
        Shaped.__init__(new, flat, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Shape = NO_SHAPE) -> Tensor:
        """Reparametrised draws, (*sample_shape, ..., K, D)."""
        return self.shape_up(self.flat.rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: Shape = NO_SHAPE) -> Tensor:
        """Draws without a gradient, (*sample_shape, ..., K, D)."""
        with torch.no_grad():
            return self.shape_up(self.flat.sample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, (..., K, D) to (...)."""
        return self.flat.log_prob(self.flatten(value))

    def rsample_and_log_prob(self, sample_shape: Shape = NO_SHAPE) -> tuple[Tensor, Tensor]:
        """Draws and their log densities at once, which is cheaper where `flat` can do it (zuko)."""
        both = getattr(self.flat, "rsample_and_log_prob", None)
        if both is None:
            z = self.rsample(sample_shape)
            return z, self.log_prob(z)
        flat, log_prob = both(torch.Size(sample_shape))
        return self.shape_up(flat), log_prob

    @property
    def noise_size(self) -> int | None:
        """Normal numbers that a draw takes, as `flat`."""
        return noise_size(self.flat)

    def from_noise(self, noise: Tensor) -> Tensor:
        """Draws from standard normal numbers, (..., N) to (..., K, D)."""
        return self.shape_up(from_noise(self.flat, noise))

    def entropy(self) -> Tensor:
        """Differential entropy in nats, (...), where `flat` has one."""
        return self.flat.entropy()

    @property
    def mean(self) -> Tensor:
        """(..., K, D)."""
        return self.shape_up(self.flat.mean)

    @property
    def variance(self) -> Tensor:
        """Marginal variances, (..., K, D)."""
        return self.shape_up(self.flat.variance)
