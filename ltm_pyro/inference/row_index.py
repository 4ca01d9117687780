"""Where each sequence id is kept, in 16 bytes per row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]

_SHARD = 2**40  # a place is shard * _SHARD + slot
_LEAST_RECENT = 2**14


class RowIndex:
    """Shard and slot of each id: sorted arrays, and a dictionary for what came last.

    Args:
        ids: For each shard, the id in each slot.
    """

    def __init__(self, ids: list[Numbers]) -> None:
        places = [k * _SHARD + np.arange(len(part)) for k, part in enumerate(ids)]
        self._recent: dict[int, int] = {}
        self._sort(np.concatenate([np.zeros(0, np.int64), *ids]), np.concatenate([[], *places]))

    def __len__(self) -> int:
        return len(self._ids) + len(self._recent)

    def find(self, ids: Numbers) -> tuple[Numbers, Numbers]:
        """Shard and slot of each of `ids` (B,); both -1 where an id is unknown."""
        places = np.full(len(ids), -1, dtype=np.int64)
        if len(self._ids):
            near = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
            found = self._ids[near] == ids
            places[found] = self._places[near[found]]
        if self._recent:
            for row, i in enumerate(ids.tolist()):
                places[row] = self._recent.get(i, places[row])
        return np.where(places < 0, -1, places // _SHARD), np.where(places < 0, -1, places % _SHARD)

    def add(self, shard: int, ids: Numbers, slots: Numbers) -> None:
        """Takes up new `ids` (n,) in `slots` (n,) of `shard`."""
        self._recent.update(zip(ids.tolist(), (shard * _SHARD + slots).tolist(), strict=True))
        # Sorting anew only after growth by an eighth keeps the cost of a row constant.
        if len(self._recent) > max(_LEAST_RECENT, len(self._ids) // 8):
            n = len(self._recent)
            more = (
                np.fromiter(part, np.int64, n) for part in (self._recent, self._recent.values())
            )
            ids, places = (
                np.concatenate([old, new])
                for old, new in zip((self._ids, self._places), more, strict=True)
            )
            self._recent = {}
            self._sort(ids, places)

    def _sort(self, ids: Numbers, places: NDArray[np.generic]) -> None:
        order = np.argsort(ids, kind="stable")
        self._ids, self._places = ids[order], places.astype(np.int64)[order]
