"""What the slow clock descends: the objective at the fitted q, on fresh draws."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.clocks.fast import frozen
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives import Objective
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.drawing import Drawing
from ltm_pyro.random import Noise


@dataclass(frozen=True)
class SlowLoss:
    """What a slow step descends, and what it reports.

    Attributes:
        descended: In nats, summed over the batch.
        objective: The part of it that is the objective at the fitted q.
        nll: (B,) -log p(x | z), every input token read.
        kl: (B,).
        z: (S, B, K, D) the draws; `None` before thoughts join.
    """

    descended: Tensor
    objective: Tensor
    nll: Tensor
    kl: Tensor
    z: Tensor | None = None


class SlowObjective:
    """Builds a slow step's loss for the rows that the guide holds.

    Args:
        model: The model.
        guide: Its local parameters are fitted already.
        objective: What is ascended.
    """

    def __init__(self, model: LatentModel, guide: LocalGuide, objective: Objective) -> None:
        self.model, self.guide, self.objective = model, guide, objective

    def at_fitted(self, batch: Batch, read: Batch, weight: float, seed: int) -> SlowLoss:
        """At the fitted q, on fresh draws.

        Args:
            batch: The rows.
            read: The same after word dropout, or the same object without.
            weight: Of the KL.
            seed: Of the draws.
        """
        model, guide = self.model, self.guide
        draw = Drawing(Noise(seed, batch.ids), guide.anchor.dtype)

        def loss(rows: Batch) -> Tensor:
            return self.objective.descend(model, guide, rows, draw, weight)[0]

        with frozen(guide.local_parameters().values()), pyro.validation_enabled(False):
            objective, terms = self.objective.descend(model, guide, read, draw, weight)
            nll, kl = terms.report()
            extra = None
            if guide.shared_parameters():
                with frozen(model.parameters()):
                    extra = guide.shared_loss(loss, read)
            if read is not batch:
                nll = self._nll(terms.z, batch)
        descended = objective if extra is None else objective + extra
        return SlowLoss(descended, objective, nll, kl, terms.z.detach())

    def without_thoughts(self, batch: Batch, read: Batch) -> SlowLoss:
        """Before thoughts join: -log p(x | z = 0), no KL."""
        z = self.guide.anchor.new_zeros((len(batch), *self.model.thought_shape))
        losses = -self.model.log_likelihood(z, read)
        nll = losses.detach() if read is batch else self._nll(z[None], batch)
        return SlowLoss(losses.sum(), losses.sum(), nll, torch.zeros_like(nll))

    @torch.no_grad()
    def _nll(self, z: Tensor, batch: Batch) -> Tensor:
        """-log p(x | z) per sequence, (B,), mean over draws (S, B, K, D)."""
        return -torch.stack([self.model.log_likelihood(each, batch) for each in z]).mean(0)
