"""The one module that knows ArviZ 0.23 (Python 3.11) from ArviZ 1.x (Python 3.12 and later).

ArviZ is imported inside the functions, because that takes seconds. Nothing here needs torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray


def version() -> str:
    """The installed ArviZ's version."""
    return importlib.metadata.version("arviz")


def is_modern() -> bool:
    """Whether ArviZ 1.x is installed, whose containers are `xarray.DataTree`s."""
    return int(version().split(".")[0]) >= 1


def pareto_khat(log_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """ArviZ's k-hat of each column of log p - log q, (S, B) to (B,); `inf` where no tail is fitted.

    Use `ltm_pyro.diagnostics.psis.pareto_khat`, which settles the degenerate cases first.
    """
    try:
        found = _khats(log_weights)
    except FloatingPointError:
        found = [_khat_or_inf(column[:, None]) for column in log_weights.T]
    khat = np.array(found, dtype=np.float64)
    khat[np.isnan(khat)] = np.inf  # 1.x where the tail is tied, for which 0.23 says inf
    return khat


def _khats(log_weights: NDArray[np.float64]) -> Any:
    # Where weights are hundreds of nats apart the fit can overflow, and then answers 1/3.
    with np.errstate(over="raise", invalid="raise"):
        if not is_modern():
            return _import("arviz").psislw(log_weights.T.copy())[1]
        return [_modern_khat(column) for column in log_weights.T]


def _khat_or_inf(log_weights: NDArray[np.float64]) -> float:
    """K-hat of one column (S, 1), `inf` where the fit overflows."""
    try:
        return float(np.squeeze(_khats(log_weights)))
    except FloatingPointError:
        return float("inf")


def _modern_khat(log_weights: NDArray[np.float64]) -> float:
    try:
        # 1.x negates what it is given: it takes log q - log p.
        _, khat = _import("arviz_stats.base").array_stats.psislw(-log_weights)
    except ValueError as error:
        if "All tail values are the same" in str(error):
            return float("inf")  # what 0.23 answers here
        raise
    return float(khat)


def rhat(data: xr.Dataset) -> xr.Dataset:
    """ArviZ's rank-normalised split R-hat of each variable with dimensions `chain` and `draw`."""
    return _import("arviz").rhat(data)


def ess(data: xr.Dataset, method: str) -> xr.Dataset:
    """ArviZ's effective sample size, `method` being `bulk`, `tail` or `mean`."""
    return _import("arviz").ess(data, method=method)


def for_arviz(tree: xr.DataTree) -> Any:
    """The tree as the installed ArviZ keeps such data: `arviz.InferenceData` with 0.23."""
    if is_modern():
        return tree
    with warnings.catch_warnings():
        # 0.23 remarks on groups that it has no name for; they are kept all the same.
        warnings.filterwarnings("ignore", message=".*InferenceData scheme", category=UserWarning)
        return _import("arviz").InferenceData.from_datatree(tree)


def teach_trees() -> None:
    """Makes the functions of ArviZ 0.23 take an `xarray.DataTree`, as those of 1.x do.

    0.23 can convert a tree, but its functions refuse one. Each function of the `arviz` namespace is
    put behind one that converts trees among its arguments first, so that `az.summary(tree)` is the
    same line on both. Everything else passes through unchanged; a second call does nothing.
    """
    if is_modern():
        return
    arviz = _import("arviz")
    for name, value in list(vars(arviz).items()):
        if inspect.isfunction(value) and not hasattr(value, _TAUGHT):
            setattr(arviz, name, _taking_trees(value))


_TAUGHT = "_takes_trees"


def _taking_trees(function: Callable[..., Any]) -> Callable[..., Any]:
    def converted(value: Any) -> Any:
        return for_arviz(value) if isinstance(value, xr.DataTree) else value

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(converted, args), **{k: converted(v) for k, v in kwargs.items()})

    setattr(call, _TAUGHT, True)
    return call


def _import(name: str) -> ModuleType:
    with warnings.catch_warnings():
        # 0.23 announces its successor on import: nothing that a user of this package can act on.
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        return importlib.import_module(name)
