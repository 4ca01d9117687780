"""What changes where q is a point mass: it has no density, hence neither a KL nor an ELBO.

The objective is then log p(x, z) at the point. A density of z may have any value, so the log joint
is no bound on log p(x), may exceed 0 on discrete data, and has a name of its own in every metric.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ltm_pyro.errors import InputError
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.priors.base import ThoughtPrior


def metric_terms(guide: LocalGuide, nll: float, kl: float, tokens: float) -> dict[str, float]:
    """The bound of a slow step and its parts, by the names that they deserve.

    Args:
        guide: Whose q it is.
        nll: -log p(x | z), nats per sequence.
        kl: KL(q || p), nats per sequence; for a point mass -log p(z).
        tokens: Tokens per sequence.

    Returns:
        `elbo`, `nll`, `kl` and `elbo_per_token`; for a point mass `log_joint`, `nll`, `log_prior`
        and `log_joint_per_token`.
    """
    total = -(nll + kl)
    if guide.has_density:
        return {"elbo": total, "nll": nll, "kl": kl, "elbo_per_token": total / tokens}
    return {"log_joint": total, "nll": nll, "log_prior": -kl, "log_joint_per_token": total / tokens}


def metrics_row(
    guide: LocalGuide, sums: Mapping[str, float], told: Mapping[str, float]
) -> dict[str, float]:
    """A slow step's metrics, see `DualRateSVI.step`.

    Args:
        guide: Whose q it is.
        sums: Over the batch's sequences.
        told: Numbers of the step as they are.
    """
    rows, tokens = sums["n_sequences"], sums["n_tokens"]
    return {
        "step": told["step"],
        **metric_terms(guide, sums["nll"] / rows, sums["kl"] / rows, tokens / rows),
        "objective": -sums["objective"] / rows,
        **{name: told[name] for name in ("kl_weight", "lr_fast", "lr_slow")},
        "grad_norm_fast": sums["grad_norm_fast"] / rows,
        "grad_norm_slow": told["grad_norm_slow"],
        "fast_gain": sums["fast_gain"] / rows,
        "tokens_per_second": tokens / told["seconds"],
        "seconds": told["seconds"],
    }


def bound_name(metrics: Mapping[str, float]) -> str:
    """`elbo`, or `log_joint` in the metrics of a point mass."""
    return "log_joint" if "log_joint" in metrics else "elbo"


def headline(metrics: Mapping[str, float]) -> dict[str, str]:
    """What a progress bar shows of a slow step."""
    name = f"{bound_name(metrics)}_per_token"
    shown = {name: f"{metrics[name]:.3f}"}
    return {**shown, "kl": f"{metrics['kl']:.1f}"} if "kl" in metrics else shown


def refuse_runaway(model: LatentModel, guide: LocalGuide) -> None:
    """Refuses to learn a prior from point masses, where its density at them has no sensible limit.

    Both would be fitted with log p(z): the prior closes in on the points and the points on its
    peaks, whatever the text says. With a density q pays for that by its entropy.

    Raises:
        InputError: for a point mass and a learned prior that can concentrate.
    """
    prior = getattr(model, "thought_prior", None)
    if guide.has_density or not isinstance(prior, nn.Module):
        return
    learned = any(p.requires_grad for p in prior.parameters())
    if learned and not (isinstance(prior, ThoughtPrior) and prior.cannot_concentrate):
        name = getattr(prior, "family", "") or type(prior).__name__
        raise InputError(
            f"guide {guide.family!r} is a point mass, and the learned prior {name!r} would shrink "
            "onto its points without limit: use prior 'standard_normal', or a guide with a density "
            "such as 'mean_field'"
        )
