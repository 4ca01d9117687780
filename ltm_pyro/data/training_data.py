"""Where the slow clock takes its batches."""

from __future__ import annotations

from typing import Protocol

import torch

from ltm_pyro.data.batches import Batch
from ltm_pyro.data.sequences import chosen_rows
from ltm_pyro.random import Stream, derive_seed


class TrainingData(Protocol):
    """Where `fit` takes its batches: any `SequenceSet`."""

    def __len__(self) -> int:
        """How many sequences there are; a batch has no more."""
        ...

    def training_batch(
        self,
        step: int,
        batch_size: int,
        seed: int = 0,
        *,
        lanes: bool = False,
        rows: slice | None = None,
    ) -> Batch:
        """The batch of one slow step, a pure function of its arguments.

        Args:
            step: The slow step.
            batch_size: B.
            seed: Of the order.
            lanes: A sequence is always in the same row; persistent fits ask for it.
            rows: Only these rows of the batch; all by default.
        """
        ...


class RowsOf:
    """Training batches out of the rows of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch)

    def training_batch(
        self,
        step: int,
        batch_size: int,
        seed: int = 0,
        *,
        lanes: bool = False,
        rows: slice | None = None,
    ) -> Batch:
        """Distinct rows, chosen anew at each step; with lanes, row j is one of j, j + B, ..."""
        generator = torch.Generator().manual_seed(derive_seed(seed, Stream.BATCH, step))
        n = len(self.batch)
        size = min(n, batch_size)
        if lanes:
            lane = torch.arange(size)
            members = (n - lane - 1) // size + 1
            drawn = torch.rand(size, generator=generator, dtype=torch.float64)
            index = lane + size * (drawn * members).long()
        else:
            index = torch.randperm(n, generator=generator)[:size]
        chosen = chosen_rows(size, rows)
        return self.batch.select(index[chosen.start : chosen.stop].to(self.batch.device))
