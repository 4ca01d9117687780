"""Runs side by side: differences of bounds, with the errors of sampling and of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltm_pyro.diagnostics.compare.differences import ERROR_RATE, Difference
from ltm_pyro.diagnostics.estimates import Values
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, drawable, house_figure, title_and_legend
from ltm_pyro.run.run_comparison import RunComparison

_LONGEST = 40  # characters of a run's name


def run_comparison(comparison: RunComparison) -> Figure:
    """Differences to the baseline and to each run's own control, fits as points, with intervals.

    Args:
        comparison: Of `ltm_pyro.compare_runs`.
    """
    groups = list(comparison.settings.index)
    base, unit = comparison.dataset.attrs["baseline"], comparison.unit
    controlled = bool(np.isfinite(comparison.dataset["control"].values).any())
    names = [drawable(str(group)[:_LONGEST]) for group in groups]
    size = (6.4 + 2.4 * controlled, 1.6 + 0.5 * len(groups))
    with house_figure(size, _caption(comparison)) as figure:
        every = np.atleast_1d(figure.subplots(1, 1 + controlled, sharey=True))
        for shift, score, color in ((-0.12, "elbo", BLUE), (0.12, "iw", GREEN)):
            found = [comparison.difference(group, base, score) for group in groups]
            fits = [comparison.fit_differences(group, base, score) for group in groups]
            _panel(every[0], found, fits, shift, color, "ELBO" if score == "elbo" else "IW bound")
        every[0].set_xlabel(f"difference to the baseline\n(nats per {unit})")
        title_and_legend(every[0], "Bounds")
        if controlled:
            found = [comparison.estimate(group, "over_control") for group in groups]
            fits = [comparison.fits(group, "over_control").to_numpy() for group in groups]
            _panel(every[1], found, fits, 0.0, ORANGE, "IW bound")
            every[1].set_xlabel(f"gain over the control\n(nats per {unit})")
            title_and_legend(every[1], "Over the control")
        every[0].set_yticks(range(len(groups)), names)
        every[0].set_ylim(len(groups) - 0.5, -0.5)
    return figure


def _caption(comparison: RunComparison) -> str:
    attrs, several = comparison.dataset.attrs, max(len(comparison.settings) - 1, 1)
    text = (
        f"{attrs['n_sequences']} {attrs['split']} sequences of {attrs['n_documents']} documents. "
        f"Right of 0: a higher bound than the first group, or than that of "
        "the same decoder without thoughts. An interval that crosses 0 tells nothing apart; it "
        f"holds 95 %, for all of {several} comparisons at once, and has the error of training "
        "where a group has several fits (points: single fits)."
    )
    return text


def _panel(
    axes: Axes,
    found: Sequence[Difference],
    fits: Sequence[Values],
    shift: float,
    color: Any,
    label: str,
) -> None:
    """Estimates with their intervals, and behind each its fits."""
    places = np.arange(len(found)) + shift
    rate = ERROR_RATE / max(len(found) - 1, 1)
    axes.axvline(0, color=INK, lw=1.0, ls="--")
    axes.errorbar(
        [each.value for each in found], places, xerr=[each.margin(rate) for each in found],
        fmt="o", color=color, capsize=3, ms=5, label=label,
    )  # fmt: skip
    for place, values in zip(places, fits, strict=True):
        axes.scatter(values, np.full(len(values), place), s=12, alpha=0.45, color=color, lw=0)
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
