"""Paired differences of guides with every error that they have, and what may be said of them.

The sequences are a sample of documents, so a mean difference has a sampling error, clustered by
document. Where shared parameters were trained (an encoder, a flow's network) another start of the
training would have given another fit, better or worse on ALL sequences: no number of them averages
that out. A claim about a family therefore needs several independent fits of it, and its variance is

    se^2 = se_documents^2 + var_fits(guide) / R_guide + var_fits(baseline) / R_baseline

with var_fits the variance of the mean score between fits, and degrees of freedom by Welch and
Satterthwaite (Welch 1947). A single fit allows a claim about that fit alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ltm_pyro.diagnostics.estimates import Estimate, Values, clustered_ratio

ERROR_RATE = 0.05
"""Chance that a comparison of equal guides calls any of them better or worse (Bonferroni)."""


def paired_difference(
    guide: Values, base: Values, sizes: Values, documents: NDArray[np.int64] | None
) -> Estimate:
    """Total difference over total size (n,), with the errors of sampling and of training.

    Scores (R, n) of independent fits of guide and baseline, nats; one row if none is trained.
    """
    with np.errstate(invalid="ignore"):  # point masses have no ELBO
        difference = guide.mean(0) - base.mean(0)
    difference = np.where(np.isfinite(difference), difference, np.nan)
    sampling = clustered_ratio(difference, sizes, documents)
    finite = [np.where(np.isfinite(fits), fits, np.nan) for fits in (guide, base)]
    return with_training(sampling, [fits.sum(1) / sizes.sum() for fits in finite])


def with_training(sampling: Estimate, rates: Iterable[Values]) -> Estimate:
    """A mean over fits, its error of sampled documents joined by that of training.

    `rates` are, for each side, (R,) of its independent fits; of one fit nothing is known.
    """
    parts = [(sampling.se**2, sampling.df)]
    parts += [(float(r.var(ddof=1)) / len(r), len(r) - 1.0) for r in rates if len(r) > 1]
    variance = sum(v for v, _ in parts)
    spent = sum(v**2 / df for v, df in parts)
    freedom = variance**2 / spent if spent > 0 else sampling.df
    return replace(sampling, se=math.sqrt(variance), freedom=freedom)


def in_words(
    found: Estimate,
    comparisons: int = 1,
    guide: str | None = None,
    base: str | None = None,
    *,
    unit: str = "nats",
    sides: tuple[str, str] = ("better", "worse"),
) -> str:
    """What a difference says at its error, and no more, if `comparisons` share the error rate.

    A `guide` or `base` is named where the claim is about one fit of it and not about the family.
    `sides` say what it means to be above 0, and below.
    """
    value, margin = found.value, found.margin(ERROR_RATE / max(comparisons, 1))
    if not math.isfinite(value + margin):
        return "no difference can be computed"
    if found.few:
        return "too few documents to say"
    if abs(value) <= margin:
        return f"not told apart (between {value - margin:+.2g} and {value + margin:+.2g} {unit})"
    subject = "" if guide is None else f"this fit of {guide} is "
    object_ = "" if base is None else f" than this fit of {base}"
    which, size = sides[value < 0], abs(value)
    return f"{subject}{which}{object_}, by {size - margin:.2g} to {size + margin:.2g} {unit}"
