"""A guide as a program that is saved and loaded, and that Pyro's own `SVI` may run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ltm_pyro.data.batches import Batch
from ltm_pyro.errors import InputError, shown
from ltm_pyro.models.base import Program


class Rows(nn.Module):
    """Tensors with one row per sequence that are data, not parameters: an encoder's tokens."""

    def load(self, rows: dict[str, Tensor]) -> None:
        """Replaces everything by `rows`, each (B, ...)."""
        self._buffers.clear()
        for name, value in rows.items():
            self.register_buffer(name, value.detach())

    def values(self) -> dict[str, Tensor]:
        """The rows by name."""
        return dict(self.named_buffers())


class GuideProgram(Program, ABC):
    """What holds rows of a batch, and knows whether they are those of another."""

    anchor: Tensor
    local: nn.ParameterDict

    def __init__(self) -> None:
        super().__init__()
        self.local, self.inputs = nn.ParameterDict(), Rows()
        self._rows_of_svi: tuple[Tensor, nn.Module | Tensor | None] | None = None

    @abstractmethod
    def reset(self, batch: Batch) -> None:
        """Fresh rows for `batch`."""

    @abstractmethod
    def load_rows(self, rows: dict[str, Tensor]) -> None:
        """Puts given values (B, ...) in place as the local parameters."""

    @property
    def n_rows(self) -> int:
        """B: sequences that the guide holds; 0 before `reset`."""
        return next((len(rows) for rows in (*self.local.values(), *self.inputs.buffers())), 0)

    def check(self, batch: Batch) -> None:
        """Refuses a batch that the guide was not reset for."""
        if not isinstance(batch, Batch):
            raise InputError(f"batch is {shown(batch)}: must be a Batch")
        if self.n_rows != len(batch):
            raise InputError(
                f"the guide holds {self.n_rows} sequences and the batch {len(batch)}: "
                "call guide.reset(batch) first"
            )

    def tell_svi(self, batch: Batch | None = None) -> None:
        """Under Pyro's `SVI` the first batch is taken up by itself; of others it is refused."""
        if batch is not None:
            self._take_up(batch)
        super().tell_svi(batch)

    def _take_up(self, batch: Batch) -> None:
        """Makes the guide hold the rows of `batch`, which it keeps from step to step."""
        rows, ids = list(self.local.values()), None
        if self._rows_of_svi is not None and self._rows_of_svi[1] is (rows[0] if rows else None):
            ids = self._rows_of_svi[0]  # no `reset` since the last step
        same = ids is not None and torch.equal(ids, batch.ids)
        if rows and ids is not None and not same:
            raise InputError(
                f"the guide's rows are those of {len(ids)} other sequences, and pyro.infer.SVI "
                "keeps one batch: use DualRateSVI(model, guide).fit(...), or guide.reset(batch)"
            )
        if self.n_rows == 0 or not (rows or same):
            self.reset(batch)
        elif not all(p.requires_grad for p in rows):
            # Left by `infer`, whose answer reads these very tensors.
            self.load_rows(dict(self.local.items()))
        self._rows_of_svi = batch.ids, next(iter(self.local.values()), None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Takes rows as they come: a batch's size is part of the state, not of the guide."""
        local, inputs = (
            {k.removeprefix(start): v for k, v in state_dict.items() if k.startswith(start)}
            for start in (f"{prefix}local.", f"{prefix}inputs.")
        )
        if inputs:
            self.inputs.load({k: v.to(self.anchor.device) for k, v in inputs.items()})
        if local:
            self.load_rows({k: v.to(self.anchor) for k, v in local.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
