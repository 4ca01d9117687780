"""The ELBO's gradient by the local parameters where the family has it in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.objectives.evidence import Elbo
from ltm_pyro.inference.objectives.handlers import Repeat, TermRecorder, kl_weight, recorders
from ltm_pyro.inference.pathwise_normal import PathwiseNormal
from ltm_pyro.models.base import SITE_X


@dataclass(frozen=True)
class ElboByHand:
    """`Elbo` of one draw with its gradient, autograd going through the likelihood alone.

    The same numbers to the bit as `Elbo.differentiable_loss` and autograd give.

    Attributes:
        model: Weights frozen.
        path: Draws of the guide, at the present values of its parameters.
    """

    model: Any
    path: PathwiseNormal

    @classmethod
    def of(cls, loss: object) -> ElboByHand | None:
        """For a loss as it is called here, with these handlers around; `None` where it cannot be.

        It cannot where the objective is another, where the guide knows no such gradient
        (`LocalGuide.pathwise`), or where a handler has to see the sites (`Repeat`).
        """
        # Of that class itself: one derived from it may charge something else.
        if not isinstance(loss, ELBOModule) or type(loss.elbo) is not Elbo:
            return None
        model: Any = loss.model
        guide: Any = loss.guide
        repeat = Repeat.of(model, guide)
        if repeat is None or loss.elbo.particles > 1 or recorders():
            return None
        path = guide.pathwise(repeat.prior, kl_weight())
        return None if path is None else cls(model, path)

    def __call__(self, batch: Batch, recorder: TermRecorder) -> tuple[Tensor, dict[str, Tensor]]:
        """Minus the objective, summed over the batch, in nats; its gradient by parameter's name.

        Args:
            batch: The rows that the guide holds.
            recorder: Told the terms.
        """
        z = self.path.draw()
        likelihood = self.model.likelihood(z, batch)
        log_lik = likelihood.log_prob(batch.observed)
        (by_z,) = torch.autograd.grad(log_lik, z, -torch.ones_like(log_lik))
        recorder.add(SITE_X, likelihood, batch.observed)
        recorder.closed_kl = self.path.kl
        return self.path.loss(log_lik), self.path.gradients(by_z)
