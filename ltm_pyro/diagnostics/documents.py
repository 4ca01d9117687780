"""Scores of whole documents: what a reader compares, where a sequence is a cut without meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ltm_pyro.data.pairing import refuse_other_sequences
from ltm_pyro.diagnostics.sampling_error import documents_of


def gains_by_document(scores: xr.Dataset, control: xr.Dataset) -> xr.Dataset:
    """Nats above the control, document by document.

    Args:
        scores: Of `evaluate`.
        control: Of the decoder without thoughts, on the same sequences.

    Returns:
        Dataset over `document`: `sequences`, `tokens`, and for each score that there is
        `elbo_gain` and `iw_bound_gain` or `log_predictive_gain`, nats per sequence of the document.

    Raises:
        InputError: if the two are about other sequences.
    """
    refuse_other_sequences(scores, control, ("scores", "control"))
    names = [n for n in ("elbo", "iw_bound", "log_predictive") if n in scores]
    known = documents_of(scores)
    documents = np.arange(scores.sizes["sequence"]) if known is None else known
    found, place, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    out: dict[str, NDArray[Any]] = {
        "sequences": sizes,
        "tokens": np.bincount(place, weights=scores["n_tokens"].values),
    }
    for name in names:
        gain = scores[name].values + control["nll_z0"].values
        out[f"{name}_gain"] = np.bincount(place, weights=gain) / sizes
    return xr.Dataset(
        {name: ("document", values) for name, values in out.items()}, {"document": found}
    )
