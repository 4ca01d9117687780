"""How far importance weights can be trusted: the Pareto k-hat of each sequence.

The weights w = p(x, z) / q(z) of one sequence have a right tail; k is the shape of the generalised
Pareto distribution that fits it (Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto smoothed
importance sampling). Moments of w beyond 1/k do not exist, so with k above 0.7 estimates from the
weights are unreliable, however small their printed standard error is.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ltm_pyro import compat_arviz
from ltm_pyro.errors import InputError

MIN_DRAWS = 1000
"""Below it a k-hat is not judged. With 32 draws its spread over seeds is 0.29, far more than
between sequences; with 1,000 it is about 0.1."""

_EQUAL = 1e-3
"""Log weights within this many nats of each other count as equal. Single-precision sums of a few
hundred terms differ by about 1e-4 nats for the exact posterior, and a fit to that is a fit to
rounding; weights within a thousandth of each other estimate anything well."""


def pareto_khat(log_weights: ArrayLike) -> NDArray[np.float64]:
    """Pareto k-hat of each sequence's importance weights.

    Args:
        log_weights: log p(x, z) - log q(z) in nats, (S, B), unscaled; one column per sequence. A
            constant added to a column changes nothing.

    Returns:
        (B,) estimates of k. Below 0.5 good, below `khat_threshold(S)` usable, otherwise unreliable.
        - `nan`: not judged. Fewer than `MIN_DRAWS` draws, a weight that is not a number, or no
          weight above zero (all log weights minus infinity).
        - `inf`: a weight is infinite, or the largest weights are so few or so tied that no tail
          can be fitted. Treat it as unreliable.
        - 0: the weights are equal up to rounding, as they are when q is the exact posterior.
        Weights of zero (minus infinity) are draws like any others.

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
    known = ~np.isnan(top) & (top > -np.inf)
    khat[known & (top == np.inf)] = np.inf
    finite = known & (top < np.inf)
    with np.errstate(invalid="ignore"):
        equal = finite & (top - bottom <= _EQUAL)
    khat[equal] = 0.0
    fitted = finite & ~equal
    if fitted.any():
        khat[fitted] = compat_arviz.pareto_khat(weights[:, fitted])
    return khat


def khat_threshold(draws: int) -> float:
    """The largest k-hat at which S draws give a usable estimate: min(1 - 1/log10(S), 0.7).

    Vehtari et al. (2024), section 3.2.4: the fewer the draws, the lighter the tail must be. The one
    limit everywhere; what is printed names its S.

    Raises:
        InputError: if there are fewer than 2 draws.
    """
    if draws < 2:
        raise InputError(f"{draws} draws: a k-hat needs at least {MIN_DRAWS}")
    return min(1.0 - 1.0 / math.log10(draws), 0.7)


def khat_error(khat: NDArray[np.float64], draws: int) -> NDArray[np.float64]:
    """Standard error of a k-hat of S draws, (1 + k) / sqrt(number of largest weights)."""
    tail = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    return (1.0 + np.maximum(khat, 0.0)) / math.sqrt(tail)


def judged_in_words(khat: ArrayLike, draws: int) -> str:
    """How many sequences' weights S draws can be relied on for, in half a sentence.

    Args:
        khat: (B,) of `pareto_khat`.
        draws: S.
    """
    values = np.asarray(khat, dtype=np.float64)
    known = values[~np.isnan(values)]
    if not known.size:
        return f"not judged at S = {draws} (a k-hat needs {MIN_DRAWS:,} draws)"
    limit = khat_threshold(draws)
    return (
        f"median {np.median(known):.2f}, above {limit:.2f} (the limit at S = {draws}) in "
        f"{np.mean(known > limit):.0%} of {known.size} sequences"
    )
