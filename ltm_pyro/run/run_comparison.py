"""Runs compared, for reading: the table, its notes, the frame and the figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import ltm_pyro
from ltm_pyro.diagnostics.compare.differences import ERROR_RATE, in_words, with_training
from ltm_pyro.diagnostics.estimates import Estimate, Values, few_documents_note
from ltm_pyro.errors import shown
from ltm_pyro.html import show

SCORES = ("elbo", "iw", "over_control")


@dataclass(frozen=True, eq=False, repr=False)
class RunComparison:
    """Runs compared on the same held-out documents.

    A group holds the runs that differ in their seed alone; its scores are means over them. Every
    score is higher-is-better, in nats per unit of text, and has an `_error` of which two on either
    side hold 95 %: of having sampled these documents, and, from several fits, of training.

    Attributes:
        dataset: Totals per `run` and `document`: `elbo`, `iw_bound`, `kl`, and `control` (the log
            likelihood by the run's own decoder without thoughts, which is exact; `nan` without
            one), in nats; `size`, in the unit of the attribute `unit`. Coordinates `group`, `seed`,
            `step` and `steps` of each run.
        settings: One row per group: the settings in which they differ.
    """

    dataset: xr.Dataset
    settings: pd.DataFrame

    @property
    def unit(self) -> str:
        """What scores are divided by: `token`, `byte` or `symbol`."""
        return str(self.dataset.attrs["unit"])

    def frame(self) -> pd.DataFrame:
        """One row per group.

        Columns: the settings that differ; `fits`, and their `seeds`; `elbo_per_UNIT`, `iw_per_UNIT`
        and `over_control_per_UNIT` (the IW bound less the control's exact log-likelihood, paired)
        with their errors; `elbo_fit_sd_per_UNIT`, between fits; `elbo_difference_per_UNIT` and
        `iw_difference_per_UNIT` to the baseline, paired, with their errors; `kl_per_UNIT`;
        `verdict`.
        """
        rows = {group: self._row(group) for group in self.settings.index}
        frame = pd.DataFrame.from_dict(rows, orient="index")
        return pd.concat([self.settings, frame.rename_axis("group")], axis=1)

    def _count(self) -> str:
        """How many sequences of each run were scored."""
        few, most = (int(f(self.dataset["n_sequences"].values)) for f in (np.min, np.max))
        return str(few) if few == most else f"{few} to {most}"

    def estimate(self, group: str, score: str = "elbo") -> Estimate:
        """A group's mean `score` (of `SCORES`) over fits, nats per unit, with all its errors."""
        fits = self.fits(group, score).to_numpy()
        return with_training(self._contrast([(group, 1.0)], score), [fits])

    def fit_differences(self, group: str, other: str, score: str = "elbo") -> Values:
        """(R,) what each fit of a group is above the other group: its fit of that seed, or mean."""
        mine, others = self.fits(group, score), self.fits(other, score)
        paired = mine.index.equals(others.index)
        return (mine - (others if paired else others.mean())).to_numpy()

    def difference(self, group: str, other: str, score: str = "elbo") -> Estimate:
        """A group's score less that of another, paired, nats per unit, with all its errors.

        Groups with the same seeds are paired by seed too: the same seed means the same initial
        weights, batches and noise, and what these do to both cancels.
        """
        found = self._contrast([(group, 1.0), (other, -1.0)], score)
        mine, others = self.fits(group, score), self.fits(other, score)
        if mine.index.equals(others.index):
            return with_training(found, [(mine - others).to_numpy()])
        return with_training(found, [mine.to_numpy(), others.to_numpy()])

    def plot(self) -> Any:
        """The differences as a figure; see `ltm_pyro.plots.run_comparison`."""
        return ltm_pyro.plots.run_comparison(self)

    def to_csv(self, path: str | Path) -> None:
        """Writes `frame()`."""
        self.frame().to_csv(path)

    def as_dict(self) -> dict[str, Any]:
        """The dataset's attributes, the rows of `frame()` by group, the runs, and the notes."""
        runs = {
            str(run): {name: self.dataset[name].sel(run=run).item() for name in
                       ("group", "seed", "step", "steps")}
            for run in self.dataset["run"].values
        }  # fmt: skip
        rows = self.frame().to_dict(orient="index")
        return {**self.dataset.attrs, "groups": rows, "runs": runs, "notes": self.notes}

    def __repr__(self) -> str:
        return (
            f"RunComparison({self.dataset.sizes['run']} runs in {len(self.settings)} groups, nats "
            f"per {self.unit} of {self.dataset.sizes['document']} documents)"
        )

    def __str__(self) -> str:
        return format_runs(self)

    def _repr_html_(self) -> str:
        title = f"Runs compared, nats per {self.unit}, higher is better"
        return show(title, tables=[self.frame().T], notes=self.notes)

    @cached_property
    def notes(self) -> list[str]:
        """What a reader must know beside the table, one sentence each."""
        attrs, data = self.dataset.attrs, self.dataset
        base = shown(str(attrs["baseline"])).strip("'")
        notes = [
            f"{self._count()} {attrs['split']} sequences of {attrs['n_documents']} "
            f"documents, {attrs['draws']} fresh draws each; differences are to {base}, paired, and "
            "above 0 where a bound is higher.",
            "A higher bound is a shorter code of this text by model and posterior together; which "
            "model is better, a difference of bounds alone cannot say.",
        ]
        if len(self.settings) > 1:
            notes.append(
                f"Verdicts are of the ELBO and allow for {len(self.settings) - 1} comparisons at "
                f"{ERROR_RATE:.0%} in all."
            )
        single = [g for g in self.settings.index if (data["group"] == g).sum() == 1]
        if single:
            notes.append(
                f"{shown(', '.join(single), 200)[1:-1]}: one fit, so that verdicts are about this "
                "fit; runs of other seeds ask about the recipe."
            )
        if not attrs["same_sequences"]:
            notes.append(
                f"The runs cut the text into other tokens or sequences: scores are per {self.unit} "
                "and paired by document; sequences that begin elsewhere see other text before."
            )
        short = [str(r) for r in data["run"].values[data["step"].values < data["steps"].values]]
        if short:
            notes.append(f"Not fitted to the end: {shown(', '.join(short), 200)[1:-1]}.")
        few = few_documents_note(self.estimate(str(attrs["baseline"])))
        return notes if few is None else [*notes, f"{few}."]

    def fits(self, group: str, score: str = "elbo") -> pd.Series:
        """Nats per unit of each fit of a group, by seed."""
        data = self.dataset.isel(run=np.flatnonzero(self.dataset["group"].values == group))
        rates = self._totals(data, score).sum(1) / data["size"].values.sum(1)
        return pd.Series(rates, index=data["seed"].values).sort_index()

    def _totals(self, data: xr.Dataset, score: str) -> Values:
        values: Values = data["iw_bound" if score in ("iw", "over_control") else score].values
        values = values - data["control"].values if score == "over_control" else values
        # A point mass has no bound.
        return np.where(np.isfinite(values), values, np.nan)

    def _contrast(self, sides: Sequence[tuple[str, float]], score: str) -> Estimate:
        """The weighted sum of groups' means over fits, with the error of sampling."""
        groups = self.dataset["group"].values
        weights = np.zeros(len(groups))
        for group, sign in sides:
            weights[groups == group] += sign / (groups == group).sum()
        chosen = np.flatnonzero([group in dict(sides) for group in groups])
        data = self.dataset.isel(run=chosen)
        return clustered_contrast(self._totals(data, score), data["size"].values, weights[chosen])

    def _row(self, group: str) -> dict[str, Any]:
        of = np.flatnonzero(self.dataset["group"].values == group)
        data, base = self.dataset.isel(run=of), str(self.dataset.attrs["baseline"])
        seeds = " ".join(map(str, data["seed"].values))
        row: dict[str, Any] = {"fits": len(of), "seeds": seeds}
        found = {score: self.estimate(group, score) for score in SCORES}
        if group != base:
            for score in ("elbo", "iw"):
                found[f"{score}_difference"] = self.difference(group, base, score)
        for name, estimate in found.items():
            row[f"{name}_per_{self.unit}"] = estimate.value
            row[f"{name}_per_{self.unit}_error"] = estimate.error
        sd = float(self.fits(group, "elbo").std()) if len(of) > 1 else np.nan
        row[f"elbo_fit_sd_per_{self.unit}"] = sd
        row[f"kl_per_{self.unit}"] = float(self.fits(group, "kl").mean())
        row["verdict"] = self._verdict(group, base)
        return row

    def _verdict(self, group: str, base: str) -> str:
        if group == base:
            return "baseline"
        return in_words(
            self.difference(group, base),
            len(self.settings) - 1,
            unit=f"nats per {self.unit}",
            sides=("higher bound", "lower bound"),
        )


def format_runs(comparison: RunComparison) -> str:
    """The table for the terminal, with its notes."""
    frame, unit = comparison.frame(), comparison.unit
    names = [shown(str(group)).strip("'") for group in frame.index]
    wide = max(12, *map(len, names)) + 2
    columns = [
        ("ELBO", "elbo", 18), ("difference", "elbo_difference", 20),
        ("IW bound", "iw", 18), ("difference", "iw_difference", 20),
        ("over control", "over_control", 20),
    ]  # fmt: skip
    head = "".join(f"{title:>{width}}" for title, _, width in columns)
    lines = [f"nats per {unit}, higher is better; +- errors of which two hold 95 %", ""]
    lines.append(f"{'group':<{wide}}{'fits':>4}{head}  verdict")
    for name, (_, row) in zip(names, frame.iterrows(), strict=True):
        cells = "".join(f"  {_cell(row, key, unit):>{width - 2}}" for _, key, width in columns)
        lines.append(f"{name:<{wide}}{row['fits']:>4}{cells}  {row['verdict']}")
    return "\n".join([*lines, "", _settings_lines(comparison.settings), *comparison.notes])


def _cell(row: pd.Series, key: str, unit: str) -> str:
    value, error = (row.get(f"{key}_per_{unit}{ending}", np.nan) for ending in ("", "_error"))
    if not np.isfinite(value):
        return "-"
    sign = "" if key in ("elbo", "iw") else "+"
    # Two digits of the error, which may be small beside the score.
    digits = 4 if not 0 < error < 1e-3 else min(7, 1 - math.floor(math.log10(error)))
    return f"{value:{sign}.{digits}f} ± {error:.{digits}f}"


def _settings_lines(settings: pd.DataFrame) -> str:
    """The settings that differ, one a line, a value for each group."""
    if settings.empty:
        return "No setting differs between groups, the seed aside."
    lines = ["Settings that differ:"]
    for name in settings.columns:
        values = ", ".join("-" if v is None else shown(v).strip("'") for v in settings[name])
        lines.append(f"  {name}: {values}")
    return "\n".join(lines)


def clustered_contrast(totals: Values, sizes: Values, weights: Values) -> Estimate:
    """A weighted sum of the rates of several scores of the same documents, by the same jackknife.

    A document is left out of all scores at once, so what they share of it cancels in a difference.
    They may cut the documents in different ways: only what belongs to which document is used.
    Totals and what they are divided by are (R, G) per score and document, weights (R,).
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
