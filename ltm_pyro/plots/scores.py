"""Scores, sequence by sequence, beside their controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ltm_pyro.data.pairing import refuse_other_sequences
from ltm_pyro.plots.style import (
    BLUE,
    GREEN,
    INK,
    PURPLE,
    RED,
    Floats,
    house_figure,
    title_and_legend,
)

_KHAT_LIMIT = 0.7


def score_panel(scores: xr.Dataset, control: xr.Dataset | None = None) -> Figure:
    """Scores per sequence as gains over a reference without thoughts.

    Args:
        scores: Of `evaluate`.
        control: Scores of the decoder without thoughts on the same sequences; without it the
            reference is the same model at z = 0.

    Raises:
        InputError: if the control is about other sequences.
    """
    if control is not None:
        refuse_other_sequences(scores, control, ("scores", "control"))
    reference = -scores["nll_z0"].values if control is None else control["elbo"].values
    name = "this model at z = 0" if control is None else "control without z"
    gains = {
        "ELBO": scores["elbo"].values - reference,
        "IW bound": scores["iw_bound"].values - reference,
        "shuffled z": -scores["nll_shuffled"].values - reference,
    }
    if control is not None:
        gains["z at 0"] = -scores["nll_z0"].values - reference
    colors = dict(zip(gains, (BLUE, GREEN, RED, PURPLE), strict=False))
    order = np.argsort(gains["ELBO"])
    loose = ~(scores["khat"].values <= _KHAT_LIMIT)[order]  # an unknown k-hat counts too
    caption = (
        f"Nats per sequence above the reference ({name}), sequences in order of their ELBO. "
        "ELBO and IW bound are lower bounds on log p(x): above 0, up to its error, a bound proves "
        "a gain. Another sequence's thoughts (shuffled z) must score lower, or z is not used. Open "
        f"circles: k-hat above {_KHAT_LIMIT} or unknown, the IW bound is noisy and probably loose "
        f"({loose.mean():.0%} here). Right: means with 2 standard errors over sequences."
    )
    with house_figure((10.5, 5.0), caption) as figure:
        main, means = figure.subplots(1, 2, width_ratios=(2.4, 1), sharey=True)
        rank = np.arange(1, len(order) + 1)
        for label, gain in gains.items():
            fill = np.where(loose, "none", "full") if label == "IW bound" else None
            _points(main, rank, gain[order], colors[label], label, fill)
        error = 2 * scores["elbo_se"].values[order]
        main.errorbar(
            rank, gains["ELBO"][order], yerr=error, fmt="none", ecolor=BLUE, lw=0.8, alpha=0.7
        )
        main.set(
            xlabel="sequence, by rank of its ELBO gain",
            ylabel="gain over the reference\n(nats per sequence)",
        )  # fmt: skip
        main.xaxis.set_major_locator(MaxNLocator(integer=True))
        for place, (label, gain) in enumerate(gains.items()):
            spread = 2 * gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else np.nan
            means.errorbar(
                place, gain.mean(), yerr=spread, fmt="o", color=colors[label], capsize=4, ms=7
            )
        means.set(title="Means", xlabel="score", xlim=(-0.6, len(gains) - 0.4))
        means.set_xticks(range(len(gains)), [label.replace(" ", "\n", 1) for label in gains])
        means.grid(visible=False, axis="x")
        for axes in (main, means):
            axes.axhline(0, color=INK, lw=1.2, ls="--", label=name)
        title_and_legend(main, "By sequence")
    return figure


def _points(
    axes: Axes,
    x: NDArray[np.int_],
    y: Floats,
    color: Any,
    label: str,
    fill: NDArray[np.str_] | None,
) -> None:
    face = color if fill is None else [color if f == "full" else "none" for f in fill]
    axes.scatter(x, y, s=22, facecolors=face, edgecolors=[color], linewidths=1.1)
    axes.scatter([], [], s=22, color=[color], label=label)
