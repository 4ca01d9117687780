"""Scores by sequence and by document beside their controls, and how far their weights go."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltm_pyro.checks import refuse_other_sequences
from ltm_pyro.diagnostics.control import gains_by_document
from ltm_pyro.diagnostics.estimates import Estimate, clustered_mean, documents_of, khat_threshold
from ltm_pyro.diagnostics.psis import MIN_DRAWS, judged_in_words
from ltm_pyro.errors import InputError
from ltm_pyro.plots import style


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
    colors = dict(zip(gains, (style.BLUE, style.GREEN, style.RED, style.PURPLE), strict=False))
    first = next(iter(gains))
    order = np.argsort(gains[first])
    heavy = (scores["khat"].values > khat_threshold(scores.attrs["draws"]))[order]
    means = {label: clustered_mean(gain, documents_of(scores)) for label, gain in gains.items()}
    with style.house_figure((10.5, 5.0), _score_caption(scores, control, means[first])) as figure:
        main, side = figure.subplots(1, 2, width_ratios=(2.4, 1), sharey=True)
        rank = np.arange(1, len(order) + 1)
        for label, gain in gains.items():
            face: Any = colors[label]
            if label in _AVERAGES:
                face = ["none" if hollow else colors[label] for hollow in heavy]
            edge = {"edgecolors": [colors[label]], "linewidths": 1.1}
            main.scatter(rank, gain[order], s=22, facecolors=face, **edge)
            main.scatter([], [], s=22, color=[colors[label]], label=label)
        se = "elbo_se" if "iw_bound" in scores else "log_predictive_se"
        main.errorbar(
            rank, gains[first][order], yerr=2 * scores[se].values[order], fmt="none",
            ecolor=style.BLUE, lw=0.8, alpha=0.7,
        )  # fmt: skip
        main.set(
            xlabel=f"sequence, by rank of its {first} gain",
            ylabel="gain over the reference\n(nats per sequence)",
        )
        style.whole_numbers(main)
        for place, (label, mean) in enumerate(means.items()):
            style.estimates(side, [place], [mean], color=colors[label], capsize=4, ms=7)
        names = [label.replace(" ", "\n", 1) for label in gains]
        line = "this model at z = 0" if control is None else "control without z"
        _means_and_line(main, side, names, "By sequence", line)
    return figure


def _means_and_line(main: Axes, side: Axes, labels: list[str], title: str, reference: str) -> None:
    """The means' axis, and the line that both panels are read against."""
    side.set(title="Means", xlabel="score", xlim=(-0.6, len(labels) - 0.4))
    side.set_xticks(range(len(labels)), labels)
    side.grid(visible=False, axis="x")
    for axes in (main, side):
        style.zero_line(axes, lw=1.2, ls="--", label=reference)
    style.title_and_legend(main, title)


_AVERAGES = ("IW bound", "prediction")
"""Scores that average over draws inside the logarithm, for which k-hat counts."""


def _gains(scores: xr.Dataset, control: xr.Dataset | None) -> dict[str, style.Floats]:
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


def _score_caption(scores: xr.Dataset, control: xr.Dataset | None, mean: Estimate) -> str:
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


_LABELS = {"elbo": "ELBO", "iw_bound": "IW bound", "log_predictive": "prediction"}


def document_gains(scores: xr.Dataset, control: xr.Dataset) -> Figure:
    """Each document's gain over the control, and the mean over all with its error.

    Args:
        scores: Of `evaluate`.
        control: Of the decoder without thoughts, on the same sequences.

    Raises:
        InputError: if the two are about other sequences.
    """
    gains = gains_by_document(scores, control)
    names = [str(n).removesuffix("_gain") for n in gains.data_vars if str(n).endswith("_gain")]
    last = f"{names[-1]}_gain"
    order = np.argsort(gains[last].values, kind="stable")
    size = 8 + 40 * (gains["sequences"].values / gains["sequences"].values.max())[order]
    mean = {n: clustered_mean(scores[n] + control["nll_z0"], documents_of(scores)) for n in names}
    above = int((gains[last] > 0).sum())
    with style.house_figure(
        (8.6, 3.6), _document_caption(names[-1], mean[names[-1]], above, len(order))
    ) as figure:
        main, side = figure.subplots(1, 2, width_ratios=(2.6, 1), sharey=True)
        for name, color, shift in zip(names, (style.BLUE, style.GREEN), (0, 1), strict=False):
            main.scatter(
                np.arange(1, len(order) + 1), gains[f"{name}_gain"].values[order], s=size,
                color=color, alpha=0.75, lw=0, label=_LABELS[name],
            )  # fmt: skip
            style.estimates(side, [shift], [mean[name]], ms=7, capsize=4, color=color)
        main.set(
            xlabel=f"document, by rank of its {_LABELS[names[-1]]} gain",
            ylabel="gain over the control\n(nats per sequence)",
        )
        style.whole_numbers(main)
        _means_and_line(main, side, [_LABELS[name] for name in names], "By document", "control")
    return figure


def _document_caption(name: str, mean: Estimate, above: int, documents: int) -> str:
    verdict = "told from 0" if mean.differs() else "not told from 0"
    verdict = "too few documents to say" if mean.few else verdict
    return (
        f"Each dot is a document ({documents}; larger ones hold more sequences): nats per "
        "sequence above the same decoder without thoughts, trained apart. "
        f"{above} of {documents} lie above 0 by the {_LABELS[name]}. Right: means over "
        f"sequences, bars hold 95 %, clustered by document: {mean.value:+.2f} ± "
        f"{mean.error:.2f}, {verdict}."
    )


def khat_histogram(scores: xr.Dataset) -> Figure:
    """The k-hats of `evaluate`, and the limit that their number of draws sets."""
    draws = int(scores.attrs["draws"])
    khat = scores["khat"].values
    known = khat[~np.isnan(khat)]
    if not known.size:
        raise InputError(f"no k-hat to draw at S = {draws}: score with draws={MIN_DRAWS} or more")
    limit = khat_threshold(draws)
    shown = np.minimum(known, 2.0)
    caption = (
        f"Pareto k-hat of each sequence's importance weights: {judged_in_words(khat, draws)}. "
        "Right of the line the weights' tail is too heavy for this S: there the IW bound is loose, "
        "and its Monte Carlo error too small."
    )
    with style.house_figure((6.2, 3.2), caption) as figure:
        axes = figure.subplots()
        edges = np.linspace(min(0.0, float(shown.min())), max(1.0, float(shown.max())), 25)
        axes.hist(shown, bins=edges.tolist(), color=style.PURPLE, alpha=0.8, label="sequences")
        axes.axvline(limit, color=style.INK, lw=1.4, ls="--", label=f"limit at S = {draws}")
        axes.set(xlabel="k-hat (2 and more at 2)", ylabel="sequences")
        style.whole_numbers(axes, "y")
        style.title_and_legend(axes, "k-hat")
    return figure
