"""Local parameters kept per sequence id, so that a later visit starts where the last one ended."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ltm_pyro.engine.rows.layout import RowLayout

Rows = dict[str, Tensor]
"""Tensors by name, each (B, ...) with one row per sequence."""


class RowStore(Protocol):
    """Where a persistent fit keeps its rows: in memory, or on disk (`RowDatabase`)."""

    def __len__(self) -> int:
        """Sequences that have a row."""
        ...

    def gather(self, ids: Tensor, fresh: Rows) -> Rows:
        """Rows for `ids` (B,): the stored ones, and those of `fresh` (B, ...) for new ids."""
        ...

    def scatter(self, ids: Tensor, rows: Rows) -> None:
        """Stores `rows` (B, ...) under `ids` (B,)."""
        ...


class MemoryRows:
    """Rows in the memory of the CPU, as long as the process lives."""

    def __init__(self) -> None:
        self._layout: RowLayout | None = None
        self._rows: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, ids: Tensor, fresh: Rows) -> Rows:
        """See `RowStore`; `InputError` if the rows stored are another guide's."""
        if self._layout is None:
            return {name: value.clone() for name, value in fresh.items()}
        numbers = ids.tolist()
        return self._layout.filled(
            fresh, {row: self._rows[i] for row, i in enumerate(numbers) if i in self._rows}
        )

    def all(self) -> tuple[Tensor, Rows]:
        """Every id, (n,), and its row."""
        columns = {} if self._layout is None else self._layout.columns
        rows = {
            name: torch.zeros((len(self._rows), *shape), dtype=getattr(torch, dtype))
            for name, (dtype, shape) in columns.items()
        }
        if self._layout is not None:
            rows = self._layout.filled(rows, dict(enumerate(self._rows.values())))
        return torch.tensor(list(self._rows), dtype=torch.int64), rows

    def scatter(self, ids: Tensor, rows: Rows) -> None:
        """See `RowStore`; `InputError` if the rows stored are another guide's."""
        self._layout = self._layout or RowLayout.of(rows)
        self._rows.update(zip(ids.tolist(), self._layout.packed(rows), strict=True))
