"""Where the nats below the evidence went, and whether the fast loop had enough steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltm_pyro.diagnostics.convergence import CANNOT_TELL, ENOUGH, NOT_ENOUGH
from ltm_pyro.diagnostics.gaps import gap_means
from ltm_pyro.plots import style

_COLORS = {"approximation": style.BLUE, "truncation": style.ORANGE, "amortisation": style.GREEN}
_CAUSE = {
    "approximation": "a richer family would win the approximation gap",
    "truncation": "more fast steps or a better rate would win the truncation gap",
    "amortisation": "local steps after the encoder would win the amortisation gap",
}
_VERDICTS = {ENOUGH: style.GREEN, NOT_ENOUGH: style.RED, CANNOT_TELL: style.GREY}


def gap_bars(gaps: xr.Dataset) -> Figure:
    """The gaps of `gap_decomposition`, stacked per sequence, and their means."""
    style.require(gaps, "components", "gap_decomposition")
    names = list(gaps.attrs["components"])
    order = np.argsort(-gaps["total"].values, kind="stable")
    means = gap_means(gaps)
    with style.house_figure((10.5, 5.0), _gap_caption(gaps, means)) as figure:
        main, side = figure.subplots(1, 2, width_ratios=(2.4, 1))
        _stack(main, [gaps[name].values[order] for name in names], names)
        rank = np.arange(1, len(order) + 1)
        total, error = gaps["total"].values[order], gaps["total_se"].values[order]
        look: dict[str, Any] = {"fmt": "o", "ms": 3, "color": style.INK, "lw": 0.8}
        main.errorbar(rank, total, yerr=2 * error, label="total, 2 s.e.", **look)
        if "total_upper" in gaps:
            upper = gaps["total_upper"].values[order]
            main.plot(rank, upper, "_", color=style.RED, label="at most")
        main.set_xlabel("sequence, by rank of its total gap")
        main.set_ylabel("log p(x) - ELBO\n(nats per sequence)")
        style.whole_numbers(main)
        _means(side, means)
        for axes in (main, side):
            style.zero_line(axes)
        style.title_and_legend(main, "By sequence")
    return figure


def _means(axes: Axes, means: xr.Dataset) -> None:
    names = means["component"].values
    wide = np.hypot(means["mc_se"].values, np.nan_to_num(means["sampling_se"].values))
    colors = [_COLORS.get(name, style.INK) for name in names]
    style.named_bars(axes, list(zip(names, means["mean"].values, wide, colors, strict=True)))
    axes.set(title="Means", xlabel="gap")


def _stack(axes: Axes, values: list[style.Floats], names: list[str]) -> None:
    """Bars on top of each other; what is below 0 hangs from 0."""
    rank = np.arange(1, len(values[0]) + 1)
    up, down = np.zeros(len(rank)), np.zeros(len(rank))
    for name, value in zip(names, values, strict=True):
        base = np.where(value >= 0, up, down)
        axes.bar(rank, value, bottom=base, width=0.85, color=_COLORS[name], alpha=0.8, label=name)
        up, down = up + np.maximum(value, 0), down + np.minimum(value, 0)


def _gap_caption(gaps: xr.Dataset, means: xr.Dataset) -> str:
    names = gaps.attrs["components"]
    largest = max(names, key=lambda name: float(means["mean"].sel(component=name)))
    row = means.sel(component=largest)
    text = (
        f"{gaps.attrs['guide']} after {gaps.attrs['steps']} fast steps: what its ELBO lacks to "
        f"log p(x) ({gaps.attrs['evidence_kind']}), and why. Most is {largest}, "
        f"{float(row['mean']):.3g} +- {float(row['mc_se']):.2g} nats: {_CAUSE[largest]}. "
    )
    if gaps.attrs["approximation_is"] == "at least":
        text += "The evidence is a lower bound, so approximation and total are at least this. "
    text += (
        "Gaps are estimates: one that is 0 may come out below 0, by its error. "
        "Means with 2 standard errors, of draws and of documents."
    )
    if (gaps["total"].values < -3 * gaps["total_se"].values).any():
        text += " A total far below 0 means that the evidence is too low."
    short = int((~gaps["converged"].values).sum())
    if short:
        text += (
            f" For {short} of {gaps.sizes['sequence']} sequences it is not shown that the long "
            "loop arrived: there approximation is perhaps less, and the other gap more."
        )
    return text


def convergence_curves(convergence: xr.Dataset) -> Figure:
    """The course of the ELBO over fast steps, with the verdicts of `fast_convergence`."""
    style.require(convergence, "behind", "fast_convergence")
    tolerance, steps = convergence.attrs["tolerance"], convergence.attrs["steps"]
    caption = (
        f"{convergence.attrs['sentence']} Left: each line is one sequence, its ELBO on fresh draws "
        f"at each number of steps minus that at {steps}; the loop was run anew for each. Lines "
        f"that rise beyond {steps} ask for more steps. Right: what is still to be had, by doubling "
        "the steps and by going on at another learning rate, whichever is more, with 3 standard "
        f"errors: enough if all of it lies below the tolerance of {tolerance:g} nats."
    )
    verdict = convergence["verdict"].values
    with style.house_figure((10.5, 5.0), caption) as figure:
        main, side = figure.subplots(1, 2, width_ratios=(1.5, 1))
        done = convergence["checkpoint"].values
        place = np.arange(len(done))
        for name, color in _VERDICTS.items():
            chosen = verdict == name
            if chosen.any():
                behind = convergence["behind"].values[:, chosen]
                main.plot(place, behind, color=color, lw=0.9, alpha=0.5)
                main.plot([], [], color=color, label=f"{name} ({int(chosen.sum())})")
        main.axvline(place[done == steps][0], color=style.INK, lw=1.0, ls="--", label="T")
        main.set_yscale("symlog", linthresh=tolerance)
        main.set_xticks(place, [str(d) for d in done])
        main.set(
            xlabel="fast steps", ylabel=f"ELBO minus that at {steps} steps\n(nats per sequence)"
        )
        _still_to_be_had(side, convergence)
        style.zero_line(side, tolerance, lw=1.2, ls="--", label="tolerance")
        style.title_and_legend(main, "Course")
        style.title_and_legend(side, "Still to be had")
    return figure


def _still_to_be_had(axes: Axes, convergence: xr.Dataset) -> None:
    names = ("gain_doubling", "gain_other_rate")
    both, errors = (np.stack([convergence[n + e].values for n in names]) for e in ("", "_se"))
    larger = both.argmax(0)[None]
    gain, error = (np.take_along_axis(values, larger, 0)[0] for values in (both, errors))
    order = np.argsort(-gain, kind="stable")
    rank = np.arange(1, len(order) + 1)
    verdict = convergence["verdict"].values[order]
    for name, color in _VERDICTS.items():
        at = verdict == name
        if at.any():
            axes.errorbar(
                rank[at], gain[order][at], yerr=3 * error[order][at], fmt="o", ms=3, lw=0.9,
                color=color,
            )  # fmt: skip
    axes.set_yscale("symlog", linthresh=convergence.attrs["tolerance"])
    axes.set(xlabel="sequence, by rank", ylabel="gain (nats per sequence)")
    style.whole_numbers(axes)
