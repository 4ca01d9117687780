"""What the two clocks descend: any Pyro ELBO, weighted, and taken apart for the record."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.infer import ELBO, RenyiELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ltm_pyro.errors import InputError
from ltm_pyro.models.base import SITE_X, SITE_Z


class KLWeight(Messenger):
    """Multiplies both log densities of `z`, and so the KL term, by a weight.

    With a weight below 1 the objective is no longer a bound; it is recorded as `objective`, and
    `elbo` always has weight 1.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == SITE_Z:
            msg["scale"] = msg["scale"] * self.weight


class TermRecorder(Messenger):
    """Remembers what was sampled and scored, so that an ELBO can be split into its terms for free.

    A Pyro ELBO returns one number. This handler sees every site of guide and model pass by, and
    answers afterwards with the reconstruction and the KL of each sequence at the same draws.
    """

    def __init__(self) -> None:
        super().__init__()
        self._likelihoods: list[tuple[TorchDistribution, Tensor]] = []
        self._thoughts: list[tuple[TorchDistribution, Tensor]] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == SITE_X:
            self._likelihoods.append((msg["fn"], msg["value"]))
        elif msg["name"] == SITE_Z:
            self._thoughts.append((msg["fn"], msg["value"]))

    def nll(self) -> Tensor:
        """-log p(x | z) per sequence in nats, (B,), mean over the draws that were made."""
        return _over_particles([-fn.log_prob(x).detach() for fn, x in self._likelihoods])

    def kl(self) -> Tensor:
        """Log q(z) - log p(z) per sequence in nats, (B,), mean over the draws that were made.

        The guide's site comes before the model's at each draw.
        """
        pairs = zip(self._thoughts[::2], self._thoughts[1::2], strict=True)
        with torch.no_grad():
            return _over_particles([q.log_prob(z) - p.log_prob(z) for (q, z), (p, _) in pairs])


@contextmanager
def quiet_about_nan() -> Iterator[None]:
    """Silences Pyro's warnings about NaN: the clocks raise an error that names the sequences."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered (NaN|.inf)", UserWarning)
        yield


def _over_particles(values: list[Tensor]) -> Tensor:
    """Mean over particles, drawn one by one or stacked in leading dimensions, to (B,)."""
    return torch.stack([v.flatten(0, -2).mean(0) if v.dim() > 1 else v for v in values]).mean(0)


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
