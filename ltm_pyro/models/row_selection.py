"""Some rows of a distribution over sequences, and which are meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)

from ltm_pyro.errors import InputError, shown
from ltm_pyro.models.shaped import Shaped

# Of several parameters for one thing, those that it is computed by.
_NAMES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (MultivariateNormal, ("loc", "scale_tril")),
    (LowRankMultivariateNormal, ("loc", "cov_factor", "cov_diag")),
)


def select_rows(q: Any, index: Tensor) -> Any:
    """The rows of q (batch shape (B,)) at `index`, in that order.

    A distribution of one's own may have a method `select_rows(index)`; torch's are made anew from
    their parameters; others are refused.
    """
    if hasattr(q, "select_rows"):
        return q.select_rows(index)
    if isinstance(q, Independent):
        return type(q)(select_rows(q.base_dist, index), q.reinterpreted_batch_ndims)
    if isinstance(q, Shaped):
        some: Shaped = type(q).__new__(type(q))
        Shaped.__init__(some, select_rows(q.flat, index), q.event_shape, validate_args=False)
        return some
    if isinstance(q, Delta):
        return Delta(q.v[index], q.log_density.expand(q.batch_shape)[index], q.event_dim)
    names = next((n for kind, n in _NAMES if isinstance(q, kind)), None)
    if names is None:
        names = tuple(n for n, v in vars(q).items() if n in q.arg_constraints)
    if not names or not all(isinstance(getattr(q, n), Tensor) for n in names):
        raise InputError(
            f"{type(q).__name__} cannot be cut into rows: give it select_rows(index), or infer the "
            "rows alone"
        )
    rows = {}
    for name in names:
        value, inner = getattr(q, name), q.arg_constraints[name].event_dim
        rows[name] = value.expand(q.batch_shape + value.shape[value.dim() - inner :])[index]
    return type(q)(**rows, validate_args=False)


def has_normal_marginals(q: Distribution) -> bool:
    """Whether each dimension of q is normal, so that mean and scale tell all about it."""
    inner = q.flat if isinstance(q, Shaped) else q
    inner = inner.base_dist if isinstance(inner, Independent) else inner
    return isinstance(inner, Normal | MultivariateNormal | LowRankMultivariateNormal)


def rows_of(which: Any, ids: Tensor) -> Tensor:
    """The rows that `Posterior.__getitem__` is asked for; `InputError` if there are none such."""
    n = len(ids)
    places = torch.arange(n, device=ids.device)
    if isinstance(which, slice):
        return _some(places[list(range(n)[which])], which)
    if isinstance(which, int | np.integer) and not isinstance(which, bool):
        if not -n <= which < n:
            raise InputError(f"place {which} is not among the posterior's {n} sequences")
        return places[int(which)][None]
    try:
        asked = torch.as_tensor(which).to(ids.device)
    except (TypeError, ValueError, RuntimeError):
        asked = torch.zeros(0)
    if asked.dim() != 1 or asked.is_floating_point() or asked.is_complex() or not len(asked):
        raise InputError(
            f"posterior[{shown(which)}]: give a place, a slice, or a list of stable ids"
        )
    if asked.dtype == torch.bool:
        if len(asked) != n:
            raise InputError(f"{len(asked)} truth values for {n} sequences: give one for each")
        return _some(places[asked], which)
    found = asked[:, None] == ids
    known = found.any(1)
    if not bool(known.all()):
        raise InputError(
            f"sequence id {int(asked[~known][0])} is not in this posterior: a list is of stable "
            "ids, as in posterior.ids; for places give a slice"
        )
    return found.long().argmax(1)


def _some(rows: Tensor, which: Any) -> Tensor:
    if not len(rows):
        raise InputError(f"posterior[{shown(which)}] has no sequences: choose at least one")
    return rows
