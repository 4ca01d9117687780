"""Fully factorised normal posterior: q(z_i) = prod_kd N(z_kd; loc_kd, exp(log_variance_kd))."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import log_variance
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.rows.optimizers import LOG_VARIANCE_UNIT, Unit
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.registry import register_guide
from ltm_pyro.models.base import LatentModel


@register_guide("mean_field")
class MeanField(LocalGuide):
    """Diagonal normal, the family of Kong et al. (2025, section 3.2).

    Args:
        init_log_variance: Where the log variances start. 0 is the standard-normal prior; far below
            it a short fast loop cannot return (see `kl_floor_per_sequence`).

    Local parameters: `loc` and `log_variance`, each (B, K, D).
    """

    def __init__(self, model: LatentModel, init_log_variance: float = 0.0) -> None:
        super().__init__(model)
        self.init_log_variance = self.start_log_variance = log_variance(init_log_variance)

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        """`loc` at 0, `log_variance` at its start, each (B, K, D)."""
        shape = (len(batch), *self.thought_shape)
        return {
            "loc": self.anchor.new_zeros(shape),
            "log_variance": self.anchor.new_full(shape, self.init_log_variance),
        }

    def posterior(self) -> TorchDistribution:
        """q(z): batch shape (B,), event shape (K, D)."""
        scale = torch.exp(0.5 * self.local["log_variance"])
        return dist.Normal(self.local["loc"], scale).to_event(2)

    def units(self) -> dict[str, Unit]:
        """One scale of q for `loc`."""
        scale = torch.exp(0.5 * self.local["log_variance"])
        return {"loc": scale, "log_variance": LOG_VARIANCE_UNIT}
