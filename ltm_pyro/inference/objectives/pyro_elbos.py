"""Pyro's own ELBO objects as objectives: all of them can be descended, and all are recorded."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.objectives.base import Objective
from ltm_pyro.models.base import SITE_X, SITE_Z, LatentModel


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


def differentiable(elbo: ELBO) -> ELBO:
    """The same objective in a form that `ELBO()(model, guide)` can differentiate.

    Raises:
        InputError: if the object has no `differentiable_loss` and is not a `RenyiELBO`.
    """
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

    Returns:
        `analytic`, `monte_carlo`, `none` for a point mass, which has no KL, or `unknown` for an
        ELBO object of another's making.
    """
    if not guide.has_density:
        return "none"
    with torch.no_grad():
        if isinstance(elbo, Objective):
            return "analytic" if elbo.closed_kl(guide, model.prior()) is not None else "monte_carlo"
        if isinstance(elbo, TraceMeanField_ELBO):
            posterior = guide.posterior()
            try:
                kl_divergence(posterior, model.prior().expand(posterior.batch_shape))
            except NotImplementedError:
                return "monte_carlo"
            return "analytic"
    return "monte_carlo" if isinstance(elbo, Trace_ELBO | RenyiELBO) else "unknown"
