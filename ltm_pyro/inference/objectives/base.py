"""What an objective is: a number per sequence from explicit terms on S draws (`Terms`).

Higher is better; summed over the batch and negated it is a loss.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.infer import ELBO
from torch import Tensor

from ltm_pyro.checks import whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives.terms import ProgramTerms, Terms
from ltm_pyro.models.base import LatentModel, Program
from ltm_pyro.models.drawing import Drawing
from ltm_pyro.models.plain_svi import svi_asks
from ltm_pyro.random import Noise, fresh_seed

Draw = Callable[[TorchDistribution, int], Tensor]
"""(q, S) -> draws (S, B, K, D), with a path to q's parameters: usually a `Drawing`."""

_MOST_PARTICLES = 10**6


class Objective(ELBO):
    """A sum over sequences of nats to be maximised, on S draws made at once.

    An `ELBO` of Pyro's, so that it serves wherever one does. Guides must draw with a path from
    parameters to z (`rsample`).

    Args:
        particles: S, draws per sequence and call; each costs one evaluation of the decoder.

    Attributes:
        name: By which `build_objective` knows it.
        options: What it was built with.
        evaluations: Sequences times draws that it has been computed on by the clocks.
    """

    name: ClassVar[str] = ""
    charges_kl: ClassVar[bool] = False
    """Whether it pays for the KL as such (`Terms.kl`), in closed form where the guide has one."""

    def __init__(self, particles: int = 1, **options: Any) -> None:
        whole_number("particles", particles, 1, _MOST_PARTICLES)
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=particles, max_plate_nesting=1, vectorize_particles=particles > 1
        )
        self.options: dict[str, Any] = {**options, "particles": particles}
        self.evaluations = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"

    @property
    def particles(self) -> int:
        """S."""
        return int(self.num_particles)

    @abstractmethod
    def per_sequence(self, terms: Terms) -> Tensor:
        """The objective of each sequence in nats, higher is better, (B,)."""

    def terms(
        self,
        model: LatentModel,
        guide: LocalGuide,
        batch: Batch,
        draw: Draw,
        weight: float = 1.0,
        prior: TorchDistribution | None = None,
    ) -> Terms:
        """Draws from the guide, ready to be scored.

        Args:
            model: The model.
            guide: Holds the B rows of `batch`.
            batch: The sequences.
            draw: Makes the draws.
            weight: c.
            prior: p(z), where it has been made already.

        Raises:
            InputError: if the guide's draws have no gradient.
        """
        q = guide.posterior()
        if not q.has_rsample:
            raise InputError(
                f"objective {self.name!r} needs a path from the guide's parameters to z (rsample), "
                "and this guide's distribution has none: use elbo=pyro.infer.Trace_ELBO()"
            )
        prior = model.prior() if prior is None else prior
        return Terms(model, guide, prior, batch, q, draw(q, self.particles), weight)

    def descend(self, *place: Any, **options: Any) -> tuple[Tensor, Terms]:
        """Minus the objective, summed over the batch, in nats; and its terms. See `terms`."""
        terms = self.terms(*place, **options)
        self.evaluations += terms.z.shape[:2].numel()
        return -self.per_sequence(terms).sum(), terms

    def differentiable_loss(self, model: LatentModel, guide: LocalGuide, batch: Batch) -> Tensor:
        """Minus the objective, summed over the batch, in nats, on noise of torch's generator."""
        if svi_asks():  # Pyro's own SVI learns of weights when programs run
            for program in (model, guide):
                if isinstance(program, Program):
                    program.tell_svi(batch)
        if not isinstance(guide, LocalGuide):
            return -self.per_sequence(ProgramTerms(model, guide, batch, self.particles)).sum()
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


def finite_number(what: str, value: object) -> float:
    """`value` as a finite float.

    Raises:
        InputError: if it is none.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not torch.isfinite(torch.tensor(float(value))):  # type: ignore[arg-type]
        raise InputError(f"{what} is {value!r}: must be a finite number")
    return float(value)  # type: ignore[arg-type]
