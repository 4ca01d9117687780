"""Does the model use its thoughts? The collapse panel.

A latent is collapsed where q(z_i) no longer depends on the sequence. No single number shows that:
a high KL does not prove use, so the panel puts beside it how much the text suffers when each
sequence is given another's thoughts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal

from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.inference.random import Stream, derive_seed, seeded

ACTIVE_VARIANCE = 0.01
"""A dimension of z is active if its posterior mean varies over sequences by at least this
(Burda, Grosse & Salakhutdinov 2016, section 5.2)."""

_MOMENT_DRAWS = 256  # for families that cannot state their marginal variances


@dataclass(frozen=True, eq=False)
class CollapsePanel:
    """How much q(z_i) says, and how much of it the decoder hears. Nats per sequence.

    Attributes:
        n_sequences: N, sequences that the panel is about.
        draws: S, draws per sequence for the mutual information.
        kl: Mean KL(q(z_i) || prior).
        kl_se: Its standard error over sequences.
        kl_estimator: `analytic` or `monte_carlo`.
        kl_per_thought: (K,) mean KL of each thought vector's marginal moments: exact for a
            factorised normal q, a lower bound for any other; `nan` where the prior is not a
            factorised normal.
        kl_per_layer: (L,) the same summed over each layer's thoughts; empty without layers.
        active_units: Dimensions of z whose posterior mean has a variance over sequences of at least
            `ACTIVE_VARIANCE`.
        n_units: K D.
        mutual_information: Between sequence and z under q, mean_i KL(q_i || q_agg) with q_agg the
            mixture of these N posteriors; at most log N, whatever q is.
        mutual_information_se: Its Monte Carlo standard error given these sequences.
        mutual_information_cap: log N.
        kl_aggregate: KL(q_agg || prior) = kl - mutual_information: how far all posteriors together
            are from the prior, which a decoder can exploit without telling sequences apart.
        penalty_z0: Mean of -log p(x | z = 0) minus that at the sequence's own draws.
        penalty_z0_se: Its paired standard error over sequences.
        penalty_shuffled: The same with the thoughts of another sequence.
        penalty_shuffled_se: Its paired standard error over sequences.
    """

    n_sequences: int
    draws: int
    kl: float
    kl_se: float
    kl_estimator: str
    kl_per_thought: NDArray[np.float64]
    kl_per_layer: NDArray[np.float64]
    active_units: int
    n_units: int
    mutual_information: float
    mutual_information_se: float
    mutual_information_cap: float
    kl_aggregate: float
    penalty_z0: float
    penalty_z0_se: float
    penalty_shuffled: float
    penalty_shuffled_se: float

    @property
    def uses_thoughts(self) -> bool:
        """Whether another sequence's thoughts hurt by more than two standard errors."""
        return self.penalty_shuffled > 2 * self.penalty_shuffled_se

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, `uses_thoughts` included."""
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in asdict(self).items()
        }
        return {**plain, "uses_thoughts": self.uses_thoughts}


def collapse_panel(
    post: Posterior,
    scores: xr.Dataset,
    *,
    n_layers: int | None = None,
    draws: int = 16,
    seed: int = 0,
) -> CollapsePanel:
    """The collapse panel of a batch.

    Args:
        post: q for N sequences, at least 2.
        scores: Of `evaluate(model, post, batch)`, mode `oracle`, for the same sequences.
        n_layers: L, for the KL by layer: thoughts belong to layers in equal blocks.
        draws: S, draws per sequence for the mutual information. Its cost is S N N densities.
        seed: Of these draws.

    Raises:
        InputError: if scores and posterior do not belong together, or there is one sequence only.
    """
    _check(post, scores, n_layers)
    n = len(post)
    device = post.ids.device
    with torch.no_grad(), seeded(derive_seed(seed, Stream.SCORE), device):
        mean, variance = _moments(post)
        information, error = _mutual_information(post, draws)
        by_thought = _kl_of_moments(mean, variance, post.prior).mean(0).sum(-1)
    kl = scores["kl"].values.astype(np.float64)
    per_thought = by_thought.double().cpu().numpy()
    active = int((mean.double().var(0) >= ACTIVE_VARIANCE).sum())
    z0, z0_se = _paired(scores, "nll_z0")
    shuffled, shuffled_se = _paired(scores, "nll_shuffled")
    return CollapsePanel(
        n_sequences=n,
        draws=draws,
        kl=float(kl.mean()),
        kl_se=_standard_error(kl),
        kl_estimator=post.kl_estimator,
        kl_per_thought=per_thought,
        kl_per_layer=np.empty(0) if n_layers is None else per_thought.reshape(n_layers, -1).sum(1),
        active_units=active,
        n_units=mean[0].numel(),
        mutual_information=information,
        mutual_information_se=error,
        mutual_information_cap=math.log(n),
        kl_aggregate=float(kl.mean()) - information,
        penalty_z0=z0,
        penalty_z0_se=z0_se,
        penalty_shuffled=shuffled,
        penalty_shuffled_se=shuffled_se,
    )


def _check(post: Posterior, scores: xr.Dataset, n_layers: int | None) -> None:
    if scores.attrs.get("mode", "oracle") != "oracle":
        raise InputError(
            f"collapse_panel needs scores of mode 'oracle', not {scores.attrs['mode']!r}: "
            "in the other modes no KL is charged"
        )
    if not np.array_equal(scores["sequence"].values, post.ids.cpu().numpy()):
        raise InputError("scores and posterior hold other sequences, or in another order")
    if len(post) < 2:
        raise InputError("collapse_panel needs at least 2 sequences: it asks what tells them apart")
    thoughts = post.prior.event_shape[0]
    if n_layers is not None and thoughts % n_layers:
        raise InputError(f"{thoughts} thoughts cannot belong to {n_layers} layers in equal blocks")


def _moments(post: Posterior) -> tuple[Tensor, Tensor]:
    """Mean and marginal variance of each dimension, (B, K, D) each."""
    try:
        return post.distribution.mean, post.distribution.variance
    except NotImplementedError:
        z = post.sample(_MOMENT_DRAWS)
        return z.mean(0), z.var(0)


def _kl_of_moments(mean: Tensor, variance: Tensor, prior: TorchDistribution) -> Tensor:
    """KL from normals with these moments to a factorised normal prior, by dimension (B, K, D).

    Among all q with given moments the factorised normal has the highest entropy, and the cross
    entropy to a factorised normal depends on moments alone: so this never exceeds KL(q || prior).
    """
    if not (isinstance(prior, Independent) and isinstance(prior.base_dist, Normal)):
        return torch.full_like(mean, torch.nan)
    ratio = variance / prior.variance
    shift = (mean - prior.mean).square() / prior.variance
    return 0.5 * (ratio + shift - 1.0 - ratio.log())


def _mutual_information(post: Posterior, draws: int) -> tuple[float, float]:
    """mean_i E_{z ~ q_i}[log q_i(z) - log mean_j q_j(z)] and its Monte Carlo standard error."""
    if not post.has_density:
        return math.nan, math.nan
    n = len(post)
    z = post.sample(draws)
    gains = []
    for i in range(n):  # one sequence at a time, so that memory grows with S N and not S N N
        log_q = post.log_prob(z[:, i, None]).double()  # (S, N): draws of q_i under every q_j
        gains.append(log_q[:, i] - (log_q.logsumexp(1) - math.log(n)))
    gain = torch.stack(gains, dim=1)
    error = gain.var(0).sum().div(draws).sqrt() / n if draws > 1 else torch.tensor(math.nan)
    return float(gain.mean()), float(error)


def _paired(scores: xr.Dataset, control: str) -> tuple[float, float]:
    """Mean and standard error over sequences of a control minus the sequence's own thoughts."""
    difference = (scores[control] - scores["nll_given_z"]).values.astype(np.float64)
    return float(difference.mean()), _standard_error(difference)


def _standard_error(values: NDArray[np.float64]) -> float:
    if not np.isfinite(values).all():
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def format_panel(panel: CollapsePanel) -> str:
    """The panel as text for the terminal, every number with its unit, error and meaning."""
    cap = panel.mutual_information_cap
    rows = [
        ("KL(q || prior)", panel.kl, panel.kl_se, f"what q says about the text ({_how(panel)})"),
        (
            "mutual information", panel.mutual_information, panel.mutual_information_se,
            f"its part that tells sequences apart; at most log N = {cap:.2f}",
        ),
        ("z = 0 penalty", panel.penalty_z0, panel.penalty_z0_se, "loss with thoughts set to 0"),
        (
            "shuffled-z penalty", panel.penalty_shuffled, panel.penalty_shuffled_se,
            "loss with another sequence's thoughts",
        ),
    ]  # fmt: skip
    lines = [
        f"Does the model use its thoughts?  ({panel.n_sequences} sequences, nats per sequence)"
    ]
    for name, value, error, meaning in rows:
        lines.append(f"  {name:<19} {value:>8.2f} +- {error:<6.2f} {meaning}")
    lines.append(
        f"  {'active units':<19} {panel.active_units:>8} of {panel.n_units:<6} "
        f"dimensions whose mean varies by {ACTIVE_VARIANCE} or more"
    )
    # Marginal moments miss what dimensions say together.
    least = "at least " if panel.kl_per_thought.sum() < 0.999 * panel.kl else ""
    if panel.kl_per_layer.size:
        lines.append(f"  {'KL by layer':<19} {least}{_numbers(panel.kl_per_layer)}")
    lines.append(f"  {'KL by thought':<19} {least}{_numbers(panel.kl_per_thought)}")
    if panel.uses_thoughts:
        verdict = "yes: another sequence's thoughts hurt by more than two standard errors"
    else:
        verdict = "not shown: another sequence's thoughts hurt by less than two standard errors"
    return "\n".join([*lines, f"  {verdict}"])


def _how(panel: CollapsePanel) -> str:
    return {"analytic": "closed form", "monte_carlo": "Monte Carlo"}[panel.kl_estimator]


def _numbers(values: NDArray[np.float64], most: int = 12) -> str:
    shown = "  ".join(f"{value:.2f}" for value in values[:most])
    return shown if len(values) <= most else f"{shown}  ... ({len(values)} in all)"
