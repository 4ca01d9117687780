"""What an objective is: one vectorised draw of S particles, and a number per sequence from it.

    z_s ~ q(z),  s = 1..S,     log w_s = log p(x | z_s) + c (log p(z_s) - log q(z_s))

with c the KL weight, 1 but for annealing. Every objective here is a function of these terms, higher
is better, summed over the batch and negated as a loss.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match
from torch import Tensor, nn
from torch.func import functional_call

from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives.handlers import Repeat, kl_weight, recorders
from ltm_pyro.models.base import SITE_X, SITE_Z, LatentModel


class _LogProb(nn.Module):
    """Log q(z) as a module's call, which `functional_call` can make."""

    def __init__(self, guide: LocalGuide) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, z: Tensor) -> Tensor:
        return self.guide.posterior().log_prob(z)


def stopped_log_prob(guide: LocalGuide, z: Tensor) -> Tensor:
    """Log q(z) at the guide's present parameters, local and shared, held constant.

    It has a gradient by z and none by the parameters, for any guide: its parameters are exchanged
    for constants while the density is computed, and not only while the distribution is made, since
    a flow reads its network when it is asked for a density.

    Args:
        guide: Holds B rows.
        z: (..., B, K, D).
    """
    # Parameters still, because a guide may ask for its parameters by that type.
    held: dict[str, Tensor] = {
        f"guide.{name}": nn.Parameter(p.detach(), requires_grad=False)
        for name, p in guide.named_parameters()
    }
    # Another tensor object, so that no transform answers from what it kept of the draw.
    return functional_call(_LogProb(guide), held, (z.view(z.shape),))


@dataclass(frozen=True)
class Draws:
    """S draws from the guide for each of B sequences, and their terms in nats.

    Attributes:
        guide: Where they are from.
        prior: p(z), event shape (K, D).
        z: (S, B, K, D).
        weight: c, the KL weight.
        site: The guide's site `z`, with its leading dimensions as drawn.
        prior_site: The model's site `z`.
        likelihood_site: The model's site `x`.
        n_layers: Decoder layers that the thoughts feed in equal blocks; `None` where the model has
            no layers.
    """

    guide: LocalGuide
    prior: TorchDistribution
    z: Tensor
    weight: Any
    site: dict[str, Any]
    prior_site: dict[str, Any]
    likelihood_site: dict[str, Any]
    n_layers: int | None

    @cached_property
    def log_lik(self) -> Tensor:
        """Log p(x | z), (S, B): the decoder's pass, made when it is first asked for."""
        return _log_prob(self.likelihood_site).reshape(self.z.shape[:2])

    @cached_property
    def log_prior(self) -> Tensor:
        """C log p(z), (S, B)."""
        return _log_prob(self.prior_site).reshape(self.z.shape[:2])

    def log_q(self, stopped: bool = False) -> Tensor:
        """C log q(z), (S, B); with `stopped`, at parameters held constant."""
        if stopped:
            log_q = stopped_log_prob(self.guide, self.z)
        else:
            log_q = self.site["fn"].log_prob(self.site["value"]).reshape(self.z.shape[:2])
        return self.weight * log_q

    def log_weight(self, stopped: bool = False) -> Tensor:
        """Log w, (S, B)."""
        return self.log_lik + self.log_prior - self.log_q(stopped)


class Objective(ELBO):
    """A sum over sequences of nats to be maximised, on S draws made at once.

    An `ELBO` of Pyro's with one site `z` and one site `x` over the plate of sequences, so that it
    serves wherever a Pyro ELBO does. Guides must draw with a path from parameters to z (`rsample`).

    Args:
        particles: S, draws per sequence and call; each costs one evaluation of the decoder.

    Attributes:
        name: By which `build_objective` knows it.
        options: What it was built with.
    """

    name: ClassVar[str] = ""

    def __init__(self, particles: int = 1, **options: Any) -> None:
        if not isinstance(particles, int) or isinstance(particles, bool) or particles < 1:
            raise InputError(f"particles is {particles!r}: must be a whole number, 1 or more")
        super().__init__(  # type: ignore[no-untyped-call]
            num_particles=particles, max_plate_nesting=1, vectorize_particles=particles > 1
        )
        self.options: dict[str, Any] = {**options, "particles": particles}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"

    @property
    def particles(self) -> int:
        """S."""
        return int(self.num_particles)

    @abstractmethod
    def per_sequence(self, draws: Draws) -> Tensor:
        """The objective of each sequence in nats, higher is better, (B,)."""

    def closed_kl(self, guide: LocalGuide, prior: TorchDistribution) -> Tensor | None:
        """The KL in closed form that this objective uses, (B,), or `None` where it uses none."""
        return None

    def differentiable_loss(self, model: LatentModel, guide: LocalGuide, batch: Batch) -> Tensor:
        """Minus the objective, summed over the batch, in nats.

        Raises:
            InputError: if the guide's draws have no gradient.
        """
        return -self.per_sequence(self.draw(model, guide, batch)).sum()

    def loss(self, model: LatentModel, guide: LocalGuide, batch: Batch) -> float:
        """`differentiable_loss` as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, batch))

    def loss_and_grads(self, model: LatentModel, guide: LocalGuide, batch: Batch) -> float:
        """`loss`, its gradient added to the weights' `.grad`: what `pyro.infer.SVI` asks for."""
        loss = self.differentiable_loss(model, guide, batch)
        loss.backward()
        return float(loss.detach())

    def draw(self, model: LatentModel, guide: LocalGuide, batch: Batch) -> Draws:
        """Runs the guide and then the model at its draws, S at once."""
        repeat = Repeat.of(model, guide)
        return (
            self._traced(model, guide, batch)
            if repeat is None
            else self._repeated(repeat, model, guide, batch)
        )

    def _traced(self, model: LatentModel, guide: LocalGuide, batch: Batch) -> Draws:
        """By Pyro, with all that its handlers do."""
        # Before the model runs, which may let a learned prior see the draws and move on.
        prior = model.prior()
        traces: Any = self._get_vectorized_trace(  # type: ignore[no-untyped-call]
            model, guide, (batch,), {}
        )
        model_trace, guide_trace = traces
        q, p, x = guide_trace.nodes[SITE_Z], model_trace.nodes[SITE_Z], model_trace.nodes[SITE_X]
        return self._draws(model, guide, prior, q, p, x)

    def _repeated(self, repeat: Repeat, model: Any, guide: LocalGuide, batch: Batch) -> Draws:
        """The same draws from two standard programs, nobody else listening."""
        prior, weight = repeat.prior, kl_weight()
        # Expanded by plates, even to the shape that it has: gradients are added up in this order.
        shape = torch.Size([len(batch)] if self.particles == 1 else [self.particles, len(batch)])
        q = guide.posterior().expand(shape)
        z = q.rsample()
        likelihood = model.likelihood(z, batch).expand(shape)
        for recorder in recorders():
            recorder.add(SITE_Z, q, z)
            recorder.add(SITE_Z, prior, z)
            recorder.add(SITE_X, likelihood, batch.observed)
        return self._draws(
            model,
            guide,
            prior,
            _site(q, z, weight),
            _site(prior, z, weight),
            _site(likelihood, batch.observed),
        )

    def _draws(
        self,
        model: LatentModel,
        guide: LocalGuide,
        prior: TorchDistribution,
        q: dict[str, Any],
        p: dict[str, Any],
        x: dict[str, Any],
    ) -> Draws:
        z = q["value"]
        return Draws(
            guide=guide,
            prior=prior,
            z=z.reshape(self.particles, -1, *z.shape[-2:]),
            weight=q["scale"],
            site=q,
            prior_site=p,
            likelihood_site=x,
            n_layers=getattr(model, "n_layers", None),
        )

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        # Not by `get_trace`, which copies each trace: a fast step feels it.
        drawn = poutine.trace(guide)
        drawn(*args, **kwargs)
        nodes: dict[str, Any] = drawn.trace.nodes
        if not nodes[SITE_Z]["fn"].has_rsample:
            raise InputError(
                f"objective {self.name!r} needs a path from the guide's parameters to z (rsample), "
                "and this guide's distribution has none: use elbo=pyro.infer.Trace_ELBO()"
            )
        scored = poutine.trace(poutine.replay(model, trace=drawn.trace))
        scored(*args, **kwargs)
        if is_validation_enabled():
            check_model_guide_match(
                prune_subsample_sites(scored.trace),
                prune_subsample_sites(drawn.trace),
                self.max_plate_nesting,
            )
        return scored.trace, drawn.trace


def _site(fn: TorchDistribution, value: Tensor, scale: float = 1.0) -> dict[str, Any]:
    """A site as Pyro's traces hold it, as far as `Draws` reads it."""
    return {"fn": fn, "value": value, "scale": scale, "mask": None}


def _log_prob(site: Any) -> Tensor:
    """A site's log density, scaled as handlers asked."""
    return scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])


def finite_number(what: str, value: object) -> float:
    """`value` as a finite float.

    Raises:
        InputError: if it is none.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not torch.isfinite(torch.tensor(float(value))):  # type: ignore[arg-type]
        raise InputError(f"{what} is {value!r}: must be a finite number")
    return float(value)  # type: ignore[arg-type]
