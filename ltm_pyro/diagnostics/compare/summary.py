"""What a comparison says: paired differences, means over sequences, the verdict of each guide."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xarray as xr
from scipy import stats

from ltm_pyro.diagnostics.compare.differences import ERROR_RATE, in_words, paired_difference
from ltm_pyro.diagnostics.estimates import (
    Estimate,
    Values,
    clustered_mean,
    documents_of,
    khat_threshold,
)


def add_summary(data: xr.Dataset) -> xr.Dataset:
    """Adds paired differences, means over sequences with errors, and the verdict per guide."""
    base = data.sel(guide=data.attrs["baseline"])
    out = data.copy()
    tokens = data["n_tokens"].values.astype(np.float64)
    for score in ("elbo", "iw"):
        column = "iw_bound" if score == "iw" else score
        out[f"{score}_difference"] = data[column] - base[column]
        against = fits_of(data, data.attrs["baseline"], column)
        sides = [(fits_of(data, guide, column), against) for guide in data["guide"].values]
        for unit, sizes in (("sequence", np.ones_like(tokens)), ("token", tokens)):
            found = [paired_difference(*scores, sizes, documents_of(data)) for scores in sides]
            _add_estimates(out, f"{score}_difference_per_{unit}", found)
    out["elbo_per_sequence"] = data["elbo"].mean("sequence")
    out["kl_per_sequence"] = data["kl"].mean("sequence")
    whole, known = clustered_mean(tokens, documents_of(data)), documents_of(data) is not None
    out.attrs["n_documents"] = whole.documents if known else 0
    out.attrs["effective_documents"] = whole.effective
    _add_gaps(out)
    _add_khat(out)
    for name in ("reference_mean_error", "reference_mean_floor", "reference_scale_ratio"):
        if name in out:
            out[f"{name}_median"] = out[name].median("sequence", skipna=True)
    _add_pairs(out)
    out["verdict"] = ("guide", _verdicts(out))
    _add_units(out)
    return out


def fits_of(data: xr.Dataset, guide: str, column: str) -> Values:
    """A score of each independent fit of a guide, (R, n)."""
    row = data.sel(guide=guide)
    values: Values = row[f"fit_{column}"].values[: int(row["fits"])]
    return values


def pair(data: xr.Dataset, guide: str, other: str) -> Estimate:
    """ELBO of one guide less that of another, nats per sequence."""
    sizes = np.ones(data.sizes["sequence"])
    scores, others = fits_of(data, guide, "elbo"), fits_of(data, other, "elbo")
    return paired_difference(scores, others, sizes, documents_of(data))


def one_fit(data: xr.Dataset, guide: str) -> str | None:
    """The guide's name, where what is known of it is one fit of shared parameters."""
    row = data.sel(guide=guide)
    return guide if bool(row["shares_parameters"]) and int(row["fits"]) == 1 else None


def _add_estimates(out: xr.Dataset, name: str, found: Sequence[Estimate]) -> None:
    """Value, standard error, its degrees of freedom, and the error that is printed behind +-."""
    for ending, part in (("", "value"), ("_se", "se"), ("_df", "df"), ("_error", "error")):
        out[name + ending] = ("guide", [getattr(each, part) for each in found])


def _add_gaps(out: xr.Dataset) -> None:
    """What is left to log p(x), and how much of it the fast loop's length explains."""
    if "truncation_gap" in out:
        _add_means(out, "truncation_gap")
    if "log_evidence" in out:
        out.attrs["evidence"] = "exact"
    else:
        # The guide with the best mean: choosing for each sequence would choose lucky draws.
        bounds = out["iw_bound"].mean("sequence").values
        if not np.isfinite(bounds).any():
            return
        best = out["guide"].values[np.argmax(np.where(np.isfinite(bounds), bounds, -np.inf))]
        out["log_evidence"] = out["iw_bound"].sel(guide=best, drop=True)
        out.attrs["evidence"] = f"at least: importance-weighted bound of {best}"
    elbo = out["elbo"]
    if "longer_elbo" in out:  # of some of the sequences, and not of encoders
        without = out["longer_elbo"].isnull().all("sequence")
        elbo = elbo.where(without, out["longer_elbo"])
    out["approximation_gap"] = (out["log_evidence"] - elbo).transpose("guide", "sequence")
    _add_means(out, "approximation_gap")


def _add_means(out: xr.Dataset, name: str) -> None:
    """Means over the sequences for which `name` is known, and their errors."""
    documents = documents_of(out)
    found: list[Estimate] = []
    for row in out[name].values:
        known = ~np.isnan(row)
        found.append(clustered_mean(row[known], None if documents is None else documents[known]))
    _add_estimates(out, f"{name}_per_sequence", found)


def _add_khat(out: xr.Dataset) -> None:
    """Medians and shares of the k-hats that are known; `nan` where S is too small to judge."""
    limit = khat_threshold(out.attrs["draws"])
    out.attrs["khat_limit"] = limit
    known = out["khat"].notnull()
    out["khat_median"] = out["khat"].median("sequence", skipna=True)
    above = ((out["khat"] > limit) & known).sum("sequence")
    out["khat_share_unreliable"] = above / known.sum("sequence").where(known.any("sequence"))


def _add_pairs(out: xr.Dataset) -> None:
    """Paired ELBO differences of every guide to every other."""
    names = out["guide"].values
    pairs = [[pair(out, guide, other) for other in names] for guide in names]
    for ending, part in (("", "value"), ("_se", "se"), ("_error", "error")):
        values = [[getattr(found, part) for found in row] for row in pairs]
        out[f"pair_difference{ending}"] = (("guide", "other"), values)
    out.coords["other"] = names


def _verdicts(out: xr.Dataset) -> list[str]:
    base = str(out.attrs["baseline"])
    verdicts = []
    for guide in out["guide"].values:
        row = out.sel(guide=guide)
        if guide == base:
            text = "baseline"
        else:
            fits = one_fit(out, guide), one_fit(out, base)
            text = in_words(pair(out, guide, base), out.sizes["guide"] - 1, *fits)
        if not np.isfinite(row["elbo"].values).all():
            text = "a point mass: no ELBO, nothing to compare"
        elif float(row["khat_share_unreliable"]) > 0.5:
            text += "; its IW bound is unreliable"
        verdicts.append(text)
    return verdicts


_UNITS = {"n_tokens": "tokens", "seconds": "s"}
_NATS = r"elbo|iw_|kl|gap|nll|evidence|^pair_|^log_"


def _add_units(out: xr.Dataset) -> None:
    for name in map(str, out.data_vars):
        units = _UNITS.get(name, "1")
        if name.endswith("_evaluations"):
            units = "decoder evaluations per sequence"
        elif not name.endswith("_df") and name != "kl_estimator" and re.search(_NATS, name):
            units = "nats"
        out[name].attrs["units"] = units


def margin(data: xr.Dataset, name: str) -> Values:
    """Half the width of intervals that hold for all comparisons with the baseline at once."""
    tail = ERROR_RATE / (2 * max(data.sizes["guide"] - 1, 1))
    out: Values = data[f"{name}_se"].values * stats.t.isf(tail, data[f"{name}_df"].values)
    return out
