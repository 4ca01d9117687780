"""Perplexities of all sequences together, with their two errors, and against a control."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from ltm_pyro.diagnostics.sampling_error import clustered_ratio, documents_of

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


def perplexities(data: xr.Dataset) -> dict[str, float]:
    """Every perplexity that the columns allow, with `_se` and `_sampling_se`."""
    out: dict[str, float] = {}
    for name in PERPLEXITIES:
        column = PERPLEXITIES[name][0]
        if column in data:
            error = data.get(f"{column}_se")
            out |= per_token_perplexity(
                name,
                losses(data, name),
                data["n_tokens"].values,
                None if error is None else error.values,
                documents_of(data),
            )
    return out


def bits_per_byte(data: xr.Dataset) -> dict[str, float]:
    """Bytes and words of the text, and the bounds' bits per byte with their two errors.

    Nothing where the text is not known.
    """
    if "n_bytes" not in data:
        return {}
    out: dict[str, float] = {name: int(data[name].sum()) for name in ("n_bytes", "n_words")}
    n_bytes, documents = data["n_bytes"].values, documents_of(data)
    for name in COMPARED:
        if PERPLEXITIES[name][0] in data:
            rate = clustered_ratio(losses(data, name), n_bytes, documents)
            mc = monte_carlo(data, name) / out["n_bytes"]
            label = name.replace("ppl", "bits_per_byte")
            parts = {"": rate.value, "_se": mc, "_sampling_se": rate.error}
            out |= {f"{label}{ending}": nats / math.log(2) for ending, nats in parts.items()}
    return out


def losses(data: xr.Dataset, name: str) -> NDArray[np.float64]:
    """The nats per sequence, (n,), that a perplexity adds up."""
    column, sign = PERPLEXITIES[name]
    values: NDArray[np.float64] = sign * data[column].values.astype(np.float64)
    return values


def per_token_perplexity(
    name: str,
    nats: NDArray[np.float64],
    n_tokens: NDArray[np.int64],
    mc_se: NDArray[np.float64] | None = None,
    documents: ArrayLike | None = None,
) -> dict[str, float]:
    """exp(total nats / total tokens) with its two errors, by the delta method.

    Args:
        name: Under which name.
        nats: (n,) negative log-likelihoods or bounds per sequence.
        n_tokens: (n,) their lengths.
        mc_se: (n,) Monte Carlo standard errors of `nats`.
        documents: (n,) the document of each sequence; without it each is one of its own.

    Returns:
        `name`; `name_se`, the Monte Carlo error given these sequences (0 where `nats` are exact);
        `name_sampling_se`, that of having sampled these documents, of which two on either side
        hold 95 %.
    """
    rate = clustered_ratio(nats, n_tokens, documents)
    ppl = exponential(rate.value)
    mc = 0.0 if mc_se is None else math.sqrt(float(np.square(mc_se).sum()))
    return {
        name: ppl,
        f"{name}_se": ppl * mc / float(n_tokens.sum()),
        f"{name}_sampling_se": ppl * rate.error,
    }


def against_control(
    scores: xr.Dataset, control: xr.Dataset, per: str = "token"
) -> dict[str, dict[str, Any]]:
    """Each score's ratio to the control's exact perplexity, paired sequence by sequence.

    Args:
        scores: Of `evaluate`.
        control: Of the decoder without thoughts, exact, for the same sequences.
        per: What perplexities are of: `token`, `byte` or `word`, which also stands in the names.

    Returns:
        By name (`ppl_elbo` and `ppl_iw`, or `ppl_predictive`): `ratio` and `ratio_error`;
        `difference_per_token` (nats, below 0 where the thoughts' model is better),
        `difference_per_token_se` clustered by document and not below the Monte Carlo error,
        `difference_per_token_error`, of which two
        on either side hold 95 %; `documents` (each sequence counts as one where not known) and the
        `verdict` that the error allows. Its 95 % are for each score alone.
    """
    out: dict[str, dict[str, Any]] = {}
    sizes = scores[f"n_{per}s"].values
    for name in COMPARED:
        if PERPLEXITIES[name][0] not in scores:
            continue
        gap = losses(scores, name) - losses(control, "ppl_z0")
        rate = clustered_ratio(gap, sizes, documents_of(scores))
        # The spread over documents holds the draws' error on average; of a few documents it may
        # by luck not, where one sequence's draws are far noisier than the others'.
        draws = monte_carlo(scores, name) / float(sizes.sum())
        rate = replace(rate, se=max(rate.se, draws))
        ratio = exponential(rate.value)
        out[name] = {
            "ratio": ratio,
            "ratio_error": ratio * rate.error,
            f"difference_per_{per}": rate.value,
            f"difference_per_{per}_se": rate.se,
            f"difference_per_{per}_error": rate.error,
            "documents": rate.documents,
            "verdict": _verdict(rate.value, rate.margin(), few=rate.few, bound=name in BOUNDS),
        }
    return out


def _verdict(difference: float, margin: float, *, few: bool, bound: bool) -> str:
    """What a paired difference of losses allows to say of these two fits, and no more."""
    if not (math.isfinite(difference) and math.isfinite(margin)):
        return "no error, so nothing can be said"
    if few:
        return "too few documents to say"
    if abs(difference) <= margin:
        return "not told apart"
    if difference < 0:
        return "this fit is better than this fit of the control"
    if bound:
        return "this bound is above the control; whether the model is, a bound cannot say"
    return "this fit is worse than this fit of the control"


def monte_carlo(scores: xr.Dataset, name: str) -> float:
    """Standard error of the total nats, given these sequences; 0 for exact scores."""
    error = scores.get(f"{PERPLEXITIES[name][0]}_se")
    return 0.0 if error is None else math.sqrt(float(np.square(error.values).sum()))


def exponential(rate: float) -> float:
    """The perplexity of nats per unit; infinite where a float has no room for it."""
    return math.exp(rate) if rate < 700 else math.inf
