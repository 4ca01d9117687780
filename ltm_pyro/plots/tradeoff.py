"""One score against another, or a setting: rate and distortion, own and fresh draws, T_fast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltm_pyro.diagnostics.estimates import Estimate, clustered_mean, documents_of
from ltm_pyro.errors import InputError
from ltm_pyro.plots import style


def rate_distortion(
    scores: Mapping[float, xr.Dataset], control: xr.Dataset | None = None
) -> Figure:
    """Fits with different weights on the KL, in the plane of rate and distortion (Alemi 2018).

    Args:
        scores: Of `evaluate`, mode `oracle`, on the same sequences, by the weight beta.
        control: Of the decoder without thoughts: all of its loss is distortion.

    Raises:
        InputError: if there are fewer than 2, or scores without an ELBO.
    """
    _require_several(scores, "fits")
    betas = sorted(scores)
    rate = [_mean(scores[beta], "kl") for beta in betas]
    loss = [_mean(scores[beta], "nll_given_z") for beta in betas]
    x, y = (np.array([each.value for each in values]) for values in (rate, loss))
    best = int(np.argmin(x + y))
    caption = (
        "Rate is KL(q || prior), distortion E_q[-log p(x | z)], nats per sequence; on a dashed "
        f"line their sum, minus the ELBO, is the same. The best ELBO is that of beta = "
        f"{betas[best]:g} ({-(x + y)[best]:.1f} nats). Points at rate 0 have collapsed; a point to "
        "the right that is no lower spends nats for nothing. Bars: 2 errors over "
        "documents."
    )
    with style.house_figure((6.6, 4.2), caption) as figure:
        axes = figure.subplots()
        axes.errorbar(
            x, y, xerr=[2 * r.error for r in rate], yerr=[2 * d.error for d in loss], fmt="o",
            color=style.BLUE, ecolor=style.GREY, elinewidth=0.8, capsize=2, ms=6,
            label="fits, by beta", zorder=3,
        )  # fmt: skip
        axes.plot(x, y, color=style.BLUE, lw=0.8, alpha=0.6)
        for beta, a, b in zip(betas, x, y, strict=True):
            axes.annotate(f"{beta:g}", (a, b), (6, 5), textcoords="offset points", fontsize=9)
        if control is not None:
            nll = _mean(control, "nll_z0").value
            style.zero_line(axes, nll, ls=":", label="control without z")
        _lines_of_equal_elbo(axes, np.linspace(min(x + y), max(x + y), min(4, len(betas))))
        axes.set(
            xlabel="rate: KL(q || prior) (nats per sequence)",
            ylabel="distortion: -log p(x | z)\n(nats per sequence)",
        )
        style.title_and_legend(axes, "")
    return figure


def _lines_of_equal_elbo(axes: Axes, levels: style.Floats) -> None:
    """Within the frame of what is drawn, from rate 0 on."""
    low, high = min(axes.get_xlim()[0], 0.0), axes.get_xlim()[1]
    frame: dict[str, Any] = {"xlim": (low, high), "ylim": axes.get_ylim()}
    dashed: dict[str, Any] = {"color": style.GREY, "lw": 0.8, "ls": "--"}
    for level in levels:
        axes.plot([low, high], [level - low, level - high], zorder=1, **dashed)
    axes.plot([], [], label="equal ELBO", **dashed)
    axes.set(**frame)


def _mean(data: xr.Dataset, name: str) -> Estimate:
    return clustered_mean(data[name], documents_of(data))


def _require_several(scores: Mapping[Any, xr.Dataset], of: str) -> None:
    if len(scores) < 2 or any("elbo" not in each for each in scores.values()):
        raise InputError(f"give scores with an ELBO (mode 'oracle') of 2 {of} or more")


def own_against_fresh(scores: xr.Dataset) -> Figure:
    """The objective on own draws against the same q's ELBO on fresh ones: `score_on_own_draws`."""
    style.require(scores, "own_draw_objective", "score_on_own_draws")
    own, fresh = scores["own_draw_objective"].values, scores["elbo"].values
    excess = _mean(scores, "excess")
    ends = [min(own.min(), fresh.min()), max(own.max(), fresh.max())]
    caption = (
        f"Each point is a sequence ({len(own)}). Above the line, q's score on its own "
        f"{scores.attrs['fixed_draws']} fixed draws is better than the same q is worth: by "
        f"{excess.value:.2f} ± {excess.error:.2f} nats per sequence on average. The score on own "
        "draws is no bound on log p(x), and can exceed it."
    )
    with style.house_figure((5.6, 4.2), caption) as figure:
        axes = figure.subplots()
        axes.plot(ends, ends, color=style.INK, lw=1.0, ls="--", label="equal")
        axes.errorbar(
            fresh, own, xerr=2 * scores["elbo_se"].values, fmt="o", ms=4, color=style.RED,
            ecolor=style.GREY, elinewidth=0.8, alpha=0.8, label="sequence",
        )  # fmt: skip
        axes.set(
            xlabel="ELBO on fresh draws: a bound (nats)",
            ylabel="score on own draws:\nno bound (nats)",
        )
        style.title_and_legend(axes, "")
    return figure


def score_against_steps(
    scores: Mapping[int, xr.Dataset], control: xr.Dataset | None = None
) -> Figure:
    """What more fast steps per sequence buy, the decoder as it is.

    Args:
        scores: Of `evaluate`, mode `oracle`, on the same sequences, by T_fast.
        control: Of the decoder without thoughts, on these sequences.

    Raises:
        InputError: if there are fewer than 2, or scores without an ELBO.
    """
    _require_several(scores, "numbers of fast steps")
    steps = sorted(scores)
    last, first = scores[steps[-1]], scores[steps[-2]]
    gain = clustered_mean(last["elbo"] - first["elbo"], documents_of(last))
    verdict = "still told from 0: take more" if gain.differs() else "not told from 0: enough"
    caption = (
        f"{last.sizes['sequence']} sequences, inferred anew with each number of fast steps. From "
        f"{steps[-2]} to {steps[-1]} steps the ELBO gains {gain.value:+.2f} ± {gain.error:.2f} "
        f"nats per sequence, paired; {verdict}. Bars, 2 standard errors over documents, are of the "
        "differences to the last ELBO; both scores are lower bounds on log p(x)."
    )
    level = last["elbo"]
    with style.house_figure((6.2, 3.6), caption) as figure:
        axes = figure.subplots()
        for name, label, color in (
            ("elbo", "ELBO", style.BLUE),
            ("iw_bound", "IW bound", style.GREEN),
        ):
            found = [clustered_mean(scores[t][name] - level, documents_of(last)) for t in steps]
            style.estimates(
                axes, steps, found, "-", marker="o", ms=5, capsize=3, color=color, label=label
            )  # fmt: skip
        if control is not None:
            gap = float((-control["nll_z0"] - level).mean())
            style.zero_line(axes, gap, ls="--", label="control without z")
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [str(t) for t in steps])
        axes.set(
            xlabel="fast steps per sequence, T_fast",
            ylabel=f"bound less the ELBO at {steps[-1]}\n(nats per sequence)",
        )
        style.title_and_legend(axes, "")
    return figure
