"""Local parameters kept per sequence id, so that a later visit starts where the last one ended."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class RowStore(Protocol):
    """Where a persistent fit keeps its rows: in memory, or on disk (`MappedStore`)."""

    def __len__(self) -> int:
        """Sequences that have a row."""
        ...

    def gather(self, ids: Tensor, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows for `ids` (B,): the stored ones, and those of `fresh` (B, ...) for new ids."""
        ...

    def scatter(self, ids: Tensor, rows: dict[str, Tensor], lanes: Tensor | None = None) -> None:
        """Stores `rows` (B, ...) under `ids` (B,), which are in the given lanes of the batch."""
        ...


class LocalStore:
    """Rows of variational parameters and of their optimiser's moments, by sequence id.

    Grows by doubling as new ids come; held in the memory of the CPU.
    """

    def __init__(self) -> None:
        self.position: dict[int, int] = {}
        self.columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.position)

    def gather(self, ids: Tensor, fresh: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rows for `ids`: the stored ones, and those of `fresh` (B, ...) where an id is new."""
        out = {name: value.clone() for name, value in fresh.items()}
        known = [
            (row, self.position[i]) for row, i in enumerate(ids.tolist()) if i in self.position
        ]
        if known:
            rows, places = (torch.tensor(part) for part in zip(*known, strict=True))
            for name, value in out.items():
                value[rows.to(value.device)] = self.columns[name][places].to(value)
        return out

    def scatter(self, ids: Tensor, rows: dict[str, Tensor], lanes: Tensor | None = None) -> None:
        """Stores `rows` (B, ...) under `ids`; lanes make no difference here."""
        places = torch.tensor(
            [self.position.setdefault(i, len(self.position)) for i in ids.tolist()]
        )
        for name, value in rows.items():
            column = self.columns.get(name)
            if column is None or len(column) < len(self.position):
                grown = torch.zeros(
                    max(64, 2 * len(self.position)), *value.shape[1:], dtype=value.dtype
                )
                if column is not None:
                    grown[: len(column)] = column
                self.columns[name] = column = grown
            column[places] = value.detach().cpu()

    def state(self) -> dict[str, Tensor]:
        """Everything as flat names to tensors, rows in order of arrival."""
        n = len(self)
        out = {f"column.{name}": value[:n].contiguous() for name, value in self.columns.items()}
        return {"ids": torch.tensor(list(self.position), dtype=torch.long), **out}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` returned."""
        self.position = {i: place for place, i in enumerate(state["ids"].tolist())}
        self.columns = {
            name.removeprefix("column."): value.clone()
            for name, value in state.items()
            if name.startswith("column.")
        }
