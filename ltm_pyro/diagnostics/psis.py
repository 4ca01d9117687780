"""How far importance weights can be trusted: the Pareto k-hat of each sequence.

The weights w = p(x, z) / q(z) of one sequence have a right tail; k is the shape of the generalised
Pareto distribution that fits it (Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto smoothed
importance sampling). Moments of w beyond 1/k do not exist, so with k above 0.7 estimates from the
weights are unreliable, however small their printed standard error is.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ltm_pyro import compat_arviz
from ltm_pyro.diagnostics.estimates import Values, khat_threshold
from ltm_pyro.errors import InputError

_REPEATS = 200
"""Simulated means behind a `tail_error`: it is known to 1/sqrt(2 * 200) = 5 %."""

MIN_DRAWS = 1000
"""Below it a k-hat is not judged. With 32 draws its spread over seeds is 0.29, far more than
between sequences; with 1,000 it is about 0.1."""

_EQUAL = 1e-3
"""Log weights within this many nats of each other count as equal. Single-precision sums of a few
hundred terms differ by about 1e-4 nats for the exact posterior, and a fit to that is a fit to
rounding; weights within a thousandth of each other estimate anything well."""


def pareto_khat(log_weights: ArrayLike) -> Values:
    """Pareto k-hat of each sequence's importance weights, (S, B) nats to (B,).

    Of log p(x, z) - log q(z); minus infinity is a draw like any other. Below 0.5 good, below
    `khat_threshold(S)` usable, otherwise unreliable. `nan`: not judged, from fewer than `MIN_DRAWS`
    draws, with a weight that is not a number or with none above zero. `inf`: a weight is infinite,
    or the largest are so few or so tied that no tail can be fitted. 0: the weights are equal up to
    rounding, as of the exact posterior.

    Raises:
        InputError: if `log_weights` is not (S, B).
    """
    weights = np.array(log_weights, dtype=np.float64)
    if weights.ndim != 2:
        raise InputError(f"log_weights must be (S, B), not {weights.shape}: draws come first")
    khat = np.full(weights.shape[1], np.nan)
    if len(weights) < MIN_DRAWS:
        return khat
    top, bottom = weights.max(0), weights.min(0)
    khat[top == np.inf] = np.inf
    finite = np.isfinite(top)  # not a number where any weight is none
    equal = np.zeros_like(finite)
    equal[finite] = top[finite] - bottom[finite] <= _EQUAL
    khat[equal] = 0.0
    fitted = finite & ~equal
    if fitted.any():
        khat[fitted] = compat_arviz.pareto_khat(weights[:, fitted])
    return khat


def khat_error(khat: Values, draws: int) -> Values:
    """Standard error of a k-hat of S draws, (1 + k) / sqrt(number of largest weights)."""
    tail = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    return (1.0 + np.maximum(khat, 0.0)) / math.sqrt(tail)


def judged_in_words(khat: ArrayLike, draws: int) -> str:
    """How many sequences' weights S draws can be relied on for, by their k-hats (B,), in words."""
    values = np.asarray(khat, dtype=np.float64)
    known = values[~np.isnan(values)]
    if not known.size:
        return f"not judged at S = {draws} (a k-hat needs {MIN_DRAWS:,} draws)"
    limit = khat_threshold(draws)
    return (
        f"median {np.median(known):.2f}, above {limit:.2f} (the limit at S = {draws}) in "
        f"{np.mean(known > limit):.0%} of {known.size} sequences"
    )


def tail_error(log_weights: Values, khat: Values) -> Values:
    """Standard error of the log mean if the weights' tail is a Pareto of shape `khat`.

    The largest weights, as many as k-hat is fitted to, are replaced by draws from a generalised
    Pareto distribution through their own median, which unlike them reaches beyond the largest; the
    spread of `_REPEATS` such log means is the error.

    Finite log weights (S, B) and shapes (B,) give (B,) nats, `nan` where k-hat is not finite.
    """
    S, B = log_weights.shape
    generator = np.random.default_rng(0)
    tail = math.ceil(min(S / 5, 3 * math.sqrt(S)))
    weights = np.sort(np.exp(log_weights - log_weights.max(0)), axis=0)
    body, start = weights[: S - tail], weights[S - tail - 1]
    # At k = 0 the Pareto is exponential; a shape this small is one to rounding.
    k = np.where(np.abs(khat) < 1e-6, 1e-6, khat)
    scale = np.median(weights[S - tail :] - start, axis=0) * k / (2.0**k - 1.0)
    beyond = generator.binomial(S, tail / S, size=(_REPEATS, B))
    means = np.empty((_REPEATS, B))
    for column in range(B):  # one sequence at a time: memory does not grow with B
        counts = beyond[:, column]
        u = 1.0 - generator.random((_REPEATS, counts.max()))
        x = start[column] + scale[column] * (u ** -k[column] - 1.0) / k[column]
        inside = np.arange(counts.max()) < counts[:, None]
        rest = S - counts
        noise = generator.normal(size=_REPEATS) * np.sqrt(rest) * body[:, column].std()
        means[:, column] = (x * inside).sum(1) + rest * body[:, column].mean() + noise
    error: Values = np.log(np.maximum(means, np.finfo(float).tiny)).std(0, ddof=1)
    return np.where(np.isfinite(khat), error, np.nan)
