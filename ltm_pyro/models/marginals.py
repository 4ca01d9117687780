"""Quantiles and intervals of each dimension of z under a distribution over sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro.distributions import Delta, TorchDistribution
from torch import Tensor

from ltm_pyro.checks import one_of, real_number
from ltm_pyro.errors import InputError, shown
from ltm_pyro.models.row_selection import has_normal_marginals, select_rows
from ltm_pyro.random import Drawing, Noise

DRAWS = 4000
"""Draws behind what has no closed form: an end of a 94 % interval is then off by 0.04 sd or so."""
_AT_ONCE = 2**24  # numbers drawn together


@torch.no_grad()
def quantiles(q: TorchDistribution, ids: Tensor, at: float | Sequence[float]) -> Tensor:
    """See `Posterior.quantile`."""
    listed = isinstance(at, list | tuple | np.ndarray)
    levels = [real_number("quantile", p) for p in (at if listed else [at])]  # type: ignore[union-attr]
    if not levels or not all(0 <= p <= 1 for p in levels):
        raise InputError(f"quantile is {shown(at)}: must be one or more numbers from 0 to 1")
    if isinstance(q, Delta):
        values = q.v.expand(len(levels), *q.v.shape)
    elif has_normal_marginals(q):
        z = torch.special.ndtri(torch.tensor(levels, dtype=torch.float64)).to(q.mean)
        values = q.mean + z[:, None, None, None] * q.stddev
    else:
        values = _of_draws(q, ids, lambda z: np.quantile(z, levels, axis=0))
    return values if listed else values[0]


@torch.no_grad()
def interval(q: TorchDistribution, ids: Tensor, prob: float, kind: str) -> tuple[Tensor, Tensor]:
    """The lower and upper end of each dimension's interval, (B, K, D) each."""
    one_of("kind of interval", kind, ("eti", "hdi"))
    if not 0 < real_number("prob", prob) < 1:
        raise InputError(f"prob is {shown(prob)}: must be between 0 and 1, e.g. 0.94")
    # The shortest interval of a normal is the one with as much on either side.
    if kind == "eti" or isinstance(q, Delta) or has_normal_marginals(q):
        low, high = quantiles(q, ids, [0.5 - prob / 2, 0.5 + prob / 2])
    else:
        low, high = _of_draws(q, ids, lambda z: _shortest(z, prob))
    return low, high


def summary(q: TorchDistribution, ids: Tensor, prob: float, kind: str) -> pd.DataFrame:
    """See `Posterior.summary`."""
    low, high = interval(q, ids, prob, kind)
    ends = [f"{kind}_{100 * p:.3g}%" for p in (0.5 - prob / 2, 0.5 + prob / 2)]
    columns = {"mean": q.mean, "sd": q.stddev, ends[0]: low, ends[1]: high}
    thoughts, dims = q.event_shape
    index = pd.MultiIndex.from_product(
        [ids.tolist(), range(thoughts), range(dims)], names=["sequence", "thought", "dim"]
    )
    flat = {n: v.detach().flatten().cpu().numpy() for n, v in columns.items()}
    return pd.DataFrame(flat, index=index)


def _of_draws(q: TorchDistribution, ids: Tensor, statistic: Any) -> Tensor:
    """A statistic of `DRAWS` draws, (DRAWS, b, K, D) to (n, b, K, D), a few rows at a time."""
    size = max(1, _AT_ONCE // (DRAWS * q.event_shape.numel()))
    parts = []
    for rows in torch.arange(len(ids), device=ids.device).split(size):
        z = Drawing(Noise(0, ids[rows]))(select_rows(q, rows), DRAWS)
        parts.append(torch.from_numpy(np.asarray(statistic(z.cpu().numpy()))))
    return torch.cat(parts, dim=1).to(q.mean)


def _shortest(z: Any, prob: float) -> Any:
    """Ends (2, ...) of the shortest interval that holds `prob` of the draws (S, ...)."""
    ordered = np.sort(z, axis=0)
    inside = math.ceil(prob * len(z))
    first = (ordered[inside - 1 :] - ordered[: len(z) - inside + 1]).argmin(0)[None]
    ends = [np.take_along_axis(ordered, at, axis=0)[0] for at in (first, first + inside - 1)]
    return np.stack(ends)
