"""Guide families side by side: which is closer to the posterior, and what limits each."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltm_pyro.diagnostics.compare import Comparison
from ltm_pyro.diagnostics.compare.summary import margin
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, PURPLE, house_figure, title_and_legend


def guide_comparison(comparison: Comparison) -> Figure:
    """Differences to the baseline with their errors, gaps, k-hat, and distance to the reference.

    Args:
        comparison: Of `ltm_pyro.compare`.
    """
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
    with house_figure(
        (3.6 * len(panels), 1.6 + 0.42 * data.sizes["guide"]), _caption(data)
    ) as figure:
        every = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
        for axes, panel in zip(every, panels, strict=True):
            panel(axes, data)
            axes.grid(visible=False, axis="y")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        every[0].set_yticks(range(data.sizes["guide"]), data["guide"].values)
        every[0].set_ylim(data.sizes["guide"] - 0.5, -0.5)
    return figure


def _caption(data: xr.Dataset) -> str:
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
    axes.axvline(0, color=INK, lw=1.0, ls="--")
    _bars(axes, data, "elbo_difference_per_sequence", BLUE, "ELBO", -0.12)
    _bars(axes, data, "iw_difference_per_sequence", GREEN, "IW bound", 0.12)
    axes.set(xlabel=f"difference to {data.attrs['baseline']}\n(nats per sequence)", ylabel="guide")
    title_and_legend(axes, "Bounds")


def _gaps(axes: Axes, data: xr.Dataset) -> None:
    axes.axvline(0, color=INK, lw=1.0, ls="--")
    _bars(axes, data, "truncation_gap_per_sequence", ORANGE, "truncation", 0.0)
    axes.set(xlabel="gap of the short loop\n(nats per sequence)")
    title_and_legend(axes, "Gap")


def _khat(axes: Axes, data: xr.Dataset) -> None:
    khat = data["khat"].values
    for place, row in enumerate(khat):
        finite = row[np.isfinite(row)]
        axes.scatter(finite, np.full(len(finite), place), s=8, alpha=0.35, color=PURPLE, lw=0)
    axes.scatter([], [], s=8, color=PURPLE, label="sequence")
    axes.scatter(
        data["khat_median"].values, np.arange(len(khat)), marker="|", s=160, color=INK,
        label="median",
    )  # fmt: skip
    axes.axvline(data.attrs["khat_limit"], color=INK, lw=1.0, ls="--")
    axes.set(xlabel="k-hat of the\nimportance weights")
    title_and_legend(axes, "Weights")


def _reference(axes: Axes, data: xr.Dataset) -> None:
    places = np.arange(data.sizes["guide"])
    axes.axvline(0, color=BLUE, lw=1.0, ls="--")
    axes.axvline(1, color=ORANGE, lw=1.0, ls="--")
    axes.scatter(
        data["reference_mean_error_median"].values, places - 0.12, color=BLUE, label="means"
    )
    axes.scatter(
        data["reference_scale_ratio_median"].values, places + 0.12, color=ORANGE, marker="D",
        label="scales",
    )  # fmt: skip
    axes.set(xlabel="distance of means (scales),\nratio of scales (medians)")
    title_and_legend(axes, "Reference")
