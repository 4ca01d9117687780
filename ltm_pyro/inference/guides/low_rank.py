"""Normal posterior of diagonal plus rank r: q(z_i) = N(loc_i, S_i (I + A_i A_i') S_i)."""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ltm_pyro.checks import log_variance, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.rows.optimizers import LOG_VARIANCE_UNIT, Unit
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.registry import register_guide
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.full_normal import LowRankNormal

START = 0.3
"""Length of each column of A at the start: the KL to the prior there is 0.0018 nats per column."""


@register_guide("low_rank")
class LowRank(LocalGuide):
    """Normal with r directions of correlation per sequence (Ong, Nott & Smith 2018).

    S is diagonal with S_jj = exp(log_variance_j / 2), and A has r columns. The columns are in units
    of S rather than of z: an optimiser with one learning rate for all then moves them well whether
    a posterior is as wide as the prior or a hundred times narrower, and the r x r matrix that the
    density factors, I + A'A, is never singular. With r = K * D every covariance can be reached.

    Args:
        rank: r, from 1 to K * D; by default 2, or 1 where z has one dimension.
        init_log_variance: Log of the marginal variances at the start. 0 is the standard normal
            prior's.

    Local parameters: `loc` and `log_variance` (B, K, D), `factor` (B, K, D, r).
    """

    def __init__(
        self, model: LatentModel, rank: int | None = None, init_log_variance: float = 0.0
    ) -> None:
        n_thoughts, dim = model.thought_shape
        size = n_thoughts * dim
        rank = min(2, size) if rank is None else rank
        limit = f"the dimension of the thoughts, K * D = {n_thoughts} * {dim}"
        whole_number("rank", rank, 1, size, limit=limit)
        super().__init__(model)
        self.rank = rank
        self.init_log_variance = self.start_log_variance = log_variance(init_log_variance)

    def initial_rows(self, batch: Batch) -> dict[str, Tensor]:
        """Means at 0, marginal variances as asked, slight correlations; the same for every row."""
        shape = (len(batch), *self.thought_shape)
        factor = START * self._directions()
        # What the columns add to the variances is taken off the diagonal.
        log_variance = self.init_log_variance - factor.square().sum(-1).log1p()
        return {
            "loc": self.anchor.new_zeros(shape),
            "log_variance": log_variance.expand(shape),
            "factor": factor.expand(*shape, self.rank),
        }

    def _directions(self) -> Tensor:
        """(K, D, r) orthonormal columns, the cosines of the DCT-II, slow to fast.

        At A = 0 the gradient in A is zero whatever the data, and columns that start alike stay
        alike; these are neither.
        """
        n = self.thought_shape[0] * self.thought_shape[1]
        place = torch.arange(n, dtype=torch.float64)[:, None] + 0.5
        order = torch.arange(self.rank, dtype=torch.float64)
        columns = torch.cos(math.pi / n * place * order)
        columns = columns / columns.norm(dim=0)
        return columns.to(self.anchor).unflatten(0, self.thought_shape)

    def posterior(self) -> TorchDistribution:
        """q(z): batch shape (B,), event shape (K, D)."""
        scale = torch.exp(0.5 * self.local["log_variance"])
        return LowRankNormal(self.local["loc"], scale, self.local["factor"])

    def units(self) -> dict[str, Unit]:
        """S for `loc`, at most its scale given the other dimensions; `factor` has none."""
        scale = torch.exp(0.5 * self.local["log_variance"])
        return {"loc": scale, "log_variance": LOG_VARIANCE_UNIT}
