"""Distributions over thoughts whose draws are made of standard normal numbers."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

Shape = torch.Size | list[int] | tuple[int, ...]
NO_SHAPE = torch.Size()


class Drawn(TorchDistribution):
    """Batch shape (...), event shape (K, D); a subclass makes draws of noise, see `TakesNoise`.

    Args:
        like: A parameter: draws are of its dtype and on its device.
        batch_shape: Of rows.
        event_shape: (K, D).
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch's own interface
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        like: Tensor,
        batch_shape: Shape,
        event_shape: Shape,
        validate_args: bool | None = None,
    ) -> None:
        self._like = like
        super().__init__(
            torch.Size(batch_shape), torch.Size(event_shape), validate_args=validate_args
        )

    @property
    def noise_size(self) -> int:
        """Normal numbers that a draw takes, K * D."""
        return self.event_shape.numel()

    def from_noise(self, noise: Tensor) -> Tensor:
        """Draws, with a path to the parameters, from normal numbers: (..., N) to (..., K, D)."""
        raise NotImplementedError

    def rsample(self, sample_shape: Shape = NO_SHAPE) -> Tensor:
        """Reparametrised draws, (*sample_shape, ..., K, D)."""
        shape = (*sample_shape, *self.batch_shape, self.noise_size)
        return self.from_noise(torch.randn(shape, dtype=self._like.dtype, device=self._like.device))
