"""The ELBO split over layers and thoughts, and what is reconstructed as they are kept."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ltm_pyro.diagnostics.estimates import clustered_mean, documents_of
from ltm_pyro.errors import InputError
from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, house_figure, title_and_legend


def elbo_split(*parts: xr.Dataset) -> Figure:
    """What each layer or thought brings to the reconstruction, and what its KL costs.

    Args:
        parts: Of `reconstruction_by_block`, by layer, by thought, or one of each.

    Raises:
        InputError: if there is none, or another dataset.
    """
    if not parts or any("kept" not in part.dims for part in parts):
        raise InputError("no parts to draw: give the Dataset of reconstruction_by_block")
    nets = {part.attrs["by"]: _gains(part)[0].sum() - _gains(part)[1].sum() for part in parts}
    whole = next(iter(nets.values()))
    caption = (
        "Green: nats per sequence by which the reconstruction gains when a block's thoughts join "
        "those below it; orange: what its KL costs, each block by itself. A block pays where green "
        f"is the higher. All together they add {whole:+.2f} nats per sequence to log p(x | z = 0)"
        + (" (less what blocks say twice)." if whole == whole else ".")
        + " Bars: 2 standard errors over documents."
    )
    with house_figure((8.6 if len(parts) > 1 else 5.6, 3.3), caption) as figure:
        for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts))), parts, strict=True):
            _pair(axes, part)
    return figure


def _gains(part: xr.Dataset) -> tuple[xr.DataArray, xr.DataArray]:
    """Mean gain and cost per block."""
    gain = -part["nll"].diff("kept").mean("sequence")
    return gain.rename(kept="block"), part["kl"].mean("sequence")


def _pair(axes: Axes, part: xr.Dataset) -> None:
    documents, by = documents_of(part), part.attrs["by"]
    place = np.arange(part.sizes["block"])
    gains = [clustered_mean(g, documents) for g in -np.diff(part["nll"].values, axis=0)]
    costs = [clustered_mean(kl, documents) for kl in part["kl"].values]
    for shift, found, color, label in (
        (-0.2, gains, GREEN, "reconstruction gained"),
        (0.2, costs, ORANGE, "KL paid"),
    ):
        value, error = [each.value for each in found], [2 * each.error for each in found]
        if np.isfinite(value).all():
            axes.bar(place + shift, value, 0.38, color=color, alpha=0.8, label=label)
            axes.errorbar(
                place + shift, value, yerr=error, fmt="none", ecolor=INK, lw=1.0, capsize=2.5
            )
    axes.axhline(0, color=INK, lw=1.0)
    axes.set(xlabel=by, ylabel="nats per sequence")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(-0.6, len(place) - 0.4)
    axes.grid(visible=False, axis="x")
    title_and_legend(axes, f"By {by}")


def layer_reconstruction(part: xr.Dataset) -> Figure:
    """Reconstruction as the thoughts of the first layers are kept and the others set to 0.

    Args:
        part: Of `reconstruction_by_block`.

    Raises:
        InputError: if it is another dataset.
    """
    if "kept" not in part.dims:
        raise InputError("no course to draw: give the Dataset of reconstruction_by_block")
    by, kept, documents = part.attrs["by"], part["kept"].values, documents_of(part)
    nll = part["nll"].values
    gains = [clustered_mean(row, documents) for row in nll[0] - nll]
    steps = np.diff([gain.value for gain in gains])
    caption = (
        f"Thoughts of the first {by}s are kept, the others set to 0 ({part.sizes['sequence']} "
        f"sequences; bars: 2 errors over documents). Where the curve rises, that {by} says "
        f"something of the text: most at {by} {int(np.argmax(steps))}, counted from 0. The KL is "
        "not charged: this is no bound."
    )
    accurate = "accuracy" in part
    with house_figure((8.2 if accurate else 5.0, 3.2), caption) as figure:
        every = np.atleast_1d(figure.subplots(1, 1 + accurate))
        every[0].errorbar(
            kept, [g.value for g in gains], yerr=[2 * g.error for g in gains], marker="o", ms=5,
            color=BLUE, capsize=3, label="mean",
        )  # fmt: skip
        every[0].axhline(0, color=INK, lw=1.0, ls="--", label="z = 0")
        every[0].set(ylabel="log p(x | z) gained\n(nats per sequence)")
        title_and_legend(every[0], "Likelihood")
        if accurate:
            every[1].plot(
                kept, part["accuracy"], marker="o", ms=5, color=GREEN, label="at q's mean"
            )
            every[1].set(ylabel="tokens guessed right")
            every[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
            title_and_legend(every[1], "Accuracy")
        for axes in every:
            axes.set_xlabel(f"{by}s kept")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
