"""What a comparison says: summaries, verdicts that the errors allow, and the table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from ltm_pyro.diagnostics.psis import khat_threshold

ERROR_RATE = 0.05
"""Chance that a comparison of equal guides calls any of them better or worse (Bonferroni)."""

RHAT_LIMIT = 1.05
"""Above it the chains of a reference disagree too much to measure anything by."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Guides compared on the same sequences.

    Attributes:
        dataset: Per guide and sequence: `elbo`, `elbo_se`, `iw_bound`, `iw_bound_se`, `khat`, `kl`,
            `nll_given_z`, `elbo_difference` and `iw_difference` to the baseline, `truncation_gap`
            and its `_se`, `log_evidence` (exact, or the best guide's IW bound: attribute
            `evidence`) and `approximation_gap`, all in nats;
            `reference_*` (with a reference). Per guide: the summaries of `frame`.
            Per pair of guides: `pair_difference` and `pair_difference_se`.
        interrupted: Ctrl-C came before the last guide or the reference; what is here is whole.
    """

    dataset: xr.Dataset
    interrupted: bool = False

    @property
    def frame(self) -> pd.DataFrame:
        """One row per guide: the summaries, their errors, the cost and the verdict."""
        data = self.dataset
        names = [n for n in data.data_vars if data[n].dims == ("guide",)]
        frame = data[names].to_dataframe()
        return frame[[n for n in COLUMNS if n in frame] + [n for n in frame if n not in COLUMNS]]

    def to_csv(self, path: str | Path) -> None:
        """Writes `frame`."""
        self.frame.to_csv(path)

    def as_dict(self) -> dict[str, Any]:
        """The dataset's attributes, the rows of `frame` by guide, and the notes."""
        rows = self.frame.to_dict(orient="index")
        return {**self.dataset.attrs, "guides": rows, "notes": self.notes}

    @property
    def notes(self) -> list[str]:
        """What a reader must know beside the table, one sentence each."""
        return _notes(self.dataset, self.interrupted)

    def __str__(self) -> str:
        return format_comparison(self)


COLUMNS = (
    "elbo_per_sequence",
    "elbo_difference_per_sequence",
    "elbo_difference_per_sequence_se",
    "elbo_difference_per_token",
    "elbo_difference_per_token_se",
    "iw_difference_per_sequence",
    "iw_difference_per_sequence_se",
    "kl_per_sequence",
    "truncation_gap_per_sequence",
    "truncation_gap_per_sequence_se",
    "approximation_gap_per_sequence",
    "approximation_gap_per_sequence_se",
    "khat_median",
    "khat_share_unreliable",
    "reference_mean_error_median",
    "reference_scale_ratio_median",
    "decoder_evaluations",
    "training_evaluations",
    "seconds",
    "verdict",
)


def add_summary(data: xr.Dataset) -> xr.Dataset:
    """Adds paired differences, means over sequences with errors, and the verdict per guide."""
    base = data.sel(guide=data.attrs["baseline"])
    out = data.copy()
    for score in ("elbo", "iw"):
        column = "iw_bound" if score == "iw" else score
        difference = data[column] - base[column]
        out[f"{score}_difference"] = difference
        values = difference.values
        tokens = data["n_tokens"].values
        per_sequence = [paired_mean(row) for row in values]
        per_token = [paired_ratio(row, tokens) for row in values]
        for unit, pairs in (("sequence", per_sequence), ("token", per_token)):
            name = f"{score}_difference_per_{unit}"
            out[name] = ("guide", [m for m, _ in pairs])
            out[f"{name}_se"] = ("guide", [e for _, e in pairs])
    out["elbo_per_sequence"] = data["elbo"].mean("sequence")
    out["kl_per_sequence"] = data["kl"].mean("sequence")
    _add_gaps(out)
    _add_khat(out)
    for name in ("reference_mean_error", "reference_scale_ratio"):
        if name in out:
            out[f"{name}_median"] = out[name].median("sequence", skipna=True)
    _add_pairs(out)
    out["verdict"] = ("guide", _verdicts(out))
    _add_units(out)
    return out


def paired_mean(difference: Values) -> tuple[float, float]:
    """Mean of paired differences over sequences and its standard error, nats per sequence.

    The spread over sequences holds both the Monte Carlo error of each score and the variation
    between sequences, so this is the error of the mean over the population they came from.
    """
    n = len(difference)
    if not np.isfinite(difference).all():
        return math.nan, math.nan
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(n))


def paired_ratio(difference: Values, tokens: NDArray[np.int64]) -> tuple[float, float]:
    """Total difference over total tokens, nats per token, and its error (ratio estimator)."""
    if not np.isfinite(difference).all():
        return math.nan, math.nan
    n, total = len(difference), float(tokens.sum())
    rate = float(difference.sum()) / total
    spread = difference - rate * tokens
    return rate, math.sqrt(n / (n - 1) * float(np.square(spread).sum())) / total


def threshold(n: int, comparisons: int) -> float:
    """Standard errors that a mean of n paired differences must be from 0 to be told from it."""
    return float(stats.t.isf(ERROR_RATE / (2 * max(comparisons, 1)), df=n - 1))


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
    rows = [row[~np.isnan(row)] for row in out[name].values]
    pairs = [paired_mean(row) if len(row) > 1 else (math.nan, math.nan) for row in rows]
    out[f"{name}_per_sequence"] = ("guide", [mean for mean, _ in pairs])
    out[f"{name}_per_sequence_se"] = ("guide", [error for _, error in pairs])


def _add_khat(out: xr.Dataset) -> None:
    limit = khat_threshold(out.attrs["draws"])
    out.attrs["khat_limit"] = limit
    known = out["khat"].notnull()
    if not known.any():
        unknown = np.full(out.sizes["guide"], np.nan)
        out["khat_median"], out["khat_share_unreliable"] = ("guide", unknown), ("guide", unknown)
        return
    out["khat_median"] = out["khat"].median("sequence", skipna=True)
    out["khat_share_unreliable"] = ((out["khat"] > limit) & known).sum("sequence") / known.sum(
        "sequence"
    )


def _add_pairs(out: xr.Dataset) -> None:
    """Paired ELBO differences of every guide to every other."""
    elbo = out["elbo"].values
    with np.errstate(invalid="ignore"):  # point masses have no ELBO
        pairs = [[paired_mean(a - b) for b in elbo] for a in elbo]
    out["pair_difference"] = (("guide", "other"), [[m for m, _ in row] for row in pairs])
    out["pair_difference_se"] = (("guide", "other"), [[e for _, e in row] for row in pairs])
    out.coords["other"] = out["guide"].values


def _verdicts(out: xr.Dataset) -> list[str]:
    n, comparisons = out.sizes["sequence"], out.sizes["guide"] - 1
    factor = threshold(n, comparisons)
    verdicts = []
    for guide in out["guide"].values:
        row = out.sel(guide=guide)
        if guide == out.attrs["baseline"]:
            text = "baseline"
        else:
            text = difference_in_words(
                float(row["elbo_difference_per_sequence"]),
                float(row["elbo_difference_per_sequence_se"]),
                factor,
            )
        if not np.isfinite(row["elbo"].values).all():
            text = "a point mass: no ELBO, nothing to compare"
        elif float(row["khat_share_unreliable"]) > 0.5:
            text += "; its IW bound is unreliable"
        verdicts.append(text)
    return verdicts


def difference_in_words(mean: float, error: float, factor: float) -> str:
    """What a difference says at this error, and no more.

    Args:
        mean: Nats per sequence, above 0 where it is closer to the posterior.
        error: Standard error.
        factor: Standard errors that count.
    """
    if not (math.isfinite(mean) and math.isfinite(error)):
        return "no difference can be computed"
    margin = factor * error
    if abs(mean) > margin:
        which = "better" if mean > 0 else "worse"
        return f"{which}, by {abs(mean) - margin:.2g} to {abs(mean) + margin:.2g} nats"
    return f"not told apart (between {mean - margin:+.2g} and {mean + margin:+.2g} nats)"


def _add_units(out: xr.Dataset) -> None:
    for name in out.data_vars:
        label = str(name)
        nats = any(part in label for part in ("elbo", "iw_", "kl", "gap", "nll", "evidence"))
        units = "nats" if nats or label.startswith(("pair_", "log_")) else "1"
        if label.endswith("_evaluations"):
            units = "decoder evaluations per sequence"
        out[name].attrs["units"] = {"n_tokens": "tokens", "seconds": "s"}.get(label, units)


def _notes(data: xr.Dataset, interrupted: bool) -> list[str]:
    attrs, n = data.attrs, data.sizes["sequence"]
    notes = [
        f"{n} sequences, {attrs['draws']} fresh draws each; every guide got "
        f"{attrs['budget']} decoder evaluations per sequence, training included. A difference of "
        "ELBOs is a difference of KL(q || p(z | x)): log p(x) is the same for all.",
        f"Verdicts allow for {data.sizes['guide'] - 1} comparisons at {ERROR_RATE:.0%} in all; "
        "the errors are of the mean over sequences, Monte Carlo error included.",
    ]
    if (data["training_evaluations"] > 0).any():
        trained = data["guide"].values[data["training_evaluations"].values > 0]
        notes.append(
            f"{', '.join(trained)}: shared parameters were trained on "
            f"{attrs['shared_parameters_trained_on']}, out of the same budget."
        )
    if "truncation_gap" in data:
        notes.append(
            "The loops twice as long are not part of the budget; gaps are means over "
            f"{int(data['longer_elbo'].notnull().any('guide').sum())} of the sequences."
        )
    notes += _encoder_note(data)
    if "reference_rhat" in data:
        notes.append(_reference_note(data))
    if interrupted:
        notes.append("Interrupted: guides or the reference that were still to come are missing.")
    return notes


def _reference_note(data: xr.Dataset) -> str:
    """Whether the reference's own chains agree."""
    rhat = data["reference_rhat"].dropna("sequence")
    bad = int((~(rhat <= RHAT_LIMIT)).sum())
    text = (
        f"Reference {data.attrs['reference']} for {len(rhat)} of the sequences: largest R-hat "
        f"{float(rhat.max()):.3f}"
    )
    if not bad:
        return f"{text}, no sequence above {RHAT_LIMIT}."
    return (
        f"{text}; {bad} above {RHAT_LIMIT}, whose chains do not agree: left out of the reference's "
        "columns. Sample longer."
    )


def _encoder_note(data: xr.Dataset) -> list[str]:
    """Whether local steps after the encoder paid, where both families are there."""
    if not {"amortized", "semi_amortized"} <= set(data["guide"].values):
        return []
    pair = {"guide": "semi_amortized", "other": "amortized"}
    mean = float(data["pair_difference"].sel(pair))
    error = float(data["pair_difference_se"].sel(pair))
    said = difference_in_words(mean, error, threshold(data.sizes["sequence"], 1))
    why = ""
    if not said.startswith("better"):
        spent = data["training_evaluations"].sel(guide=["semi_amortized", "amortized"]).values
        steps = int(data["local_steps"].sel(guide="semi_amortized"))
        why = (
            f" Why: its encoder had {spent[0]:.0f} evaluations per sequence of training against "
            f"{spent[1]:.0f}, and {steps} local steps did not make up for it."
        )
    return [f"semi_amortized against amortized at equal cost: {said}.{why}"]


def format_comparison(comparison: Comparison) -> str:
    """The table for the terminal, with its notes."""
    data = comparison.dataset
    head = f"{'guide':<16}{'ELBO':>10}{'difference':>18}{'per token':>20}"
    head += f"{'truncation':>15}{'left':>15}{'k-hat':>14}"
    reference = "reference_rhat" in data
    head += f"{'mean err':>10}{'scale':>7}" if reference else ""
    lines = [f"{head}{'evals':>7}{'s':>7}  verdict"]
    for guide in data["guide"].values:
        row = data.sel(guide=guide)
        value = {
            str(n): float(row[n])
            for n in data.data_vars
            if data[n].dims == ("guide",) and n not in _TEXT
        }
        text = f"{guide:<16}{value['elbo_per_sequence']:>10.2f}"
        base = guide == data.attrs["baseline"]
        for unit, width, digits in (("sequence", 18, 2), ("token", 20, 4)):
            name = f"elbo_difference_per_{unit}"
            text += f"{'-' if base else _with_error(value, name, digits):>{width}}"
        text += f"{_with_error(value, 'truncation_gap_per_sequence', 2):>15}"
        text += f"{_with_error(value, 'approximation_gap_per_sequence', 2):>15}"
        share = value["khat_share_unreliable"]
        judged = math.isfinite(share)
        text += f"{value['khat_median']:>7.2f}{f'({share:.0%})':>7}" if judged else f"{'-':>14}"
        if reference:
            text += f"{value['reference_mean_error_median']:>10.2f}"
            text += f"{value['reference_scale_ratio_median']:>7.2f}"
        text += f"{value['decoder_evaluations']:>7.0f}{value['seconds']:>7.1f}"
        lines.append(f"{text}  {row['verdict'].item()}")
    legend = (
        "ELBO, difference to the baseline and gaps in nats per sequence, with standard errors; "
        "truncation: what a loop twice as long gains; left: log p(x) minus the ELBO after that "
        f"({data.attrs.get('evidence', 'not known')}); k-hat: median (share of sequences above "
        f"{data.attrs['khat_limit']:.2f}); evals: decoder evaluations per sequence"
    )
    if reference:
        legend += (
            "; mean err: distance of means in the reference's scales; scale: q's over the "
            "reference's (medians)"
        )
    return "\n".join([*lines, "", legend + ".", *comparison.notes])


_TEXT = ("verdict", "family", "kl_estimator")


def _with_error(value: dict[str, float], name: str, digits: int) -> str:
    mean, error = value.get(name, math.nan), value.get(f"{name}_se", math.nan)
    if not math.isfinite(mean):
        return "-"
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"
