"""Does the model use its thoughts, and where? The collapse panel, and the ELBO by block."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ltm_pyro.diagnostics.collapse import CollapsePanel
from ltm_pyro.diagnostics.estimates import clustered_mean, documents_of
from ltm_pyro.errors import InputError
from ltm_pyro.plots import style

_MOST_NAMED = 24  # thoughts that get a tick each


def collapse_bars(panel: CollapsePanel) -> Figure:
    """What z costs, what of it tells texts apart, and what is lost without it: `collapse_panel`."""
    with style.house_figure((9.6, 3.6), _caption(panel)) as figure:
        total, parts = figure.subplots(1, 2, width_ratios=(1, 1.35))
        _totals(total, panel)
        _parts(parts, panel)
        style.title_and_legend(total, "All thoughts")
        style.title_and_legend(parts, "Thought by thought")
    return figure


def _totals(axes: Axes, panel: CollapsePanel) -> None:
    rows = (
        ("KL\n(q || prior)", panel.kl, panel.kl_se, style.ORANGE),
        ("mutual\ninformation", panel.mutual_information, panel.mutual_information_se, style.GREEN),
        ("loss at\nz = 0", panel.penalty_z0, panel.penalty_z0_se, style.BLUE),
        ("loss at\nshuffled z", panel.penalty_shuffled, panel.penalty_shuffled_se, style.RED),
    )
    style.named_bars(axes, [row for row in rows if math.isfinite(row[1])])
    style.zero_line(axes)
    axes.set_xlabel("2 standard errors")


def _parts(axes: Axes, panel: CollapsePanel) -> None:
    """KL and mutual information of each thought, blocks of layers told apart by lines."""
    kl, told = panel.kl_per_thought, panel.mutual_information_per_thought
    place = np.arange(len(kl))
    for shift, values, color, label in (
        (-0.2, kl, style.ORANGE, "KL"), (0.2, told, style.GREEN, "mutual information"),
    ):  # fmt: skip
        if np.isfinite(values).all():
            axes.bar(place + shift, values, width=0.38, color=color, alpha=0.8, label=label)
    layers = len(panel.kl_per_layer)
    for layer in range(1, layers):
        axes.axvline(layer * len(kl) // layers - 0.5, color=style.INK, lw=0.8, ls=":")
    dotted = " (dotted: layers)" if layers > 1 else ""
    axes.set(xlabel=f"thought{dotted}", ylabel="nats per sequence")
    axes.set_xlim(-0.7, len(kl) - 0.3)
    axes.set_ylim(bottom=min(0.0, float(np.nan_to_num(np.concatenate([kl, told])).min())))
    if len(kl) <= _MOST_NAMED:
        axes.set_xticks(place)
    else:
        style.whole_numbers(axes)
    axes.grid(visible=False, axis="x")


def _caption(panel: CollapsePanel) -> str:
    if math.isnan(panel.penalty_shuffled):
        verdict = "Whether thoughts are used is not judged: all sequences are of one document."
    elif panel.uses_thoughts:
        verdict = "Another document's thoughts hurt by more than two errors: thoughts are used."
    else:
        verdict = "Another document's thoughts hurt by less than two errors: use is not shown."
    cap = panel.mutual_information_cap
    return (
        f"{panel.n_sequences} sequences, of which thoughts can tell at most {cap:.2f} nats apart. "
        f"KL is what q says, mutual information what of it differs between texts; a KL without a "
        f"loss at shuffled z is not use. {panel.active_units} of {panel.n_units} dimensions are "
        f"active. {verdict}"
    )


def elbo_split(*parts: xr.Dataset) -> Figure:
    """What each layer or thought brings to the reconstruction, and what its KL costs.

    Args:
        parts: Of `reconstruction_by_block`, by layer, by thought, or one of each.

    Raises:
        InputError: if there is none, or another dataset.
    """
    if not parts:
        raise InputError("no parts to draw: give the Dataset of reconstruction_by_block")
    for part in parts:
        style.require(part, "kept", "reconstruction_by_block")
    first = parts[0]
    gained = float((first["nll"][0] - first["nll"][-1]).mean())
    whole = gained - float(first["kl"].mean("sequence").sum(skipna=False))
    caption = (
        "Green: nats per sequence by which the reconstruction gains when a block's thoughts join "
        "those below it; orange: what its KL costs, each block by itself. A block pays where green "
        f"is the higher. All together they add {whole:+.2f} nats per sequence to log p(x | z = 0)"
        + (" (less what blocks say twice)." if whole == whole else ".")
        + " Bars: 2 standard errors over documents."
    )
    with style.house_figure((8.6 if len(parts) > 1 else 5.6, 3.3), caption) as figure:
        for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts))), parts, strict=True):
            _pair(axes, part)
    return figure


def _pair(axes: Axes, part: xr.Dataset) -> None:
    documents, by = documents_of(part), part.attrs["by"]
    place = np.arange(part.sizes["block"])
    gains = [clustered_mean(g, documents) for g in -np.diff(part["nll"].values, axis=0)]
    costs = [clustered_mean(kl, documents) for kl in part["kl"].values]
    for shift, found, color, label in (
        (-0.2, gains, style.GREEN, "reconstruction gained"),
        (0.2, costs, style.ORANGE, "KL paid"),
    ):
        value = [each.value for each in found]
        if np.isfinite(value).all():
            axes.bar(place + shift, value, 0.38, color=color, alpha=0.8, label=label)
            style.estimates(
                axes, place + shift, found, "none", ecolor=style.INK, lw=1.0, capsize=2.5
            )
    style.zero_line(axes)
    axes.set(xlabel=by, ylabel="nats per sequence")
    style.whole_numbers(axes)
    axes.set_xlim(-0.6, len(place) - 0.4)
    axes.grid(visible=False, axis="x")
    style.title_and_legend(axes, f"By {by}")


def layer_reconstruction(part: xr.Dataset) -> Figure:
    """Reconstruction as first thoughts are kept and others set to 0: `reconstruction_by_block`."""
    style.require(part, "kept", "reconstruction_by_block")
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
    with style.house_figure((8.2 if accurate else 5.0, 3.2), caption) as figure:
        every = np.atleast_1d(figure.subplots(1, 1 + accurate))
        style.estimates(
            every[0], kept, gains, "-", marker="o", ms=5, color=style.BLUE, capsize=3, label="mean"
        )  # fmt: skip
        style.zero_line(every[0], ls="--", label="z = 0")
        every[0].set(ylabel="log p(x | z) gained\n(nats per sequence)")
        style.title_and_legend(every[0], "Likelihood")
        if accurate:
            accuracy = part["accuracy"]
            every[1].plot(kept, accuracy, marker="o", ms=5, color=style.GREEN, label="at q's mean")
            every[1].set(ylabel="tokens guessed right")
            every[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
            style.title_and_legend(every[1], "Accuracy")
        for axes in every:
            axes.set_xlabel(f"{by}s kept")
            style.whole_numbers(axes)
    return figure
