"""Mixture posterior: q(z_i) = sum_c w_ic N(loc_ic, diag(exp(log_variance_ic)))."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import log_variance, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.rows.optimizers import LOG_VARIANCE_UNIT, Unit
from ltm_pyro.inference.guides.base import LocalGuide, closed_kl
from ltm_pyro.inference.guides.registry import register_guide
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.normal_mixture import NormalMixture

START = 1.0
"""Distance of each component's mean from the prior's at the start: 0.5 nats of KL at the most,
however many dimensions share it."""
WEIGHT_RATE = 0.1
"""Log weights move at this fraction of the other parameters' pace. At full pace the first component
to find a mode takes nearly all the weight before the other has found its own, and keeps it."""

LEAST_WEIGHT = 0.05
"""Units grow with a component's falling weight, down to this one."""
_ROW_BYTES = 8  # mean and variance of a dimension, of one sequence


@register_guide("mixture")
class Mixture(LocalGuide):
    """Mixture of diagonal normals per sequence, for posteriors of several modes.

    Weights are learned while components overlap. A reparametrised draw cannot pass between modes
    that have parted, so the weights then stay as they are, near equal where that happened early.
    Between modes of unequal mass this costs something, at most log C nats.

    Args:
        components: C.
        init_log_variance: Where the components' log variances start. 0 is the standard normal
            prior's.

    Local parameters: `logits` (B, C), the log weights before normalisation in units of
    `WEIGHT_RATE`; `loc` and `log_variance` (B, C, K, D).
    """

    def __init__(
        self, model: LatentModel, components: int = 2, init_log_variance: float = 0.0
    ) -> None:
        each = _ROW_BYTES * math.prod(model.thought_shape)
        whole_number("components", components, 1, bytes_each=each)
        super().__init__(model)
        self.components = components
        self.init_log_variance = self.start_log_variance = log_variance(init_log_variance)

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        """Equal weights and variances, means apart; the same for every row."""
        rows = len(batch)
        shape = (rows, self.components, *self.thought_shape)
        return {
            "logits": self.anchor.new_zeros(rows, self.components),
            "loc": self._means().expand(shape),
            "log_variance": self.anchor.new_full(shape, self.init_log_variance),
        }

    def _means(self) -> Tensor:
        """(C, K, D) points around 0 at distance `START` or less, their mean 0.

        Components that start alike stay alike. The directions are random, so that none is special
        to a model, and drawn from a generator of their own, so that they are always the same.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (self.components, *self.thought_shape)
        means = torch.randn(shape, generator=generator, dtype=torch.float64)
        means = means - means.mean(0)
        length = means.square().sum((1, 2)).max().sqrt()
        return (START * means / length.clamp(min=1e-12)).to(self.anchor)

    def posterior(self) -> TorchDistribution:
        """q(z): batch shape (B,), event shape (K, D)."""
        scale = torch.exp(0.5 * self.local["log_variance"])
        return NormalMixture(WEIGHT_RATE * self.local["logits"], self.local["loc"], scale)

    def units(self) -> dict[str, Unit]:
        """A component's gradients shrink with its weight, and its units grow; weights have none."""
        weights = torch.softmax(WEIGHT_RATE * self.local["logits"], -1)[..., None, None]
        share = weights.clamp(min=LEAST_WEIGHT).rsqrt()
        scale = torch.exp(0.5 * self.local["log_variance"])
        return {"loc": share * scale, "log_variance": LOG_VARIANCE_UNIT * share}

    def kl(self, prior: TorchDistribution) -> Tensor | None:
        """None but for one component: the entropy of a mixture has no closed form."""
        if self.components > 1:
            return None
        q = self.posterior()
        return closed_kl(dist.Normal(q.mean, q.stddev).to_event(2), prior)
