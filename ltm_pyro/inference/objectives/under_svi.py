"""What makes an objective a loss for `pyro.infer.SVI`, and for a guide that is any Pyro program."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.models.base import LatentModel, Program
from ltm_pyro.models.plain_svi import svi_asks
from ltm_pyro.random import Drawing, Noise, fresh_seed


class UnderSVI(ELBO):
    """An objective (`Objective`) in Pyro's words."""

    options: dict[str, Any]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"

    @abstractmethod
    def per_sequence(self, terms: Any) -> Tensor:
        """The objective of each sequence in nats, higher is better, (B,)."""

    @abstractmethod
    def descend(self, *place: Any, **options: Any) -> Any:
        """Minus the objective, summed over the batch, in nats; and its terms."""

    def differentiable_loss(self, model: LatentModel, guide: LocalGuide, batch: Batch) -> Tensor:
        """Minus the objective, summed over the batch, in nats, on noise of torch's generator."""
        if svi_asks():  # Pyro's own SVI learns of weights when programs run
            for program in (model, guide):
                if isinstance(program, Program):
                    program.tell_svi(batch)
        if not isinstance(guide, LocalGuide):
            from ltm_pyro.inference.objectives.pyro_elbos import program_terms

            terms = program_terms(model, guide, batch, self.num_particles)
            return -self.per_sequence(terms).sum()
        guide.check(batch)
        draw = Drawing(Noise(fresh_seed(), batch.ids))
        return self.descend(model, guide, batch, draw)[0]

    def loss(self, model: LatentModel, guide: LocalGuide, batch: Batch) -> float:
        """`differentiable_loss` as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, batch))

    def loss_and_grads(self, model: LatentModel, guide: LocalGuide, batch: Batch) -> float:
        """`loss`, its gradient added to the weights' `.grad`: what `pyro.infer.SVI` asks for."""
        loss = self.differentiable_loss(model, guide, batch)
        loss.backward()
        return float(loss.detach())

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("objectives are made of explicit terms, see `Terms`")
