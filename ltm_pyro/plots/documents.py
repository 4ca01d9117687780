"""Scores by document, and how far their importance weights can be trusted."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltm_pyro.diagnostics.control import gains_by_document
from ltm_pyro.diagnostics.estimates import clustered_mean, documents_of, khat_threshold
from ltm_pyro.diagnostics.psis import MIN_DRAWS, judged_in_words
from ltm_pyro.errors import InputError
from ltm_pyro.plots.style import BLUE, GREEN, INK, PURPLE, house_figure, title_and_legend


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
    labels = {"elbo": "ELBO", "iw_bound": "IW bound", "log_predictive": "prediction"}
    order = np.argsort(gains[f"{names[-1]}_gain"].values, kind="stable")
    rank = np.arange(1, len(order) + 1)
    size = 8 + 40 * (gains["sequences"].values / gains["sequences"].values.max())[order]
    above = int((gains[f"{names[-1]}_gain"] > 0).sum())
    mean = {
        name: clustered_mean(scores[name] + control["nll_z0"], documents_of(scores))
        for name in names
    }
    last = mean[names[-1]]
    verdict = "told from 0" if last.differs() else "not told from 0"
    verdict = "too few documents to say" if last.few else verdict
    caption = (
        f"Each dot is a document ({len(order)}; larger ones hold more sequences): nats per "
        "sequence above the same decoder without thoughts, trained apart. "
        f"{above} of {len(order)} lie above 0 by the {labels[names[-1]]}. Right: means over "
        f"sequences, bars hold 95 %, clustered by document: {last.value:+.2f} ± "
        f"{last.error:.2f}, {verdict}."
    )
    with house_figure((8.6, 3.6), caption) as figure:
        main, side = figure.subplots(1, 2, width_ratios=(2.6, 1), sharey=True)
        for name, color, shift in zip(names, (BLUE, GREEN), (0, 1), strict=False):
            values = gains[f"{name}_gain"].values[order]
            main.scatter(rank, values, s=size, color=color, alpha=0.75, lw=0, label=labels[name])
            side.errorbar(
                shift, mean[name].value, yerr=2 * mean[name].error, fmt="o", ms=7, capsize=4,
                color=color,
            )  # fmt: skip
        main.set(
            xlabel=f"document, by rank of its {labels[names[-1]]} gain",
            ylabel="gain over the control\n(nats per sequence)",
        )
        main.xaxis.set_major_locator(MaxNLocator(integer=True))
        side.set(title="Means", xlabel="score", xlim=(-0.6, len(names) - 0.4))
        side.set_xticks(range(len(names)), [labels[name] for name in names])
        side.grid(visible=False, axis="x")
        for axes in (main, side):
            axes.axhline(0, color=INK, lw=1.2, ls="--", label="control")
        title_and_legend(main, "By document")
    return figure


def khat_histogram(scores: xr.Dataset) -> Figure:
    """The k-hats of all sequences with the limit that their number of draws sets.

    Args:
        scores: Of `evaluate`, with draws enough to judge.

    Raises:
        InputError: if no k-hat was judged.
    """
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
    with house_figure((6.2, 3.2), caption) as figure:
        axes = figure.subplots()
        edges = np.linspace(min(0.0, float(shown.min())), max(1.0, float(shown.max())), 25)
        axes.hist(shown, bins=edges.tolist(), color=PURPLE, alpha=0.8, label="sequences")
        axes.axvline(limit, color=INK, lw=1.4, ls="--", label=f"limit at S = {draws}")
        axes.set(xlabel="k-hat (2 and more at 2)", ylabel="sequences")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        title_and_legend(axes, "k-hat")
    return figure
