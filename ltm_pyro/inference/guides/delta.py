"""Point posterior: the mode of p(z | x) alone (maximum a posteriori)."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.registry import register_guide


@register_guide("delta")
class Delta(LocalGuide):
    """All mass on one point per sequence.

    It has no density, so it has no ELBO: the objective that it maximises is log p(x, z) at the
    point, which may exceed log p(x). `evaluate` scores it as -inf and reports the joint under its
    own name.

    Local parameters: `point` (B, K, D), started at 0, the prior's mean.
    """

    has_density: ClassVar[bool] = False

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        """`point` at 0, (B, K, D)."""
        return {"point": self.anchor.new_zeros((len(batch), *self.thought_shape))}

    def posterior(self) -> TorchDistribution:
        """The point mass: batch shape (B,), event shape (K, D)."""
        return dist.Delta(self.local["point"], event_dim=2)
