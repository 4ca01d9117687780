"""Figures that several studies draw alike."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from ltm_pyro.plots.style import BLUE, GREEN, INK, ORANGE, house_figure, title_and_legend
from studies.common import over_seeds

KINDS = {"elbo": ORANGE, "iw": BLUE, "off": INK}
ARMS = {"nested": BLUE, "flat": ORANGE, "turns_only": GREEN}


def gains_by_window(table: pd.DataFrame, rows: str, window: str, caption: str) -> Figure:
    """Gain over the control of the same seed with two errors, a panel a window, one mark a seed.

    Args:
        table: Columns `KIND_gain_per_sequence` and `KIND_gain_error` for those of `KINDS` it has.
        rows: The column whose values stand below one another.
        window: The column of the panels.
        caption: What to conclude.
    """
    names, panels = list(table[rows].unique()), list(table.groupby(window))
    kinds = [kind for kind in KINDS if f"{kind}_gain_error" in table]
    size = (4.2 * len(panels) + 1.4, 1.0 + (0.1 + 0.17 * len(kinds)) * len(names))
    with house_figure(size, caption) as fig:
        drawn = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (value, found) in zip(drawn, panels, strict=True):
            for number, kind in enumerate(kinds):
                up = 0.22 * ((len(kinds) - 1) / 2 - number)
                axes.errorbar(
                    found[f"{kind}_gain_per_sequence"],
                    found[rows].map(names.index) - up + 0.05 * (found["seed"] - 1),
                    xerr=2 * found[f"{kind}_gain_error"].fillna(0.0), fmt="o", markersize=3,
                    linewidth=0.8, color=KINDS[kind],
                )  # fmt: skip
            axes.axvline(0.0, color=INK, linewidth=1.0)
            axes.set_xlabel("gain over the control, nats per sequence")
            title_and_legend(axes, f"window {value}")
        drawn[0].set_yticks(range(len(names)), names)
        drawn[0].invert_yaxis()
    return fig


def bars_by_arm(table: pd.DataFrame, panels: dict[str, str], caption: str) -> Figure:
    """Means and standard errors over seeds of some columns, a bar an arm.

    Args:
        table: With the column `arm`.
        panels: Titles by column.
        caption: What to conclude.
    """
    with house_figure((8.4, 3.0), caption) as fig:
        for axes, (column, label) in zip(fig.subplots(1, len(panels)), panels.items(), strict=True):
            mean = over_seeds(table, ["arm"], column)
            colors = [ARMS.get(arm, INK) for arm in mean["arm"]]
            axes.bar(mean["arm"], mean["mean"], yerr=mean["error"].fillna(0.0), color=colors)
            axes.tick_params("x", rotation=30)
            axes.set_title(label)
    return fig
