"""Guide families, and runs, side by side: differences of bounds with all errors they have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltm_pyro.diagnostics.compare import Comparison
from ltm_pyro.diagnostics.compare.differences import ERROR_RATE
from ltm_pyro.diagnostics.compare.summary import margin
from ltm_pyro.diagnostics.estimates import Estimate, Values
from ltm_pyro.plots import style
from ltm_pyro.run.run_comparison import RunComparison


def guide_comparison(comparison: Comparison) -> Figure:
    """Differences of `compare` with their errors, gaps, k-hat, and distance to the reference."""
    data = comparison.dataset
    # Point masses have no ELBO to draw.
    data = data.isel(guide=np.flatnonzero(np.isfinite(data["elbo_per_sequence"].values)))
    panels = [_differences]
    if "truncation_gap" in data:
        panels.append(_gaps)
    if data["khat"].notnull().any():  # few draws make none
        panels.append(_khat)
    if "reference_rhat" in data:
        panels.append(_reference)
    size = (3.6 * len(panels), 1.6 + 0.42 * data.sizes["guide"])
    with style.house_figure(size, _guide_caption(data)) as figure:
        every = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
        for axes, panel in zip(every, panels, strict=True):
            panel(axes, data)
            axes.grid(visible=False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        every[0].set_yticks(range(data.sizes["guide"]), data["guide"].values)
        every[0].set_ylim(data.sizes["guide"] - 0.5, -0.5)
    return figure


def _guide_caption(data: xr.Dataset) -> str:
    documents = f" of {data.attrs['n_documents']} documents" if data.attrs["n_documents"] else ""
    text = (
        f"{data.sizes['sequence']} sequences{documents}, {data.attrs['budget']} decoder "
        f"evaluations per sequence for each guide. Differences to {data.attrs['baseline']}: right "
        "of 0 is closer to the posterior; an interval that crosses 0 tells nothing apart. "
        "Intervals allow for all comparisons at once (95 %). "
    )
    if "truncation_gap" in data:
        text += "Gap: what a loop twice as long gains; a large one says the loop was too short. "
    if data["khat"].notnull().any():
        text += (
            f"k-hat above the line, {data.attrs['khat_limit']:.2f} at S = {data.attrs['draws']}: "
            "the IW bound is not to be relied on. "
        )
    if "reference_rhat" in data:
        text += (
            "Right: distance of q's means from the reference chain's, in its scales and less its "
            "own error, and ratio of scales; an exact q has 0 and 1."
        )
    return text


def _bars(axes: Axes, data: xr.Dataset, name: str, color: Any, label: str, shift: float) -> None:
    places = np.arange(data.sizes["guide"]) + shift
    axes.errorbar(
        data[name].values, places, xerr=margin(data, name), fmt="o", color=color,
        capsize=3, ms=5, label=label,
    )  # fmt: skip


def _differences(axes: Axes, data: xr.Dataset) -> None:
    axes.axvline(0, color=style.INK, lw=1.0, ls="--")
    _bars(axes, data, "elbo_difference_per_sequence", style.BLUE, "ELBO", -0.12)
    _bars(axes, data, "iw_difference_per_sequence", style.GREEN, "IW bound", 0.12)
    axes.set(xlabel=f"difference to {data.attrs['baseline']}\n(nats per sequence)", ylabel="guide")
    style.title_and_legend(axes, "Bounds")


def _gaps(axes: Axes, data: xr.Dataset) -> None:
    axes.axvline(0, color=style.INK, lw=1.0, ls="--")
    _bars(axes, data, "truncation_gap_per_sequence", style.ORANGE, "truncation", 0.0)
    axes.set(xlabel="gap of the short loop\n(nats per sequence)")
    style.title_and_legend(axes, "Gap")


def _khat(axes: Axes, data: xr.Dataset) -> None:
    khat = data["khat"].values
    for place, row in enumerate(khat):
        finite = row[np.isfinite(row)]
        axes.scatter(finite, np.full(len(finite), place), s=8, alpha=0.35, color=style.PURPLE, lw=0)
    axes.scatter([], [], s=8, color=style.PURPLE, label="sequence")
    axes.scatter(
        data["khat_median"].values, np.arange(len(khat)), marker="|", s=160, color=style.INK,
        label="median",
    )  # fmt: skip
    axes.axvline(data.attrs["khat_limit"], color=style.INK, lw=1.0, ls="--")
    axes.set(xlabel="k-hat of the\nimportance weights")
    style.title_and_legend(axes, "Weights")


def _reference(axes: Axes, data: xr.Dataset) -> None:
    places = np.arange(data.sizes["guide"])
    axes.axvline(0, color=style.BLUE, lw=1.0, ls="--")
    axes.axvline(1, color=style.ORANGE, lw=1.0, ls="--")
    axes.scatter(
        data["reference_mean_error_median"].values, places - 0.12, color=style.BLUE, label="means"
    )
    axes.scatter(
        data["reference_scale_ratio_median"].values, places + 0.12, color=style.ORANGE, marker="D",
        label="scales",
    )  # fmt: skip
    axes.set(xlabel="distance of means (scales),\nratio of scales (medians)")
    style.title_and_legend(axes, "Reference")


_LONGEST = 40  # characters of a run's name


def run_comparison(comparison: RunComparison) -> Figure:
    """Differences of `compare_runs` to the baseline and to each run's control; fits as points."""
    groups = list(comparison.settings.index)
    base, unit = comparison.dataset.attrs["baseline"], comparison.unit
    controlled = bool(np.isfinite(comparison.dataset["control"].values).any())
    names = [style.drawable(str(group)[:_LONGEST]) for group in groups]
    size = (6.4 + 2.4 * controlled, 1.6 + 0.5 * len(groups))
    with style.house_figure(size, _run_caption(comparison)) as figure:
        every = np.atleast_1d(figure.subplots(1, 1 + controlled, sharey=True))
        for shift, score, color in ((-0.12, "elbo", style.BLUE), (0.12, "iw", style.GREEN)):
            found = [comparison.difference(group, base, score) for group in groups]
            fits = [comparison.fit_differences(group, base, score) for group in groups]
            _panel(every[0], found, fits, shift, color, "ELBO" if score == "elbo" else "IW bound")
        every[0].set_xlabel(f"difference to the baseline\n(nats per {unit})")
        style.title_and_legend(every[0], "Bounds")
        if controlled:
            found = [comparison.estimate(group, "over_control") for group in groups]
            fits = [comparison.fits(group, "over_control").to_numpy() for group in groups]
            _panel(every[1], found, fits, 0.0, style.ORANGE, "IW bound")
            every[1].set_xlabel(f"gain over the control\n(nats per {unit})")
            style.title_and_legend(every[1], "Over the control")
        every[0].set_yticks(range(len(groups)), names)
        every[0].set_ylim(len(groups) - 0.5, -0.5)
    return figure


def _run_caption(comparison: RunComparison) -> str:
    attrs, several = comparison.dataset.attrs, max(len(comparison.settings) - 1, 1)
    return (
        f"{attrs['n_sequences']} {attrs['split']} sequences of {attrs['n_documents']} documents. "
        f"Right of 0: a higher bound than the first group, or than that of "
        "the same decoder without thoughts. An interval that crosses 0 tells nothing apart; it "
        f"holds 95 %, for all of {several} comparisons at once, and has the error of training "
        "where a group has several fits (points: single fits)."
    )


def _panel(
    axes: Axes,
    found: Sequence[Estimate],
    fits: Sequence[Values],
    shift: float,
    color: Any,
    label: str,
) -> None:
    """Estimates with their intervals, and behind each its fits."""
    places = np.arange(len(found)) + shift
    rate = ERROR_RATE / max(len(found) - 1, 1)
    axes.axvline(0, color=style.INK, lw=1.0, ls="--")
    axes.errorbar(
        [each.value for each in found], places, xerr=[each.margin(rate) for each in found],
        fmt="o", color=color, capsize=3, ms=5, label=label,
    )  # fmt: skip
    for place, values in zip(places, fits, strict=True):
        axes.scatter(values, np.full(len(values), place), s=12, alpha=0.45, color=color, lw=0)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
