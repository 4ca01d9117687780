"""Rank plots of simulation-based calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from ltm_pyro.errors import InputError
from ltm_pyro.plots import style

_LEVEL = 0.99
_MOST_PANELS = 12
_ENVELOPE_SIMULATIONS = 2_000


def rank_plot(
    calibration: xr.Dataset, quantities: Sequence[str] | None = None, *, ecdf: bool = False
) -> Figure:
    """Ranks of the truth among posterior draws, one panel per quantity.

    Args:
        calibration: Of `sbc`.
        quantities: Which ones; by default the log densities and the dimensions with the smallest
            p-values, twelve in all at most.
        ecdf: Draw the distribution function of the ranks less that of uniform ones, with a band
            that holds for the whole curve at once (Saeilynoja, Buerkner & Vehtari 2022), instead of
            a histogram, whose band holds for each bin.

    Raises:
        InputError: if a quantity is not in the dataset, or this is no dataset of `sbc`.
    """
    style.require(calibration, "rank", "sbc")
    names = _chosen(calibration) if quantities is None else list(quantities)
    unknown = [name for name in names if name not in calibration["quantity"].values]
    if unknown or not names:
        raise InputError(f"quantities {unknown or names}: name some that the dataset has")
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    size = (max(6.5, 2.9 * columns), 1.1 + 2.2 * rows)
    with style.house_figure(size, _caption(calibration, ecdf)) as f:
        grid = f.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        bands = _bands(calibration, ecdf)
        draw = _curve if ecdf else _histogram
        for axes, name in zip(grid.flat, names, strict=False):
            draw(axes, calibration.sel(quantity=name), *bands)
            axes.set_title(f"{name}   p = {float(calibration['p_value'].sel(quantity=name)):.2g}")
        for axes in grid.flat[len(names) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("excess over uniform\n(share)" if ecdf else "replications\nper bin")
        for axes in grid[-1]:
            axes.set_xlabel(f"rank of the truth\n(0 to {calibration.attrs['draws']})")
        style.common_legend(f, grid[0, 0])
    return f


def _chosen(calibration: xr.Dataset) -> list[str]:
    """The log densities, then dimensions from the least uniform on."""
    order = calibration["quantity"].values[np.argsort(calibration["p_value"].values)]
    joint = [name for name in calibration["quantity"].values if not name.startswith("z[")]
    rest = [name for name in order if name.startswith("z[")]
    return [str(name) for name in (joint + rest)[:_MOST_PANELS]]


def _bands(calibration: xr.Dataset, ecdf: bool) -> tuple[style.Floats, style.Floats]:
    """Lower and upper limits under uniform ranks, per bin or per rank."""
    n, draws = calibration.attrs["replications"], calibration.attrs["draws"]
    if not ecdf:
        share = calibration["expected"].values / n
        tail = (1 - _LEVEL) / 2
        return stats.binom.ppf(tail, n, share), stats.binom.isf(tail, n, share)
    # Pointwise limits of a level so strict that a whole uniform curve stays inside with _LEVEL.
    cdf = np.arange(1, draws + 1) / (draws + 1)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(draws + 1, 1 / (draws + 1)), size=_ENVELOPE_SIMULATIONS)
    below = counts.cumsum(1)[:, :-1]
    tails = 2 * np.minimum(stats.binom.cdf(below, n, cdf), stats.binom.sf(below - 1, n, cdf))
    strict = np.quantile(tails.min(1), 1 - _LEVEL)
    low, high = stats.binom.ppf(strict / 2, n, cdf), stats.binom.isf(strict / 2, n, cdf)
    return low / n - cdf, high / n - cdf


_BAND: dict[str, Any] = {
    "color": style.GREY,
    "alpha": 0.3,
    "lw": 0,
    "label": f"uniform, {_LEVEL:.0%}",
}
_CALIBRATED: dict[str, Any] = {"ls": "--", "label": "calibrated"}


def _curve(axes: Axes, one: xr.Dataset, low: style.Floats, high: style.Floats) -> None:
    draws = one.attrs["draws"]
    rank = np.arange(draws)
    share = np.bincount(one["rank"].values, minlength=draws + 1) / one.attrs["replications"]
    axes.fill_between(rank, low, high, step="mid", **_BAND)
    curve = share.cumsum()[:-1] - (rank + 1) / (draws + 1)
    axes.step(rank, curve, where="mid", color=style.BLUE, label="ranks")
    style.zero_line(axes, **_CALIBRATED)


def _histogram(axes: Axes, one: xr.Dataset, low: style.Floats, high: style.Floats) -> None:
    bins, count = one.attrs["bins"], one["count"].values
    edges = np.arange(bins + 1) * (one.attrs["draws"] + 1) / bins - 0.5
    axes.stairs(high, edges, baseline=low, fill=True, **_BAND)
    width, centre = 0.92 * np.diff(edges), (edges[1:] + edges[:-1]) / 2
    out = (count < low) | (count > high)
    for chosen, color, label in ((~out, style.BLUE, "ranks"), (out, style.RED, "outside the band")):
        height = np.where(chosen, count, 0)
        axes.bar(centre, height, width, color=color, alpha=0.75, label=label, zorder=1)
    style.zero_line(axes, float(one["expected"].mean()), **_CALIBRATED)


def _caption(calibration: xr.Dataset, ecdf: bool) -> str:
    n, p = calibration.attrs["replications"], calibration.attrs["p_value"]
    verdict = (
        "nothing speaks against calibration" if p > 0.01 else "the posterior is not calibrated"
    )
    shapes = (
        "A curve that leaves the band is evidence: an S that rises first, scale too small; one "
        "that falls first, too large; a single bow, shifted."
        if ecdf
        else "Ranks piled up at both ends: scale too small; in the middle: too large; at one end: "
        "shifted. About one bin in a hundred leaves its band by chance."
    )
    return (
        f"Ranks of the thoughts that {n} sequences were made from, among "
        f"{calibration.attrs['draws']} posterior draws each; uniform if the posterior is right. "
        f"{shapes} For log densities, high ranks mean draws less probable than the truth. All "
        f"{calibration.sizes['quantity']} quantities together: p = {p:.2g} (the smallest of "
        f"as many chi-square tests), {verdict}."
    )


def contraction_plot(contraction: xr.Dataset) -> Figure:
    """How far q has left its prior, and whether the truth lies where q says: `contraction`."""
    style.require(contraction, "z_score", "contraction")
    shrunk, score = (contraction[name].values.ravel() for name in ("contraction", "z_score"))
    spread = float(np.sqrt(np.mean(np.square(score))))
    reading = "q is too wide" if spread < 0.8 else "as it should be"
    reading = "q is too narrow" if spread > 1.2 else reading
    caption = (
        f"Each dot is a dimension of z of one of {contraction.attrs['replications']} sequences "
        "from the model. Right: q is narrow beside its prior, so the data have told; at 0 they "
        "told nothing. Up and down: where the truth lies, in q's scales. Their root mean square "
        f"is {spread:.2f} where 1 is right: {reading}. Points to the right and far from 0 are "
        "overconfident."
    )
    with style.house_figure((6.4, 3.8), caption) as figure:
        axes = figure.subplots()
        axes.axhspan(-2, 2, color=style.GREY, alpha=0.22, lw=0, label="95 % if q is right")
        style.zero_line(axes, ls="--")
        alpha = float(np.clip(400 / len(score), 0.08, 0.7))
        axes.scatter(shrunk, np.clip(score, -6, 6), s=9, color=style.BLUE, alpha=alpha, lw=0)
        axes.scatter([], [], s=16, color=[style.BLUE], label="dimension of z")
        axes.set(
            xlabel="contraction: 1 - variance of q / variance of the prior",
            ylabel="z-score of the truth\n(scales of q; 6 at most)",
            xlim=(min(-0.05, float(shrunk.min())), 1.02),
            ylim=(-6.3, 6.3),
        )
        style.title_and_legend(axes, "")
    return figure
