"""A map of thoughts: each sequence's posterior mean, in two dimensions."""

from __future__ import annotations

import importlib
import math
from typing import Literal

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from ltm_pyro.checks import one_of
from ltm_pyro.errors import InputError, shown
from ltm_pyro.inference.posterior import Posterior
from ltm_pyro.plots import style

_MOST_COLORS = 8  # categories that can be told apart; the rest is one more
_LONGEST = 24  # characters of a name in the legend


def thought_map(
    source: xr.DataTree | Posterior,
    by: str | ArrayLike | None = None,
    *,
    name: str | None = None,
    method: Literal["pca", "umap"] = "pca",
) -> Figure:
    """Posterior means of z, each sequence a point, coloured by whatever is known of it.

    Args:
        source: A posterior, or a tree of `to_datatree`.
        by: What to colour by, one value per sequence, e.g. `batch.metadata["author"]`; of a tree
            also the name of a coordinate of its sequences. Numbers of many values get a colour
            scale, all else a legend.
        name: What the colour is, for the legend; of a pandas series its own name.
        method: `pca`, a rotation in which distances mean something; or `umap`, where umap-learn is
            installed, which shows neighbourhoods only.

    Raises:
        InputError: if there are fewer than 3 sequences, `by` does not fit them, or UMAP is absent.
    """
    one_of("method", method, ("pca", "umap"))
    mean, by, name = _points(source, by, name)
    if len(mean) < 3:
        raise InputError(f"{len(mean)} sequences make no map: give 3 or more")
    place, kept = _pca(mean) if method == "pca" else (_umap(mean), None)
    with style.house_figure((6.6, 4.8), _caption(mean, kept, name)) as figure:
        axes = figure.subplots()
        x, y = place.T
        if by is None:
            axes.scatter(x, y, s=26, color=style.BLUE, alpha=0.8, lw=0)
        elif by.dtype.kind in "if" and len(np.unique(by)) > _MOST_COLORS:
            dots = axes.scatter(x, y, s=26, c=by, cmap="cividis", alpha=0.9, lw=0)
            figure.colorbar(dots, ax=axes, label=name)
        else:
            _by_category(axes, place, by, name)
        if kept is None:
            axes.set(xlabel="UMAP 1 (no unit)", ylabel="UMAP 2 (no unit)", xticks=[], yticks=[])
        else:
            axes.set(
                xlabel=f"component 1 of z ({kept[0]:.0%})",
                ylabel=f"component 2 of z ({kept[1]:.0%})",
            )
            axes.set_aspect("equal", adjustable="datalim")
    return figure


def _points(
    source: xr.DataTree | Posterior, by: str | ArrayLike | None, name: str | None
) -> tuple[style.Floats, NDArray[np.generic] | None, str]:
    """Posterior means (B, K D), values to colour by (B,), and what these are called."""
    if isinstance(source, Posterior):
        mean = source.mean.detach().flatten(1).cpu().double().numpy()
    elif "posterior" in source.children:
        z = source["posterior"].dataset["z"]
        mean = z.mean(("chain", "draw")).transpose("sequence", ...).values
        mean = mean.reshape(len(mean), -1).astype(np.float64)
        if isinstance(by, str):
            if by not in z.coords:
                raise InputError(f"the tree has no coordinate {shown(by)}: it has {list(z.coords)}")
            name, by = name or by, z[by].values
    else:
        raise InputError("the tree has no group posterior: make it with to_datatree")
    if by is None:
        return mean, None, ""
    name = name or (str(by.name) if isinstance(by, pd.Series) else "value")
    name = style.drawable(name.replace("$", ""))
    values = np.asarray(by)
    if values.shape != (len(mean),):
        raise InputError(
            f"by is {shown(by)}: must hold one value for each of {len(mean)} sequences"
        )
    if values.dtype.kind not in "if":  # one by one: a record's field may be a list
        values = np.array([str(value) for value in values])
    return mean, values, name


def _pca(mean: style.Floats) -> tuple[style.Floats, tuple[float, float]]:
    """First two principal components (B, 2), and their shares of the variance."""
    centred = mean - mean.mean(0)
    u, scale, _ = np.linalg.svd(centred, full_matrices=False)
    share = np.square(scale) / max(float(np.square(scale).sum()), math.ulp(1.0))
    place = np.zeros((len(mean), 2))
    place[:, : min(2, len(scale))] = (u * scale)[:, :2]
    # A component's sign is arbitrary: the largest coordinate is made positive.
    place *= np.where(np.abs(place.max(0)) < np.abs(place.min(0)), -1.0, 1.0)
    first, second = (float(share[i]) if i < len(share) else 0.0 for i in (0, 1))
    return place, (first, second)


def _umap(mean: style.Floats) -> style.Floats:
    try:
        umap = importlib.import_module("umap")
    except ImportError:
        raise InputError(
            "method 'umap' needs umap-learn: pip install umap-learn, or 'pca'"
        ) from None
    neighbours = min(15, len(mean) - 1)
    place: style.Floats = umap.UMAP(random_state=0, n_neighbors=neighbours).fit_transform(mean)
    return place


def _by_category(axes: Axes, place: style.Floats, by: NDArray[np.generic], name: str) -> None:
    """The most frequent categories in colours, with markers of their own; the others grey."""
    x, y = place.T
    values, counts = np.unique(by, return_counts=True)
    named = values[np.argsort(-counts, kind="stable")][:_MOST_COLORS]
    rest = ~np.isin(by, named)
    if rest.any():
        label = f"other ({rest.sum()})"
        axes.scatter(x[rest], y[rest], s=18, color=style.GREY, alpha=0.6, lw=0, label=label)
    palette = sns.color_palette("colorblind", _MOST_COLORS)
    for value, color, marker in zip(named, palette, "osD^vPX*", strict=False):
        at = by == value
        label = " ".join(str(value).split()) or "(empty)"
        label = style.drawable(label if len(label) <= _LONGEST else f"{label[: _LONGEST - 1]}…")
        axes.scatter(
            x[at], y[at], s=26, color=color, marker=marker, alpha=0.85, lw=0, label=label
        )  # fmt: skip
    axes.legend(title=name, loc="upper left", bbox_to_anchor=(1.01, 1.0), title_fontsize=9)


def _caption(mean: style.Floats, kept: tuple[float, float] | None, name: str) -> str:
    meaning = "UMAP keeps neighbours together: distances and sizes of groups mean nothing. "
    if kept is not None:
        meaning = (
            f"The two principal components hold {sum(kept):.0%} of the variance of the means. "
        )
    groups = "Clusters are groups of texts that q tells apart."
    if name:
        groups = (
            f"Colours that keep together say that thoughts know the {name}; mixed ones, that in "
            "these two dimensions they do not."
        )
    return (
        f"Each point is the posterior mean of one sequence's thoughts ({len(mean)} sequences, "
        f"{mean.shape[1]} dimensions). {meaning}{groups}"
    )
