"""How sequences are named in every Dataset: their ids, their documents, their corpus."""

from __future__ import annotations

from typing import Any

from ltm_pyro.data.batches import Batch


def sequence_coords(batch: Batch) -> dict[str, Any]:
    """Coordinates of the dimension `sequence`: stable ids, and `document` where it is known."""
    coords: dict[str, Any] = {"sequence": batch.ids.cpu().numpy()}
    if batch.documents is not None:
        coords["document"] = ("sequence", batch.documents.cpu().numpy())
    return coords


def corpus_attrs(batch: Batch) -> dict[str, str]:
    """The attribute `corpus`, the fingerprint that the ids belong to; none where not known."""
    return {} if batch.corpus is None else {"corpus": batch.corpus}
