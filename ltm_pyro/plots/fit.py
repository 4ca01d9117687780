"""The course of a fit: the slow clock's metrics, and the fast loop's traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    Floats,
    house_figure,
    title_and_legend,
)

Rows = Sequence[Mapping[str, float]]


def two_clock_curves(metrics: Rows, control: Rows | None = None) -> Figure:
    """The course of a fit: ELBO (of a point mass the log joint), its parts, and the two clocks.

    Args:
        metrics: One row per slow step, as `DualRateSVI.fit` returns and `metrics.csv` holds.
        control: The same for the decoder without thoughts; its `nll` is the reference.

    Raises:
        InputError: if there is no row.
    """
    if not metrics:
        raise InputError("no metrics to draw: the fit has not made a step")
    step = _column(metrics, "step")
    words = _Words(point_mass="log_joint" in metrics[0])
    nll = _column(metrics, "nll")
    elbo = _column(metrics, "log_joint" if words.point_mass else "elbo")
    kl = -elbo - nll
    span = _span(len(metrics))
    caption = words.caption
    if span > 1:
        caption += f" Faint: each step; bold: mean of the last {span} steps."
    if control:
        caption += " " + _against_control(elbo, control, span, words.bound)
    with house_figure((10.5, 5.6), caption) as figure:
        grid = figure.add_gridspec(3, 2, width_ratios=(2.1, 1))
        main = figure.add_subplot(grid[:, 0])
        side = [figure.add_subplot(grid[row, 1]) for row in range(3)]
        _curve(main, step, -nll, span, GREEN, "reconstruction")
        _curve(main, step, elbo, span, BLUE, words.bound)
        smooth_nll, smooth_elbo = _smooth(-nll, span), _smooth(elbo, span)
        main.fill_between(
            step, smooth_elbo, smooth_nll, color=ORANGE, alpha=0.35, lw=0, label=words.cost
        )
        if control:
            reference = -_column(control, "nll")
            smooth = _smooth(reference, span)
            main.plot(
                _column(control, "step"), smooth, color=INK, ls="--", lw=1.3,
                label="control without z",
            )  # fmt: skip
        name = "held_out_log_joint" if words.point_mass else "held_out_elbo"
        scored = [row for row in metrics if name in row]
        held_out = _column(scored, name)
        if scored:
            error = [row.get(f"{name}_se", 0.0) for row in scored]
            main.errorbar(
                _column(scored, "step"), held_out, error, color=PURPLE, marker="o", ms=3.5, lw=1.3,
                label=f"{words.bound}, held-out text",
            )  # fmt: skip
        main.set_ylim(*_limits(elbo, -nll, *([held_out] if scored else [])))
        main.set(xlabel="slow step", ylabel="nats per sequence")
        main.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        main.margins(x=0.02)
        _curve(side[0], step, kl, span, ORANGE, words.cost_of_q)
        # A KL starts at 0; -log p(z) may lie on either side of it.
        lowest = 1.08 * min(float(kl.min()), 0.0) if words.point_mass else 0.0
        side[0].set(ylabel="nats per seq.", ylim=(lowest, 1.08 * max(float(kl.max()), 1e-3)))
        side[1].plot(step, _column(metrics, "kl_weight"), color=ORANGE, label=f"on {words.cost}")
        side[1].set(ylabel="weight", ylim=(-0.05, 1.1))
        fast = _column(metrics, "lr_fast")
        # Without a fast loop there is no rate, and none on a logarithmic axis.
        side[2].plot(step, np.where(fast > 0, fast, np.nan), color=PURPLE, label="fast (first)")
        side[2].plot(step, _column(metrics, "lr_slow"), color=BLUE, label="slow")
        side[2].set(ylabel="learning rate", yscale="log", xlabel="slow step")
        titles = ("What z says", f"Weight of {words.cost}", "Clocks")
        for axes, title in zip(
            (main, *side), (f"{words.bound} and its parts", *titles), strict=True
        ):
            title_and_legend(axes, title)
        for axes in side:
            axes.sharex(main)
        for axes in side[:2]:
            axes.tick_params(labelbottom=False)
    return figure


@dataclass(frozen=True)
class _Words:
    """What the curves are called: a point mass has neither an ELBO nor a KL."""

    point_mass: bool

    @property
    def bound(self) -> str:
        return "log joint" if self.point_mass else "ELBO"

    @property
    def cost(self) -> str:
        return "-log p(z)" if self.point_mass else "the KL"

    @property
    def cost_of_q(self) -> str:
        return "-log p(z)" if self.point_mass else "KL(q || prior)"

    @property
    def drawn(self) -> str:
        return "at each fast" if self.point_mass else "estimate at one draw per fast"

    @property
    def caption(self) -> str:
        if self.point_mass:
            return (
                "Log joint = reconstruction + log p(z) at each sequence's point, on training "
                "batches. A point mass has no ELBO: this is no bound on log p(x), and may exceed 0."
            )
        return (
            "ELBO = reconstruction - KL, on training batches at fresh draws, KL weight 1: the "
            "orange band between the curves is what z costs. A fit uses its thoughts if the KL "
            "stays above 0 once its weight is 1."
        )


def _against_control(elbo: Floats, control: Rows, span: int, bound: str) -> str:
    reference = -_column(control, "nll")
    gap = float(elbo[-span:].mean() - reference[-span:].mean())
    where = "above" if gap >= 0 else "below"
    return (
        f"Here the {bound} ends {abs(gap):.1f} nats per sequence {where} the control, the same "
        "decoder without thoughts; the held-out scores decide."
    )


def fast_loop_traces(post: Posterior) -> Figure:
    """How q was fitted: the course of the ELBO over the fast steps, sequence by sequence.

    Args:
        post: From `infer`, which records the course.

    Raises:
        InputError: if the posterior has no course.
    """
    trace = post.trace
    if trace is None:
        raise InputError("this posterior has no course to draw: make it with infer, steps above 0")
    elbo, nll, kl = (_array(x) for x in (trace.elbo, trace.nll, trace.kl))
    steps = np.arange(1, len(elbo) + 1)
    words = _Words(point_mass=not post.has_density)
    tail = max(1, len(elbo) // 4)
    level = elbo[-tail:].mean(0)
    rise = level - elbo[0]
    worse = int((rise < 0).sum())
    caption = (
        f"Each line is one sequence ({len(rise)} in all): its {words.bound} {words.drawn} "
        f"step, minus its own mean over the last {tail} steps. Lines that reach 0 early have "
        "converged; lines that still climb at the end ask for more fast steps or a larger rate. "
        f"Reconstruction must gain more than {words.cost} costs. "
        f"Median rise {np.median(rise):.1f} nats per sequence; {worse} of {len(rise)} end lower."
    )
    with house_figure((10.5, 5.2), caption) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
        main = figure.add_subplot(grid[:, 0])
        parts, spread = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
        below = elbo - level
        main.fill_between(
            steps, *np.quantile(below, (0.25, 0.75), axis=1), color=BLUE, alpha=0.18, lw=0,
            label="middle half",
        )  # fmt: skip
        main.plot(steps, below, color=BLUE, lw=0.7, alpha=max(0.12, min(0.7, 8 / len(rise))))
        main.plot([], [], color=BLUE, lw=0.8, alpha=0.7, label="one sequence")
        main.plot(steps, below.mean(1), color=INK, lw=2.2, label="mean")
        main.set(
            xlabel="fast step", ylabel=f"{words.bound} minus its final level (nats per sequence)"
        )
        main.set_ylim(*_limits(below))
        parts.plot(steps, (nll[0] - nll).mean(1), color=GREEN, label="reconstruction gained")
        parts.plot(steps, (kl - kl[0]).mean(1), color=ORANGE, label=f"{words.cost} paid")
        parts.set(xlabel="fast step", ylabel="nats per sequence")
        sns.histplot(x=rise, ax=spread, color=BLUE, bins="auto", alpha=0.55, edgecolor="white")
        spread.axvline(0, color=INK, lw=1, ls=":", label="no rise")
        spread.axvline(float(rise.mean()), color=INK, lw=1.8, label="mean")
        spread.set(xlabel="rise over the fast loop (nats per sequence)", ylabel="sequences")
        for axes, title in ((main, words.bound), (parts, "Parts"), (spread, "Rise")):
            title_and_legend(axes, title)
        for axes in (main, parts):
            axes.axhline(0, color=GREY, lw=0.8, zorder=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        spread.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _array(tensor: Any) -> Floats:
    values: Floats = tensor.detach().cpu().double().numpy()
    return values


def _column(rows: Rows, name: str) -> Floats:
    return np.array([row[name] for row in rows], dtype=np.float64)


def _span(n: int) -> int:
    """Steps that a running mean covers: none for a short fit."""
    return 1 if n < 40 else max(5, n // 30)


def _smooth(values: Floats, span: int) -> Floats:
    """Mean of the last `span` values; of fewer at the start."""
    total = np.concatenate(([0.0], np.cumsum(values)))
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - span, 0)
    mean: Floats = (total[stop] - total[start]) / (stop - start)
    return mean


def _curve(axes: Axes, x: Floats, y: Floats, span: int, color: Any, label: str) -> None:
    if span > 1:
        axes.plot(x, y, color=color, lw=0.7, alpha=0.3)
    axes.plot(x, _smooth(y, span), color=color, lw=1.9, label=label)


def _limits(*curves: Floats) -> tuple[float, float]:
    """Limits that show the end of the course: the first steps fall out of the frame."""
    values = np.concatenate([curve[len(curve) // 20 :] for curve in curves])
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
