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
        # Buffers, so that the distribution is made where the model lives; whole, since every traced
        # step makes it anew.
        self.register_buffer("loc", torch.zeros(self.shape), persistent=False)
        self.register_buffer("scale", torch.ones(self.shape), persistent=False)

    def forward(self) -> TorchDistribution:
        """The prior of one sequence's thoughts."""
        return dist.Normal(self.loc, self.scale).to_event(2)
