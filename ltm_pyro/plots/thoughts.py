"""The posterior over thoughts, drawn over its prior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import seaborn as sns
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltm_pyro.errors import InputError
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.plots import style
from ltm_pyro.random import seeded

_MOVED = 0.25  # scales of the prior
_DRAWS = 1_000  # at least, per sequence
_FLOATS_AT_ONCE = 10**7
_WIDE, _NARROW = (0.05, 0.95), (0.25, 0.75)  # the intervals drawn: 90 % and 50 %


def thought_intervals(
    source: xr.DataTree | Posterior, *, sequences: int = 3, thoughts: int = 6, dims: int = 16
) -> Figure:
    """Posterior intervals of z by sequence, thought and dimension, over the prior's band.

    Args:
        source: A posterior, or a tree of `to_datatree`.
        sequences: Rows at most.
        thoughts: Columns at most.
        dims: Dimensions per panel at most.

    Raises:
        InputError: if there is nothing to draw.
    """
    if min(sequences, thoughts, dims) < 1:
        raise InputError("sequences, thoughts and dims must be 1 or more")
    limits = {"sequence": sequences, "thought": thoughts, "dim": dims}
    z, prior, sizes = _shown(source, limits)
    rows, columns = z.sizes["sequence"], z.sizes["thought"]
    caption = (
        "Thin: 90 % intervals of q(z); thick: 50 %; dot: median; grey: the prior's 90 % band. An "
        "interval that fills the band says nothing about its sequence; one that is narrower or off "
        f"centre does. {_share_outside_prior(z, prior):.0%} of the medians shown lie outside the "
        f"prior's middle 50 %: of a collapsed posterior none would.{_left_out(z, sizes)}"
    )
    size = (max(6.5, 1.2 + 1.9 * columns), 1.5 + 1.6 * rows)
    with style.house_figure(size, caption) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for (row, column), axes in np.ndenumerate(grid):
            one = z.isel(sequence=row, thought=column).values
            _intervals(axes, one, prior.isel(thought=column).values.ravel())
        for row in range(rows):
            grid[row, 0].set_ylabel(f"sequence {z['sequence'].values[row]}\nz")
        for column in range(columns):
            grid[0, column].set_title(str(z["thought"].values[column]))
            grid[-1, column].set_xlabel("dimension")
            grid[-1, column].xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        style.common_legend(figure, grid[0, 0])
    return figure


def posterior_against_prior(source: xr.DataTree | Posterior) -> Figure:
    """Which dimensions of z the data move and narrow, by a posterior or a tree of `to_datatree`."""
    everything = {"sequence": 512, "thought": 64, "dim": 64}
    z, prior, sizes = _shown(source, everything)
    mean, sd = z.mean("sample"), z.std("sample")
    centre, scale = prior.mean("sample"), prior.std("sample")
    moved = (((mean - centre) / scale) ** 2).mean("sequence") ** 0.5
    narrowed = (sd / scale).mean("sequence")
    thoughts = z.sizes["thought"]
    active = int((moved > _MOVED).sum())
    caption = (
        "Each dot is a dimension of z: how far q's mean lies from the prior's (root mean square "
        "over sequences, in scales of the prior), and how wide q is. A collapsed dimension sits at "
        f"the cross, (0, 1); {active} of {moved.size} are moved by more than {_MOVED:g}. Right: "
        "draws of all posteriors together; they should fill the prior, or it has holes that no "
        f"text lives in.{_left_out(z, sizes)}"
    )
    with style.house_figure((8.6, 3.6), caption) as figure:
        axes, side = figure.subplots(1, 2, width_ratios=(1.25, 1))
        for k, color in enumerate(sns.color_palette("viridis", thoughts)):
            label = f"thought {k}" if k in (0, thoughts - 1) else None
            axes.scatter(moved[k], narrowed[k], s=22, color=[color], alpha=0.85, lw=0, label=label)
        axes.plot(0, 1, "+", ms=12, mew=1.6, color=style.INK, label="collapsed")
        axes.set(
            xlabel="distance of q's mean\n(scales of the prior)",
            ylabel="width of q\n(scales of the prior)",
            ylim=(0.0, max(1.08, 1.08 * float(narrowed.max()))),
        )
        style.title_and_legend(axes, "")
        _together(side, ((z - centre) / scale).values, ((prior - centre) / scale).values)
    return figure


def _together(axes: Axes, z: style.Floats, prior: style.Floats) -> None:
    """All of z, and of the prior, in scales of the prior."""
    edges = np.linspace(-4, 4, 49).tolist()
    axes.hist(prior.ravel(), edges, density=True, color=style.GREY, alpha=0.4, label="prior")
    axes.hist(
        z.ravel(), edges, density=True, histtype="step", color=style.BLUE, lw=1.6, label="all q"
    )  # fmt: skip
    axes.set(xlabel="z (scales of the prior)", ylabel="density")
    style.title_and_legend(axes, "Together")


def _intervals(axes: Axes, z: style.Floats, prior: style.Floats) -> None:
    """One panel: z (S, D) and draws of the prior."""
    dims = np.arange(z.shape[1])
    axes.axhspan(
        *np.quantile(prior, _WIDE), color=style.GREY, alpha=0.22, lw=0, label="prior, 90 %"
    )
    axes.vlines(dims, *np.quantile(z, _WIDE, axis=0), color=style.BLUE, lw=1.0, label="q(z), 90 %")
    axes.vlines(
        dims, *np.quantile(z, _NARROW, axis=0), color=style.BLUE, lw=3.0, label="q(z), 50 %"
    )
    axes.plot(dims, np.median(z, axis=0), ".", color=style.INK, ms=4, label="median")


Shown = tuple[xr.DataArray, xr.DataArray, Mapping[Any, int]]
"""Draws of z (sample, sequence, thought, dim), of the prior (sample, thought, dim); all sizes."""


def _shown(source: xr.DataTree | Posterior, limits: dict[str, int]) -> Shown:
    if isinstance(source, Posterior):
        return _from_posterior(source, limits)
    return _from_tree(source, limits)


def _from_tree(tree: xr.DataTree, limits: dict[str, int]) -> Shown:
    if not {"posterior", "prior"} <= set(tree.children):
        raise InputError("the tree has no groups posterior and prior: make it with to_datatree")
    whole, prior = tree["posterior"].dataset["z"], tree["prior"].dataset["z"]
    some = {name: slice(most) for name, most in limits.items()}
    stacked = [
        z.isel(some, missing_dims="ignore").stack(sample=("chain", "draw")).transpose("sample", ...)
        for z in (whole, prior)
    ]
    return stacked[0], stacked[1], whole.sizes


def _from_posterior(post: Posterior, limits: dict[str, int]) -> Shown:
    """Draws a part at a time, since all thoughts of a large model fill the memory."""
    shape = (len(post), *post.distribution.event_shape)
    at_once = max(1, min(_DRAWS, _FLOATS_AT_ONCE // math.prod(shape)))
    some = tuple(slice(most) for most in limits.values())
    with torch.no_grad(), seeded(0, post.ids.device):
        parts = [post.sample(at_once)[:, *some].cpu() for _ in range(-(-_DRAWS // at_once))]
        prior = post.prior.expand(torch.Size([_DRAWS])).sample()[:, *some[1:]].cpu()
    coords = {
        "sequence": post.ids[some[0]].cpu().numpy(),
        "thought": [f"thought {k}" for k in range(shape[1])][some[1]],
    }
    z = xr.DataArray(torch.cat(parts).numpy(), coords, ("sample", *limits))
    return (
        z,
        xr.DataArray(prior.numpy(), dims=("sample", "thought", "dim")),
        dict(zip(limits, shape, strict=True)),
    )


def _share_outside_prior(z: xr.DataArray, prior: xr.DataArray) -> float:
    low, high = np.quantile(prior.values, _NARROW)
    median = np.median(z.values, axis=0)
    return float(((median < low) | (median > high)).mean())


def _left_out(z: xr.DataArray, sizes: Mapping[Any, int]) -> str:
    of = [
        f"{z.sizes[name]} of {sizes[name]} {name}s"
        for name in ("sequence", "thought", "dim")
        if z.sizes[name] < sizes[name]
    ]
    return f" Shown: the first {', '.join(of)}." if of else ""
