"""Counts of groups that each have a rate, and slopes, of their own: Poisson random effects."""

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


class PoissonEffects(LatentModel):
    """Poisson regression with normal random coefficients (Gelman & Hill 2007, chapter 15).

        z_i        ~ N(0, I)                                        (1, P)
        x_ij | z_i ~ Poisson(exp(c_ij . (w + s z_i))),  j = 1..J    (J,)

    Group i has J counts, each at covariates c_ij; its coefficients are w + s z_i, those of the
    population and how far groups stray from them. The slow clock learns w and log s, the fast clock
    each group's z_i. The covariates are `batch.covariates["design"]`, (B, J, P), and groups with
    fewer counts are padded with 0: what the mask leaves out does not count.

    Args:
        n_covariates: P, the constant among them.
        n_counts: J, of groups that the program makes up by itself.

    Example:
        >>> model = PoissonEffects()
        >>> batch = simulate(model, 100).batch
        >>> batch.covariates["design"].shape
        torch.Size([100, 8, 2])
    """

    def __init__(self, n_covariates: int = 2, n_counts: int = 8) -> None:
        super().__init__()
        self.n_counts = whole_number("n_counts", n_counts, at_least=1)
        n_covariates = whole_number("n_covariates", n_covariates, at_least=1)
        self.thought_prior = StandardNormal(1, n_covariates)
        self.weights = nn.Parameter(torch.zeros(n_covariates))
        self.log_scales = nn.Parameter(torch.full((n_covariates,), -1.0))

    def prior(self) -> TorchDistribution:
        """p(z) of one group: event shape (1, P)."""
        return self.thought_prior()

    def likelihood(self, z: Tensor, batch: Batch) -> TorchDistribution:
        """p(x | z) for z (..., B, 1, P): batch shape (..., B), event shape (J,)."""
        coefficients = self.weights + self.log_scales.exp() * z  # (..., B, 1, P)
        log_rate = (batch.covariates["design"].to(z) * coefficients).sum(-1)
        return dist.Poisson(log_rate.exp()).mask(batch.mask).to_event(1)

    def blank(self, size: int) -> Batch:
        """`size` groups still to be counted, at a constant and at random covariates."""
        shape = (whole_number("size", size, at_least=1), self.n_counts)
        design = torch.randn(*shape, len(self.weights), device=self.device).to(self.weights.dtype)
        design[..., 0] = 1.0
        mask = torch.ones(shape, dtype=torch.bool, device=self.device)
        return Batch(None, mask, covariates={"design": design})

    def check(self, batch: Batch) -> None:
        """Refuses what is no counts, or has no covariates that fit."""
        x, design = batch.observed, batch.covariates["design"]
        if design.shape != (*x.shape, len(self.weights)) or x.dim() != 2:
            raise InputError(
                f"design is {tuple(design.shape)} and x {tuple(x.shape)}: must be (B, J, "
                f"{len(self.weights)}) and (B, J), a row of covariates for each count"
            )
        whole = (x >= 0) & (x == x.round()) & x.isfinite() & design.isfinite().all(-1)
        if not bool(whole.all()):
            raise InputError(
                f"ids {batch.ids[~whole.all(-1)].tolist()[:8]}: x must be counts and design "
                "finite; mend it, or put 0 there and mask it"
            )
