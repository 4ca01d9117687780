"""What is Pyro's, or anyone's: their ELBO objects as objectives, their programs as guides.

The one place where Pyro's handlers run.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides.base import LocalGuide, closed_kl
from ltm_pyro.inference.objectives.evidence import Draw, Objective, Terms
from ltm_pyro.models.base import PLATE, SITE_X, SITE_Z, LatentModel


class PyroElbo(Objective):
    """A Pyro ELBO object as an objective, on the draws and with the KL weight of the clocks.

    Args:
        elbo: With a `differentiable_loss(model, guide, batch)`, or a `RenyiELBO`.
    """

    def __init__(self, elbo: ELBO) -> None:
        super().__init__(int(elbo.num_particles))
        self.elbo: Any = _differentiable(elbo)
        self.weighs_draws = isinstance(elbo, RenyiELBO)

    def __repr__(self) -> str:
        return describe(self.elbo)

    def per_sequence(self, terms: Terms) -> Tensor:
        """Not known: such an object answers with one number for the batch."""
        raise NotImplementedError

    def descend(
        self,
        model: LatentModel,
        guide: LocalGuide,
        batch: Batch,
        draw: Draw,
        weight: float = 1.0,
        prior: TorchDistribution | None = None,
    ) -> tuple[Tensor, Terms]:
        """The object's loss, and the terms of the draws that it made; see `Objective.descend`."""
        prior = model.prior() if prior is None else prior
        with _Sites(draw, weight) as sites, _quiet_about_nan():
            loss: Tensor = self.elbo.differentiable_loss(model, guide, batch)
        z = torch.cat([z.reshape(-1, *z.shape[-3:]) for z in sites.thoughts])
        self.evaluations += z.shape[:2].numel()
        terms = Terms(model, guide, prior, batch, guide.posterior(), z, weight)
        # What the object has computed need not be computed again.
        terms.__dict__["log_lik"] = torch.cat([s.reshape(-1, len(batch)) for s in sites.scores()])
        return loss, terms

    def differentiable_loss(self, model: LatentModel, guide: LocalGuide, batch: Batch) -> Tensor:
        """The object's own."""
        with _quiet_about_nan():
            loss: Tensor = self.elbo.differentiable_loss(model, guide, batch)
        return loss


class _Sites(Messenger):
    """Gives the guide's site `z` its draws, weighs both densities of `z`, and remembers both."""

    def __init__(self, draw: Draw, weight: float) -> None:
        super().__init__()
        self.draw, self.weight = draw, weight
        self.thoughts: list[Tensor] = []
        self._likelihoods: list[tuple[Any, Tensor]] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] != SITE_Z:
            return
        msg["scale"] = msg["scale"] * self.weight
        if msg["value"] is None:  # of the guide; the model is replayed
            lead = msg["fn"].batch_shape[:-1]
            z = self.draw(msg["fn"], lead.numel())
            z = z if lead else z[0]
            msg["value"] = z
            self.thoughts.append(z.detach())

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == SITE_X:
            self._likelihoods.append((msg["fn"], msg["value"]))

    def scores(self) -> list[Tensor]:
        """Log p(x | z) of each run of the model; a distribution over text keeps what it scored."""
        with torch.no_grad():
            return [fn.log_prob(x).detach() for fn, x in self._likelihoods]


@contextmanager
def _quiet_about_nan() -> Iterator[None]:
    """Silences Pyro's warnings about NaN: the clocks raise an error that names the sequences."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered (NaN|.inf)", UserWarning)
        yield


class _DifferentiableRenyi(RenyiELBO):
    """Pyro's Renyi bound as a loss to differentiate.

    Pyro's own class calls `backward` itself, and only where the model has `pyro.param` sites, so
    it leaves modules without a gradient. The bound is the same (Li & Turner 2016, eq. 8).
    """

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        particles = []
        traces: Any = self._get_traces(model, guide, args, kwargs)  # type: ignore[no-untyped-call]
        for model_trace, guide_trace in traces:
            log_weight = (
                model_trace.nodes[SITE_X]["log_prob"] + model_trace.nodes[SITE_Z]["log_prob"]
            )
            particles.append(log_weight - guide_trace.nodes[SITE_Z]["log_prob"])
        stacked = particles[0] if len(particles) == 1 else torch.stack(particles)
        scaled = (1.0 - self.alpha) * stacked.reshape(self.num_particles, -1)
        log_mean = scaled.logsumexp(0) - math.log(self.num_particles)
        return -log_mean.sum() / (1.0 - self.alpha)


def _differentiable(elbo: ELBO) -> ELBO:
    """The same objective in a form that can be differentiated."""
    if hasattr(elbo, "differentiable_loss"):
        out = copy.copy(elbo)
    elif isinstance(elbo, RenyiELBO):
        out = _DifferentiableRenyi(  # type: ignore[no-untyped-call]
            alpha=elbo.alpha,
            num_particles=elbo.num_particles,
            vectorize_particles=elbo.vectorize_particles,
        )
        out.max_plate_nesting = elbo.max_plate_nesting
    else:
        raise InputError(
            f"{type(elbo).__name__} has no differentiable_loss(model, guide, batch): "
            "give it one, or use Trace_ELBO, TraceMeanField_ELBO or RenyiELBO"
        )
    if math.isinf(out.max_plate_nesting):
        # Left to guess, Pyro runs the model once more at the first call, which then sees other
        # noise than it would when repeated or resumed. There is one plate, and one of particles.
        out.max_plate_nesting = 2 if out.vectorize_particles and out.num_particles > 1 else 1
    return out


def describe(elbo: ELBO) -> str:
    """What an objective is called in records, with its options, e.g. `iwae(particles=8)`."""
    if isinstance(elbo, PyroElbo):
        elbo = elbo.elbo
    if isinstance(elbo, Objective):
        name, options = elbo.name, elbo.options
    else:
        name, options = type(elbo).__name__.removeprefix("_Differentiable"), {}
        if isinstance(elbo, RenyiELBO):
            name, options = "RenyiELBO", {"alpha": elbo.alpha}
        options["num_particles"] = elbo.num_particles
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"


def kl_estimator(elbo: ELBO, model: LatentModel, guide: LocalGuide) -> str:
    """How this objective gets its KL from this guide, which must hold rows.

    `analytic`, `monte_carlo`, `none` for a point mass, which has no KL, or `unknown` for an ELBO
    object of another's making.
    """
    if not guide.has_density:
        return "none"
    if isinstance(elbo, PyroElbo):
        elbo = elbo.elbo
    with torch.no_grad():
        if isinstance(elbo, Objective):
            closed = elbo.charges_kl and guide.kl(model.prior()) is not None
            return "analytic" if closed else "monte_carlo"
        if isinstance(elbo, TraceMeanField_ELBO):
            q = guide.posterior()
            known = closed_kl(q, model.prior().expand(q.batch_shape)) is not None
            return "analytic" if known else "monte_carlo"
    return "monte_carlo" if isinstance(elbo, Trace_ELBO | RenyiELBO) else "unknown"


def program_terms(model: LatentModel, guide: Any, batch: Batch, particles: int) -> Terms:
    """Of S draws from a guide that is any Pyro program with a site `z`, e.g. an autoguide."""
    traces = [poutine.trace(guide).get_trace(batch) for _ in range(particles)]
    z = torch.stack([trace.nodes[SITE_Z]["value"] for trace in traces])
    q = traces[0].nodes[SITE_Z]["fn"]
    terms = Terms(model, guide, model.prior(), batch, q, z)
    # All sites: an autoguide draws under another name, and hands the value on.
    terms._log_q, terms.closed_kl = torch.stack([_log_prob(trace) for trace in traces]), None
    return terms


def _log_prob(trace: Any) -> Tensor:
    trace.compute_log_prob()
    sites = [name for name in trace.stochastic_nodes if name != PLATE]
    return torch.stack([trace.nodes[name]["log_prob"] for name in sites]).sum(0)
