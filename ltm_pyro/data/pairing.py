"""Whether two things are about the same sequences: the one check wherever they are paired."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from ltm_pyro.errors import InputError


class Identified(Protocol):
    """A batch, or a posterior: something with a row per sequence."""

    @property
    def ids(self) -> Tensor:
        """(B,) stable ids."""

    @property
    def corpus(self) -> str | None:
        """Fingerprint of the corpus that the ids belong to; `None` where it is not known."""


def refuse_other_sequences(
    first: Identified | xr.Dataset,
    second: Identified | xr.Dataset,
    names: tuple[str, str] = ("the posterior", "the batch"),
) -> None:
    """Refuses two things that are not about the same sequences in the same order.

    Ids are counted within a corpus, so those of two corpora may coincide: where both fingerprints
    are known they must be equal too.

    Args:
        first: A batch, a posterior or scores: a Dataset over `sequence` of `evaluate`.
        second: Another.
        names: How to call them.

    Raises:
        InputError: if they are of other corpora, other sequences, or in another order.
    """
    (ids, corpus), (others, other_corpus) = _identity(first), _identity(second)
    both = f"{names[0]} and {names[1]}"
    if None not in (corpus, other_corpus) and corpus != other_corpus:
        raise InputError(
            f"{both} are of other sequences: their ids are of different corpora, or of one corpus "
            "cut or tokenised in two ways; make both from the same corpus"
        )
    if not np.array_equal(ids, others):
        raise InputError(
            f"{both} hold other sequences, or in another order: their ids must be equal"
        )


def _identity(thing: Identified | xr.Dataset) -> tuple[NDArray[np.int64], str | None]:
    if isinstance(thing, xr.Dataset):
        return thing["sequence"].values, thing.attrs.get("corpus")
    return thing.ids.cpu().numpy(), thing.corpus
