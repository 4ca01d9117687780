"""Numbers with their errors: ratios over documents, log means of weights, perplexities.

Sequences are pieces of documents, and pieces of one document are alike: an error that takes them
for independent is too small, the more so the more sequences there are. Everything of a batch is a
ratio of totals, R = sum_i y_i / sum_i t_i (a mean has t_i = 1), whose residuals u_i = y_i - R t_i
are added up within each document g, with share h_g of the denominator:

    se^2 = (G - 1)/G sum_g (U_g / (1 - h_g))^2 / T^2       U_g = sum of u_i in g, T = sum of t_i
    df   = 1 / sum_g h_g^2 - 1                             effective documents, less one

`se` is exactly the jackknife that leaves out one document at a time (CR3: Bell & McCaffrey 2002;
Cameron & Miller 2015, section VI). Documents of unlike length make fewer effective ones, and a
standard error from few is itself uncertain: `error` is `se` times what Student's t asks for, so
that two errors on either side hold 95 % however few documents there are. docs/errors.md has the
coverage that `benchmarks/error_coverage.py` finds.

The error of the log of a mean of weights is the jackknife's too: the delta method's is about 30 %
too small where k-hat is 0.5 and 40 % where it is 0.7, the jackknife's square on average the
variance over seeds, or a little more (Efron & Stein 1981).
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

import ltm_pyro
from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError

Values = NDArray[np.float64]
Columns = dict[str, tuple[str | tuple[str, ...], Values, dict[str, str]]]
"""By name: dimensions, values and units, as `xarray.Dataset` takes them."""

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
        freedom: Degrees of freedom of `se` where more than documents were sampled.
    """

    value: float
    se: float
    documents: int
    effective: float
    freedom: float | None = None

    @property
    def df(self) -> float:
        """Degrees of freedom of `se`, at least 1."""
        return max(self.effective - 1.0 if self.freedom is None else self.freedom, 1.0)

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
    """Mean of values or paired differences (n,), clustered as by `clustered_ratio`."""
    return clustered_ratio(values, np.ones(np.shape(values)), documents)


def clustered_ratio(
    totals: ArrayLike, sizes: ArrayLike, documents: ArrayLike | None = None
) -> Estimate:
    """Sum of `totals` (n,) over sum of `sizes` (n,), above 0: nats per token, or a difference.

    `documents` (n,) tells what each sequence is a piece of; without it each stands for itself.
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


def as_array(values: ArrayLike | Tensor) -> Values:
    """In double precision, on the CPU."""
    values = values.cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(values, dtype=np.float64)


def columns(dims: str | tuple[str, ...], units: str, **values: ArrayLike | Tensor) -> Columns:
    """Variables of a Dataset with common dimensions and units."""
    return {name: (dims, as_array(each), {"units": units}) for name, each in values.items()}


def documents_of(data: xr.Dataset) -> NDArray[np.int64] | None:
    """(n,) the document of each sequence of `evaluate`'s scores; `None` if unknown."""
    return data["document"].values if "document" in data.coords else None


def few_documents_note(estimate: Estimate) -> str | None:
    """What to say beside errors that rest on too few documents, as any of the batch does."""
    if not estimate.few:
        return None
    documents = "one document"
    if estimate.documents != 1:
        equal = f"{estimate.effective:.1f} of equal length"
        documents = f"{estimate.documents} documents, which count as {equal}"
    return f"{documents}: too few to trust any sampling error; score more documents"


@dataclass(frozen=True)
class LogMean:
    """Log mean of S weights, (B,) nats, its error by the jackknife, and their effective number."""

    value: Tensor
    error: Tensor
    ess: Tensor


def log_mean(log_weights: Tensor) -> LogMean:
    """Of log weights (S, B) in nats, S at least 2."""
    S = len(log_weights)
    share = torch.softmax(log_weights, 0)
    # What leaving out each draw changes the log mean by. A weight that is all of the sum leaves
    # rounding behind.
    change = torch.log1p(-share.clamp_max(1.0 - torch.finfo(share.dtype).eps))
    value = log_weights.logsumexp(0) - math.log(S)
    return LogMean(value, jackknife(change), 1.0 / share.square().sum(0))


def jackknife(left_out: Tensor) -> Tensor:
    """Standard error of an estimate from those without each of G groups, (G, ...) to (...)."""
    return (left_out.var(0, unbiased=False) * (len(left_out) - 1)).sqrt()


def khat_threshold(draws: int) -> float:
    """The largest k-hat at which S draws give a usable estimate: min(1 - 1/log10(S), 0.7).

    Vehtari et al. (2024), section 3.2.4: the fewer the draws, the lighter the tail must be. The one
    limit everywhere; what is printed names its S.
    """
    if draws < 2:
        raise InputError(f"{draws} draws: a k-hat needs at least 2")
    return min(1.0 - 1.0 / math.log10(draws), 0.7)


PERPLEXITIES = {
    "ppl_elbo": ("elbo", -1.0),
    "ppl_iw": ("iw_bound", -1.0),
    "ppl_predictive": ("log_predictive", -1.0),
    "ppl_reconstruction": ("nll_given_z", 1.0),
    "ppl_z0": ("nll_z0", 1.0),
    "ppl_shuffled": ("nll_shuffled", 1.0),
}
"""By name: the column of `evaluate` that each is of, and the sign that makes it a loss."""

BOUNDS = ("ppl_elbo", "ppl_iw")
"""Upper bounds on the model's perplexity; in mode `prefix` there is none."""

COMPARED = (*BOUNDS, "ppl_predictive")
"""What is held against a control."""


def totals(data: xr.Dataset) -> dict[str, Any]:
    """What `evaluate` says of all sequences together: perplexities, and bits per byte of bounds.

    Those of bytes only where the text is known.
    """
    documents, tokens = documents_of(data), data["n_tokens"].values
    size = clustered_ratio(tokens, tokens, documents)
    out = {
        "n_sequences": data.sizes["sequence"],
        "n_tokens": int(tokens.sum()),
        "n_documents": 0 if documents is None else size.documents,
        "effective_documents": size.effective,
        "ppl_reconstruction_is_a_bound": "no: the KL is not charged",
    }
    for name in scored(data, PERPLEXITIES):
        rate, mc = loss_rate(data, name)
        ppl = exponential(rate.value)  # errors by the delta method
        out |= {name: ppl, f"{name}_se": ppl * mc, f"{name}_sampling_se": ppl * rate.error}
    if "n_bytes" not in data:
        return out
    out |= {name: int(data[name].sum()) for name in ("n_bytes", "n_words")}
    for name in scored(data, COMPARED):
        rate, mc = loss_rate(data, name, "byte")
        parts = {"": rate.value, "_se": mc, "_sampling_se": rate.error}
        label = name.replace("ppl", "bits_per_byte")
        out |= {f"{label}{ending}": nats / math.log(2) for ending, nats in parts.items()}
    return out


def scored(data: xr.Dataset, names: Iterable[str]) -> list[str]:
    """The perplexities among `names` that the columns allow."""
    return [name for name in names if PERPLEXITIES[name][0] in data]


def losses(data: xr.Dataset, name: str) -> Values:
    """The nats per sequence, (n,), that a perplexity adds up."""
    column, sign = PERPLEXITIES[name]
    return sign * data[column].values.astype(np.float64)


def text_sizes(data: xr.Dataset, per: str) -> Values:
    """Units of each sequence, (n,): `token`, `byte`, `word`, or itself as one `sequence`."""
    return np.ones(data.sizes["sequence"]) if per == "sequence" else data[f"n_{per}s"].values


def loss_rate(
    data: xr.Dataset, name: str, per: str = "token", clusters: ArrayLike | None = None
) -> tuple[Estimate, float]:
    """Total nats of one of `PERPLEXITIES` over the size of the text, and its Monte Carlo error.

    Per `token`, `byte`, `word` or `sequence`, by clusters (n,), documents by default.
    """
    sizes = text_sizes(data, per)
    clusters = documents_of(data) if clusters is None else clusters
    rate = clustered_ratio(losses(data, name), sizes, clusters)
    return rate, monte_carlo(data, PERPLEXITIES[name][0]) / float(sizes.sum())


def monte_carlo(data: xr.Dataset, column: str) -> float:
    """Standard error of a column's total, given these sequences; 0 for exact scores."""
    error = data.get(f"{column}_se")
    return 0.0 if error is None else math.sqrt(float(np.square(error.values).sum()))


def exponential(rate: float) -> float:
    """The perplexity of nats per unit; infinite where a float has no room for it."""
    return math.exp(rate) if rate < 700 else math.inf


_TAKEN = {
    "sequence", "token", "chain", "draw", "thought", "dim", "z", "x", "tokens", "mask", "elbo",
    "kl", "khat", "iw_bound", "log_joint", "log_p", "log_q", "log_predictive", "log_score",
    "nll_given_z", "nll_z0", "nll_shuffled", "n_tokens", "n_bytes", "n_words", "slow_step",
    "fast_step", "guide", "reference", "metric", "bound", "method",
}  # fmt: skip
"""Names of dimensions and columns: a field of a record that is called so gets `record.`."""


def sequence_coords(batch: Batch, taken: Iterable[Hashable] = ()) -> dict[str, Any]:
    """Coordinates of `sequence`: stable ids, `document` and whatever else is known of them.

    That is `file`, `offset`, `position`, `group`, the fields of the records; see
    `SequenceSet.metadata`. Numbers stay numbers; all else is text, "" where missing. A field that
    is called as one of the Dataset's variables (`taken`) gets `record.` before its name.
    """
    known = {*_TAKEN, *taken}
    coords: dict[str, Any] = {"sequence": batch.ids.cpu().numpy()}
    if batch.origin is not None:
        for name, column in batch.metadata.items():
            free = f"record.{name}" if name in known else _text(name)
            free = free.replace("/", ".")  # which would name a group of the file
            coords[free] = ("sequence", _values(column))
    if batch.documents is not None:
        coords["document"] = ("sequence", batch.documents.cpu().numpy())
    return coords


def _values(column: pd.Series[Any]) -> NDArray[Any]:
    """Numbers or texts, as NetCDF holds them."""
    if pd.api.types.is_bool_dtype(column.dtype) or pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy()
    return np.array([_text(value) for value in column], dtype=object)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value.replace("\0", "\N{SYMBOL FOR NULL}")  # which NetCDF cannot hold
    if isinstance(value, list | dict | tuple):
        return json.dumps(value, ensure_ascii=False)
    return "" if pd.isna(value) else str(value)  # type: ignore[call-overload]


def provenance(batch: Batch) -> dict[str, str]:
    """Attributes: the fingerprint of the corpus that the ids belong to, if known, and versions."""
    return {
        **({} if batch.corpus is None else {"corpus": batch.corpus}),
        "ltm_pyro_version": ltm_pyro.__version__,
        "torch_version": str(torch.__version__),
        "pyro_version": pyro.__version__,
    }


def partners_of(n: int, documents: Tensor | None = None) -> Tensor | None:
    """For each of n sequences the row of another, whose thoughts it gets when they are shuffled.

    Of another document where `documents` (n,) are known: neighbouring pieces of one say similar
    things, so that a neighbour's thoughts would look harmless where thoughts matter. Each row is
    used once, unless one document has more than half of them. `None` where there is no other.
    """
    if documents is None:
        return torch.arange(n).roll(1) if n > 1 else None
    order = torch.argsort(documents, stable=True)
    _, sizes = torch.unique_consecutive(documents[order], return_counts=True)
    if len(sizes) < 2:
        return None
    largest = int(sizes.max())
    partners = torch.empty_like(order)
    if 2 * largest <= n:
        # Sorted by document, a step of the largest one's size leaves every document.
        partners[order] = order.roll(largest)
        return partners
    start = int(sizes.cumsum(0)[sizes.argmax()]) - largest
    inside = order[start : start + largest]
    outside = torch.cat([order[:start], order[start + largest :]])
    partners[outside] = inside[: len(outside)]
    partners[inside] = outside.repeat(-(-largest // len(outside)))[:largest]
    return partners
