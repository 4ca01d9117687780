"""Errors of having sampled these documents, and not others of the same kind.

Sequences are pieces of documents, and pieces of one document are alike: an error that takes them
for independent is too small, the more so the more sequences there are. Everything here is a ratio
of totals, R = sum_i y_i / sum_i t_i (a mean has t_i = 1), whose residuals u_i = y_i - R t_i are
added up within each document g, with share h_g of the denominator:

    se^2 = (G - 1)/G sum_g (U_g / (1 - h_g))^2 / T^2       U_g = sum of u_i in g, T = sum of t_i
    df   = 1 / sum_g h_g^2 - 1                             effective documents, less one

`se` is exactly the jackknife that leaves out one document at a time (CR3: Bell & McCaffrey 2002;
Cameron & Miller 2015, section VI). Documents of unlike length make fewer effective ones, and a
standard error from few is itself uncertain: `error` is `se` times what Student's t asks for, so
that two errors on either side hold 95 % however few documents there are. docs/errors.md has the
coverage that `benchmarks/error_coverage.py` finds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Values = NDArray[np.float64]

FEW_DOCUMENTS = 5.0
"""Effective documents below which an error is too uncertain itself to rest a claim on."""

_TWO_ERRORS = float(stats.norm.sf(2.0))


@dataclass(frozen=True)
class Estimate:
    """A number with the error of having sampled its documents.

    Attributes:
        value: The mean or ratio.
        se: Standard error, clustered by document; `nan` from one document, or if not finite.
        documents: G, how many documents the sequences are pieces of.
        effective: As how many documents of equal length they count.
    """

    value: float
    se: float
    documents: int
    effective: float

    @property
    def df(self) -> float:
        """Degrees of freedom of `se`, at least 1."""
        return max(self.effective - 1.0, 1.0)

    @property
    def error(self) -> float:
        """What is printed behind +-: `value` +- 2 errors is a 95 % interval, by Student's t."""
        return self.se * float(stats.t.isf(_TWO_ERRORS, self.df)) / 2.0

    @property
    def few(self) -> bool:
        """Whether there are too few documents to trust any error."""
        return self.effective < FEW_DOCUMENTS

    def margin(self, rate: float = 0.05) -> float:
        """Half the width of an interval that misses with probability `rate`."""
        return self.se * float(stats.t.isf(rate / 2.0, self.df))

    def differs(self, rate: float = 0.05) -> bool:
        """Whether `value` is told from 0: never on one document, or where it is not finite."""
        return abs(self.value) > self.margin(rate)


def clustered_mean(values: ArrayLike, documents: ArrayLike | None = None) -> Estimate:
    """Mean over sequences; for a paired comparison, of their differences.

    Args:
        values: (n,) one number per sequence.
        documents: (n,) which document each is a piece of; `None` if unknown, when each sequence
            stands for itself.
    """
    values = np.asarray(values, dtype=np.float64)
    return clustered_ratio(values, np.ones_like(values), documents)


def clustered_ratio(
    totals: ArrayLike, sizes: ArrayLike, documents: ArrayLike | None = None
) -> Estimate:
    """Sum of `totals` over sum of `sizes`: nats per token, or a paired difference of them.

    Args:
        totals: (n,) per sequence, e.g. nats.
        sizes: (n,) what they are divided by, e.g. tokens; above 0.
        documents: As in `clustered_mean`.
    """
    y, t = np.asarray(totals, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    place = np.arange(len(y)) if documents is None else np.unique(documents, return_inverse=True)[1]
    whole = float(t.sum())
    value = float(y.sum()) / whole if len(y) else math.nan
    share = np.bincount(place, weights=t) / whole
    groups, effective = len(share), float(1.0 / np.square(share).sum()) if len(share) else 0.0
    if groups < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, groups, effective)
    left_out = np.bincount(place, weights=y - value * t) / (1.0 - share)
    se = math.sqrt((groups - 1) / groups * float(np.square(left_out).sum())) / whole
    return Estimate(value, se, groups, effective)


def clustered_contrast(totals: Values, sizes: Values, weights: Values) -> Estimate:
    """A weighted sum of the rates of several scores of the same documents, by the same jackknife.

    A document is left out of all scores at once, so what they share of it cancels in a difference.
    They may cut the documents in different ways: only what belongs to which document is used.

    Args:
        totals: (R, G) per score and document, e.g. nats.
        sizes: (R, G) what they are divided by, 0 or more; some of each score above 0.
        weights: (R,) e.g. 1 and -1 for a difference.
    """
    total, size = totals.sum(1, keepdims=True), sizes.sum(1, keepdims=True)
    value = float(weights @ (total / size)[:, 0])
    share = (sizes / size).mean(0)
    groups, effective = int((share > 0).sum()), float(1.0 / np.square(share).sum())
    if groups < 2 or not math.isfinite(value):
        return Estimate(value, math.nan, groups, effective)
    with np.errstate(divide="ignore", invalid="ignore"):  # a score that one document is all of
        left_out = weights @ (total / size - (total - totals) / (size - sizes))
    se = math.sqrt((groups - 1) / groups * float(np.square(left_out).sum()))
    return Estimate(value, se, groups, effective)


def documents_of(data: xr.Dataset) -> NDArray[np.int64] | None:
    """The documents that the sequences of `evaluate`'s scores are pieces of; `None` if unknown."""
    return data["document"].values if "document" in data.coords else None


def few_documents_note(estimate: Estimate) -> str | None:
    """What to say beside an error that rests on too few documents; `None` where there are enough.

    Args:
        estimate: Any of the batch: all rest on the same documents.
    """
    if not estimate.few:
        return None
    documents = "one document"
    if estimate.documents != 1:
        equal = f"{estimate.effective:.1f} of equal length"
        documents = f"{estimate.documents} documents, which count as {equal}"
    return f"{documents}: too few to trust any sampling error; score more documents"
