"""Where the slow clock takes its batches."""

from __future__ import annotations

from typing import Protocol

import torch

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.random import Stream, derive_seed


class TrainingData(Protocol):
    """Where `fit` takes its batches: any `SequenceSet`."""

    def training_batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:
        """The batch of one slow step, a pure function of its arguments."""
        ...


class RowsOf:
    """Training batches out of the rows of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def training_batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:
        """Distinct rows, chosen anew at each step."""
        generator = torch.Generator().manual_seed(derive_seed(seed, Stream.BATCH, step))
        rows = torch.randperm(len(self.batch), generator=generator)[:batch_size]
        return self.batch.select(rows.to(self.batch.device))
