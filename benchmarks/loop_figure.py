"""The figure of `fast_loop.py --scaling`: cost of the fast loop as one thing grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ltm_pyro.plots.style import BLUE, GREY, INK, house_figure

_LOOPS = (("c", "DualRateSVI", BLUE, "o"), ("a", "published algorithm", GREY, "s"))
Axis = Mapping[str, Any]


def cost_curves(result: Mapping[str, Any]) -> Figure:
    """Panels for the axes that the run has, and one for memory against V.

    Args:
        result: What `fast_loop.py --scaling` writes as JSON.
    """
    axes = result["axes"]
    panels = [(name, "seconds") for name in axes]
    if "vocab_size" in axes:
        panels.insert(panels.index(("vocab_size", "seconds")) + 1, ("vocab_size", "peak_bytes"))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with house_figure((3.6 * columns, 3.0 * rows + 0.3), caption(result)) as figure:
        grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for place, (name, what) in zip(grid, panels, strict=False):
            _PANELS[name](place, axes[name], what)
        for place in grid[len(panels) :]:
            place.set_visible(False)
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _curve(place: Axes, axis: Axis, what: str, scale: float, per_step: bool) -> None:
    at = [p["value"] for p in axis["points"]]
    key = "seconds_per_fast_step" if per_step else what
    for name, label, color, marker in _LOOPS:
        cost = [p[key][name] * scale for p in axis["points"]]
        place.plot(at, cost, marker=marker, ms=4, color=color, label=label)
    place.set_xscale("log", base=2)
    place.set_yscale("log")
    place.set_xticks(at, [_short(v) for v in at])
    place.xaxis.set_minor_locator(NullLocator())
    _plain_numbers(place)


def _plain_numbers(place: Axes) -> None:
    """20 and 0.5 on a logarithmic axis, where powers of ten would leave most ticks bare."""
    place.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    place.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    place.yaxis.set_minor_formatter(NullFormatter())


def _line(place: Axes, axis: Axis, scale: float) -> None:
    """The straight line that (c) is compared with."""
    fit = axis["linearity"]
    at = np.array([p["value"] for p in axis["points"]], dtype=float)
    place.plot(
        at, scale * (fit["intercept"] + fit["slope"] * at), color=INK, lw=0.9, ls="--",
        label="straight line through DualRateSVI", zorder=1,
    )  # fmt: skip


def _fast_steps(place: Axes, axis: Axis, what: str) -> None:
    _curve(place, axis, what, 1.0, per_step=False)
    _line(place, axis, 1.0)
    place.set(title="Fast steps", xlabel="T_fast", ylabel="time of the loop (s)")


def _length(place: Axes, axis: Axis, what: str) -> None:
    _curve(place, axis, what, 1e3, per_step=True)
    _line(place, axis, 1e3 / axis["points"][0]["fast_steps"])
    place.set(title="Length, window fixed", xlabel="T (tokens)", ylabel="time per fast step (ms)")


def _vocabulary(place: Axes, axis: Axis, what: str) -> None:
    if what == "peak_bytes":
        _curve(place, axis, what, 1e-6, per_step=False)
        place.set(
            title="Memory and vocabulary", xlabel="V (tokens known)",
            ylabel="peak beyond weights (MB)",
        )  # fmt: skip
        return
    _curve(place, axis, what, 1e3, per_step=True)
    _line(place, axis, 1e3 / axis["points"][0]["fast_steps"])
    place.set(title="Vocabulary", xlabel="V (tokens known)", ylabel="time per fast step (ms)")


def _batch(place: Axes, axis: Axis, what: str) -> None:
    _curve(place, axis, what, 1e3, per_step=True)
    _line(place, axis, 1e3 / axis["points"][0]["fast_steps"])
    place.set(title="Batch", xlabel="B (sequences)", ylabel="time per fast step (ms)")


def _preset(place: Axes, axis: Axis, what: str) -> None:
    points = axis["points"]
    where = np.arange(len(points))
    for name, label, color, marker in _LOOPS:
        cost = [1e6 * p["seconds_per_fast_step"][name] / p["tokens"] for p in points]
        place.plot(where, cost, marker=marker, ms=6, lw=0, color=color, label=label)
    place.set_yscale("log")
    place.set_xlim(-0.5, len(points) - 0.5)
    _plain_numbers(place)
    place.set_xticks(where, [str(p["value"]) for p in points])
    place.set(title="Preset", xlabel="model", ylabel="time per token\nand fast step (µs)")
    place.grid(visible=False, axis="x")


_PANELS = {
    "fast_steps": _fast_steps, "length": _length, "vocab_size": _vocabulary,
    "batch_size": _batch, "preset": _preset,
}  # fmt: skip


def _short(value: float) -> str:
    return f"{value // 1024:.0f}k" if value >= 1024 else str(value)


def caption(result: Mapping[str, Any]) -> str:
    """What was measured and what to conclude, with the numbers."""
    axes, head = result["axes"], result["header"]
    text = (
        "Cost of the fast loop as one thing grows and the rest stays; medians of "
        f"{min(a['rounds'] for a in axes.values())} rounds, of the published algorithm one run; "
        f"{head['machine']}, {head['threads']} threads. "
    )
    fits = [
        f"{name}: {axes[key]['linearity']['residual']:.1%}"
        for key, name in (("fast_steps", "T_fast"), ("length", "T"), ("vocab_size", "V"),
                          ("batch_size", "B"))
        if key in axes
    ]  # fmt: skip
    if fits:
        text += f"Farthest that DualRateSVI is from a straight line: {', '.join(fits)}. "
    if "vocab_size" in axes:
        memory = axes["vocab_size"]["memory"]
        text += (
            "Each entry of the vocabulary adds "
            f"{max(memory['c']['bytes_per_vocabulary_entry'], 0.0):.3g} bytes to its peak, and "
            f"{memory['a']['bytes_per_vocabulary_entry']:,.0f} to that of the published algorithm, "
            "which keeps all logits and their gradient. "
        )
    return text + (
        "The dashed line is a fixed cost and a cost per unit: where it fits, a run of any size "
        "can be costed from two."
    )
