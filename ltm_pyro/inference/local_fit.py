"""The fast clock on one batch after another."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ltm_pyro.config import Fast
from ltm_pyro.data.batches import Batch
from ltm_pyro.engine.rows.store import RowStore
from ltm_pyro.inference.fast_loop import FastResult, frozen, local_optimizer, run_fast_loop
from ltm_pyro.inference.guides.base import LocalGuide, Loss
from ltm_pyro.inference.non_finite import numbers_out_of_range
from ltm_pyro.inference.row_adam import RowAdam
from ltm_pyro.models.base import LatentModel


class LocalFit:
    """Fits the guide's local parameters, in place, with everything else frozen.

    It remembers whether Pyro has run and checked the programs, so that later loops need not.

    Args:
        model: The model.
        guide: Reset for each batch.
        slow: The parameters of the slow clock.
    """

    def __init__(self, model: LatentModel, guide: LocalGuide, slow: Iterable[nn.Parameter]) -> None:
        self.model, self.guide, self.slow = model, guide, list(slow)
        self._ran = False

    def __call__(
        self,
        loss: Loss,
        batch: Batch,
        fast: Fast,
        noise: int,
        *,
        weight: float = 1.0,
        store: RowStore | None = None,
        record: bool = False,
    ) -> tuple[FastResult, RowAdam]:
        """A fast loop on rows as `store` knows them, fresh ones where it does not.

        Args:
            loss: Summed -ELBO of the batch, the same program at every call.
            batch: B sequences; the guide holds their rows afterwards.
            fast: The fast clock.
            noise: Seed of the draws.
            weight: Of the KL.
            store: Rows and moments by sequence id; read alone.
            record: Keep the course of every sequence.

        Returns:
            What the loop reports, and the optimiser with the rows' moments.

        Raises:
            NonFiniteError: if the objective or local parameters became NaN or infinite.
        """
        self.guide.reset(batch)
        optimizer = local_optimizer(self.guide, fast)
        if store is not None and self.guide.local_parameters():
            fresh = {**self.guide.rows(), **optimizer.state()}
            stored = store.gather(batch.ids, fresh)
            self.guide.load_rows({name: stored[name] for name in self.guide.rows()})
            optimizer = local_optimizer(self.guide, fast)
            optimizer.load(stored)
        with frozen(self.slow), numbers_out_of_range(self.guide, batch, step=-1):
            result = run_fast_loop(
                loss,
                self.guide,
                self.model.prior(),
                self.model.prepare(batch),
                fast,
                optimizer=optimizer,
                seed=noise,
                kl_weight=weight,
                record=record,
                ran=self._ran,
            )
        self._ran = self._ran or fast.steps > 0
        return result, optimizer
