"""Does the model use its thoughts? The collapse panel, drawn."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltm_pyro.diagnostics.collapse import CollapsePanel
from ltm_pyro.plots.style import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    RED,
    Floats,
    house_figure,
    title_and_legend,
)

_MOST_NAMED = 24  # thoughts that get a tick each


def collapse_bars(panel: CollapsePanel) -> Figure:
    """What z costs, what of it tells texts apart, and what the decoder loses without it.

    Args:
        panel: Of `collapse_panel`.
    """
    with house_figure((9.6, 3.6), _caption(panel)) as figure:
        total, parts = figure.subplots(1, 2, width_ratios=(1, 1.35))
        _totals(total, panel)
        _parts(parts, panel)
        title_and_legend(total, "All thoughts")
        title_and_legend(parts, "Thought by thought")
    return figure


def _totals(axes: Axes, panel: CollapsePanel) -> None:
    rows = (
        ("KL\n(q || prior)", panel.kl, panel.kl_se, ORANGE),
        ("mutual\ninformation", panel.mutual_information, panel.mutual_information_se, GREEN),
        ("loss at\nz = 0", panel.penalty_z0, panel.penalty_z0_se, BLUE),
        ("loss at\nshuffled z", panel.penalty_shuffled, panel.penalty_shuffled_se, RED),
    )
    known = [row for row in rows if math.isfinite(row[1])]
    for place, (_, value, error, color) in enumerate(known):
        axes.bar(place, value, color=color, alpha=0.8, width=0.6)
        axes.errorbar(place, value, yerr=2 * np.nan_to_num(error), color=INK, capsize=4, lw=1.2)
    axes.axhline(0, color=INK, lw=1.0)
    axes.set_xticks(range(len(known)), [row[0] for row in known], fontsize=8)
    axes.set(ylabel="nats per sequence", xlabel="2 standard errors")
    axes.grid(visible=False, axis="x")


def _parts(axes: Axes, panel: CollapsePanel) -> None:
    """KL and mutual information of each thought, blocks of layers told apart by lines."""
    kl, told = panel.kl_per_thought, panel.mutual_information_per_thought
    place = np.arange(len(kl))
    _bars(axes, place - 0.2, kl, ORANGE, "KL")
    _bars(axes, place + 0.2, told, GREEN, "mutual information")
    layers = len(panel.kl_per_layer)
    if layers > 1:
        each = len(kl) // layers
        for layer in range(1, layers):
            axes.axvline(layer * each - 0.5, color=INK, lw=0.8, ls=":")
    axes.set(
        xlabel="thought" + (" (dotted: layers)" if layers > 1 else ""), ylabel="nats per sequence"
    )
    axes.set_xlim(-0.7, len(kl) - 0.3)
    axes.set_ylim(bottom=min(0.0, float(np.nan_to_num(np.concatenate([kl, told])).min())))
    if len(kl) <= _MOST_NAMED:
        axes.set_xticks(place)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False, axis="x")


def _bars(axes: Axes, place: Floats, values: Floats, color: object, label: str) -> None:
    if np.isfinite(values).all():
        axes.bar(place, values, width=0.38, color=color, alpha=0.8, label=label)


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
