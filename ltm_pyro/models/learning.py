"""What a fit has to know of weights that learn: which do not decay, and what a prior is shown."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltm_pyro.engine.processes import Parallel
from ltm_pyro.errors import InputError
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.priors.base import ThoughtPrior


def embedding_weights(*parts: object) -> list[nn.Parameter]:
    """The embeddings in these modules: decay would make them forget rare tokens.

    And what a learned prior spares itself, see `ThoughtPrior.undecayed_parameters`.
    """
    modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
    embeddings = [p for m in modules if isinstance(m, nn.Embedding) for p in m.parameters()]
    priors = [p for m in modules if isinstance(m, ThoughtPrior) for p in m.undecayed_parameters()]
    return embeddings + priors


def show_prior(model: LatentModel, draws: list[Tensor], parallel: Parallel) -> None:
    """Shows a slow step's draws (S, B, K, D), of all processes, to a prior that learns."""
    prior = getattr(model, "thought_prior", None)
    if draws and isinstance(prior, ThoughtPrior) and _learns(prior):
        prior.observe(parallel.gather_rows(torch.cat(draws, dim=1), dim=1))


def refuse_runaway(model: LatentModel, family: str) -> None:
    """Refuses to learn a prior from point masses, where its density at them has no sensible limit.

    Both would be fitted with log p(z): the prior closes in on the points and the points on its
    peaks, whatever the text says. With a density q pays for that by its entropy. `family` is the
    guide's; a prior that cannot concentrate is not refused.
    """
    prior = getattr(model, "thought_prior", None)
    bounded = isinstance(prior, ThoughtPrior) and prior.cannot_concentrate
    if isinstance(prior, nn.Module) and _learns(prior) and not bounded:
        name = getattr(prior, "family", "") or type(prior).__name__
        raise InputError(
            f"guide {family!r} is a point mass, and the learned prior {name!r} would shrink "
            "onto its points without limit: use prior 'standard_normal', or a guide with a density "
            "such as 'mean_field'"
        )


def _learns(prior: nn.Module) -> bool:
    return any(p.requires_grad for p in prior.parameters())
