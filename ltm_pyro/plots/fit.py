"""The course of a fit: the slow clock's metrics, and the fast loop's traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.plots import style

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
    words = _OF_A_POINT if "log_joint" in metrics[0] else _OF_A_DENSITY
    course = _Course(
        _column(metrics, "step"),
        _column(metrics, "log_joint" if words is _OF_A_POINT else "elbo"),
        _column(metrics, "nll"),
        1 if len(metrics) < 40 else max(5, len(metrics) // 30),
    )
    caption = words.caption
    if course.span > 1:
        caption += f" Faint: each step; bold: mean of the last {course.span} steps."
    if control:
        caption += " " + _against_control(course, control, words.bound)
    with style.house_figure((10.5, 5.6), caption) as figure:
        grid = figure.add_gridspec(3, 2, width_ratios=(2.1, 1))
        main = figure.add_subplot(grid[:, 0])
        side = [figure.add_subplot(grid[row, 1]) for row in range(3)]
        _bound_and_parts(main, course, words, metrics, control)
        _cost_and_clocks(side, course, words, metrics)
        titles = ("What z says", f"Weight of {words.cost}", "Clocks")
        style.title_and_legend(main, f"{words.bound} and its parts")
        for axes, title in zip(side, titles, strict=True):
            style.title_and_legend(axes, title)
        for axes in side:
            axes.sharex(main)
        for axes in side[:2]:
            axes.tick_params(labelbottom=False)
    return figure


@dataclass(frozen=True)
class _Course:
    """Columns of the metrics, and how many steps a running mean covers: one in a short fit."""

    step: style.Floats
    elbo: style.Floats
    nll: style.Floats
    span: int

    @property
    def kl(self) -> style.Floats:
        return -self.elbo - self.nll

    def smooth(self, values: style.Floats) -> style.Floats:
        """Mean of the last `span` values; of fewer at the start."""
        mean: style.Floats = pd.Series(values).rolling(self.span, min_periods=1).mean().to_numpy()
        return mean

    def draw(self, axes: Axes, values: style.Floats, color: Any, label: str) -> None:
        if self.span > 1:
            axes.plot(self.step, values, color=color, lw=0.7, alpha=0.3)
        axes.plot(self.step, self.smooth(values), color=color, lw=1.9, label=label)


def _bound_and_parts(
    axes: Axes, course: _Course, words: _Words, metrics: Rows, control: Rows | None
) -> None:
    course.draw(axes, -course.nll, style.GREEN, "reconstruction")
    course.draw(axes, course.elbo, style.BLUE, words.bound)
    between = course.smooth(course.elbo), course.smooth(-course.nll)
    axes.fill_between(course.step, *between, color=style.ORANGE, alpha=0.35, lw=0, label=words.cost)
    if control:
        reference = course.smooth(-_column(control, "nll"))
        axes.plot(
            _column(control, "step"), reference, color=style.INK, ls="--", lw=1.3,
            label="control without z",
        )  # fmt: skip
    name = words.held_out
    scored = [row for row in metrics if name in row]
    held_out = _column(scored, name)
    if scored:
        axes.errorbar(
            _column(scored, "step"), held_out, [row.get(f"{name}_se", 0.0) for row in scored],
            color=style.PURPLE, marker="o", ms=3.5, lw=1.3, label=f"{words.bound}, held-out text",
        )  # fmt: skip
    axes.set_ylim(*_limits(course.elbo, -course.nll, *([held_out] if scored else [])))
    axes.set(xlabel="slow step", ylabel="nats per sequence")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.margins(x=0.02)


def _cost_and_clocks(side: list[Axes], course: _Course, words: _Words, metrics: Rows) -> None:
    kl, weight, clocks = side
    course.draw(kl, course.kl, style.ORANGE, words.cost_of_q)
    # A KL starts at 0; -log p(z) may lie on either side of it.
    lowest = 1.08 * min(float(course.kl.min()), 0.0) if words is _OF_A_POINT else 0.0
    kl.set(ylabel="nats per seq.", ylim=(lowest, 1.08 * max(float(course.kl.max()), 1e-3)))
    weight.plot(
        course.step, _column(metrics, "kl_weight"), color=style.ORANGE, label=f"on {words.cost}"
    )  # fmt: skip
    weight.set(ylabel="weight", ylim=(-0.05, 1.1))
    fast = _column(metrics, "lr_fast")
    # Without a fast loop there is no rate, and none on a logarithmic axis.
    fast = np.where(fast > 0, fast, np.nan)
    clocks.plot(course.step, fast, color=style.PURPLE, label="fast (first)")
    clocks.plot(course.step, _column(metrics, "lr_slow"), color=style.BLUE, label="slow")
    clocks.set(ylabel="learning rate", yscale="log", xlabel="slow step")


@dataclass(frozen=True)
class _Words:
    """What the curves are called: a point mass has neither an ELBO nor a KL."""

    bound: str
    cost: str
    cost_of_q: str
    held_out: str
    caption: str


_OF_A_DENSITY = _Words(
    "ELBO", "the KL", "KL(q || prior)", "held_out_elbo",
    "ELBO = reconstruction - KL, on training batches at fresh draws, KL weight 1: the orange band "
    "between the curves is what z costs. A fit uses its thoughts if the KL stays above 0 once its "
    "weight is 1.",
)  # fmt: skip
_OF_A_POINT = _Words(
    "log joint", "-log p(z)", "-log p(z)", "held_out_log_joint",
    "Log joint = reconstruction + log p(z) at each sequence's point, on training batches. A point "
    "mass has no ELBO: this is no bound on log p(x), and may exceed 0.",
)  # fmt: skip


def _against_control(course: _Course, control: Rows, bound: str) -> str:
    reference = -_column(control, "nll")
    gap = float(course.elbo[-course.span :].mean() - reference[-course.span :].mean())
    where = "above" if gap >= 0 else "below"
    return (
        f"Here the {bound} ends {abs(gap):.1f} nats per sequence {where} the control, the same "
        "decoder without thoughts; the held-out scores decide."
    )


def fast_loop_traces(post: Posterior) -> Figure:
    """How `infer` fitted q: the course of the ELBO over the fast steps, sequence by sequence."""
    trace = post.trace
    if trace is None:
        raise InputError("this posterior has no course to draw: make it with infer, steps above 0")
    elbo, nll, kl = (
        values.detach().cpu().double().numpy() for values in (trace.elbo, trace.nll, trace.kl)
    )
    words = _OF_A_DENSITY if post.has_density else _OF_A_POINT
    tail = max(1, len(elbo) // 4)
    level = elbo[-tail:].mean(0)
    rise = level - elbo[0]
    drawn = "estimate at one draw per fast" if post.has_density else "at each fast"
    caption = (
        f"Each line is one sequence ({len(rise)} in all): its {words.bound} {drawn} "
        f"step, minus its own mean over the last {tail} steps. Lines that reach 0 early have "
        "converged; lines that still climb at the end ask for more fast steps or a larger rate. "
        f"Reconstruction must gain more than {words.cost} costs. Median rise {np.median(rise):.1f} "
        f"nats per sequence; {int((rise < 0).sum())} of {len(rise)} end lower."
    )
    with style.house_figure((10.5, 5.2), caption) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=(1.6, 1))
        main = figure.add_subplot(grid[:, 0])
        parts, spread = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
        steps = np.arange(1, len(elbo) + 1)
        _lines(main, steps, elbo - level)
        main.set_ylabel(f"{words.bound} minus its final level (nats per sequence)")
        parts.plot(steps, (nll[0] - nll).mean(1), color=style.GREEN, label="reconstruction gained")
        parts.plot(steps, (kl - kl[0]).mean(1), color=style.ORANGE, label=f"{words.cost} paid")
        parts.set(xlabel="fast step", ylabel="nats per sequence")
        _rises(spread, rise)
        for axes, title in ((main, words.bound), (parts, "Parts"), (spread, "Rise")):
            style.title_and_legend(axes, title)
        for axes in (main, parts):
            style.zero_line(axes, color=style.GREY, lw=0.8, zorder=0)
            style.whole_numbers(axes)
        style.whole_numbers(spread, "y")
    return figure


def _rises(axes: Axes, rise: style.Floats) -> None:
    look = {"color": style.BLUE, "alpha": 0.55, "edgecolor": "white"}
    sns.histplot(x=rise, ax=axes, bins="auto", **look)
    axes.axvline(0, color=style.INK, lw=1, ls=":", label="no rise")
    axes.axvline(float(rise.mean()), color=style.INK, lw=1.8, label="mean")
    axes.set(xlabel="rise over the fast loop (nats per sequence)", ylabel="sequences")


def _lines(axes: Axes, steps: NDArray[np.int_], below: style.Floats) -> None:
    """Each sequence's course (steps, B), the middle half of them, and their mean."""
    axes.fill_between(
        steps, *np.quantile(below, (0.25, 0.75), axis=1), color=style.BLUE, alpha=0.18, lw=0,
        label="middle half",
    )  # fmt: skip
    axes.plot(steps, below, color=style.BLUE, lw=0.7, alpha=max(0.12, min(0.7, 8 / below.shape[1])))
    axes.plot([], [], color=style.BLUE, lw=0.8, alpha=0.7, label="one sequence")
    axes.plot(steps, below.mean(1), color=style.INK, lw=2.2, label="mean")
    axes.set_xlabel("fast step")
    axes.set_ylim(*_limits(below))


def _column(rows: Rows, name: str) -> style.Floats:
    return np.array([row[name] for row in rows], dtype=np.float64)


def _limits(*curves: style.Floats) -> tuple[float, float]:
    """Limits that show the end of the course: the first steps fall out of the frame."""
    values = np.concatenate([curve[len(curve) // 20 :] for curve in curves])
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin
