"""A mixture of normals around learned pseudo-thoughts.

    z ~ sum_c w_c N(mean_c, diag(scale_c^2))                 c = 1 .. C, mean_c a pseudo-thought

The best prior for given posteriors is their average, the aggregated posterior. A VampPrior (Tomczak
& Welling 2018, arXiv 1705.07120) stands in for it with an encoder's posteriors at learned
pseudo-inputs; posteriors without an encoder have no pseudo-inputs, so the components themselves are
learned here, by the gradient of the ELBO like every other weight.

Gradients alone would keep whatever division of labour the random start happened to have: two
components on one cluster, one component on two. So the prior keeps the draws z ~ q of the last slow
steps, and each time they have all been replaced it fits a mixture anew to one half of them, and
takes it over if it beats the present one on the other half by more than two standard errors. A take
over is thus a step up the same ELBO, one that gradients do not find.
"""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ltm_pyro.checks import whole_number
from ltm_pyro.errors import InputError
from ltm_pyro.models.priors.base import ThoughtPrior, register_prior
from ltm_pyro.models.priors.em import fit_mixture

DRAWS_PER_COMPONENT = 64
"""Draws that are kept, per component; half of them to fit on."""
_SPREAD = 0.5
"""Standard deviation of the pseudo-thoughts at the start, where the mixture as a whole has mean 0
and variance 1, so that guides which start there start right."""
_LEAST_VARIANCE = 1e-4
"""Without a floor, a point-mass guide and a component could shrink on each other for ever."""
_STANDARD_ERRORS = 2.0


@register_prior("mixture")
class MixturePrior(ThoughtPrior):
    """C diagonal normals with learned weights, means and scales. KL is estimated on draws.

    Args:
        components: C.

    Attributes:
        pseudo_thoughts: (C, K, D) the components' means.
        log_variance: (C, K, D).
        logits: (C,) log weights up to a constant.
    """

    recent: Tensor
    seen: Tensor

    def __init__(self, n_thoughts: int, thought_dim: int, components: int = 8) -> None:
        each = 4 * (DRAWS_PER_COMPONENT + 2) * n_thoughts * thought_dim
        whole_number("components of the mixture prior", components, 1, bytes_each=each)
        super().__init__(n_thoughts, thought_dim)
        shape = (components, n_thoughts, thought_dim)
        self.pseudo_thoughts = nn.Parameter(_SPREAD * torch.randn(shape))
        self.log_variance = nn.Parameter(torch.full(shape, math.log(1.0 - _SPREAD**2)))
        self.logits = nn.Parameter(torch.zeros(components))
        # Saved with the weights, so that an interrupted fit goes on as it would have.
        self.register_buffer("recent", torch.zeros(DRAWS_PER_COMPONENT * components, *shape[1:]))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self) -> TorchDistribution:
        """The prior of one sequence's thoughts."""
        return dist.MixtureSameFamily(
            dist.Categorical(logits=self.logits.clone()), self._components()
        )

    def _components(self) -> TorchDistribution:
        """Batch shape (C,), event shape (K, D)."""
        variance = self.log_variance.exp().clamp_min(_LEAST_VARIANCE)
        return dist.Normal(self.pseudo_thoughts.clone(), variance.sqrt()).to_event(2)

    @torch.no_grad()
    def responsibilities(self, z: Tensor) -> Tensor:
        """p(c | z): which component thoughts (..., K, D) come from, (..., C)."""
        if tuple(z.shape[-2:]) != self.shape:
            raise InputError(f"z is {tuple(z.shape)}: must end in (K, D) = {self.shape}")
        log_joint = self._components().log_prob(z.unsqueeze(-3)) + self.logits.log_softmax(0)
        return log_joint.softmax(-1)

    def named_values(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        """`prior_weight` (C,), `prior_mean` and `prior_scale` (C, K, D)."""
        components = self._components()
        dims = ("component", "thought", "dim")
        return {
            "prior_weight": (("component",), self.logits.softmax(0)),
            "prior_mean": (dims, components.mean),
            "prior_scale": (dims, components.variance.sqrt()),
        }

    def undecayed_parameters(self) -> list[nn.Parameter]:
        """All of them: 0 is neither a better place for a cluster nor a better scale."""
        return [self.pseudo_thoughts, self.log_variance, self.logits]

    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        """Keeps the draws; when all kept ones are new, tries a fresh fit to them.

        The slow step under way still descends on the distribution that it began with.
        """
        draws = z.detach().reshape(-1, *self.shape)[-len(self.recent) :]
        if not bool(draws.isfinite().all()):
            return
        size, seen = len(self.recent), int(self.seen)
        self.recent[(seen + torch.arange(len(draws))) % size] = draws.to(self.recent)
        self.seen += len(draws)
        if (seen + len(draws)) // size > seen // size:
            self._try_fresh_fit(seen + len(draws))

    def _try_fresh_fit(self, seed: int) -> None:
        """Takes over a mixture fitted to every other draw, if it is better on those between."""
        mine, other = self.recent[::2].flatten(1), self.recent[1::2]
        fitted = fit_mixture(mine.float().cpu(), len(self.logits), seed)
        fresh = fitted.log_joint(other.flatten(1).float().cpu()).logsumexp(1).double()
        gain = fresh - self().log_prob(other).double().cpu()
        if gain.mean() > _STANDARD_ERRORS * gain.std() / math.sqrt(len(gain)):
            self.pseudo_thoughts.copy_(fitted.mean.unflatten(1, self.shape))
            self.log_variance.copy_(fitted.variance.log().unflatten(1, self.shape))
            self.logits.copy_(fitted.weight.log())
