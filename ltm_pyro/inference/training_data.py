"""Where the slow clock takes its batches."""

from __future__ import annotations

from typing import Protocol

import torch

from ltm_pyro.data.batches import Batch
from ltm_pyro.inference.parallel import Parallel
from ltm_pyro.inference.random import Stream, derive_seed


class TrainingData(Protocol):
    """Where `fit` takes its batches: any `SequenceSet`."""

    def training_batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:
        """The batch of one slow step, a pure function of its arguments."""
        ...


def rows_of_step(
    data: TrainingData, step: int, batch_size: int, seed: int, parallel: Parallel
) -> Batch:
    """This process's rows of the batch of one slow step.

    Args:
        data: The training sequences.
        step: The slow step.
        batch_size: B, of all processes together.
        seed: Of the order.
        parallel: The processes.

    Raises:
        InputError: if the processes cannot have equally many rows.
    """
    batch = data.training_batch(step, batch_size, seed)
    return batch if parallel.size == 1 else batch.select(parallel.rows(len(batch)))


class RowsOf:
    """Training batches out of the rows of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def training_batch(self, step: int, batch_size: int, seed: int = 0) -> Batch:
        """Distinct rows, chosen anew at each step."""
        generator = torch.Generator().manual_seed(derive_seed(seed, Stream.BATCH, step))
        rows = torch.randperm(len(self.batch), generator=generator)[:batch_size]
        return self.batch.select(rows.to(self.batch.device))
