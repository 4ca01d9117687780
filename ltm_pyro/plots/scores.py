"""Scores, sequence by sequence, beside their controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ltm_pyro.checks import refuse_other_sequences
from ltm_pyro.diagnostics.estimates import Estimate, clustered_mean, documents_of, khat_threshold
from ltm_pyro.diagnostics.psis import judged_in_words
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
    gains = _gains(scores, control)
    colors = dict(zip(gains, (BLUE, GREEN, RED, PURPLE), strict=False))
    first, bounds = next(iter(gains)), "iw_bound" in scores
    order = np.argsort(gains[first])
    khat, limit = scores["khat"].values, khat_threshold(scores.attrs["draws"])
    heavy = (khat > limit)[order]
    name = "this model at z = 0" if control is None else "control without z"
    documents = documents_of(scores)
    means = {label: clustered_mean(gain, documents) for label, gain in gains.items()}
    with house_figure((10.5, 5.0), _caption(scores, control, means[first])) as figure:
        main, side = figure.subplots(1, 2, width_ratios=(2.4, 1), sharey=True)
        rank = np.arange(1, len(order) + 1)
        for label, gain in gains.items():
            fill = np.where(heavy, "none", "full") if label in _AVERAGES else None
            _points(main, rank, gain[order], colors[label], label, fill)
        error = 2 * scores["elbo_se" if bounds else "log_predictive_se"].values[order]
        main.errorbar(
            rank, gains[first][order], yerr=error, fmt="none", ecolor=BLUE, lw=0.8, alpha=0.7
        )
        main.set(
            xlabel=f"sequence, by rank of its {first} gain",
            ylabel="gain over the reference\n(nats per sequence)",
        )  # fmt: skip
        main.xaxis.set_major_locator(MaxNLocator(integer=True))
        for place, (label, mean) in enumerate(means.items()):
            side.errorbar(
                place, mean.value, yerr=2 * mean.error, fmt="o", color=colors[label], capsize=4,
                ms=7,
            )  # fmt: skip
        side.set(title="Means", xlabel="score", xlim=(-0.6, len(gains) - 0.4))
        side.set_xticks(range(len(gains)), [label.replace(" ", "\n", 1) for label in gains])
        side.grid(visible=False, axis="x")
        for axes in (main, side):
            axes.axhline(0, color=INK, lw=1.2, ls="--", label=name)
        title_and_legend(main, "By sequence")
    return figure


_AVERAGES = ("IW bound", "prediction")
"""Scores that average over draws inside the logarithm, for which k-hat counts."""


def _gains(scores: xr.Dataset, control: xr.Dataset | None) -> dict[str, Floats]:
    """Nats per sequence above the reference, by the name of the score."""
    reference = -(scores if control is None else control)["nll_z0"].values
    if "iw_bound" in scores:
        gains = {"ELBO": scores["elbo"].values, "IW bound": scores["iw_bound"].values}
    else:
        gains = {"prediction": scores["log_predictive"].values}
    gains["shuffled z"] = -scores["nll_shuffled"].values
    if control is not None:
        gains["z at 0"] = -scores["nll_z0"].values
    return {label: values - reference for label, values in gains.items()}


def _caption(scores: xr.Dataset, control: xr.Dataset | None, mean: Estimate) -> str:
    """What the points prove, and what they do not."""
    if "iw_bound" not in scores:
        what = (
            "The prediction is of what q has not seen; it is no bound on log p(rest | first part)."
        )
    else:
        what = "ELBO and IW bound are lower bounds on the model's log p(x), up to their error."
    if control is None:
        line = (
            "The line is this model at z = 0, not the best that it could do without thoughts: "
            "points above it show that thoughts are used, not that they are needed."
        )
    else:
        line = (
            "The line is a decoder without thoughts, trained apart: a point above says that this "
            "fit gives the sequence more probability than that fit does, not that thoughts are why "
            "(z at 0 may lie above too). What thoughts gain in training shows on "
            "average, over seeds."
        )
    known = documents_of(scores) is not None
    over = f"{mean.documents} {'documents' if known else 'sequences, taken for independent'}"
    khat = judged_in_words(scores["khat"].values, scores.attrs["draws"])
    return (
        f"Nats per sequence. {what} {line} Another document's thoughts (shuffled z) must score "
        f"lower, or z is not used. k-hat (open circles above its limit): {khat}. Right: means over "
        f"{over}, bars hold 95 %."
    )


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
