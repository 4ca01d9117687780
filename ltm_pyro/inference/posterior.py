"""The fitted posterior of a batch: what inference hands to scores, export and plots."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

KL_DRAWS = 256
"""Draws for a KL that has no closed form."""


@dataclass(frozen=True)
class FastTrace:
    """What happened in a fast loop, per fast step and sequence.

    Attributes:
        elbo: (T_fast, B) ELBO estimates in nats at the parameters before each step, at the draws
            that the step used, KL weight 1. Noisy; with `noise="fixed"` not a bound.
        nll: (T_fast, B) its reconstruction part, -log p(x | z).
        kl: (T_fast, B) its KL part.
        lr: (T_fast,) learning rates.
        grad_norm: (T_fast, B) Euclidean norms of the local gradients.
    """

    elbo: Tensor
    nll: Tensor
    kl: Tensor
    lr: Tensor
    grad_norm: Tensor


@dataclass(frozen=True)
class Posterior:
    """q(z_i) for each sequence of a batch.

    Attributes:
        distribution: Batch shape (B,), event shape (K, D); carries no gradient.
        prior: p(z), event shape (K, D).
        ids: (B,) the sequences' stable ids.
        mask: (B, T) the positions that q was fitted to.
        family: Name of the guide family.
        has_density: False for a point mass.
        parameters: The local variational parameters by name, each (B, ...).
        trace: The fast loop's course, if it ran.
        closed_form_kl: (B,) KL(q || prior), where the family has a closed form.
        own_draw_elbo: (B,) with `noise="fixed"`: the ELBO on the draws that fitted q. NOT a bound;
            `score_on_own_draws` shows it beside the honest value.
    """

    distribution: TorchDistribution
    prior: TorchDistribution
    ids: Tensor
    mask: Tensor
    family: str
    has_density: bool = True
    parameters: dict[str, Tensor] = field(default_factory=dict)
    trace: FastTrace | None = None
    closed_form_kl: Tensor | None = None
    own_draw_elbo: Tensor | None = None

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @torch.no_grad()
    def sample(self, draws: int) -> Tensor:
        """Independent draws, (S, B, K, D), from torch's global random generator."""
        return self.distribution.sample(torch.Size([draws]))

    def log_prob(self, z: Tensor) -> Tensor:
        """Log q(z) in nats, z (..., B, K, D) to (..., B)."""
        return self.distribution.log_prob(z)

    @property
    def mean(self) -> Tensor:
        """E_q[z], (B, K, D)."""
        return self.distribution.mean

    @property
    def kl_estimator(self) -> str:
        """`analytic`, or `monte_carlo` where the family has no closed form."""
        return "monte_carlo" if self.closed_form_kl is None and self.has_density else "analytic"

    def kl(self) -> Tensor:
        """KL(q || prior) per sequence in nats, (B,); infinite for a point mass.

        Closed form where there is one, else the mean over `KL_DRAWS` fresh draws; `kl_estimator`
        tells which.
        """
        if not self.has_density:
            return torch.full(self.ids.shape, torch.inf, device=self.ids.device)
        if self.closed_form_kl is not None:
            return self.closed_form_kl
        z = self.sample(KL_DRAWS)
        return (self.log_prob(z) - self.prior.log_prob(z)).mean(0)
