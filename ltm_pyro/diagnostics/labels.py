"""How sequences are named in every Dataset: their ids, their documents, what is known of them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ltm_pyro.data.batches import Batch

_TAKEN = {
    "sequence", "token", "chain", "draw", "thought", "dim", "z", "x", "tokens", "mask", "elbo",
    "kl", "khat", "iw_bound", "log_joint", "log_p", "log_q", "log_predictive", "log_score",
    "nll_given_z", "nll_z0", "nll_shuffled", "n_tokens", "n_bytes", "n_words", "slow_step",
    "fast_step", "guide", "reference", "metric", "bound", "method",
}  # fmt: skip
"""Names of dimensions and columns: a field of a record that is called so gets `record.`."""


def sequence_coords(batch: Batch) -> dict[str, Any]:
    """Coordinates of the dimension `sequence`.

    The stable ids, `document` where it is known, and whatever else is known of the sequences (see
    `SequenceSet.metadata`): `file`, `offset`, `position`, `group`, the fields of the records.
    Numbers stay numbers; all else is text, "" where missing.
    """
    coords: dict[str, Any] = {"sequence": batch.ids.cpu().numpy()}
    if batch.origin is not None:
        for name, column in batch.metadata.items():
            free = f"record.{name}" if name in _TAKEN else _text(name)
            free = free.replace("/", ".")  # which would name a group of the file
            coords[free] = ("sequence", _values(column))
    if batch.documents is not None:
        coords["document"] = ("sequence", batch.documents.cpu().numpy())
    return coords


def _values(column: pd.Series[Any]) -> NDArray[Any]:
    """Numbers or texts, as NetCDF holds them."""
    if pd.api.types.is_bool_dtype(column.dtype) or pd.api.types.is_numeric_dtype(column.dtype):
        return column.to_numpy()
    return np.array([_text(value) for value in column], dtype=object)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value.replace("\0", "\N{SYMBOL FOR NULL}")  # which NetCDF cannot hold
    if isinstance(value, list | dict | tuple):
        return json.dumps(value, ensure_ascii=False)
    return "" if pd.isna(value) else str(value)  # type: ignore[call-overload]


def corpus_attrs(batch: Batch) -> dict[str, str]:
    """The attribute `corpus`, the fingerprint that the ids belong to; none where not known."""
    return {} if batch.corpus is None else {"corpus": batch.corpus}
