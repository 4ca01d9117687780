"""One score against another, or a setting: rate and distortion, own and fresh draws, T_fast."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from ltm_pyro.diagnostics.estimates import Estimate, clustered_mean, documents_of
from ltm_pyro.errors import InputError
from ltm_pyro.plots.style import BLUE, GREEN, GREY, INK, RED, house_figure, title_and_legend


def _mean(data: xr.Dataset, name: str) -> Estimate:
    return clustered_mean(data[name], documents_of(data))


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
    if len(scores) < 2 or any("elbo" not in each for each in scores.values()):
        raise InputError(
            "a plane of rate and distortion takes scores with an ELBO of 2 fits or more"
        )
    betas = sorted(scores)
    rate = [_mean(scores[beta], "kl") for beta in betas]
    loss = [_mean(scores[beta], "nll_given_z") for beta in betas]
    total = [a.value + b.value for a, b in zip(rate, loss, strict=True)]
    best = int(np.argmin(total))
    caption = (
        "Rate is KL(q || prior), distortion E_q[-log p(x | z)], nats per sequence; on a dashed "
        f"line their sum, minus the ELBO, is the same. The best ELBO is that of beta = "
        f"{betas[best]:g} ({-total[best]:.1f} nats). Points at rate 0 have collapsed; a point to "
        "the right that is no lower spends nats for nothing. Bars: 2 errors over "
        "documents."
    )
    with house_figure((6.6, 4.2), caption) as figure:
        axes = figure.subplots()
        x, y = ([each.value for each in values] for values in (rate, loss))
        axes.errorbar(
            x, y, xerr=[2 * r.error for r in rate], yerr=[2 * d.error for d in loss], fmt="o",
            color=BLUE, ecolor=GREY, elinewidth=0.8, capsize=2, ms=6,
            label="fits, by beta", zorder=3,
        )  # fmt: skip
        axes.plot(x, y, color=BLUE, lw=0.8, alpha=0.6)
        for beta, a, b in zip(betas, x, y, strict=True):
            axes.annotate(f"{beta:g}", (a, b), (6, 5), textcoords="offset points", fontsize=9)
        if control is not None:
            nll = _mean(control, "nll_z0").value
            axes.axhline(nll, color=INK, lw=1.0, ls=":", label="control without z")
        low, high = axes.get_xlim()
        low = min(low, 0.0)
        bottom, top = axes.get_ylim()
        for level in np.linspace(min(total), max(total), min(4, len(betas))):
            axes.plot(
                [low, high], [level - low, level - high], color=GREY, lw=0.8, ls="--", zorder=1
            )
        axes.plot([], [], color=GREY, lw=0.8, ls="--", label="equal ELBO")
        axes.set(
            xlim=(low, high), ylim=(bottom, top), xlabel="rate: KL(q || prior) (nats per sequence)",
            ylabel="distortion: -log p(x | z)\n(nats per sequence)",
        )  # fmt: skip
        title_and_legend(axes, "")
    return figure


def own_against_fresh(scores: xr.Dataset) -> Figure:
    """The objective on the draws that fitted q, against the ELBO of the same q on fresh draws.

    Args:
        scores: Of `score_on_own_draws`.

    Raises:
        InputError: if it is another dataset.
    """
    if "own_draw_objective" not in scores:
        raise InputError("no own draws to compare: give the Dataset of score_on_own_draws")
    own, fresh = scores["own_draw_objective"].values, scores["elbo"].values
    excess = _mean(scores, "excess")
    ends = [min(own.min(), fresh.min()), max(own.max(), fresh.max())]
    caption = (
        f"Each point is a sequence ({len(own)}). Above the line, q's score on its own "
        f"{scores.attrs['fixed_draws']} fixed draws is better than the same q is worth: by "
        f"{excess.value:.2f} ± {excess.error:.2f} nats per sequence on average. The score on own "
        "draws is no bound on log p(x), and can exceed it."
    )
    with house_figure((5.6, 4.2), caption) as figure:
        axes = figure.subplots()
        axes.plot(ends, ends, color=INK, lw=1.0, ls="--", label="equal")
        axes.errorbar(
            fresh, own, xerr=2 * scores["elbo_se"].values, fmt="o", ms=4, color=RED, ecolor=GREY,
            elinewidth=0.8, alpha=0.8, label="sequence",
        )  # fmt: skip
        axes.set(
            xlabel="ELBO on fresh draws: a bound (nats)",
            ylabel="score on own draws:\nno bound (nats)",
        )
        title_and_legend(axes, "")
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
    if len(scores) < 2 or any("elbo" not in each for each in scores.values()):
        raise InputError("a course takes scores with an ELBO at 2 numbers of fast steps or more")
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
    with house_figure((6.2, 3.6), caption) as figure:
        axes = figure.subplots()
        for name, label, color in (("elbo", "ELBO", BLUE), ("iw_bound", "IW bound", GREEN)):
            found = [clustered_mean(scores[t][name] - level, documents_of(last)) for t in steps]
            axes.errorbar(
                steps, [f.value for f in found], yerr=[2 * np.nan_to_num(f.error) for f in found],
                marker="o", ms=5, capsize=3, color=color, label=label,
            )  # fmt: skip
        if control is not None:
            gap = float((-control["nll_z0"] - level).mean())
            axes.axhline(gap, color=INK, lw=1.0, ls="--", label="control without z")
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [str(t) for t in steps])
        axes.set(
            xlabel="fast steps per sequence, T_fast",
            ylabel=f"bound less the ELBO at {steps[-1]}\n(nats per sequence)",
        )
        title_and_legend(axes, "")
    return figure
