"""Scores per token, per byte and per word of the raw text; by document, by group, by position.

Two tokenizers cut one text into different tokens, so that only bytes and words compare their
scores. Every number is a ratio of totals, with the two errors of docs/errors.md.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from ltm_pyro.checks import one_of
from ltm_pyro.data.sequences import SequenceSet
from ltm_pyro.diagnostics.estimates import (
    PERPLEXITIES,
    clustered_ratio,
    exponential,
    loss_rate,
    scored,
    sequence_coords,
)
from ltm_pyro.doors import door
from ltm_pyro.errors import InputError, unknown_name

UNITS = ("token", "byte", "word")
"""What scores may be divided by; `n_tokens`, `n_bytes` and `n_words` count it."""


@door
def score_table(
    scores: xr.Dataset, per: str = "token", *, by: str | None = None, cluster: str = "document"
) -> pd.DataFrame:
    """Every loss per unit of text, of all sequences or of each group.

    Args:
        scores: Of `evaluate`.
        per: `token`; or, of the raw text, `byte` or `word` (parted by white space).
        by: A coordinate that makes groups: `document`, `file`, `group`, a field of the records.
        cluster: The coordinate whose sequences are not independent of one another, e.g. `file`
            where many documents are pieces of one book.

    Returns:
        A row for each score, or for each group and score, under the names of `evaluate`'s columns.
        With `per="byte"` the columns are `nats_per_byte` (total nats of the loss, e.g. minus the
        ELBO, over total bytes: lower is better), `nats_per_byte_se` (Monte Carlo, given these
        sequences), `nats_per_byte_sampling_se` (of having sampled these clusters: two on either
        side hold 95 %; `nan` of one alone), `bits_per_byte`, `ppl_per_byte`, and `n_bytes`,
        `n_sequences` and `n_clusters`.

    Raises:
        InputError: if the text is not known, or there is no such coordinate.
    """
    if f"n_{one_of('unit', per, UNITS)}s" not in scores:
        raise InputError(
            f"scores do not tell how many {per}s there are: take the batch from a corpus of text, "
            "which knows its own"
        )
    known = cluster != "document" or "document" in scores.coords
    clusters = coordinate(scores, cluster if known else "sequence")
    if by is None:
        return pd.DataFrame(_rows(scores, clusters, per)).set_index("score")
    labels, rows = coordinate(scores, by), []
    for name in np.unique(labels):
        here = np.flatnonzero(labels == name)
        rows += [
            {by: name, **row} for row in _rows(scores[{"sequence": here}], clusters[here], per)
        ]
    return pd.DataFrame(rows).set_index([by, "score"])


@door
def loss_by_position(scores: xr.Dataset, *, doubling: bool = False) -> pd.DataFrame:
    """The loss of each token by its position in the sequence.

    Args:
        scores: Of `evaluate(..., per_token=True)`.
        doubling: Positions taken together: 0, 1, 2 and 3, 4 to 7, ..., which evens out the noise.

    Returns:
        A row for each `position`, counted from 0 (the first of those taken together): `until`, the
        last; `nats_per_token`, minus the mean `log_score` (given z: no bound), and
        `nats_per_token_iw`, minus the mean `log_score_iw`; each with `_sampling_se`, of having
        sampled these documents, of which two on either side hold 95 %; `n_tokens` and
        `n_documents`. Mean losses weighted by `n_tokens` add up to the loss of the whole.

    Raises:
        InputError: if tokens were not scored.
    """
    if "log_score" not in scores:
        raise InputError("scores are of whole sequences: make them by evaluate(per_token=True)")
    length = scores.sizes["token"]
    starts = [0, *(2**i for i in range(length.bit_length()) if 2**i < length)]
    edges = [*starts, length] if doubling else list(range(length + 1))
    known = scores["document"].values if "document" in scores.coords else scores["sequence"].values
    rows = []
    for start, end in pairwise(edges):
        part = scores[{"token": slice(start, end)}]
        sizes = part["mask"].values.sum(1)
        there = sizes > 0
        if not there.any():
            continue
        row = {"position": start, "until": end - 1}
        for name, column in (
            ("nats_per_token", "log_score"),
            ("nats_per_token_iw", "log_score_iw"),
        ):
            loss = -np.nansum(part[column].values, axis=1)[there]
            rate = clustered_ratio(loss, sizes[there], known[there])
            row |= {name: rate.value, f"{name}_sampling_se": rate.error}
        rows.append({**row, "n_tokens": int(sizes.sum()), "n_documents": rate.documents})
    return pd.DataFrame(rows).set_index("position")


def coordinate(scores: xr.Dataset, name: str) -> NDArray[Any]:
    """The value (n,) of a coordinate for each sequence."""
    known = {str(k): v for k, v in scores.coords.items() if v.dims == ("sequence",)}
    if not isinstance(name, str) or name not in known:
        raise unknown_name("coordinate of the scores", name, known)
    values: NDArray[Any] = known[name].values
    return values


def refuse_unknown(split: SequenceSet, per: str, by: str | None) -> None:
    """Refuses before anything is scored what `score_table` would refuse afterwards."""
    batch = split.batch([0])
    sizes = [] if batch.text_sizes is None else ["n_bytes", "n_words"]
    blank = xr.Dataset({n: ("sequence", [1]) for n in ["nll_z0", "n_tokens", *sizes]})
    score_table(blank.assign_coords(sequence_coords(batch)), per, by=by)


def _rows(scores: xr.Dataset, clusters: NDArray[Any], per: str) -> list[dict[str, Any]]:
    """One row for each loss."""
    column, nats = f"n_{per}s", f"nats_per_{per}"
    rows = []
    for name in scored(scores, PERPLEXITIES):
        rate, mc = loss_rate(scores, name, per, clusters)
        rows.append(
            {
                "score": PERPLEXITIES[name][0],
                nats: rate.value,
                f"{nats}_se": mc,
                f"{nats}_sampling_se": rate.error,
                f"bits_per_{per}": rate.value / math.log(2),
                f"ppl_per_{per}": exponential(rate.value),
                column: int(scores[column].sum()),
                "n_sequences": scores.sizes["sequence"],
                "n_clusters": rate.documents,
            }
        )
    return rows
