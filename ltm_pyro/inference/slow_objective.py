"""What the slow clock descends: the objective at the fitted q, on fresh draws."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.fast_loop import frozen, sequence_terms
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives import (
    KLWeight,
    TermRecorder,
    over_particles,
    quiet_about_nan,
    repeating,
)
from ltm_pyro.inference.random import seeded
from ltm_pyro.models.base import LatentModel


@dataclass(frozen=True)
class SlowLoss:
    """What a slow step descends, and what it reports.

    Attributes:
        descended: In nats, summed over the batch.
        objective: The part of it that is the objective at the fitted q.
        nll: (B,) -log p(x | z), every input token shown.
        kl: (B,).
    """

    descended: Tensor
    objective: Tensor
    nll: Tensor
    kl: Tensor


class SlowObjective:
    """Builds a slow step's loss for the rows that the guide holds.

    Args:
        model: The model.
        guide: Its local parameters are fitted already.
        loss: Summed -ELBO of a batch.
    """

    def __init__(
        self,
        model: LatentModel,
        guide: LocalGuide,
        loss: Callable[[Batch], Tensor],
    ) -> None:
        self.model, self.guide, self.loss = model, guide, loss
        self._ran = False

    def at_fitted(self, batch: Batch, shown: Batch, weight: float, noise: int) -> SlowLoss:
        """At the fitted q, on fresh draws.

        Args:
            batch: The rows.
            shown: The same after word dropout, or the same object without.
            weight: Of the KL.
            noise: Seed of the draws.
        """
        with (
            frozen(self.guide.local_parameters().values()),
            seeded(noise, batch.device),
            quiet_about_nan(),
            KLWeight(weight),
        ):
            prior = self.model.prior()
            with self._checked_once(prior), TermRecorder() as recorder:
                objective = self.loss(shown)
            nll, kl = sequence_terms(recorder, self.guide, prior)
            extra = self._shared_loss(shown)
        if shown is not batch:
            nll = self._nll(recorder.thoughts(), batch)
        return SlowLoss(objective if extra is None else objective + extra, objective, nll, kl)

    def _checked_once(self, prior: TorchDistribution) -> AbstractContextManager[object]:
        """Pyro runs and checks the first slow step; a prior that learns has to be run each time."""
        ran, self._ran = self._ran, True
        learned = getattr(self.model, "thought_prior", None)
        learns = isinstance(learned, nn.Module) and any(
            p.requires_grad for p in learned.parameters()
        )
        return repeating(prior) if ran and not learns else nullcontext()

    def _shared_loss(self, shown: Batch) -> Tensor | None:
        """`LocalGuide.shared_loss` with the model frozen, of a guide that shares anything."""
        if not self.guide.shared_parameters():
            return None
        with frozen(self.model.parameters()):
            return self.guide.shared_loss(self.loss, shown)

    def without_thoughts(self, batch: Batch, shown: Batch) -> SlowLoss:
        """Before thoughts join: -log p(x | z = 0), no KL."""
        z = self.guide.anchor.new_zeros((len(batch), *self.model.thought_shape))
        losses = -self.model.log_likelihood(z, shown)
        nll = losses.detach() if shown is batch else self._nll([z], batch)
        return SlowLoss(losses.sum(), losses.sum(), nll, torch.zeros_like(nll))

    @torch.no_grad()
    def _nll(self, thoughts: list[Tensor], batch: Batch) -> Tensor:
        """-log p(x | z) per sequence, (B,), mean over given draws."""
        return over_particles([-self.model.log_likelihood(z, batch) for z in thoughts])
