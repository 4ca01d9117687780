"""A comparison for reading: the table, its notes, and the frame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from ltm_pyro.diagnostics.compare.differences import ERROR_RATE, in_words
from ltm_pyro.diagnostics.compare.summary import one_fit, pair
from ltm_pyro.diagnostics.estimates import clustered_mean, documents_of, few_documents_note
from ltm_pyro.diagnostics.psis import MIN_DRAWS
from ltm_pyro.errors import shown
from ltm_pyro.html import show

RHAT_LIMIT = 1.05
"""Above it the chains of a reference disagree too much to measure anything by."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """Guides compared on the same sequences.

    Attributes:
        dataset: Per guide and sequence: `elbo`, `elbo_se`, `iw_bound`, `iw_bound_se`, `khat`, `kl`,
            `nll_given_z` (means over the fits), `elbo_difference` and `iw_difference` to the
            baseline, `truncation_gap` and its `_se`, `log_evidence` (exact, or the best guide's IW
            bound: attribute `evidence`) and `approximation_gap`, all in nats; `reference_*` (with a
            reference). Per fit too: `fit_elbo`, `fit_iw_bound`. Per guide: the summaries of
            `frame`. Per pair of guides: `pair_difference`.
            A mean has a standard error `_se` (clustered by document, between fits included), its
            degrees of freedom `_df`, and `_error`, which is `_se` widened by Student's t, so that
            two errors on either side hold 95 %: what the table prints behind +-.
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

    def __repr__(self) -> str:
        guides = ", ".join(map(str, self.dataset["guide"].values))
        return f"Comparison({shown(guides)[1:-1]}: {self.dataset.sizes['sequence']} sequences)"

    def __str__(self) -> str:
        return _formatted(self)

    def _repr_html_(self) -> str:
        columns = [name for name in COLUMNS if name in self.frame]
        return show("Guides compared, nats", tables=[self.frame[columns].T], notes=self.notes)


COLUMNS = (
    "elbo_per_sequence", "elbo_difference_per_sequence", "elbo_difference_per_sequence_error",
    "elbo_difference_per_token", "elbo_difference_per_token_error", "iw_difference_per_sequence",
    "iw_difference_per_sequence_error", "kl_per_sequence", "truncation_gap_per_sequence",
    "truncation_gap_per_sequence_error", "approximation_gap_per_sequence",
    "approximation_gap_per_sequence_error", "khat_median", "khat_share_unreliable",
    "reference_mean_error_median", "reference_mean_floor_median", "reference_scale_ratio_median",
    "fits", "decoder_evaluations", "training_evaluations", "seconds", "verdict",
)  # fmt: skip
"""Of `Comparison.frame`, in this order before all others."""


def _notes(data: xr.Dataset, interrupted: bool) -> list[str]:
    attrs, n = data.attrs, data.sizes["sequence"]
    documents, sampled = f" of {attrs['n_documents']} documents", "documents"
    if not attrs["n_documents"]:
        documents, of = "", "which documents they are pieces of is not known"
        sampled = f"sequences ({of}, and taken for one each)"
    notes = [
        f"{n} sequences{documents}, {attrs['draws']} fresh draws each; every guide got "
        f"{attrs['budget']} decoder evaluations per sequence, training included. A difference of "
        "ELBOs is a difference of KL(q || p(z | x)): log p(x) is the same for all.",
        f"Verdicts allow for {data.sizes['guide'] - 1} comparisons at {ERROR_RATE:.0%} in all; "
        f"errors are of the mean over {sampled}, Monte Carlo error included.",
    ]
    few = few_documents_note(clustered_mean(data["n_tokens"].values, documents_of(data)))
    notes += [f"{few}."] if few else []
    notes += _fit_notes(data)
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


def _fit_notes(data: xr.Dataset) -> list[str]:
    """Which verdicts are about one fit, and which about a family."""
    single = [guide for guide in data["guide"].values if one_fit(data, guide)]
    several = data["guide"].values[data["fits"].values > 1]
    notes = []
    if single:
        notes.append(
            f"{', '.join(single)}: one fit each of shared parameters. Another start might "
            "be better or worse on all sequences, so verdicts are about this fit; restarts=5 asks "
            "about the family."
        )
    if len(several):
        notes.append(
            f"{', '.join(several)}: means over {data.attrs['restarts']} independent fits, each "
            "with the whole budget; errors have the part between fits."
        )
    return notes


def _reference_note(data: xr.Dataset) -> str:
    """Whether the reference's own chains agree."""
    rhat = data["reference_rhat"].dropna("sequence")
    bad = int((~(rhat <= RHAT_LIMIT)).sum())
    floor = float(data["reference_mean_floor"].median("sequence", skipna=True))
    verdict = f"no sequence above {RHAT_LIMIT}."
    if bad:
        verdict = (
            f"{bad} above {RHAT_LIMIT}, whose chains do not agree: left out of the reference's "
            "columns. Sample longer."
        )
    return (
        f"Reference {data.attrs['reference']} for {len(rhat)} of the sequences: largest R-hat "
        f"{float(rhat.max()):.3f}; its own error is {floor:.2f} scales of a mean, and is taken "
        f"off; {verdict}"
    )


def _encoder_note(data: xr.Dataset) -> list[str]:
    """Whether local steps after the encoder paid, where both families are there."""
    if not {"amortized", "semi_amortized"} <= set(data["guide"].values):
        return []
    guides = ["semi_amortized", "amortized"]
    said = in_words(pair(data, *guides), 1, *(one_fit(data, guide) for guide in guides))
    why = ""
    if " worse" in f" {said}" or said.startswith("not"):
        spent = data["training_evaluations"].sel(guide=guides).values
        steps = int(data["local_steps"].sel(guide="semi_amortized"))
        why = (
            f" Why: its encoder had {spent[0]:.0f} evaluations per sequence of training against "
            f"{spent[1]:.0f}, and {steps} local steps did not make up for it."
        )
    return [f"semi_amortized against amortized at equal cost: {said}.{why}"]


def _formatted(comparison: Comparison) -> str:
    """The table for the terminal, with its notes."""
    data, frame = comparison.dataset, comparison.frame
    wide = max(14, *(len(str(guide)) for guide in frame.index)) + 2
    rows = {
        str(guide): _cells(row, guide == data.attrs["baseline"]) for guide, row in frame.iterrows()
    }
    titles = next(iter(rows.values()))
    lines = [f"{'guide':<{wide}}{''.join(f'{t:>{w}}' for t, (w, _) in titles.items())}  verdict"]
    for guide, cells in rows.items():
        text = "".join(f"{cell:>{width}}" for width, cell in cells.values())
        lines.append(f"{guide:<{wide}}{text}  {frame['verdict'][guide]}")
    legend = (
        "ELBO, difference to the baseline and gaps in nats per sequence, +- errors of which two "
        "hold 95 %; truncation: what a loop twice as long gains; left: log p(x) minus the ELBO "
        f"after that ({data.attrs.get('evidence', 'not known')}); k-hat: {_khat_meaning(data)}; "
        "evals: decoder evaluations per sequence, and s: seconds, of one fit"
    )
    if "reference_rhat" in data:
        legend += (
            "; mean err: distance of means in the reference's scales, less what the reference's "
            "own error gives; scale: q's over the reference's (medians)"
        )
    return "\n".join([*lines, "", legend + ".", *comparison.notes])


def _cells(row: pd.Series[Any], is_baseline: bool) -> dict[str, tuple[int, str]]:
    """Width and text of a guide's cells by their titles."""

    def with_error(name: str, digits: int) -> str:
        mean = row.get(name, math.nan)
        known = math.isfinite(mean)
        return f"{mean:+.{digits}f} ± {row[f'{name}_error']:.{digits}f}" if known else "-"

    khat, share = row["khat_median"], row["khat_share_unreliable"]
    of = "-" if is_baseline else None
    cells = {
        "ELBO": (10, f"{row['elbo_per_sequence']:.2f}"),
        "difference": (18, of or with_error("elbo_difference_per_sequence", 2)),
        "per token": (20, of or with_error("elbo_difference_per_token", 4)),
        "truncation": (15, with_error("truncation_gap_per_sequence", 2)),
        "left": (15, with_error("approximation_gap_per_sequence", 2)),
        "k-hat": (14, f"{khat:.2f}{f'({share:.0%})':>7}" if math.isfinite(share) else "-"),
    }
    if "reference_mean_error_median" in row:
        cells["mean err"] = (10, f"{row['reference_mean_error_median']:.2f}")
        cells["scale"] = (7, f"{row['reference_scale_ratio_median']:.2f}")
    cells["evals"] = (7, f"{row['decoder_evaluations']:.0f}")
    return {**cells, "s": (7, f"{row['seconds']:.1f}")}


def _khat_meaning(data: xr.Dataset) -> str:
    """Of which draws, and what is above the limit; or that there are too few to tell."""
    draws = data.attrs["draws"]
    if not data["khat"].notnull().any():
        return f"not judged at S = {draws} (needs {MIN_DRAWS:,} draws)"
    limit = data.attrs["khat_limit"]
    return f"median (share of sequences above {limit:.2f}, the limit at S = {draws})"
