"""Calibration of a way of inferring: does it give back the thoughts that sequences were made from?

    z*_r ~ p(z),   x_r ~ p(x | z*_r),   z_rl ~ q(z | x_r) for l = 1..L
    rank_r = #{l: f(z_rl) < f(z*_r)}

With q = p(z | x) the truth is one more draw from q, so every rank from 0 to L is equally likely,
whatever the quantity f (Talts, Betancourt, Simpson, Vehtari & Gelman 2018, theorem 1). Draws here
are independent, so none need be thinned.

What ranks of single dimensions cannot see: a q that ignores correlations but has the right
marginals, and a q that ignores the data altogether, the prior. Ranks of log p(x | z) and of
log p(x, z) see both (Modrak, Moon, Kim, Buerkner, Huurre, Faltejskova, Gelman & Vehtari 2023), so
they are always among the quantities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from ltm_pyro.checks import MOST_COUNT, whole_number
from ltm_pyro.data.batches import Batch
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.models.base import LatentModel
from ltm_pyro.models.simulation import simulate
from ltm_pyro.random import Stream, derive_seed, seeded

Infer = Callable[[Batch], Posterior]
"""Any way from a batch to its posterior, e.g. `svi.infer`."""

Statistic = Callable[[Tensor, Batch], Tensor]
"""A quantity to be ranked: z (..., B, K, D) and the batch to (..., B)."""

Floats = NDArray[np.float64]

ROWS_AT_ONCE = 250
"""Replications inferred in one batch."""

_BINS, _LEAST_EXPECTED = 20, 10
"""Bins of a rank histogram at most, and replications expected in each at least."""

_READING_RATE = 0.01
"""Chance that a calibrated posterior is read as anything else, over all quantities together."""

_DENSITIES = ("log_likelihood", "log_joint")


@door
def sbc(
    model: LatentModel,
    infer: Infer,
    replications: int = 1000,
    draws: int = 199,
    statistics: Mapping[str, Statistic] | None = None,
    seed: int = 0,
    like: Batch | None = None,
) -> xr.Dataset:
    """Simulation-based calibration: are ranks of the truth among q's draws uniform?

    Args:
        model: Writes the data, and gives the prior that thoughts come from.
        infer: From a batch to its posterior; called with `ROWS_AT_ONCE` sequences at a time.
        replications: N, sequences written and inferred.
        draws: L, posterior draws per sequence. Ranks run from 0 to L.
        statistics: Further quantities by name, beside every dimension of z, log p(x | z) and
            log p(x, z).
        seed: Of data, draws and ties.
        like: Rows whose masks and covariates the written ones have, as in `simulate`.

    Returns:
        Dataset over `quantity`, `replication` and `bin`:

        - `rank` (replication, quantity): 0..L; ties are broken at random.
        - `count` (quantity, bin), `expected` (bin): the rank histogram.
        - `chi2`, `p_value` (quantity): Pearson's test that ranks are uniform.
        - `z_location`, `z_spread` (quantity): mean of the ranks against 1/2, and their variance
          against 1/12, ranks scaled to 0..1, in standard errors under uniformity.
        - `shift` (quantity): where the truth lies on average, in units of q's own scale, counted
          from q's centre; `scale_ratio` (quantity): q's scale over the truth's. Both from normal
          scores of the ranks, so they are exact where q is normal, and at most about 3 in size.
        - `reading` (quantity): the shape in words.

        Attributes: `p_value`, of all quantities together: 1 - (1 - p)^m for the smallest p of m,
        the chance of one as small among m independent ones (Sidak 1967). Ranks of one replication
        lean on each other, which makes it a little too large. `smallest_p_value` and `tests`
        are p and m; m p is Bonferroni's limit, which holds under any dependence.

    Raises:
        InputError: if there are too few replications or draws, or a statistic gives a wrong shape.
    """
    _check_counts(replications, draws)
    names, ranks = _ranks(model, infer, replications, draws, statistics or {}, seed, like)
    bins = min(_BINS, max(2, replications // _LEAST_EXPECTED), draws + 1)
    counts, expected = _histogram(ranks, draws, bins)
    chi2 = ((counts - expected) ** 2 / expected).sum(1)
    p_value = stats.chi2.sf(chi2, bins - 1)
    location, spread = _scores_of_ranks(ranks, draws)
    shift, ratio, z_shift, z_ratio = _normal_scores(ranks, draws)
    uneven = p_value < _READING_RATE / (3 * len(names))
    limit = float(stats.norm.isf(_READING_RATE / (6 * len(names))))
    readings = [
        _reading(name, shift[i], ratio[i], z_shift[i], z_ratio[i], bool(uneven[i]), limit)
        for i, name in enumerate(names)
    ]
    columns = {
        "rank": (("replication", "quantity"), ranks, "1"),
        "count": (("quantity", "bin"), counts, "replications"),
        "expected": ("bin", expected, "replications"),
        "chi2": ("quantity", chi2, "1"),
        "p_value": ("quantity", p_value, "1"),
        "z_location": ("quantity", location, "1"),
        "z_spread": ("quantity", spread, "1"),
        "shift": ("quantity", shift, "scales of q"),
        "scale_ratio": ("quantity", ratio, "1"),
        "reading": ("quantity", np.array(readings), "1"),
    }
    data = _dataset(columns, names, p_value, replications=replications, draws=draws, seed=seed)
    return data.assign_attrs(bins=bins)


@door
def vsbc(
    model: LatentModel,
    infer: Infer,
    replications: int = 1000,
    draws: int = 199,
    seed: int = 0,
    like: Batch | None = None,
) -> xr.Dataset:
    """Is q centred? Variational SBC: are the p_d = Q(z_d < z*_d) symmetric about 1/2?

    Sees bias of a marginal's location and nothing else: a q whose scale is halved or doubled is as
    symmetric as the right one, and so is one that ignores correlations, or that is the prior. Use
    `sbc` for those (Yao, Vehtari, Simpson & Gelman 2018, section 3.2: VSBC asks less than SBC so
    that a q known to be too narrow can still be asked whether its means are right).

    The test is the greatest distance between the distribution functions of p and 1 - p. These two
    samples are one another's mirror image and not independent, for which the two-sample table of
    Kolmogorov and Smirnov is too small; the limit used here is Butler's (1969), that of the largest
    absolute value of Brownian motion on [0, 1].

    Args:
        model: Writes the data, and gives the prior that thoughts come from.
        infer: From a batch to its posterior.
        replications: N, sequences written and inferred.
        draws: L, posterior draws per sequence, from which p_d is counted.
        seed: Of data, draws and ties.
        like: Rows whose masks and covariates the written ones have, as in `simulate`.

    Returns:
        Dataset over `quantity` (dimensions of z) and `replication`: `probability` (replication,
        quantity), in 0..1; `distance`, `p_value` (quantity); `median` (quantity), above 1/2 where
        the truth lies above q; `reading` (quantity). Attributes `p_value`,
        `smallest_p_value` and `tests` as in `sbc`.

    Raises:
        InputError: if there are too few replications or draws.
    """
    _check_counts(replications, draws)
    names, ranks = _ranks(model, infer, replications, draws, None, seed, like)
    p = (ranks + 0.5) / (draws + 1)
    distance = np.array([_asymmetry(column, draws) for column in ranks.T])
    p_value = np.array([_butler(math.sqrt(replications) * d) for d in distance])
    median = np.median(p, axis=0)
    side = np.where(median > 0.5, "shifted low", "shifted high")
    readings = np.where(p_value < _READING_RATE / len(names), side, "no bias seen")
    columns = {
        "probability": (("replication", "quantity"), p, "1"),
        "distance": ("quantity", distance, "1"),
        "p_value": ("quantity", p_value, "1"),
        "median": ("quantity", median, "1"),
        "reading": ("quantity", readings, "1"),
    }
    data = _dataset(columns, names, p_value, replications=replications, draws=draws, seed=seed)
    blind = "scales, correlations, and anything else that leaves q's marginals centred"
    return data.assign_attrs(blind_to=blind)


def _dataset(
    columns: dict[str, tuple[Any, NDArray[Any], str]], names: list[str], p: Floats, **attrs: int
) -> xr.Dataset:
    """Columns with their units, and one p-value for all quantities, with what it is made of."""
    return xr.Dataset(
        {n: (dims, values, {"units": units}) for n, (dims, values, units) in columns.items()},
        coords={"quantity": np.array(names), "replication": np.arange(attrs["replications"])},
        attrs={
            "p_value": _sidak(p),
            "p_value_meaning": "1 - (1 - smallest)^tests: the chance of one as small among as many",
            "smallest_p_value": float(p.min()),
            "tests": len(p),
            **attrs,
        },
    )


def _sidak(p: Floats) -> float:
    """The chance of a p-value as small as the smallest among as many independent ones."""
    # As it stands, 1 - (1 - p)^m loses a small p to rounding, and log(1 - p) has no value at 1.
    smallest = float(p.min())
    return -math.expm1(len(p) * math.log1p(-smallest)) if smallest < 1.0 else 1.0


def _check_counts(replications: int, draws: int) -> None:
    whole_number("replications", replications, at_most=MOST_COUNT)
    whole_number("draws", draws, bytes_each=8)
    if replications < 2 * _LEAST_EXPECTED:
        raise InputError(
            f"replications is {replications}: {2 * _LEAST_EXPECTED} or more are needed to test "
            "that ranks are uniform, and 1000 to do so well"
        )
    if draws < 9:
        raise InputError(f"draws is {draws}: ranks among fewer than 9 draws say too little")


def _ranks(
    model: LatentModel,
    infer: Infer,
    replications: int,
    draws: int,
    statistics: Mapping[str, Statistic] | None,
    seed: int,
    like: Batch | None,
) -> tuple[list[str], NDArray[np.int64]]:
    """Names of Q quantities and their ranks (N, Q); dimensions of z alone without `statistics`."""
    simulated = simulate(model, replications, derive_seed(seed, Stream.CALIBRATE), like=like)
    K, D = model.thought_shape
    names = [f"z[{k},{d}]" for k in range(K) for d in range(D)]
    if statistics is not None:
        names += [*_DENSITIES, *statistics]
    if len(set(names)) < len(names):
        raise InputError(f"statistics {sorted(statistics or {})}: a name is already taken")
    rows = []
    for first in range(0, replications, ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        batch = simulated.batch.select(part)
        post = infer(batch)
        post.refuse_other_batch(batch, "the posterior of infer")
        key = derive_seed(seed, Stream.CALIBRATE, 1 + first)
        with torch.no_grad(), seeded(key, model.device):
            z = torch.cat([simulated.z[part][None], post.sample(draws).to(simulated.z)])
            values = z.flatten(-2)
            if statistics is not None:
                more = _statistics(model, z, batch, statistics)
                values = torch.cat([values, more.to(values)], -1)
            rows.append(_rank_of_first(values))
    return names, np.concatenate(rows)


def _statistics(
    model: LatentModel, z: Tensor, batch: Batch, statistics: Mapping[str, Statistic]
) -> Tensor:
    """Log p(x | z), log p(x, z) and the caller's own, (1 + L, B, Q)."""
    prepared = model.prepare(batch)
    # One draw at a time, so that memory does not grow with the number of draws.
    log_likelihood = torch.stack([model.log_likelihood(draw, prepared) for draw in z])
    columns = [log_likelihood, log_likelihood + model.prior().log_prob(z)]
    for name, statistic in statistics.items():
        value = statistic(z, batch)
        if value.shape != z.shape[:2]:
            raise InputError(
                f"statistic {name!r} gives {tuple(value.shape)} for z {tuple(z.shape)}: "
                "must be one number per draw and sequence, (..., B)"
            )
        columns.append(value)
    return torch.stack(columns, -1)


def _rank_of_first(values: Tensor) -> NDArray[np.int64]:
    """Rank of `values[0]` among the L others, (1 + L, B, Q) to (B, Q), ties broken at random."""
    truth, others = values[0], values[1:]
    below, ties = (others < truth).sum(0), (others == truth).sum(0)
    extra = (torch.rand(ties.shape, device=ties.device) * (ties + 1)).floor().long()
    ranks: NDArray[np.int64] = (below + torch.minimum(extra, ties)).cpu().numpy()
    return ranks


def _histogram(ranks: NDArray[np.int64], draws: int, bins: int) -> tuple[Floats, Floats]:
    """Counts (Q, bins) and what uniform ranks lead to expect (bins,).

    Bins need not hold equally many ranks: each is expected to take its own share.
    """
    place = np.arange(draws + 1) * bins // (draws + 1)
    expected = np.bincount(place, minlength=bins) * len(ranks) / (draws + 1)
    counts = [np.bincount(place[column], minlength=bins) for column in ranks.T]
    return np.array(counts, dtype=np.float64), expected


def _scores_of_ranks(ranks: NDArray[np.int64], draws: int) -> tuple[Floats, Floats]:
    """Mean against 1/2 and variance against 1/12 in standard errors, (Q,) each."""
    every = (np.arange(draws + 1) + 0.5) / (draws + 1) - 0.5
    u = (ranks + 0.5) / (draws + 1) - 0.5
    root = math.sqrt(len(ranks))
    location = root * u.mean(0) / every.std()
    spread = root * ((u**2).mean(0) - (every**2).mean()) / (every**2).std()
    return location, spread


def _normal_scores(ranks: NDArray[np.int64], draws: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Shift, q's scale over the truth's, and both in standard errors under uniformity, (Q,) each.

    A normal q that is off by a shift and a scale gives normal scores with that mean and the inverse
    of that scale, so the two are told apart, which mean and variance of the ranks are not.
    """
    every = stats.norm.ppf((np.arange(draws + 1) + 0.5) / (draws + 1))
    scores = every[ranks]
    root = math.sqrt(len(ranks))
    shift = scores.mean(0)
    variance = ((scores - shift) ** 2).mean(0)
    z_variance = root * (variance - every.var()) / (every**2).std()
    ratio = np.sqrt(every.var() / np.maximum(variance, np.finfo(np.float64).tiny))
    return shift, ratio, root * shift / every.std(), z_variance


def _reading(
    name: str,
    shift: float,
    ratio: float,
    z_shift: float,
    z_ratio: float,
    uneven: bool,
    limit: float,
) -> str:
    """The shape of a quantity's ranks in words; "high" of a log density means more probable."""
    density = name in _DENSITIES
    if density and z_shift > limit:
        return (
            "q's draws are less probable than the truth: q is too wide, off centre, ignores "
            "correlations, or belongs to another sequence"
        )
    if density and z_shift < -limit:
        return "q's draws are more probable than the truth: q is too narrow"
    found = []
    if not density and abs(z_shift) > limit:
        found.append(f"shifted {'low' if shift > 0 else 'high'} by {abs(shift):.2f} scales")
    if not density and abs(z_ratio) > limit:
        size = "small" if ratio < 1 else "large"
        found.append(f"scale too {size}: {ratio:.2f} times the truth's")
    if found:
        return "; ".join(found)
    if uneven or abs(z_ratio) > limit:
        return "not uniform, in another way: look at the rank plot"
    return "calibrated"


def _asymmetry(ranks: NDArray[np.int64], draws: int) -> float:
    """sup_t |F(t) - G(t)| for the distribution functions F of the ranks and G of their mirror."""
    share = np.bincount(ranks, minlength=draws + 1) / len(ranks)
    return float(np.abs(np.cumsum(share - share[::-1])).max())


def _butler(c: float) -> float:
    """P(max over [0, 1] of |Brownian motion| > c)."""
    if c < 0.2:
        return 1.0
    k = np.arange(50)
    terms = (-1.0) ** k / (2 * k + 1) * np.exp(-((math.pi * (2 * k + 1)) ** 2) / (8 * c * c))
    inside = 4 / math.pi * float(terms.sum())
    # The series loses small tails to rounding; reflection gives them, up to far smaller terms.
    return 4.0 * float(stats.norm.sf(c)) if c > 3 else 1.0 - inside
