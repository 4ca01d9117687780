"""Yes-or-no items that share a few hidden factors: item response theory."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.priors import StandardNormal


class BernoulliFactors(LatentModel):
    """Factor analysis of binary items, with one factor the two-parameter logistic model.

        z_i        ~ N(0, I)                                 (1, D)
        x_ij | z_i ~ Bernoulli(sigmoid(b_j + z_i . W_j)),  j = 1..J    (J,)

    Row i answers J items that have no order; what it did not answer holds a 0 and is masked. The
    slow clock learns loadings W and easiness b, the fast clock each row's z_i. Only W W^T is
    identified: turning all factors together changes nothing (Bartholomew, Knott & Moustaki 2011,
    chapter 4).

    Args:
        n_items: J.
        n_factors: D.

    Example:
        >>> model = BernoulliFactors(n_items=6, n_factors=2)
        >>> model(size=3).shape
        torch.Size([3, 6])
    """

    def __init__(self, n_items: int, n_factors: int = 2) -> None:
        super().__init__()
        n_items = whole_number("n_items", n_items, at_least=1)
        self.thought_prior = StandardNormal(1, whole_number("n_factors", n_factors, at_least=1))
        self.loadings = nn.Parameter(0.5 * torch.randn(n_items, n_factors))
        self.easiness = nn.Parameter(torch.zeros(n_items))
        self.x_shape = (n_items,)

    def prior(self) -> TorchDistribution:
        """p(z) of one row: event shape (1, D)."""
        return self.thought_prior()

    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        """p(x | z) for z (..., B, 1, D): batch shape (..., B), event shape (J,)."""
        logits = z.squeeze(-2) @ self.loadings.T + self.easiness
        # One trial: torch's Bernoulli takes no whole numbers.
        return dist.Binomial(logits=logits).mask(batch.mask).to_event(1)

    def check(self, batch: Batch) -> None:
        """Refuses what is no answer to J items."""
        x = batch.observed
        if x.shape[1:] != self.x_shape:
            raise InputError(
                f"x is {tuple(x.shape)}: must be (B, {len(self.easiness)}), one an item"
            )
        bad = ((x != 0) & (x != 1)).any(-1)
        if bool(bad.any()):
            raise InputError(
                f"x of ids {batch.ids[bad].tolist()[:8]} is not 0 or 1: mend it, or put 0 there "
                "and mask it"
            )
