"""Where the nats between an ELBO and the evidence went, sequence by sequence.

    log p(x) - ELBO(q)  =  approximation   log p(x) - ELBO(best q of the family)
                        +  truncation      ELBO(best q) - ELBO(q after T fast steps)

and for an encoder without local steps, whose q was never fitted to its sequence,

    log p(x) - ELBO(q)  =  approximation  +  amortisation     ELBO(best q) - ELBO(encoder's q)

(Cremer, Li & Duvenaud 2018, equations 5 to 7). The best q of the family, with whatever it
shares between sequences as it stands, is that of a long fast loop of our own with several draws per
step, which starts where the judged loop ended; whether it has arrived is checked by leading its
answer on once more. All ELBOs of one sequence share their draws, so differences are precise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from pyro.infer import ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import Independent, Normal

from ltm_pyro.checks import MOST_COUNT, refuse_other_sequences, whole_number
from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.diagnostics.convergence import (
    ENOUGH,
    MIN_DRAWS,
    continue_from,
    judge,
    mean_and_error,
    objective_draws,
    with_errors,
)
from ltm_pyro.diagnostics.estimates import (
    Values,
    clustered_mean,
    columns,
    documents_of,
    monte_carlo,
    sequence_coords,
)
from ltm_pyro.diagnostics.psis import pareto_khat
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.inference.clocks.svi import DualRateSVI
from ltm_pyro.inference.guides.base import LocalGuide
from ltm_pyro.inference.guides.registry import build_guide
from ltm_pyro.inference.objectives import build_objective
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel, exact_evidence

_PARTICLES = 8
"""Draws per step of the long loop."""
_LONG_RATE, _CHECK_RATE = 0.05, 0.01
"""Peak learning rates of the long loop's first part and of its second, which the check shares; all
fall to 0."""


@dataclass(frozen=True)
class _Evidence:
    """What stands for log p(x), (B,) each where it is an array.

    Attributes:
        value: Nats.
        kind: In words.
        exact: Whether `value` is log p(x) itself and not a lower bound.
        error: Standard error from elsewhere.
        weights: (S, B) its linearised dependence on the draws that the ELBOs share; `None` if none.
        upper: An upper bound and its standard error, where there is one.
    """

    value: Values
    kind: str
    exact: bool = False
    error: Values | float = 0.0
    weights: Tensor | None = None
    upper: tuple[Values, Values] | None = None

    def gap(self, draws: Tensor) -> tuple[Values, Values]:
        """What it is above the mean of draws (S, B), with the error of the difference."""
        apart = -draws if self.weights is None else self.weights - draws
        mean, error = mean_and_error(draws)[0], mean_and_error(apart)[1]
        return self.value - mean, np.hypot(error, self.error)

    @property
    def signs(self) -> str:
        """Which side of 0 a gap that is 0 comes out on."""
        if self.weights is None:
            return (
                "nothing is clipped: a gap that is 0 comes out on either side of it, by its error"
            )
        return (
            "approximation and total are never negative: the bound on these draws is not below "
            "their mean; the other gaps come out on either side of 0, by their error"
        )


@door
def gap_decomposition(
    svi: DualRateSVI,
    batch: Batch,
    *,
    steps: int | None = None,
    converged_steps: int = 400,
    draws: int = 512,
    evidence: Literal["exact"] | xr.Dataset | None = None,
    tolerance: float = 0.1,
    seed: int = 0,
) -> xr.Dataset:
    """Splits log p(x) - ELBO(q) of each sequence into its causes.

    Estimates are differences of Monte Carlo means and are never clipped. `truncation` and
    `amortisation` that are really 0 come out on either side of it, by about their error. So does an
    `approximation` where log p(x) is exact or given. The importance-weighted bound on the same
    draws is never below their mean, so that there a gap of 0 comes out slightly above it.

    Args:
        svi: The recipe that is judged. Its model and clocks are left alone; the sequences are
            inferred anew, from the guide's own start.
        batch: The sequences.
        steps: T of the judged loop; the fast clock's own by default.
        converged_steps: Steps of the long loop's first part; its second part and the check take
            half as many each.
        draws: S, fresh draws per sequence, the same for every q.
        evidence: `"exact"` asks the model (`log_evidence`). A Dataset with `lower` and `lower_se`,
            possibly `upper` and `upper_se`, in nats, for the same sequences: of `annealed_bound` or
            `evidence_bracket`. By default the exact value where the model has one, else the
            importance-weighted bound of the converged q.
        tolerance: Nats of further gain below which the long loop counts as converged.
        seed: Of the draws.

    Returns:
        Dataset over `sequence`, nats: `elbo` (of the judged q), `elbo_converged`, `evidence`;
        `approximation`, and `truncation` or `amortisation`, which add up to `total`, each with its
        Monte Carlo standard error `_se`; `still_gaining`, `still_gaining_se`: what the check
        added; `converged`: whether that is below `tolerance` beyond doubt; `khat` of the
        converged q. For a guide that starts from an encoder and goes on from there also
        `encoder_gap` and `refined`: what its encoder alone would lose, and how much of that its
        local steps win back. With an upper bound also `approximation_upper` and `total_upper`.

        Attributes: `components`; `evidence_kind`; `approximation_is`, `exact` or `at least`, which
        holds for `total` as well; `share_converged`; numbers and names of this call.

    Raises:
        InputError: for a point mass, an encoder whose family has no local counterpart, evidence
            that is missing or about other sequences, or a number out of range.
    """
    _check(svi.model, converged_steps, draws, evidence)
    batch = batch.to(svi.model.device)
    judged = svi.infer(batch, steps)
    if not judged.has_density:
        raise InputError(
            f"{judged.family!r} is a point mass: its ELBO is minus infinity, there is no gap to "
            "split; fast_convergence judges its fast loop"
        )
    amortised = not svi.guide.local_parameters()
    second = "amortisation" if amortised else "truncation"
    long, checked = _converge(svi, judged, batch, converged_steps)
    posts = {"judged": judged, "long": long, "best": checked}
    if not amortised and svi.guide.inputs.values():  # it goes on from an encoder
        posts["encoder"] = svi.infer(batch, 0)
    value = {
        name: objective_draws(svi.model, post, batch, draws, seed) for name, post in posts.items()
    }
    given = _evidence(svi.model, batch, value["best"], evidence)
    data = _columns(value, given, second)
    gaining = data["still_gaining"].values, data["still_gaining_se"].values
    data["converged"] = ("sequence", judge(*gaining, tolerance, draws)[0] == ENOUGH)
    data["khat"] = ("sequence", pareto_khat(value["best"].cpu().numpy()), {"units": "1"})
    data = data.assign_coords(sequence_coords(batch, data))
    data.attrs = {
        "components": ["approximation", second],
        "evidence_kind": given.kind,
        "approximation_is": "exact" if given.exact else "at least",
        "share_converged": float(data["converged"].mean()),
        "guide": judged.family,
        "steps": 0 if amortised else svi.fast.steps if steps is None else steps,
        "converged_steps": converged_steps + 2 * max(1, converged_steps // 2),
        "draws": draws,
        "seed": seed,
        "tolerance": tolerance,
        "negative_values": given.signs,
    }
    return data


def _check(
    model: LatentModel, converged_steps: int, draws: int, evidence: xr.Dataset | str | None
) -> None:
    whole_number("converged_steps", converged_steps, 1, MOST_COUNT)
    if draws < MIN_DRAWS:
        raise InputError(f"draws is {draws}: a gap needs at least {MIN_DRAWS}")
    whole_number("draws", draws, bytes_each=8 * math.prod(model.thought_shape))
    if isinstance(evidence, xr.Dataset):
        if missing := {"lower", "lower_se"} - set(evidence.data_vars):
            raise InputError(f"evidence has no {' and no '.join(sorted(missing))} (nats)")
    elif evidence not in ("exact", None):
        raise InputError(f"evidence is {evidence!r}: must be 'exact', a Dataset or None")
    elif evidence == "exact" and not hasattr(model, "log_evidence"):
        raise InputError(
            f"{type(model).__name__} has no exact log evidence: give the Dataset of "
            "annealed_bound or evidence_bracket, or leave evidence out"
        )


def _converge(
    svi: DualRateSVI, judged: Posterior, batch: Batch, steps: int
) -> tuple[Posterior, Posterior]:
    """The best q of the family by a long loop from `judged`, and the same led on once more.

    What the check leads on is what a first part with noisy gradients and a second part have come
    to: after the first alone the noise of many parameters hides that the second has arrived.
    """
    guide, rows = svi.guide, judged.parameters
    if not guide.local_parameters():
        guide, rows = _local_counterpart(svi.model, judged)
    guide.reset(batch)
    # Where the family holds p(z | x), the second objective has no gradient noise left there; far
    # away the first one has less.
    half = max(1, steps // 2)
    found = []
    for objective, rate, count in (
        ("elbo", _LONG_RATE, steps),
        ("stl", _CHECK_RATE, half),
        ("stl", _CHECK_RATE, half),
    ):
        fast = Fast(steps=count, optimizer="adam", lr=rate, final_fraction=0.0)
        elbo: ELBO = TraceMeanField_ELBO(num_particles=_PARTICLES)
        if judged.distribution.has_rsample:
            elbo = build_objective(objective, particles=_PARTICLES)
        found.append(continue_from(svi, rows, batch, fast, guide=guide, elbo=elbo))
        rows = found[-1].parameters
    return found[1], found[2]


def _local_counterpart(
    model: LatentModel, judged: Posterior
) -> tuple[LocalGuide, dict[str, Tensor]]:
    """A guide with local parameters that starts as the encoder's q, for factorised normals."""
    q: Any = judged.distribution
    if not (isinstance(q, Independent) and isinstance(q.base_dist, Normal)):
        raise InputError(
            f"the encoder of {judged.family!r} gives a {type(q).__name__}: its amortisation gap "
            "is known for factorised normals, which have a family to optimise locally"
        )
    rows = {"loc": q.mean.detach(), "log_variance": q.variance.log().detach()}
    return build_guide("mean_field", model), rows


def _evidence(
    model: LatentModel, batch: Batch, best: Tensor, evidence: xr.Dataset | str | None
) -> _Evidence:
    """What `evidence` asks for, as numbers. `best`: (S, B) log weights of the converged q."""
    if isinstance(evidence, xr.Dataset):
        refuse_other_sequences(evidence, batch, ("evidence", "the batch"))
        names = [n for n in ("lower", "lower_se", "upper", "upper_se") if n in evidence]
        known = {name: evidence[name].values.astype(np.float64) for name in names}
        lower, error = known["lower"], known["lower_se"]
        if "upper" not in known:
            return _Evidence(lower, "lower bound, given", error=error)
        upper = known["upper"], known.get("upper_se", np.zeros_like(lower))
        return _Evidence(lower, "bracket, given", error=error, upper=upper)
    exact = exact_evidence(model, batch)
    if exact is not None:
        return _Evidence(exact.double().cpu().numpy(), "exact", exact=True)
    bound = best.logsumexp(0) - math.log(len(best))
    weights = torch.exp(best - bound)  # mean 1: the first-order effect of a draw on the bound
    kind = f"importance-weighted lower bound, {len(best)} draws of the converged q"
    return _Evidence(bound.cpu().numpy(), kind, weights=weights)


def _columns(value: dict[str, Tensor], given: _Evidence, second: str) -> xr.Dataset:
    """All columns in nats; the two components add up to the total by construction."""
    judged, best = value["judged"], value["best"]
    pairs = {
        "elbo": mean_and_error(judged),
        "elbo_converged": mean_and_error(best),
        "evidence": (given.value, given.gap(torch.zeros_like(best))[1]),
        "approximation": given.gap(best),
        second: mean_and_error(best - judged),
        "total": given.gap(judged),
        "still_gaining": mean_and_error(best - value["long"]),
    }
    if "encoder" in value:
        pairs["encoder_gap"] = mean_and_error(best - value["encoder"])
        pairs["refined"] = mean_and_error(judged - value["encoder"])
    if given.upper is not None:
        upper, error = given.upper
        for name, draws in (("approximation", best), ("total", judged)):
            mean, se = mean_and_error(draws)
            pairs[f"{name}_upper"] = (upper - mean, np.hypot(error, se))
    return xr.Dataset(with_errors(pairs, "sequence"))


def gap_means(gaps: xr.Dataset) -> xr.Dataset:
    """Means over sequences of the gaps and their total.

    Returns:
        Dataset over `component`, nats per sequence: `mean`; `mc_se`, its Monte Carlo error given
        these sequences; `sampling_se`, that of having sampled their documents.
    """
    names = [*gaps.attrs["components"], "total"]
    found = [clustered_mean(gaps[name], documents_of(gaps)) for name in names]
    variables = columns(
        "component",
        "nats",
        mean=[each.value for each in found],
        mc_se=[monte_carlo(gaps, name) / gaps.sizes["sequence"] for name in names],
        sampling_se=[each.se for each in found],
    )
    return xr.Dataset(variables, coords={"component": names})
