"""Agreement of two clusterings of the same items."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ltm_pyro.errors import InputError


def adjusted_rand_index(first: ArrayLike, second: ArrayLike) -> float:
    """The adjusted Rand index (Hubert & Arabie 1985, eq. 5): agreement beyond chance.

    Counts the pairs of items that both clusterings put together. 1 for equal clusterings, whatever
    the labels are called; 0 on average for unrelated ones; negative for less agreement than chance.

    Args:
        first: (n,) labels, whole numbers or names.
        second: (n,) labels of the same items.

    Raises:
        InputError: if the two are not of the same length, 2 or more.
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise InputError(
            f"labels are {a.shape} and {b.shape}: must be two lists of the same length, 2 or more"
        )
    rows, i = np.unique(a, return_inverse=True)
    columns, j = np.unique(b, return_inverse=True)
    table = np.zeros((len(rows), len(columns)), dtype=np.int64)
    np.add.at(table, (i, j), 1)
    together, in_a, in_b = (_pairs(counts) for counts in (table, table.sum(1), table.sum(0)))
    expected = in_a * in_b / _pairs(np.array(len(a)))
    most = (in_a + in_b) / 2
    # Only two clusterings of all-in-one or all-apart have no room above chance; they are equal.
    return 1.0 if most == expected else float((together - expected) / (most - expected))


def _pairs(counts: NDArray[np.int64]) -> float:
    """Pairs of items within groups of these sizes."""
    return float((counts * (counts - 1) / 2).sum())
