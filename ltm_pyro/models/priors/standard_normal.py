"""The prior that nothing is learned of: z ~ N(0, I)."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.models.priors.base import ThoughtPrior, register_prior


@register_prior("standard_normal")
class StandardNormal(ThoughtPrior):
    """z ~ N(0, I): K thought vectors of D independent dimensions.

    Calling it gives the distribution, with batch shape () and event shape (K, D).
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, n_thoughts: int, thought_dim: int) -> None:
        super().__init__(n_thoughts, thought_dim)
        # Buffers, so that the distribution is made where the model lives.
        self.register_buffer("loc", torch.zeros(self.shape), persistent=False)
        self.register_buffer("scale", torch.ones(self.shape), persistent=False)
        self._made: tuple[Tensor, TorchDistribution] | None = None

    def forward(self) -> TorchDistribution:
        """The prior of one sequence's thoughts; the same object until the model moves."""
        if self._made is None or self._made[0] is not self.loc:
            self._made = self.loc, dist.Normal(self.loc, self.scale).to_event(2)
        return self._made[1]
